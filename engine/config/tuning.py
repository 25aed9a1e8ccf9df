"""The base class of what is trained: what a kind declares, and what kinds share."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from engine.messages.checks import at_least
from engine.messages.errors import RunError
from strategies.core.access import Capability

Targets = str | tuple[str, ...]
Sent = Literal["prompt", "vector"]


@dataclass(frozen=True)
class RankShare:
    """Adapters of rank `r` for a `share` of the clients."""

    r: int
    share: float

    def __post_init__(self) -> None:
        at_least("model.peft.ranks", 1, r=self.r)
        at_least("model.peft.ranks", 0, share=self.share)


def check_layers(layers: tuple[int, ...] | None, targets: Targets) -> None:
    """Raises RunError for numbers of layers beside an expression, which PEFT does not take together."""
    if layers is not None and isinstance(targets, str):
        raise RunError(
            f"model.peft.layers_to_transform goes with a list of names in model.peft.targets, not with {targets!r}: "
            f"write the names, or the layers' numbers into a regular expression"
        )


class Tuning:
    """The neutral base of all kinds. What the engine must know of a kind is declared here, and never asked by name."""

    kind: str
    peft_class: ClassVar[str | None] = None  # PEFT's configuration; None: the base itself is trained
    peft_type: ClassVar[str | None] = None  # PEFT's name of the kind; None: the same
    title: ClassVar[str] = "An adapter"
    peft_names: ClassVar[Mapping[str, str]] = {"targets": "target_modules"}  # where ours are shorter
    adapts: ClassVar[str] = "linear"  # the layers that a message lists where none match: linear or norm layers
    access: ClassVar[frozenset[Capability]] = frozenset({"weights"})  # what training it takes of the base
    has_gradient: ClassVar[bool] = True  # otherwise only rules of its own tune it
    replays: ClassVar[bool] = False  # weights are made again from the vector
    plugs_in: ClassVar[bool] = False  # clients train around an emulator, and the base's owner plugs the result in
    sent: ClassVar[Sent] = "vector"  # what it is to a provider that has the base

    @property
    def virtual_tokens(self) -> int:
        """The number of places in front of a text's tokens that are learned."""
        return 0

    @property
    def on_few_layers(self) -> Any:
        """The kind for a base of a layer or two, on which whole recipes are tried."""
        return self

    @property
    def injected(self) -> Any:  # one of the kinds, whose union knows this module
        """The kind that the base's owner sees of it."""
        return self

    @property
    def lora_rank(self) -> int | None:
        """The rank of LoRA's pairs of matrices A and B; None if what is trained is no such pairs."""
        return None

    @property
    def ranks(self) -> tuple[RankShare, ...]:
        """The LoRA ranks of clients that have different ones."""
        return ()

    @property
    def off_is_base(self) -> bool:
        """Whether the model without its adapters is the recipe's base, to the bit."""
        return True

    @property
    def outside_lanes(self) -> str | None:
        """The key because of which clients train one at a time; None if they train in lanes."""
        return f'model.peft.kind = "{self.kind}"'

    @property
    def outside_gangs(self) -> str | None:
        """The key that does not work in gangs of ZeRO ranks; None if all do."""
        return f'model.peft.kind = "{self.kind}"'

    @property
    def outside_row_gradients(self) -> str | None:
        """The key because of which a row's own gradient is not to be had; None if Opacus knows all trained layers."""
        return f'model.peft.kind = "{self.kind}"'

    @property
    def trains_base(self) -> str | None:
        """The key because of which weights of the base, or copies of them, are trained; None if none are."""
        return "model.peft.modules_to_save" if vars(self).get("modules_to_save") else None

    def lora_rank_of(self, client: int, seed: int) -> int | None:
        """The LoRA rank of a client; None where all have the recipe's."""
        return None

    def options(self) -> dict[str, Any]:
        """The keyword arguments of PEFT's configuration, copied: PEFT changes what it is given."""
        values = {key: value for key, value in vars(self).items() if key not in ("kind", "ranks") and value is not None}
        listed = {key: list(value) if isinstance(value, tuple) else copy(value) for key, value in values.items()}
        return {self.peft_names.get(key, key): value for key, value in listed.items()}
