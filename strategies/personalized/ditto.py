"""Ditto: a personal model held near the global one (Li et al. 2021, arXiv 2012.04221, algorithm 1)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from strategies.core.base import AveragingRule
from strategies.core.errors import require
from strategies.core.protocol import GLOBAL, Broadcast, ClientState, Update, Vector, Vectors

PERSONAL = "personal"  # the name of the second training, and of its result in the client's state


@dataclass(frozen=True)
class Ditto(AveragingRule):
    """FedAvg on theta; beside it each client minimizes F_k(v_k) + (lam / 2) |v_k - theta_t|^2 for its own v_k.

    The global training is plain; the personal one, from the client's last v_k, has the gradient
    g + lam (v_k - theta_t). Reads the sum, of the global changes. Client state: "personal", the client's v_k; a client
    that takes part for the first time starts from theta_t. Traps: clients train twice; `lam` pulls to the global model
    that was received, not to the one of the round before; with lam = 0 it is local training alone.
    """

    kind: Literal["ditto"] = "ditto"
    lam: float = 0.1
    keeps_state: ClassVar[bool] = True
    personalizes: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2012.04221"

    def __post_init__(self) -> None:
        super().__post_init__()
        pull = "strategy.lam pulls personal models to the global one and must be at least 0"
        require(0 <= self.lam < math.inf, f"{pull}, not {self.lam}")

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The global vector, then the client's own."""
        return {GLOBAL: broadcast.params, PERSONAL: client_state.get(PERSONAL, broadcast.params)}

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL
    ) -> None:
        """grad += lam (v_k - theta_t) in the personal training."""
        if run == PERSONAL:
            grad_KP.add_(params_KP - broadcast.params, alpha=self.lam)

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """Keeps the end of the personal training."""
        assert ends is not None
        update, client_state = super().finish(update, broadcast, client_state, ends)
        return update, client_state | {PERSONAL: ends[PERSONAL]}

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """v_k, once there is one."""
        return client_state.get(PERSONAL)
