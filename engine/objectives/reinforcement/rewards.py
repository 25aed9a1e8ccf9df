"""Rewards: pure functions of a prompt, its completion, and the row that the prompt comes from.

`row` has the columns that the reward reads and two facts of the completion: `completion_tokens`, their number with the
end token, and `ended`, whether it has one. A reward is a number, or None where it does not apply.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from numbers import Real
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from engine.messages.checks import at_least
from engine.messages.errors import RunError
from engine.objectives.reinforcement.answers import equal_terms, final_answer, last_number

Row = Mapping[str, Any]
KEY = "train.objective.rewards"
OPENING = {")": "(", "]": "[", "}": "{"}
SENTENCE_END = re.compile(r"[.!?]+(?:\s|$)")
WORD = re.compile(r"\w+(?:['’-]\w+)*")


class Reward(Protocol):
    """A reward of the recipe: a frozen dataclass with its options, importable without transformers."""

    @property
    def kind(self) -> str:
        """Its name in the recipe."""

    @property
    def weight(self) -> float:
        """The factor of this reward in the sum of all."""

    @property
    def reads(self) -> tuple[str, ...] | None:
        """The columns of the row that it reads; None: all that there are."""

    @property
    def most(self) -> float:
        """Its largest magnitude: secure aggregation makes its ring for that, and cuts what is larger."""

    def score(self, prompt: Any, completion: str, row: Row) -> float | None:
        """Computes the reward of one completion; `prompt` is text, or a list of turns."""


class OfText:
    """A reward that looks at the completion alone."""

    reads: ClassVar[tuple[str, ...]] = ()
    most: ClassVar[float] = 1.0


class OfAnswer:
    """A reward that compares the completion with the answer in a column of the row."""

    column: str
    most: ClassVar[float] = 1.0

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the answer."""
        return (self.column,)


@dataclass(frozen=True, kw_only=True)
class Exact(OfAnswer):
    """1 if the completion is the answer, without the space around both; otherwise 0."""

    kind: Literal["exact"] = "exact"
    column: str = "completion"
    ignore_case: bool = False
    weight: float = 1.0

    def score(self, prompt: Any, completion: str, row: Row) -> float | None:
        """Compares two texts."""
        texts = completion.strip(), str(row[self.column]).strip()
        first, second = (text.lower() for text in texts) if self.ignore_case else texts
        return float(first == second)


@dataclass(frozen=True, kw_only=True)
class Contains(OfText):
    """1 if the completion contains `text`; otherwise 0."""

    kind: Literal["contains"] = "contains"
    text: str
    ignore_case: bool = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.text:
            raise RunError(f'{KEY}: a reward of kind "contains" needs a text that is not empty')

    def score(self, prompt: Any, completion: str, row: Row) -> float | None:
        """Looks for the text."""
        return float(self.text.lower() in completion.lower() if self.ignore_case else self.text in completion)


@dataclass(frozen=True, kw_only=True)
class Regex(OfText):
    """1 if the regular expression matches somewhere in the completion, or with `whole` all of it; otherwise 0."""

    kind: Literal["regex"] = "regex"
    pattern: str
    whole: bool = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise RunError(f"{KEY}: the pattern {self.pattern!r} is no regular expression: {error}") from None

    def score(self, prompt: Any, completion: str, row: Row) -> float | None:
        """Matches the expression."""
        return float(bool((re.fullmatch if self.whole else re.search)(self.pattern, completion)))


@dataclass(frozen=True, kw_only=True)
class Number(OfAnswer):
    """1 if the last number of the completion is that of the answer, up to `tolerance`; otherwise 0.

    None if the answer has no number.
    """

    kind: Literal["number"] = "number"
    column: str = "completion"
    tolerance: float = 0.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        at_least(KEY, 0, tolerance=self.tolerance)

    def score(self, prompt: Any, completion: str, row: Row) -> float | None:
        """Compares two numbers."""
        answer, number = last_number(str(row[self.column])), last_number(completion)
        if answer is None:
            return None
        return float(number is not None and abs(number - answer) <= self.tolerance)


@dataclass(frozen=True, kw_only=True)
class Math(OfAnswer):
    """1 if the completion's final answer is the row's, as numbers or terms; otherwise 0.

    answers.py says which part of a text is its final answer, and which terms are equal. None if the row's answer is
    empty.
    """

    kind: Literal["math"] = "math"
    column: str = "completion"
    weight: float = 1.0

    def score(self, prompt: Any, completion: str, row: Row) -> float | None:
        """Compares two terms."""
        answer = final_answer(str(row[self.column]))
        return float(equal_terms(final_answer(completion), answer)) if answer else None


@dataclass(frozen=True, kw_only=True)
class Length(OfText):
    """1 - |n - target| / target, at least 0, of the completion's number n of units."""

    kind: Literal["length"] = "length"
    unit: Literal["words", "characters", "sentences", "tokens"] = "words"
    target: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        at_least(KEY, 1, target=self.target)

    def score(self, prompt: Any, completion: str, row: Row) -> float | None:
        """Counts the units."""
        return max(0.0, 1 - abs(self._count(completion, row) - self.target) / self.target)

    def _count(self, completion: str, row: Row) -> int:
        match self.unit:
            case "words":
                return len(completion.split())
            case "characters":
                return len(completion.strip())
            case "sentences":
                return sum(bool(WORD.search(part)) for part in SENTENCE_END.split(completion))
            case "tokens":
                return int(row["completion_tokens"])


@dataclass(frozen=True, kw_only=True)
class Words(OfText):
    """The share of the completion's words that are among `words`, in any case; 0 without words."""

    kind: Literal["words"] = "words"
    words: tuple[str, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.words:
            raise RunError(f'{KEY}: a reward of kind "words" needs at least one word')

    def score(self, prompt: Any, completion: str, row: Row) -> float | None:
        """Counts the words."""
        words, wanted = WORD.findall(completion.lower()), {word.lower() for word in self.words}
        return sum(word in wanted for word in words) / max(1, len(words))


@dataclass(frozen=True, kw_only=True)
class Balance(OfText):
    """The share of the completion's brackets, ( ) [ ] { }, that have their partner; 1 without brackets."""

    kind: Literal["balance"] = "balance"
    weight: float = 1.0

    def score(self, prompt: Any, completion: str, row: Row) -> float | None:
        """Matches brackets."""
        waiting, brackets, matched = list[str](), 0, 0
        for sign in completion:
            if sign in OPENING.values():
                brackets += 1
                waiting.append(sign)
            elif sign in OPENING:
                brackets += 1
                if waiting and waiting[-1] == OPENING[sign]:
                    waiting.pop()
                    matched += 2
        return matched / brackets if brackets else 1.0


@dataclass(frozen=True, kw_only=True)
class Repetition(OfText):
    """The share of different ones among the completion's sequences of `n` words: 1 if nothing repeats, or it is short.

    It is 1 minus the repetition penalty of arXiv 2502.03373, appendix B.3.
    """

    kind: Literal["repetition"] = "repetition"
    n: int = 3
    weight: float = 1.0

    def __post_init__(self) -> None:
        at_least(KEY, 1, n=self.n)

    def score(self, prompt: Any, completion: str, row: Row) -> float | None:
        """Counts sequences of words."""
        words = WORD.findall(completion.lower())
        sequences = [tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
        return len(set(sequences)) / len(sequences) if sequences else 1.0


@dataclass(frozen=True)
class Custom:
    """A user's own function f(prompt, completion, row), which the recipe names as its kind, "my_module:function"."""

    kind: str
    function: InitVar[Callable[[Any, str, dict[str, Any]], float | None]]
    weight: float = 1.0
    reads: ClassVar[None] = None
    most: ClassVar[float] = 64.0  # a guess

    def __post_init__(self, function: Callable[[Any, str, dict[str, Any]], float | None]) -> None:
        object.__setattr__(self, "function", function)  # no field: a recipe is written without it

    def score(self, prompt: Any, completion: str, row: Row) -> float | None:
        """Calls the function with a copy of the row."""
        value: float | None = vars(self)["function"](prompt, completion, dict(row))
        return value


Rewards = Exact | Contains | Regex | Number | Math | Length | Words | Balance | Repetition


class Scored(NamedTuple):
    """What a completion earns: the weighted sum (None: nothing to compare), each reward, and why one of them failed."""

    total: float | None
    each: tuple[float | None, ...]
    failure: str | None = None


def score(rewards: Sequence[Reward], prompt: Any, completion: str, row: Row) -> Scored:
    """Computes all rewards of a completion; None ones are left out of the sum.

    A reward fails if it raises, or returns what is neither a finite number nor None. Then there is no sum.
    """
    each, failures = list[float | None](), list[str]()
    for reward in rewards:
        try:
            each.append(_checked(reward.score(prompt, completion, row)))
        except Exception as error:  # the user's code may raise anything
            each.append(None)
            failures.append(f"{reward.kind}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    parts = [reward.weight * value for reward, value in zip(rewards, each, strict=True) if value is not None]
    total = sum(parts) if parts and not failures else None
    if total is not None and not math.isfinite(total):
        return Scored(None, tuple(each), "the weighted sum is not finite")
    return Scored(total, tuple(each), failures[0] if failures else None)


def _checked(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real):
        raise TypeError(f"it returned a {type(value).__name__}, not a number or None")
    if not math.isfinite(value):
        raise ValueError(f"it returned {float(value)}")
    return float(value)
