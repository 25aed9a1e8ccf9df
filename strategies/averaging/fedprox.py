"""FedProx: FedAvg whose clients are held near the global model (Li et al. 2020, arXiv 1812.06127, algorithm 2)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from strategies.averaging.fedavg import FedAvg
from strategies.core.protocol import GLOBAL, Broadcast, ClientState, Vectors


@dataclass(frozen=True)
class FedProx(FedAvg):
    """Minimises F_k(theta) + (mu/2) |theta - theta_t|^2 on each client, then averages. Reads the sum; no state.

    The term lives in the client's gradient: g + mu (theta - theta_t). A mu on the server alone would do nothing.
    """

    kind: Literal["fedprox"] = "fedprox"  # type: ignore[assignment]  # the tag of the recipe's union differs by design
    mu: float = 0.01
    paper: ClassVar[str] = "arXiv 1812.06127"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mu < math.inf:
            raise ValueError(f"strategy.mu pulls clients to the global model and must be at least 0, not {self.mu}")

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL
    ) -> None:
        """grad += mu (theta - theta_t)."""
        grad_KP.add_(params_KP - broadcast.params, alpha=self.mu)
