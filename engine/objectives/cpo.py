"""Preference losses without a reference model: CPO (arXiv 2401.08417) and SimPO (2405.14734). Legend: U pairs.

s is a completion's log-probability, a its mean per token, w the chosen and l the rejected completion. Values equal
those of TRL's CPOTrainer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from engine.messages.checks import above, at_least, below_one
from engine.objectives.base import NATS, Context, Term
from engine.objectives.pairs import (
    PAIR,
    PairObjective,
    chosen_count,
    chosen_tokens,
    pair_scores,
    pair_term,
    reward_figures,
)
from engine.objectives.token_batch import Batch, sequence_counts

KEY = "train.objective"
NLL = "nll"


@dataclass(frozen=True, kw_only=True)
class Cpo(PairObjective):
    """A loss of pairs plus `cpo_alpha` times the chosen completions' mean negative log-likelihood per token.

    `loss_type`: "sigmoid", -log sigmoid(beta (s_w - s_l)) (eq. 3), "hinge", or "ipo", whose s are means per token.
    """

    kind: Literal["cpo"] = "cpo"
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    beta: float = 0.1
    cpo_alpha: float = 1.0
    label_smoothing: float = 0.0
    losses: ClassVar[Mapping[str, float]] = {PAIR: NATS, NLL: NATS}
    units: ClassVar[Mapping[str, str]] = {**PairObjective.units, NLL: "nats per token"}

    def __post_init__(self) -> None:
        above(KEY, 0, beta=self.beta)
        at_least(KEY, 0, cpo_alpha=self.cpo_alpha)
        below_one(KEY, label_smoothing=self.label_smoothing)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of pairs, and of the chosen completions' tokens."""
        return {**dict.fromkeys((PAIR, *self.figures), batch.units), NLL: chosen_count(batch)}

    def terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        """Computes both terms; the rewards that are measured are beta s."""
        scores = pair_scores(network, batch, context)
        score_B = scores.logp_B / sequence_counts(batch).clamp(min=1) if self.loss_type == "ipo" else scores.logp_B
        x_U = score_B[::2] - score_B[1::2]
        if self.loss_type == "sigmoid":
            loss_U = smoothed(self.beta * x_U, self.label_smoothing)
        else:
            loss_U = F.relu(1 - self.beta * x_U) if self.loss_type == "hinge" else (x_U - 1 / (2 * self.beta)).square()
        return {
            PAIR: pair_term(loss_U, batch),
            NLL: chosen_tokens(self.cpo_alpha * scores.nll_N, batch),
            **reward_figures(self.beta * score_B, batch),
        }


@dataclass(frozen=True, kw_only=True)
class SimPo(PairObjective):
    """-log sigmoid(beta (a_w - a_l) - gamma) (eq. 6), with the authors' beta and gamma / beta."""

    kind: Literal["simpo"] = "simpo"
    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0
    losses: ClassVar[Mapping[str, float]] = {PAIR: NATS}

    def __post_init__(self) -> None:
        above(KEY, 0, beta=self.beta)
        at_least(KEY, 0, gamma=self.gamma)
        below_one(KEY, label_smoothing=self.label_smoothing)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of pairs."""
        return dict.fromkeys((PAIR, *self.figures), batch.units)

    def terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        """Computes the loss; the rewards that are measured are beta a."""
        mean_B = pair_scores(network, batch, context).logp_B / sequence_counts(batch).clamp(min=1)
        x_U = self.beta * (mean_B[::2] - mean_B[1::2]) - self.gamma
        return {
            PAIR: pair_term(smoothed(x_U, self.label_smoothing), batch),
            **reward_figures(self.beta * mean_B, batch),
        }


def smoothed(x_U: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Returns the loss of pairs of which a share `smoothing` is taken for mislabeled."""
    return -(1 - smoothing) * F.logsigmoid(x_U) - smoothing * F.logsigmoid(-x_U)
