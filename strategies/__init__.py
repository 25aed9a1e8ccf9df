"""The federated algorithms: pure functions on tensors. The unions below are the registry, the same in every process."""

from strategies.averaging.drift import FedDyn, FedProx, Scaffold
from strategies.averaging.fedavg import FedAvg
from strategies.averaging.fedopt import DiLoCo, FedAdagrad, FedAdam, FedAvgM, FedYogi
from strategies.averaging.reweighting import FedNova, QFedAvg
from strategies.black_box.cma_search import CmaSearch
from strategies.black_box.fedbpt import FedBpt
from strategies.black_box.words import Words
from strategies.core.cohort import PoissonCohort, UniformCohort
from strategies.lora.frozen_half import FedSb, FedSvd, FfaLora, RoLora
from strategies.lora.hetlora import HetLora
from strategies.lora.products import FedExLora, FlexLora, Flora
from strategies.personalized.personal_models import Ditto, FedDpa, FedSaLora, LocalOnly
from strategies.robust.rules import Bulyan, CenteredClipping, Krum, Median, MultiKrum, Rfa, TrimmedMean
from strategies.transforms.chain import Clip
from strategies.transforms.lossy import Int8, Projection, Sign, TopK
from strategies.zeroth_order.fedkseed import FedKSeed

Averages = FedAvg | FedProx | FedAvgM | FedAdagrad | FedAdam | FedYogi | Scaffold | FedNova | DiLoCo | QFedAvg | FedDyn
AdapterRules = FfaLora | RoLora | Flora | FlexLora | HetLora | FedExLora | FedSvd | FedSb
Personal = LocalOnly | Ditto | FedSaLora | FedDpa
Robust = Median | TrimmedMean | Krum | MultiKrum | Bulyan | Rfa | CenteredClipping
BlackBox = Words | CmaSearch | FedBpt
Strategies = Averages | AdapterRules | Personal | Robust | BlackBox | FedKSeed
Cohorts = UniformCohort | PoissonCohort
Transforms = Clip | TopK | Int8 | Sign | Projection
