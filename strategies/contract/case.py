"""A strategy under test: what the engine does with it, without the training. Legend: P parameters, K clients."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from strategies.core.base import Finished, Rule
from strategies.core.layout import Layout
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, ClientState, ServerState, Update, Vector
from strategies.core.seeds import rng

TENSORS = {"norm": (3,), "q.lora_A.w": (2, 4), "q.lora_B.w": (5, 2), "v.lora_A.w": (2, 3), "v.lora_B.w": (3, 2)}
LORA = Layout(tuple(TENSORS), tuple(TENSORS.values()), scale=1.5, choices=50)
FULL = Layout(("embed", "bias"), ((5, 4), (7,)), choices=50)
COHORT, SEED = 7, 3
METRICS = {"steps": 4.0, "rates": 0.4, "rows": 8.0, "tokens": 64.0, "loss": 1.0, "loss_before": 1.25}


def drawn(layout: Layout, first: int, second: int = 0) -> Vector:
    """A vector (P,) of normal numbers, the same for the same two numbers."""
    return torch.from_numpy(rng(0, first, second, "initial").standard_normal(layout.size).astype("float32"))


@dataclass(frozen=True)
class Case:
    """A strategy on a layout; `summed` and `stored` are the engine's: its sum, and a checkpoint written and read."""

    strategy: Rule
    layout: Layout
    summed: Callable[[list[Update]], Aggregate]
    stored: Callable[[ServerState], ServerState]

    @property
    def clients(self) -> range:
        """The cohort, the same in each round: at least as many clients as the rule needs."""
        return range(max(COHORT, self.strategy.smallest_cohort()))

    def start(self) -> ServerState:
        """The state before the first round, as the engine completes it."""
        first = self.strategy.init(drawn(self.layout, 0), self.layout)
        return replace(first, seed=SEED, population=len(self.clients) + 2)  # more than take part

    def client(self, broadcast: Broadcast, client: int, client_state: ClientState, change: Vector) -> Finished:
        """A client's update and next state; training adds `change` to its vectors, and a search prefers that way."""
        metrics = METRICS | {"loss_before": 1.25 + client / 16}
        if self.strategy.searches:

            def score(candidates_CP: torch.Tensor) -> tuple[torch.Tensor, float]:
                return -((candidates_CP - broadcast.params) @ change).double(), 10.0

            delta, beside = self.strategy.search(client, broadcast, client_state, score)
            update = Update(client, 0.5 + client / 8, delta, beside, metrics)
            return self.strategy.finish(update, broadcast, client_state)
        starts = self.strategy.starts(broadcast, client_state)
        ends = {run: start + change for run, start in starts.items()}
        delta = ends.pop(GLOBAL) - broadcast.params
        update = Update(client, 0.5 + client / 8, delta, metrics=metrics)
        return self.strategy.finish(update, broadcast, client_state, ends)

    def aggregate(self, updates: list[Update]) -> Aggregate:
        """What the server sees of the updates."""
        each = tuple(sorted(updates, key=lambda update: update.client))  # as the engine gives them
        return replace(self.summed(updates), each=None if self.strategy.reads == "sum" else each)

    def after(self, rounds: int) -> "Moment":
        """The states after this number of rounds: moments and client states, where there are any, are not zero then."""
        now = Moment(self, self.start(), [{} for _ in self.clients])
        for _ in range(rounds):
            updates, client_states = now.cohort()
            now = Moment(self, self.strategy.apply(now.state, self.aggregate(updates)), client_states)
        return now

    def effective(self, state: ServerState) -> list[torch.Tensor]:
        """What the clients' model is made of: all tensors but adapters, and merged_delta + scale * B A."""
        rest = [view for name, view in self.layout.views(state.params).items() if ".lora_" not in name]
        products = [pair.scale * pair.b_OR @ pair.a_RI for pair in self.layout.lora_pairs(state.params)]
        if state.merged_delta is not None:
            merged = self.layout.products(state.merged_delta)
            products = [product + more for product, more in zip(products, merged, strict=True)]
        return rest + products


@dataclass(frozen=True)
class Moment:
    """The states between two rounds, of the server and of each client."""

    case: Case
    state: ServerState
    client_states: list[ClientState]

    @property
    def broadcast(self) -> Broadcast:
        """What the next round's clients receive."""
        return self.case.strategy.broadcast(self.state)

    @property
    def updates(self) -> list[Update]:
        """What the next round's clients send."""
        return self.cohort()[0]

    @property
    def aggregate(self) -> Aggregate:
        """What the server sees of the next round."""
        return self.case.aggregate(self.updates)

    def cohort(self, scale: float = 0.5) -> tuple[list[Update], list[ClientState]]:
        """The next round's updates and the clients' states after it; `scale` 0: training changes nothing."""
        case, broadcast = self.case, self.broadcast
        changes = [scale * drawn(case.layout, 1 + self.state.round, k) for k in case.clients]
        results = [case.client(broadcast, k, self.client_states[k], changes[k]) for k in case.clients]
        return [update for update, _ in results], [client_state for _, client_state in results]


def tensors(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor inside, by a name such as "params" or "1.h"."""
    match value:
        case torch.Tensor():
            return {name: value}
        case dict():
            members = value
        case tuple() | list():
            members = dict(enumerate(value))
        case ServerState() | Broadcast() | Aggregate() | Update():
            members = vars(value)
        case _:
            return {}
    inner = (tensors(member, f"{name}.{key}".lstrip(".")) for key, member in members.items())
    return {path: tensor for named in inner for path, tensor in named.items()}


def copied(value: object) -> dict[str, torch.Tensor]:
    """A copy of every tensor inside, to compare with later."""
    return {name: tensor.clone() for name, tensor in tensors(value).items()}


def difference(left: object, right: object) -> str | None:
    """The name of the first tensor in which two values differ in any bit; None if they are the same."""
    ours, theirs = tensors(left), tensors(right)
    both = ours.keys() & theirs.keys()
    return next((n for n in [*ours, *theirs] if n not in both or not torch.equal(ours[n], theirs[n])), None)


class DoesNotApply(Exception):
    """The strategy does not make the promise that a check tests."""


def only_where(promised: bool, otherwise: str) -> None:
    """Raises DoesNotApply with the reason unless the strategy makes the promise."""
    if not promised:
        raise DoesNotApply(otherwise)


def hold(kept: bool, sentence: str) -> None:
    """Raises AssertionError with the sentence unless the promise is kept; `assert` would go with python -O."""
    if not kept:
        raise AssertionError(sentence)


def same(left: object, right: object, what: str) -> None:
    """Raises AssertionError unless all tensors inside both are the same."""
    name = difference(left, right)
    hold(name is None, f"{what}: {name!r} differs" if name else what)
