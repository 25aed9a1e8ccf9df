"""Full tuning by scalars: the kind `seeds` of model.peft."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from engine.config.tuning import Tuning
from engine.messages.checks import above, at_least


@dataclass(frozen=True)
class Seeds(Tuning):
    """Training of all weights along `candidates` random directions, of which only their amounts travel.

    A direction's slope is measured by the losses `eps` to either side. The mean of amounts is that of the weights.
    """

    kind: Literal["seeds"] = "seeds"
    candidates: int = 256
    eps: float = 5e-4

    has_gradient: ClassVar[bool] = False
    replays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least("model.peft", 1, candidates=self.candidates)
        above("model.peft", 0, eps=self.eps)

    def options(self) -> dict[str, Any]:
        """Both."""
        return {"candidates": self.candidates, "eps": self.eps}

    @property
    def off_is_base(self) -> bool:
        """All of the base is trained."""
        return False

    @property
    def trains_base(self) -> str | None:
        """All of it."""
        return 'model.peft = "seeds"'
