"""The federated algorithms: pure functions on tensors. The unions below are the registry, the same in every process."""

from strategies.averaging.fedavg import FedAvg
from strategies.averaging.fedopt import DiLoCo, FedAdagrad, FedAdam, FedAvgM, FedYogi
from strategies.averaging.proximal import FedDyn, FedProx
from strategies.averaging.reweighting import FedNova, QFedAvg
from strategies.averaging.scaffold import Scaffold
from strategies.core.cohort import PoissonCohort, UniformCohort
from strategies.lora.fedsb import FedSb
from strategies.lora.flexlora import FlexLora
from strategies.lora.frozen_half import FedSvd, FfaLora, RoLora
from strategies.lora.hetlora import HetLora
from strategies.lora.products import FedExLora, Flora
from strategies.personalized.personal_models import Ditto, FedDpa, FedSaLora, LocalOnly
from strategies.robust.reading_each import Bulyan, Krum, Median, MultiKrum, TrimmedMean
from strategies.robust.sums import CenteredClipping, Rfa
from strategies.transforms.clip import Clip
from strategies.transforms.quantization import Int8, Sign
from strategies.transforms.shortening import Projection, TopK

Averages = FedAvg | FedProx | FedAvgM | FedAdagrad | FedAdam | FedYogi | Scaffold | FedNova | DiLoCo | QFedAvg | FedDyn
Adapters = FfaLora | RoLora | Flora | FlexLora | HetLora | FedExLora | FedSvd | FedSb
Personal = LocalOnly | Ditto | FedSaLora | FedDpa
Robust = Median | TrimmedMean | Krum | MultiKrum | Bulyan | Rfa | CenteredClipping
Strategies = Averages | Adapters | Personal | Robust
Cohorts = UniformCohort | PoissonCohort
Transforms = Clip | TopK | Int8 | Sign | Projection
