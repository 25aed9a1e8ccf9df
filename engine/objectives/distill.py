"""Distillation: the network learns the next tokens' distribution from a teacher. Legend: N tokens, V vocabulary.

t and s are the teacher's and the network's distribution of a token; the loss equals that of TRL's GKDTrainer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from datasets_partition.core.types import MESSAGES, PROMPT_COMPLETION
from engine.messages.checks import above, at_least
from engine.messages.errors import RunError
from engine.messages.frozen import FrozenModel
from engine.objectives.base import NATS, BaseObjective, Context, Prompt, Term, Tokenizer
from engine.objectives.sampling import Completions, Sampling
from engine.objectives.sft import Sft, token_table
from engine.objectives.token_batch import Batch, split, token_logits

KEY = "train.objective"
DIVERGENCE = "divergence"
ROOM = "room"  # the column of how many tokens fit after the prompt
SFT = Sft()  # has the same rows


@dataclass(frozen=True, kw_only=True)
class Distill(BaseObjective):
    """The mean over the completions' tokens of the generalized Jensen-Shannon divergence (arXiv 2306.13649, eq. 1).

    With m = beta t + (1 - beta) s it is beta KL(t || m) + (1 - beta) KL(s || m); `beta` = 0 is KL(t || s), which covers
    all that the teacher does, and 1 is KL(s || t), which prefers its likeliest.

    A share `lmbda` of a step's rows, drawn one by one, is completed by the network itself, at `temperature` and up to
    `max_completion_length` tokens, and learned in place of the row's own completion (algorithm 1, which draws whole
    batches). Rows without a prompt, and held-out rows, keep theirs.

    `teacher` is a base (a folder, or a name on the hub at `teacher_revision`), a run's folder, or that of an adapter on
    `teacher_base`, which is by default the base that the run or the adapter names. It needs the network's vocabulary.
    """

    kind: Literal["distill"] = "distill"
    teacher: str
    teacher_revision: str | None = None
    teacher_base: str | None = None
    beta: float = 0.5
    lmbda: float = 0.0
    temperature: float = 0.9
    max_completion_length: int = 64
    formats: ClassVar[tuple[str, ...]] = (PROMPT_COMPLETION, MESSAGES)
    losses: ClassVar[Mapping[str, float]] = {DIVERGENCE: NATS}
    figures: ClassVar[Mapping[str, float]] = {"kl": NATS, "agreement": 1.0}
    units: ClassVar[Mapping[str, str]] = {DIVERGENCE: "nats per token", "kl": "nats per token", "agreement": "share"}
    heldout: ClassVar[str] = DIVERGENCE
    shown: ClassVar[tuple[str, ...]] = ("agreement",)

    def __post_init__(self) -> None:
        for name, share in (("beta", self.beta), ("lmbda", self.lmbda)):
            if not 0 <= share <= 1:
                raise RunError(f"{KEY}.{name} is {share:g}: give a share from 0 to 1")
        above(KEY, 0, temperature=self.temperature)
        at_least(KEY, 1, max_completion_length=self.max_completion_length)

    @property
    def models(self) -> tuple[FrozenModel, ...]:
        """The teacher."""
        return (FrozenModel(self.teacher, self.teacher_revision, self.teacher_base),)

    def with_models(self, models: Sequence[FrozenModel]) -> Self:
        """Takes another teacher."""
        (teacher,) = models
        return replace(self, teacher=teacher.model, teacher_revision=teacher.revision, teacher_base=teacher.base)

    @property
    def sampling(self) -> Sampling | None:
        """The network's own completions."""
        if self.lmbda == 0:
            return None
        return Sampling(tokens=self.max_completion_length, temperature=self.temperature, share=self.lmbda)

    @property
    def encoding(self) -> str:
        """The columns are those of fine-tuning, and the room for completions."""
        return f"{SFT.encoding}/{ROOM}" if self.lmbda else SFT.encoding

    def encode(self, rows: pa.Table, tokenizer: Tokenizer, max_length: int) -> pa.Table:
        """Makes the columns of fine-tuning, and `room` if the network completes prompts itself."""
        encoded = SFT.encode(rows, tokenizer, max_length)
        if not self.lmbda:
            return encoded
        masks = encoded["mask"].to_pylist()
        room = [None if mask is None else max_length - prompt_tokens(np.array(mask)) for mask in masks]
        return encoded.append_column(ROOM, pa.array(room, pa.int32()))

    def prompt_ids(self, rows: pa.RecordBatch) -> list[np.ndarray]:
        """Returns the tokens before the last run of learned ones."""
        pairs = zip(split(rows["input_ids"]), split(rows["mask"]), strict=True)
        return [ids[: prompt_tokens(mask)] for ids, mask in pairs]

    def completed(self, rows: pa.RecordBatch, completions: Completions, context: Context) -> pa.RecordBatch:
        """Puts the completions in the place of the rows' own where there are any, and learns these alone."""
        all_ids, masks = split(rows["input_ids"]), split(rows["mask"])
        for row, (completion, room) in enumerate(zip(completions, rows[ROOM].to_pylist(), strict=True)):
            if sampled := completion.ids[:room].tolist():
                prompt = all_ids[row][: prompt_tokens(masks[row])]
                all_ids[row], masks[row] = np.array([*prompt, *sampled]), np.repeat([0, 1], [len(prompt), len(sampled)])
        (made,) = token_table(all_ids, masks).to_batches()
        return made

    def collate(self, rows: pa.RecordBatch, pad: int) -> Batch:
        """Makes a batch as fine-tuning does."""
        return SFT.collate(rows, pad)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of learned tokens."""
        return dict.fromkeys((DIVERGENCE, *self.figures), batch.learned)

    def terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        """Computes the loss of each token.

        "kl" is KL(t || s), "agreement" the share of tokens whose likeliest is the teacher's likeliest.
        """
        (teacher,) = context.models
        student_NV = token_logits(network, batch, every_logit=context.every_logit)
        with torch.no_grad():
            teacher_NV = token_logits(teacher, batch).to(student_NV.dtype)
        log_s_NV, log_t_NV = student_NV.log_softmax(1), teacher_NV.log_softmax(1)
        loss_N = divergence(log_s_NV, log_t_NV, self.beta)
        with torch.no_grad():
            agreement_N = (student_NV.argmax(1) == teacher_NV.argmax(1)).to(loss_N.dtype)
            kl_N = loss_N.detach() if self.beta == 0 else kl(log_t_NV, log_s_NV)
        values = {DIVERGENCE: loss_N, "kl": kl_N, "agreement": agreement_N}
        return {name: Term(value_N, batch.row_N) for name, value_N in values.items()}

    def sample(self, row: Mapping[str, Any]) -> tuple[Prompt, str]:
        """Returns the prompt and the completion, as fine-tuning does."""
        return SFT.sample(row)


def prompt_tokens(mask: np.ndarray) -> int:
    """Returns how many tokens come before the last run of learned ones."""
    changes = np.flatnonzero(np.diff(mask, prepend=0) > 0)
    return int(changes[-1])


def divergence(log_s_NV: torch.Tensor, log_t_NV: torch.Tensor, beta: float) -> torch.Tensor:
    """Returns the generalized Jensen-Shannon divergence (N,) of log-probabilities."""
    if beta == 0:
        return kl(log_t_NV, log_s_NV)
    if beta == 1:
        return kl(log_s_NV, log_t_NV)
    log_m_NV = torch.logaddexp(log_s_NV + math.log1p(-beta), log_t_NV + math.log(beta))
    return beta * kl(log_t_NV, log_m_NV) + (1 - beta) * kl(log_s_NV, log_m_NV)


def kl(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor) -> torch.Tensor:
    """Returns KL(p || q) (N,) of log-probabilities."""
    return F.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(1)
