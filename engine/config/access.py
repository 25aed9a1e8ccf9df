"""The recipe's section `model.access`: how open the base is to the clients, and what its owner may do meanwhile."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field

from engine.messages.checks import at_least
from engine.messages.errors import RunError
from strategies.core.access import GRANTS, Level, is_home

KEY = "model.access"


@dataclass(frozen=True, kw_only=True)
class Price:
    """What `per` tokens cost: those that the provider reads, and those that it writes."""

    input: float
    output: float
    per: int = 1_000_000
    currency: str = "USD"

    def __post_init__(self) -> None:
        at_least(f"{KEY}.price", 0, input=self.input, output=self.output)
        at_least(f"{KEY}.price", 1, per=self.per)

    def cost(self, read: int, written: int) -> float:
        """The price of tokens."""
        return (read * self.input + written * self.output) / self.per


@dataclass(frozen=True, kw_only=True)
class Remove:
    """The provider takes the base away in a round."""

    round: int
    kind: Literal["remove"] = "remove"


@dataclass(frozen=True, kw_only=True)
class ReplaceBase:
    """The provider puts the base `to` in the place of the other, under its name."""

    round: int
    to: str
    kind: Literal["replace"] = "replace"


@dataclass(frozen=True, kw_only=True)
class Lower:
    """The provider lowers the level `to` one that grants less."""

    round: int
    to: Level
    kind: Literal["lower"] = "lower"


@dataclass(frozen=True, kw_only=True)
class Reprice:
    """The provider changes the price."""

    round: int
    price: Price
    kind: Literal["reprice"] = "reprice"


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """From a round on answers differ from call to call: a normal number of `nats` for each token, on average."""

    round: int
    nats: float
    kind: Literal["jitter"] = "jitter"


ProviderEvent = Remove | ReplaceBase | Lower | Reprice | Jitter


@dataclass(frozen=True)
class Terms:
    """What a provider does in a round."""

    level: Level
    price: Price | None = None
    base: str | None = None  # in place of the recipe's
    nats: float = 0.0
    removed: int | None = None  # the round in which it was


@dataclass(frozen=True)
class Access:
    """How open the base is to clients: a `level` (docs/openness.md), and below "weights" the provider's terms.

    `retain_days` and `trains_on` are what the provider declares about the rows that it is sent; `price` is what it asks
    for, and `max_cost` ends the run. `events` are what it does meanwhile, from the round of each on.
    """

    level: Level = "weights"
    retain_days: int | None = None
    trains_on: bool | None = None
    price: Price | None = None
    max_cost: float | None = None
    events: tuple[Annotated[ProviderEvent, Field(discriminator="kind")], ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        at_least(KEY, 0, retain_days=self.retain_days, max_cost=self.max_cost)
        given = {name: value for name, value in vars(self).items() if name != "level" and value not in (None, ())}
        if self.home and given:
            raise RunError(
                f'{KEY}.{next(iter(given))} is a provider\'s, and at the level "{self.level}" clients have the base at '
                f'home: leave it out, or set {KEY}.level = "api_logprobs"'
            )
        for event in self.events:
            at_least(f"{KEY}.events", 1, round=event.round)
            if isinstance(event, Jitter):
                at_least(f"{KEY}.events", 0, nats=event.nats)
            if isinstance(event, Lower) and not GRANTS[event.to] < GRANTS[self.level]:
                raise RunError(f'{KEY}.events: "{event.to}" does not grant less than the level "{self.level}"')
        priced = self.price is not None or any(isinstance(event, Reprice) for event in self.events)
        if self.max_cost is not None and not priced:
            raise RunError(f"{KEY}.max_cost needs a price: set {KEY}.price = {{ input = ..., output = ... }}")

    @property
    def home(self) -> bool:
        """Whether clients have the base at home."""
        return is_home(self.level)

    def notes(self) -> tuple[str, ...]:
        """What clients should know of the owner of a base that they do not have at home."""
        if self.home or "generate" not in GRANTS[self.level]:
            return ()
        kept = (
            "does not say how long it keeps them" if self.retain_days is None else f"keeps them {self.retain_days} days"
        )
        trains = {
            None: "does not say whether it trains on them",
            True: "trains on them",
            False: "does not train on them",
        }
        return (f"clients send rows in the clear to the base's owner, who {kept} and {trains[self.trains_on]}",)

    def in_round(self, round_: int) -> Terms:
        """The provider's terms in a round, counted from 1."""
        terms = Terms(self.level, self.price)
        for event in sorted(self.events, key=lambda event: event.round):
            if event.round > round_:
                break
            terms = _changed(terms, event)
        return terms


def _changed(terms: Terms, event: ProviderEvent) -> Terms:
    match event:
        case Remove():
            return replace(terms, removed=event.round)
        case ReplaceBase():
            return replace(terms, base=event.to)
        case Lower():
            return replace(terms, level=event.to)
        case Reprice():
            return replace(terms, price=event.price)
        case Jitter():
            return replace(terms, nats=event.nats)
