"""Local only: every client trains by itself, the baseline that a federation has to beat."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from strategies.core.base import Rule
from strategies.core.layout import Layout
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, ClientState, Mask, ServerState, Update, Vector


@dataclass(frozen=True)
class LocalOnly(Rule):
    """theta_k += delta_k on its client; theta stays. Nothing is received or sent.

    Client state: "own", the client's theta_k; at first the initial vector. Traps: evaluated as "global" it is the
    initial model in every round, look at "personal"; clients that are sampled more often have trained more.
    """

    kind: Literal["local"] = "local"
    sends_update: ClassVar[bool] = False
    keeps_state: ClassVar[bool] = True
    personalizes: ClassVar[bool] = True
    paper: ClassVar[str] = "baseline"

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The client's own vector."""
        return {GLOBAL: client_state.get("own", broadcast.params)}

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """Keeps the client's vector and sends no change."""
        kept = client_state | {"own": broadcast.params + update.delta}
        return replace(update, delta=torch.zeros_like(update.delta)), kept

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """The client's own vector, once it has one."""
        return client_state.get("own")

    def live(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """Nothing of the delta."""
        return {"delta": torch.zeros(layout.size, dtype=torch.bool)}

    def trained(self, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL) -> Mask | None:
        """Every coordinate."""
        return None

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """Nothing travels: every client had the initial vector before the first round."""
        return 0, 0

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """theta stays."""
        return replace(state, round=state.round + 1)
