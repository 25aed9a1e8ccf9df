"""The federated algorithms: pure functions on tensors. The unions below are the registry, the same in every process."""

from strategies.averaging.diloco import DiLoCo
from strategies.averaging.fedavg import FedAvg
from strategies.averaging.feddyn import FedDyn
from strategies.averaging.fednova import FedNova
from strategies.averaging.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from strategies.averaging.fedprox import FedProx
from strategies.averaging.qfedavg import QFedAvg
from strategies.averaging.scaffold import Scaffold
from strategies.core.cohort import PoissonCohort, UniformCohort
from strategies.lora.fedex import FedExLora
from strategies.lora.fedsa import FedSaLora
from strategies.lora.fedsb import FedSb
from strategies.lora.fedsvd import FedSvd
from strategies.lora.ffa import FfaLora
from strategies.lora.flexlora import FlexLora
from strategies.lora.flora import Flora
from strategies.lora.hetlora import HetLora
from strategies.lora.rolora import RoLora
from strategies.personalized.ditto import Ditto
from strategies.personalized.feddpa import FedDpa
from strategies.personalized.local_only import LocalOnly
from strategies.robust.bulyan import Bulyan
from strategies.robust.centered_clipping import CenteredClipping
from strategies.robust.krum import Krum, MultiKrum
from strategies.robust.median import Median
from strategies.robust.rfa import Rfa
from strategies.robust.trimmed_mean import TrimmedMean
from strategies.transforms.clip import Clip
from strategies.transforms.int8 import Int8
from strategies.transforms.projection import Projection
from strategies.transforms.sign import Sign
from strategies.transforms.topk import TopK

Strategies = (
    FedAvg
    | FedProx
    | FedAvgM
    | FedAdagrad
    | FedAdam
    | FedYogi
    | Scaffold
    | FedNova
    | DiLoCo
    | QFedAvg
    | FedDyn
    | CenteredClipping
    | LocalOnly
    | Ditto
    | FfaLora
    | FedSaLora
    | FedDpa
    | RoLora
    | Flora
    | FlexLora
    | HetLora
    | FedExLora
    | FedSvd
    | FedSb
    | Median
    | TrimmedMean
    | Krum
    | MultiKrum
    | Bulyan
    | Rfa
)
Cohorts = UniformCohort | PoissonCohort
Transforms = Clip | TopK | Int8 | Sign | Projection
