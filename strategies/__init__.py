"""The federated algorithms: pure functions on tensors. The unions below are the registry, the same in every process."""

from strategies.centred_clipping import CentredClipping
from strategies.cohort import PoissonCohort, UniformCohort
from strategies.diloco import DiLoCo
from strategies.ditto import Ditto
from strategies.fedavg import FedAvg
from strategies.feddyn import FedDyn
from strategies.fednova import FedNova
from strategies.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from strategies.fedprox import FedProx
from strategies.local_only import LocalOnly
from strategies.lora_feddpa import FedDpa
from strategies.lora_fedex import FedExLora
from strategies.lora_fedsa import FedSaLora
from strategies.lora_fedsb import FedSb
from strategies.lora_fedsvd import FedSvd
from strategies.lora_ffa import FfaLora
from strategies.lora_flex import FlexLora
from strategies.lora_flora import Flora
from strategies.lora_het import HetLora
from strategies.lora_rolora import RoLora
from strategies.qfedavg import QFedAvg
from strategies.robust_bulyan import Bulyan
from strategies.robust_krum import Krum, MultiKrum
from strategies.robust_median import Median
from strategies.robust_rfa import Rfa
from strategies.robust_trimmed import TrimmedMean
from strategies.scaffold import Scaffold
from strategies.transform_clip import Clip
from strategies.transform_int8 import Int8
from strategies.transform_projection import Projection
from strategies.transform_sign import Sign
from strategies.transform_topk import TopK

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
    | CentredClipping
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
