"""FedProx: FedAvg with clients held near the global model (Li et al. 2020, arXiv 1812.06127, algorithm 2)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from strategies.core.base import AveragingRule, Vectors
from strategies.core.protocol import GLOBAL, Broadcast, ClientState
from strategies.core.ranges import Range


@dataclass(frozen=True)
class FedProx(AveragingRule):
    """Each client minimizes F_k(theta) + (mu/2) |theta - theta_t|^2; the server averages as FedAvg. Reads the sum.

    The term is in the client's gradient: g + mu (theta - theta_t). A mu on the server alone would do nothing.
    """

    kind: Literal["fedprox"] = "fedprox"
    mu: Annotated[float, Range("pulls clients to the global model")] = 0.01
    paper: ClassVar[str] = "arXiv 1812.06127"

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL
    ) -> None:
        """grad += mu (theta - theta_t)."""
        grad_KP.add_(params_KP - broadcast.params, alpha=self.mu)
