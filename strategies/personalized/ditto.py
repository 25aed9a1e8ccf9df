"""Whole models of clients: Ditto's, held near the global one (Li et al. 2021, arXiv 2012.04221), and local ones."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.base import AveragingRule, Ends, Finished, Rule, Vectors
from strategies.core.layout import Layout
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, ClientState, Mask, ServerState, Update, Vector
from strategies.core.ranges import Range

PERSONAL = "personal"  # the name of the second training, and of its result in the client's state


@dataclass(frozen=True)
class Ditto(AveragingRule):
    """FedAvg on theta; beside it each client minimizes F_k(v_k) + (lam / 2) |v_k - theta_t|^2 for its own v_k.

    Algorithm 1. The global training is plain; the personal one, from the client's last v_k, has the gradient
    g + lam (v_k - theta_t). Reads the sum, of the global changes. Client state: "personal", the client's v_k; a client
    that takes part for the first time starts from theta_t. Traps: clients train twice; `lam` pulls to the global model
    that was received, not to the one of the round before; with lam = 0 it is local training alone.
    """

    kind: Literal["ditto"] = "ditto"
    lam: Annotated[float, Range("pulls personal models to the global one")] = 0.1
    keeps_state: ClassVar[bool] = True
    personalizes: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2012.04221"

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The global vector, then the client's own."""
        return {GLOBAL: broadcast.params, PERSONAL: client_state.get(PERSONAL, broadcast.params)}

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL
    ) -> None:
        """grad += lam (v_k - theta_t) in the personal training."""
        if run == PERSONAL:
            grad_KP.add_(params_KP - broadcast.params, alpha=self.lam)

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Keeps the end of the personal training."""
        assert ends is not None
        update, client_state = super().finish(update, broadcast, client_state, ends)
        return update, client_state | {PERSONAL: ends[PERSONAL]}

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """v_k, once there is one."""
        return client_state.get(PERSONAL)


@dataclass(frozen=True)
class LocalOnly(Rule):
    """theta_k += delta_k on its client; theta stays: local training, the baseline. Nothing is received or sent.

    Client state: "own", the client's theta_k; at first the initial vector. Traps: evaluated as "global" it is the
    initial model in every round, look at "personal"; clients that are sampled more often have trained more.
    """

    kind: Literal["local"] = "local"
    sends_update: ClassVar[bool] = False
    sends_all_it_trains: ClassVar[bool] = False
    receives_live: ClassVar[bool] = True  # nothing: every client had the initial vector before the first round
    keeps_state: ClassVar[bool] = True
    personalizes: ClassVar[bool] = True
    paper: ClassVar[str] = "baseline"

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The client's own vector."""
        return {GLOBAL: client_state.get("own", broadcast.params)}

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Keeps the client's vector and sends no change."""
        kept = client_state | {"own": broadcast.params + update.delta}
        return replace(update, delta=torch.zeros_like(update.delta)), kept

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """The client's own vector, once it has one."""
        return client_state.get("own")

    def live(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """Nothing of the delta."""
        return {"delta": torch.zeros(layout.size, dtype=torch.bool)}

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """theta stays."""
        return replace(state, round=state.round + 1)
