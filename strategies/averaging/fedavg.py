"""FedAvg: the weighted average of the clients' changes (McMahan et al. 2017, arXiv 1602.05629, algorithm 1)."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

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
class FedAvg:
    """theta += lr * sum_k p_k delta_k, p_k = w_k / sum w; lr below 1 is the Reptile step. Reads the sum; no state.

    `weighting`: w_k is the client's number of training rows over the largest client's ("examples"), or 1 ("uniform").
    With privacy.rows_cap R, "examples" is min(rows, R) / R.
    On LoRA it averages A and B apart (FedIT, arXiv 2305.05644), which is biased: mean(B) mean(A) != mean(B A).
    """

    kind: Literal["fedavg"] = "fedavg"
    lr: float = 1.0
    weighting: Literal["examples", "uniform"] = "examples"
    reads: ClassVar[Reads] = "sum"
    needs_lora: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = False
    loss_before: ClassVar[bool] = False
    freezes: ClassVar[bool] = False
    personalizes: ClassVar[bool] = False
    bounded_weights: ClassVar[bool] = True
    extras_are_changes: ClassVar[bool] = False
    keeps_higher_ranks: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 1602.05629"

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"strategy.lr is the server's learning rate and must be a number above 0, not {self.lr}")

    def init(self, params: Vector, layout: Layout) -> ServerState:
        """The state before the first round: the initial vector (P,) alone."""
        return ServerState(0, params, layout=layout)

    def broadcast(self, state: ServerState) -> Broadcast:
        """The global vector."""
        return Broadcast(state.round, state.params, layout=state.layout, seed=state.seed)

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The global vector alone."""
        return {GLOBAL: broadcast.params}

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL
    ) -> None:
        """FedAvg trains on the plain local gradient."""

    def finish(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: dict[str, Vector] | None = None
    ) -> tuple[Update, ClientState]:
        """Sets the weight."""
        return (update if self.weighting == "examples" else replace(update, weight=1.0)), client_state

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """No client has a model of its own."""
        return None

    def beside(self, layout: Layout) -> dict[str, int]:
        """No others."""
        return {}

    def live(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """Every coordinate."""
        return {}

    def trained(self, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL) -> Mask | None:
        """What is live in the delta."""
        return self.live(broadcast.round, broadcast.layout).get("delta")

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """The vector and the extras down, the vector up."""
        return broadcast.params.numel() + sum(
            extra.numel() for extra in broadcast.extras.values()
        ), broadcast.params.numel()

    def smallest_cohort(self) -> int:
        """One update is an average."""
        return 1

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """theta += lr * total / weight."""
        step = aggregate.total * (self.lr / aggregate.weight)
        return replace(state, round=state.round + 1, params=step.add_(state.params))
