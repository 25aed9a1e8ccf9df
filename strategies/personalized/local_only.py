"""Local only: every client trains for itself, the baseline that a federation has to beat."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.core.layout import Layout
from strategies.core.protocol import (
    GLOBAL,
    Aggregate,
    Broadcast,
    ClientState,
    Mask,
    Reads,
    ServerState,
    Update,
    Vector,
    Vectors,
)


@dataclass(frozen=True)
class LocalOnly:
    """theta_k += delta_k on its client; theta stays. Reads the sum, of zeros; nothing is received or sent.

    Memory: "own", the client's theta_k; at first the initial vector. Traps: evaluated as "global" it is the initial
    model in every round, what counts is "personal"; clients that are drawn more often have trained more.
    """

    kind: Literal["local"] = "local"
    reads: ClassVar[Reads] = "sum"
    needs_lora: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True
    loss_before: ClassVar[bool] = False
    freezes: ClassVar[bool] = False
    personalizes: ClassVar[bool] = True
    bounded_weights: ClassVar[bool] = True
    extras_are_changes: ClassVar[bool] = False
    keeps_higher_ranks: ClassVar[bool] = False
    paper: ClassVar[str] = "baseline"

    def init(self, params: Vector, layout: Layout) -> ServerState:
        """The initial vector (P,), which stays."""
        return ServerState(0, params, layout=layout)

    def broadcast(self, state: ServerState) -> Broadcast:
        """The initial vector."""
        return Broadcast(state.round, state.params, layout=state.layout, seed=state.seed)

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The client's own vector."""
        return {GLOBAL: client_state.get("own", broadcast.params)}

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL
    ) -> None:
        """The plain local gradient."""

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """Keeps all and sends no change."""
        return replace(update, delta=torch.zeros_like(update.delta)), client_state | {
            "own": broadcast.params + update.delta
        }

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """The client's own vector, once it has one."""
        return client_state.get("own")

    def beside(self, layout: Layout) -> dict[str, int]:
        """No others."""
        return {}

    def live(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """Nothing of the delta."""
        return {"delta": torch.zeros(layout.size, dtype=torch.bool)}

    def trained(self, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL) -> Mask | None:
        """Every coordinate."""
        return None

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """Nothing travels: the initial vector was everyone's before the first round."""
        return 0, 0

    def smallest_cohort(self) -> int:
        """One client can train for itself."""
        return 1

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """theta stays."""
        return replace(state, round=state.round + 1)
