"""FedAvg: the weighted average of the clients' changes (McMahan et al. 2017, arXiv 1602.05629, algorithm 1)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from strategies.core.base import AveragingRule


@dataclass(frozen=True)
class FedAvg(AveragingRule):
    """theta += lr * sum_k p_k delta_k, p_k = w_k / sum w; lr below 1 is the Reptile step. Reads the sum.

    Trap: on LoRA it averages A and B apart (FedIT, arXiv 2305.05644), which is biased: mean(B) mean(A) != mean(B A).
    """

    kind: Literal["fedavg"] = "fedavg"
    paper: ClassVar[str] = "arXiv 1602.05629"
