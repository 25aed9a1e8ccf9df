"""Odds ratio preference optimization (arXiv 2403.07691). Legend: B sequences, N learned tokens, U pairs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from engine.messages.checks import above
from engine.objectives.base import NATS, Context, Term
from engine.objectives.pairs import (
    PAIR,
    PROMPT,
    PairObjective,
    chosen_count,
    chosen_tokens,
    collate_pairs,
    pair_term,
    reward_figures,
)
from engine.objectives.token_batch import Batch, token_losses

KEY = "train.objective"
NLL = "nll"


@dataclass(frozen=True, kw_only=True)
class Orpo(PairObjective):
    """The chosen rows' negative log-likelihood, prompts too, minus beta log sigmoid of the log odds ratio (eq. 4, 7).

    a is a completion's mean log-probability per token, and the log odds ratio (a_w - a_l) - (log(1 - e^a_w) -
    log(1 - e^a_l)). No reference model is needed. Values equal those of TRL's ORPOTrainer.
    """

    kind: Literal["orpo"] = "orpo"
    beta: float = 0.1
    losses: ClassVar[Mapping[str, float]] = {PAIR: NATS, NLL: NATS}
    units: ClassVar[Mapping[str, str]] = {**PairObjective.units, NLL: "nats per token"}

    def __post_init__(self) -> None:
        above(KEY, 0, beta=self.beta)

    def collate(self, rows: pa.RecordBatch, pad: int) -> Batch:
        """Makes a batch of two sequences for each pair, in which chosen prompts are learned too."""
        return collate_pairs(rows, pad, learn_prompts=True)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of pairs, and of the chosen rows' tokens."""
        return {**dict.fromkeys((PAIR, *self.figures), batch.units), NLL: chosen_count(batch)}

    def terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        """Computes both terms; the rewards that are measured are beta a."""
        nll_N = token_losses(network, batch, every_logit=context.every_logit)
        scored_N = batch.place_N + 1 >= batch.columns[PROMPT][batch.row_N]  # of completions
        empty_B = nll_N.new_zeros(len(batch.ids_BT))
        size_B = empty_B.index_add(0, batch.row_N, scored_N.to(nll_N.dtype)).clamp(min=1)
        mean_B = empty_B.index_add(0, batch.row_N, torch.where(scored_N, -nll_N, 0)) / size_B
        w_U, l_U = mean_B[::2], mean_B[1::2]
        odds_U = (w_U - l_U) - (_log1mexp(w_U) - _log1mexp(l_U))
        return {
            PAIR: pair_term(-self.beta * F.logsigmoid(odds_U), batch),
            NLL: chosen_tokens(nll_N, batch),
            **reward_figures(self.beta * mean_B, batch),
        }


def _log1mexp(a_U: torch.Tensor) -> torch.Tensor:
    """Returns log(1 - e^a) of negative numbers; the last one below 0 in float32 stands in for 0.

    Each of the two formulas sees only numbers for which it and its gradient are finite.
    """
    a_U = a_U.clamp(max=-torch.finfo(torch.float32).tiny)
    near_U, far_U = a_U.clamp(min=-math.log(2)), a_U.clamp(max=-math.log(2))
    return torch.where(a_U > -math.log(2), torch.log(-torch.expm1(near_U)), torch.log1p(-torch.exp(far_U)))
