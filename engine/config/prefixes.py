"""What is learned in front of a frozen base's input: prompts of vectors or of words, and prefixes of every layer."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from engine.config.tuning import Sent, Tuning
from engine.messages.checks import above, at_least
from strategies.core.access import Capability


@dataclass(frozen=True)
class VirtualTokens(Tuning):
    """What `n` places in front of a text's tokens hold, in every batch; the base itself is frozen."""

    n: int = 10

    peft_class: ClassVar[str] = "PromptTuningConfig"
    peft_type: ClassVar[str] = "prompt_tuning"
    title: ClassVar[str] = "A soft prompt"
    access: ClassVar[frozenset[Capability]] = frozenset({"input_gradients"})

    def __post_init__(self) -> None:
        at_least("model.peft", 1, n=self.n)

    @property
    def virtual_tokens(self) -> int:
        """All."""
        return self.n

    def options(self) -> dict[str, Any]:
        """The number of places alone."""
        return {"num_virtual_tokens": self.n}


@dataclass(frozen=True)
class Prompt(VirtualTokens):
    """Prompt tuning (arXiv 2104.08691): `n` vectors in front of the embedded tokens, as PEFT has them.

    They begin as the embeddings of tokens that the seed draws. The mean is that of the vectors.
    """

    kind: Literal["prompt"] = "prompt"


@dataclass(frozen=True)
class Prefix(VirtualTokens):
    """Prefix tuning (arXiv 2101.00190): `n` keys and values in front of those of every layer, as PEFT has them.

    They are trained themselves, without the network that the paper makes them by. The mean is that of keys and values.
    """

    kind: Literal["prefix"] = "prefix"

    peft_class: ClassVar[str] = "PrefixTuningConfig"
    peft_type: ClassVar[str] = "prefix_tuning"
    title: ClassVar[str] = "A prefix"


@dataclass(frozen=True)
class PromptWords(VirtualTokens):
    """A prompt of `n` tokens, which a rule searches: the vector holds their numbers. It has no gradient and no mean."""

    kind: Literal["words"] = "words"
    n: int = 8

    title: ClassVar[str] = "A prompt in words"
    access: ClassVar[frozenset[Capability]] = frozenset({"score"})
    has_gradient: ClassVar[bool] = False
    sent: ClassVar[Sent] = "prompt"


@dataclass(frozen=True)
class Projected(VirtualTokens):
    """A soft prompt of `n` vectors p0 + A z, of which a rule searches the `d` numbers z (arXiv 2201.03514).

    p0 are the embeddings of drawn tokens, and A is drawn from N(0, (alpha std(embeddings) / sqrt(d))^2).
    """

    kind: Literal["projected"] = "projected"
    d: int = 32
    alpha: float = 1.0

    access: ClassVar[frozenset[Capability]] = frozenset({"inject"})
    has_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("model.peft", 1, d=self.d)
        above("model.peft", 0, alpha=self.alpha)

    @property
    def injected(self) -> Prompt:
        """The vectors."""
        return Prompt(n=self.n)
