"""The protocol of an objective: columns, batches, and a loss of named terms. Legend: B rows, N units of a term."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from datasets_partition.core.turns import Conversation
from datasets_partition.core.types import COLUMNS, IN_WORDS, format_of
from engine.messages.errors import RunError
from engine.messages.frozen import FrozenModel
from engine.objectives.sampling import Answers, Completions, Sampling
from engine.objectives.token_batch import Batch, split

Tokenizer = Any  # transformers' PreTrainedTokenizerBase, whose import takes seconds
Prompt = str | Conversation
TermSums = dict[str, tuple[float, int]]  # each term's sum and count
Need = Literal["head"]
Period = Literal["step", "round"]
Reference = Literal["base", "start", "round", "none"]
NATS = 64.0  # of a token at most: e^-64 is less than any softmax of float32 gives
REFERENCE = "reference"  # the column of what the reference model says


@dataclass(frozen=True)
class Term:
    """One named term of a loss: the values (N,) of its units, such as tokens, and the row (N,) of each.

    The term's share of the loss is the sum of its values over their count, both over the whole step: so neither the
    pieces of a step, nor lanes, nor ranks change it. A weight between terms is part of the values.
    """

    values_N: torch.Tensor
    row_N: torch.Tensor

    def total(self) -> torch.Tensor:
        """Returns the sum over all units (a scalar)."""
        return self.values_N.sum()

    def by_row(self, rows: int) -> torch.Tensor:
        """Returns the sum over each row's units (B,)."""
        return self.values_N.new_zeros(rows).index_add(0, self.row_N, self.values_N)

    def counts_by_row(self, rows: int) -> torch.Tensor:
        """Returns the number of each row's units (B,), int64."""
        return self.row_N.new_zeros(rows).index_add(0, self.row_N, torch.ones_like(self.row_N))


@dataclass(frozen=True)
class Context:
    """What a trainer gives an objective beside the network and a batch; what objectives `need` becomes a field here."""

    every_logit: bool = False  # the head must see all positions of the batch in their places
    models: tuple[Any, ...] = ()  # the objective's frozen models, in their order
    tokenizer: Tokenizer | None = None  # of the network, where it samples
    training: bool = True  # whether rows are trained on, or held out


class Objective(Protocol):
    """What a client minimizes, and how its rows become token columns and batches.

    An implementation is a frozen dataclass with the recipe's options of `train.objective` as fields, importable
    without transformers. A row counts as one for weights, sampling and privacy, whatever its columns hold, and may
    become several sequences of a batch.

    The value of a term's unit must depend on its own row alone: with a mean over the batch in it, the loss would change
    with the pieces, lanes and ranks that a step is cut into, and a row would move other rows' clipped gradients. What
    needs a mean over the step has it from `step_terms`, and says in `couples_rows` how to do without it.
    """

    needs: ClassVar[frozenset[Need]]
    formats: ClassVar[tuple[str, ...]]  # the canonical formats that it reads; COLUMNS in datasets_partition has each
    heldout: ClassVar[str]  # the term whose mean over held-out rows is the evaluation's loss
    # Figures that are shown beside that loss wherever it is shown; of each, more is better.
    shown: ClassVar[tuple[str, ...]]
    # What each term's mean is counted in, to follow its name in parentheses: "nats per token", "per pair", "share".
    units: ClassVar[Mapping[str, str]]

    @property
    def kind(self) -> str:
        """The objective's name in the recipe."""

    @property
    def losses(self) -> Mapping[str, float]:
        """The loss's terms, each with the largest magnitude of a unit, for each token in it.

        Secure aggregation makes its ring for that, and cuts what is larger. A row has at most one unit of a term for
        each token.
        """

    @property
    def figures(self) -> Mapping[str, float]:
        """Terms that are only measured, as in `losses`."""

    @property
    def reference(self) -> Reference:
        """The model that log-probabilities are compared with: see `BaseObjective`."""

    @property
    def reads_reference(self) -> bool:
        """Whether `terms` reads what the reference model says."""

    @property
    def sampling(self) -> Sampling | None:
        """How the prompts of a step are completed before it is taken; None: the rows are learned as they are."""

    @property
    def heldout_terms(self) -> tuple[str, ...]:
        """The terms of held-out rows."""

    @property
    def judges_samples(self) -> bool:
        """Whether held-out rows are prompts, judged by completions of them: see `judged`."""

    @property
    def models(self) -> tuple[FrozenModel, ...]:
        """The models that it reads beside the network, which `Context.models` has: see `map_frozen`."""

    def with_models(self, models: Sequence[FrozenModel]) -> Self:
        """Returns the objective with other models in place of its own."""

    @property
    def means(self) -> tuple[str, ...]:
        """The terms of `step_terms`."""

    @property
    def means_over(self) -> Period:
        """What the means are over: each step's rows, or `mean_rows` of a client's rows when the round starts."""

    @property
    def mean_rows(self) -> int:
        """The most rows of a client that means over a round are of."""

    @property
    def regroups(self) -> bool:
        """Whether `regroup` does anything."""

    @property
    def precompute_ref_log_probs(self) -> bool | None:
        """Whether the reference's columns are computed once for all rows; None: if that is cheaper."""

    @property
    def sequences(self) -> int:
        """The most sequences that a row becomes."""

    @property
    def couples_rows(self) -> str | None:
        """How to do without what makes a row's gradient depend on other rows; None if nothing does."""

    @property
    def reads(self) -> tuple[str, ...] | None:
        """The columns that it reads beside those of its formats; None: all that there are."""

    @property
    def encoding(self) -> str:
        """Names all that the result of `encode` depends on, beside rows, tokenizer and length."""

    def encode(self, rows: pa.Table, tokenizer: Tokenizer, max_length: int) -> pa.Table:
        """Makes `input_ids`, null where a row teaches nothing, and other columns of numbers or lists of numbers.

        The rows have one of its formats. Columns whose names end in `_ids` hold tokens, whose number cuts steps and
        tells clients' work.
        """

    def regroup(self, rows: pa.Table, max_length: int) -> pa.Table:
        """Makes other rows of all encoded rows of a client's split, such as two of each, or one of several."""

    def step_rows(self, rows: pa.RecordBatch, numbers: np.ndarray) -> pa.RecordBatch:
        """Returns the rows of a step, which are these of a client's encoded `rows`."""

    def prompt_ids(self, rows: pa.RecordBatch) -> list[np.ndarray]:
        """Returns the token ids of each row's prompt, where completions are sampled; an empty one is not completed."""

    def completed(self, rows: pa.RecordBatch, completions: Completions, context: Context) -> pa.RecordBatch:
        """Makes rows that `collate` takes of a step's rows and the sampled completions of their prompts."""

    def collate(self, rows: pa.RecordBatch, pad: int) -> Batch:
        """Makes a batch of encoded rows, padded with the token `pad`, with the other columns in `Batch.columns`."""

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of each term's units, which is known before the forward pass."""

    def reference_columns(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, torch.Tensor]:
        """Returns what the reference model says of a batch, (B, ...) by name; no gradient is recorded here."""

    def step_terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        """Computes the terms in `means`, without gradients; their means over a step become `batch.columns` (B,)."""

    def terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        """Computes all terms by the present weights; a row without learned tokens fills a lane and has no unit."""

    def judged(self, answers: Answers) -> TermSums:
        """Returns the terms of held-out prompts, completed by the model and by the reference model."""

    def sample(self, row: Mapping[str, Any]) -> tuple[Prompt, str]:
        """Returns the prompt of a canonical row and the answer it teaches, which a run shows beside the model's."""


class BaseObjective:
    """The neutral base of objectives, with a default for all that not every objective has.

    `reference` is the model that log-probabilities are compared with: the recipe's base ("base"; under rules that merge
    into the base, the one before the first round), what the run started from ("start"; with `model.start` another run's
    result), what the round started from ("round"; held-out rows are compared with the run's start), or "none".
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    shown: ClassVar[tuple[str, ...]] = ()

    @property
    def figures(self) -> Mapping[str, float]:
        """Nothing is only measured."""
        return {}

    @property
    def reference(self) -> Reference:
        """Nothing is compared."""
        return "none"

    @property
    def reads_reference(self) -> bool:
        """Whether there is one."""
        return self.reference != "none"

    @property
    def sampling(self) -> Sampling | None:
        """Nothing is sampled."""
        return None

    @property
    def heldout_terms(self) -> tuple[str, ...]:
        """Those of training."""
        return (*self.losses, *self.figures)  # type: ignore[attr-defined]

    @property
    def judges_samples(self) -> bool:
        """They have what is learned."""
        return False

    @property
    def models(self) -> tuple[FrozenModel, ...]:
        """There are none."""
        return ()

    def with_models(self, models: Sequence[FrozenModel]) -> Self:
        """Returns the same."""
        return self

    @property
    def means(self) -> tuple[str, ...]:
        """There are none."""
        return ()

    @property
    def means_over(self) -> Period:
        """Each step by itself."""
        return "step"

    @property
    def mean_rows(self) -> int:
        """None."""
        return 0

    @property
    def regroups(self) -> bool:
        """Each row stays a row."""
        return False

    @property
    def precompute_ref_log_probs(self) -> bool | None:
        """They are computed in each step."""
        return False

    @property
    def sequences(self) -> int:
        """One."""
        return 1

    @property
    def couples_rows(self) -> str | None:
        """Rows do not depend on each other."""
        return None

    @property
    def reads(self) -> tuple[str, ...] | None:
        """None beside them."""
        return ()

    @property
    def encoding(self) -> str:
        """All options."""
        return repr(self)

    def regroup(self, rows: pa.Table, max_length: int) -> pa.Table:
        """Returns the rows."""
        return rows

    def step_rows(self, rows: pa.RecordBatch, numbers: np.ndarray) -> pa.RecordBatch:
        """Returns these rows."""
        return rows.take(pa.array(numbers))

    def prompt_ids(self, rows: pa.RecordBatch) -> list[np.ndarray]:
        """Returns `input_ids`."""
        return split(rows["input_ids"])

    def completed(self, rows: pa.RecordBatch, completions: Completions, context: Context) -> pa.RecordBatch:
        """Returns the rows."""
        return rows

    def judged(self, answers: Answers) -> TermSums:
        """There are no terms."""
        return {}

    def reference_columns(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, torch.Tensor]:
        """There is no reference."""
        return {}

    def step_terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        """There are no means over steps."""
        return {}


def counted(objective: Objective, batches: Iterable[Batch]) -> Counter[str]:
    """Returns the number of each term's units in all batches."""
    counts: Counter[str] = Counter()
    for batch in batches:
        counts.update(objective.counts(batch))
    return counts


def term_sums(
    objective: Objective, network: nn.Module, pieces: Iterable[tuple[Batch, int]], context: Context
) -> TermSums:
    """Returns each term's sum and count over pieces on the network's device, each taken 1 or 0 times."""
    sums: TermSums = {}
    with torch.no_grad():
        for piece, times in pieces:
            counts = objective.counts(piece)
            for name, term in objective.terms(network, piece, context).items():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = total + term.total().item() * times, count + counts[name] * times
    return sums


def step_loss(objective: Objective, totals: Mapping[str, torch.Tensor], counts: Mapping[str, float]) -> torch.Tensor:
    """Returns the loss: each of its terms' sum over its count in the whole step, added up; 0 without units."""
    return reduce(add, (totals[name] / max(1, counts[name]) for name in objective.losses))


def require_format(objective: Objective, rows: pa.Table) -> None:
    """Raises RunError if the rows are of no format that the objective reads."""
    if (kind := format_of(rows)) not in objective.formats:
        *others, last = (IN_WORDS[name] for name in objective.formats)
        wanted = f"{', '.join(others)} or {last}" if others else last
        columns = " or ".join(", ".join(COLUMNS[name]) for name in objective.formats)
        raise RunError(
            f'train.objective = "{objective.kind}" learns from {wanted}, but the rows are {IN_WORDS[kind]} '
            f"({', '.join(COLUMNS[kind])}): name yours in data.source.columns so that they make {columns}"
        )
