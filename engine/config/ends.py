"""Offsite tuning: the kind `ends` of model.peft."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from engine.config.tuning import Tuning
from engine.messages.checks import at_least
from engine.messages.errors import RunError
from strategies.core.access import Capability


@dataclass(frozen=True)
class Ends(Tuning):
    """Offsite tuning (arXiv 2302.04870): clients train the `first` and `last` layers around an emulator of the rest.

    The emulator is `middle` of the layers between, evenly spaced; its owner aligns it with what it stands for in
    `align_steps` steps of AdamW on samples of the base's own, by next tokens and by 30 times the relative squared error
    of its output. "all" keeps the whole middle. The trained ends are plugged into the base by its owner. The mean is
    that of the ends' weights.
    """

    kind: Literal["ends"] = "ends"
    first: int = 1
    last: int = 1
    middle: int | Literal["all"] = 2
    align_steps: int = 100
    align_lr: float = 1e-4

    title: ClassVar[str] = "Trained ends for"
    access: ClassVar[frozenset[Capability]] = frozenset({"layers"})
    plugs_in: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least("model.peft", 1, first=self.first, last=self.last)
        at_least("model.peft", 0, align_steps=self.align_steps, align_lr=self.align_lr)
        if self.middle != "all" and self.middle < 2:
            raise RunError(f'model.peft.middle is {self.middle}, and an emulator spans layers: set it to 2 or "all"')

    @property
    def off_is_base(self) -> bool:
        """The ends are the base's own layers."""
        return False

    @property
    def trains_base(self) -> str | None:
        """Its ends."""
        return 'model.peft = "ends"'

    @property
    def on_few_layers(self) -> "Ends":
        """One layer at each end, and all between."""
        return replace(self, first=1, last=1, middle="all")

    def options(self) -> dict[str, Any]:
        """All of them."""
        return {name: value for name, value in vars(self).items() if name != "kind"}
