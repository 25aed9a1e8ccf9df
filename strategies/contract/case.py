"""A strategy under test: a simulation of what the engine does with it, without the training.

The sum of updates and the way of a state to disk and back are the engine's, so the caller brings both.
Legend: P parameters, K clients.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from strategies.core.base import Rule
from strategies.core.layout import Layout
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, ClientState, ServerState, Update, Vector
from strategies.core.seeds import rng

LORA = Layout(
    (
        "norm",
        "q.lora_A.default.weight",
        "q.lora_B.default.weight",
        "v.lora_A.default.weight",
        "v.lora_B.default.weight",
    ),
    ((3,), (2, 4), (5, 2), (2, 3), (3, 2)),
    scale=1.5,
)
FULL = Layout(("embed", "bias"), ((5, 4), (7,)))
COHORT, SEED = 7, 3
METRICS = {"steps": 4.0, "rates": 0.4, "rows": 8.0, "tokens": 64.0, "loss": 1.0, "loss_before": 1.25}


def drawn(layout: Layout, first: int, second: int = 0) -> Vector:
    """A vector (P,) of normal numbers, the same for the same two numbers."""
    return torch.from_numpy(rng(0, first, second, "initial").standard_normal(layout.size).astype("float32"))


@dataclass(frozen=True)
class Case:
    """A strategy on a layout; `summed` and `stored` are the engine's exact sum and a checkpoint written and read."""

    strategy: Rule
    layout: Layout
    summed: Callable[[list[Update]], Aggregate]
    stored: Callable[[ServerState], ServerState]

    @property
    def clients(self) -> range:
        """The cohort, the same in each round: at least as many clients as the rule needs."""
        return range(max(COHORT, self.strategy.smallest_cohort()))

    @property
    def population(self) -> int:
        """More clients than take part."""
        return len(self.clients) + 2

    def no_client_states(self) -> list[ClientState]:
        """The clients' states before the first round: empty."""
        return [{} for _ in self.clients]

    def start(self) -> ServerState:
        """The state before the first round, as the engine completes it."""
        first = self.strategy.init(drawn(self.layout, 0), self.layout)
        return replace(first, seed=SEED, population=self.population)

    def client(
        self,
        broadcast: Broadcast,
        client: int,
        client_state: ClientState,
        change: Vector,
        personal: Vector | None = None,
    ) -> tuple[Update, ClientState]:
        """A client's update and next state; training adds `change` to its vectors, `personal` to other runs'."""
        starts = self.strategy.starts(broadcast, client_state)
        ends = {run: start + (change if personal is None else personal) for run, start in starts.items()}
        delta = ends.pop(GLOBAL) - broadcast.params
        metrics = METRICS | {"loss_before": 1.25 + client / 16}
        return self.strategy.finish(
            Update(client, 0.5 + client / 8, delta, metrics=metrics), broadcast, client_state, ends
        )

    def cohort(
        self, state: ServerState, client_states: list[ClientState], scale: float = 0.5
    ) -> tuple[list[Update], list[ClientState]]:
        """A round's updates and the clients' next states; `scale` 0: training changes nothing."""
        broadcast = self.strategy.broadcast(state)
        changes = [scale * drawn(self.layout, 1 + state.round, k) for k in self.clients]
        pairs = zip(self.clients, client_states, strict=True)
        results = [self.client(broadcast, k, client_state, changes[k]) for k, client_state in pairs]
        return [update for update, _ in results], [client_state for _, client_state in results]

    def aggregate(self, updates: list[Update]) -> Aggregate:
        """What the server sees of the updates."""
        each = tuple(sorted(updates, key=lambda update: update.client))  # as the engine gives them
        return replace(self.summed(updates), each=None if self.strategy.reads == "sum" else each)

    def after(self, rounds: int) -> tuple[ServerState, list[ClientState]]:
        """The states after so many rounds: moments and client states, where there are any, are no longer zero."""
        state, client_states = self.start(), self.no_client_states()
        for _ in range(rounds):
            updates, client_states = self.cohort(state, client_states)
            state = self.strategy.apply(state, self.aggregate(updates))
        return state, client_states

    def effective(self, state: ServerState) -> list[torch.Tensor]:
        """What the clients' model is made of: all tensors but adapters, and merged_delta + scale * B A."""
        rest = [view for name, view in self.layout.views(state.params).items() if ".lora_" not in name]
        products = [pair.scale * pair.b_OR @ pair.a_RI for pair in self.layout.lora_pairs(state.params)]
        if state.merged_delta is not None:
            merged = self.layout.products(state.merged_delta)
            products = [product + more for product, more in zip(products, merged, strict=True)]
        return rest + products


def tensors(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor inside, by a name such as "params" or "1.h"."""
    match value:
        case torch.Tensor():
            return {name: value}
        case dict():
            pairs = list(value.items())
        case tuple() | list():
            pairs = list(enumerate(value))
        case ServerState() | Broadcast() | Aggregate() | Update():
            pairs = list(vars(value).items())
        case _:
            return {}
    inner = (tensors(member, f"{name}.{key}".lstrip(".")) for key, member in pairs)
    return {path: tensor for members in inner for path, tensor in members.items()}


def copied(value: object) -> dict[str, torch.Tensor]:
    """A copy of every tensor inside, to compare with later."""
    return {name: tensor.clone() for name, tensor in tensors(value).items()}


def difference(left: object, right: object) -> str | None:
    """The name of the first tensor in which two values differ in any bit; None if they are the same."""
    ours, theirs = tensors(left), tensors(right)
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name]):
            return name
    return None


class DoesNotApply(Exception):
    """The strategy does not make the promise that a check tests."""


def hold(kept: bool, sentence: str) -> None:
    """Raises AssertionError with the sentence unless the promise is kept; `assert` would go with python -O."""
    if not kept:
        raise AssertionError(sentence)


def same(left: object, right: object, what: str) -> None:
    """Raises AssertionError unless all tensors inside both are the same."""
    name = difference(left, right)
    hold(name is None, f"{what}: {name!r} differs" if name else what)
