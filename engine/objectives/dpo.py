"""Direct preference optimization and the losses of its family. Legend: U pairs, B sequences.

All losses equal those of TRL's DPOTrainer. s is a completion's log-probability, n its number of tokens, r = s - s of
the reference model, w the chosen and l the rejected completion.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from engine.messages.checks import above
from engine.messages.errors import RunError
from engine.objectives.base import NATS, REFERENCE, Context, Reference, Term
from engine.objectives.pairs import (
    PAIR,
    SIZE,
    PairObjective,
    chosen_count,
    chosen_tokens,
    pair_scores,
    pair_term,
    reward_figures,
    wins,
)
from engine.objectives.token_batch import Batch

KEY = "train.objective"
SFT = "sft"
Loss = Literal["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"]
LossType = Literal[Loss, "apo_zero", "apo_down", "discopop", "sft"]
SMOOTHED = ("sigmoid", "robust", "exo_pair")


class Ratios(NamedTuple):
    """The log-ratios r of both completions (U,), and each divided by the completion's number of tokens."""

    w_U: torch.Tensor
    l_U: torch.Tensor
    mean_w_U: torch.Tensor
    mean_l_U: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Dpo(PairObjective):
    """Prefers chosen completions to rejected ones, by TRL's `loss_type`, or the sum of several by `loss_weights`.

    `loss_type`: "sigmoid" (arXiv 2305.18290, eq. 7; with `label_smoothing` its conservative form, which TRL has no more
    in DPO), "robust" (2403.00409), "hinge", "ipo" (2310.12036, eq. 17, with means over tokens), "sigmoid_norm"
    (2411.15124), "exo_pair" (2402.00856, eq. 16), "nca_pair" (2402.05369), "bco_pair" (2404.04656, without its running
    mean), "sppo_hard" (2405.00675, eq. 4.7), "apo_zero" and "apo_down" (2408.06266, eq. 7 and 8), "discopop"
    (2406.08414, eq. 5), and "sft", the mean negative log-likelihood of the chosen tokens, for sums of several.
    The reference's log-probabilities are computed once for all rows, before the first round, if that is fewer rows than
    all rounds train (`precompute_ref_log_probs`; never for a reference that changes with the rounds, or in gangs).
    """

    kind: Literal["dpo"] = "dpo"
    loss_type: LossType | tuple[LossType, ...] = "sigmoid"
    loss_weights: tuple[float, ...] = ()
    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    reference: Reference = "base"
    precompute_ref_log_probs: bool | None = None
    figures: ClassVar[Mapping[str, float]] = {**PairObjective.figures, "ranking": 1.0}
    units: ClassVar[Mapping[str, str]] = {**PairObjective.units, SFT: "nats per token", "ranking": "share"}

    def __post_init__(self) -> None:
        above(KEY, 0, beta=self.beta, discopop_tau=self.discopop_tau)
        kinds, most = tuple(self._weights()), 0.5 if "robust" in self._types() else 1.0
        if not 0 <= self.label_smoothing < most:
            raise RunError(f"{KEY}.label_smoothing is {self.label_smoothing:g}: give a share from 0 to below {most:g}")
        if self.label_smoothing == 0 and "exo_pair" in kinds:
            raise RunError(f'{KEY}.loss_type = "exo_pair" needs label_smoothing above 0: set it, such as to 0.001')
        if self.label_smoothing > 0 and not set(kinds) & set(SMOOTHED):
            raise RunError(
                f"{KEY}.label_smoothing does nothing for {', '.join(kinds)}: leave it out, or take one of "
                f"{', '.join(SMOOTHED)}"
            )
        if set(kinds) == {SFT}:
            raise RunError(f'{KEY}.loss_type has "sft" alone: add a loss of pairs, or set {KEY} = "sft"')

    def _types(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type

    def _weights(self) -> dict[str, float]:
        """The weight of each loss."""
        types, weights = self._types(), self.loss_weights or (1.0,) * len(self._types())
        if not types or len(set(types)) < len(types):
            raise RunError(f"{KEY}.loss_type is {list(types)}: name each loss once")
        if len(weights) != len(types):
            raise RunError(
                f"{KEY}.loss_weights has {len(weights)} numbers for {len(types)} losses ({', '.join(types)}): give one "
                f"for each"
            )
        if not all(map(math.isfinite, weights)):
            raise RunError(f"{KEY}.loss_weights is {list(weights)}: give finite numbers")
        return dict(zip(types, weights, strict=True))

    @property
    def losses(self) -> Mapping[str, float]:
        """One value for each pair, and beside it the chosen tokens' likelihood."""
        return {PAIR: NATS, SFT: NATS} if SFT in self._types() else {PAIR: NATS}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of pairs, and of the chosen completions' tokens."""
        counts = dict.fromkeys((PAIR, *self.figures), batch.units)
        return {**counts, SFT: chosen_count(batch)} if SFT in self._types() else counts

    def reference_columns(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, torch.Tensor]:
        """Returns the log-probability of each completion."""
        return {REFERENCE: pair_scores(network, batch, context).logp_B}

    def terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        """Computes the loss of each pair, and what is measured.

        "chosen" and "rejected" are the log-ratios r, "margin" is beta (r_w - r_l), "accuracy" the share of pairs with
        r_w > r_l, and "ranking" that of pairs whose chosen completion is the likelier per token; ties are one half.
        """
        scores = pair_scores(network, batch, context)
        ratio_B = scores.logp_B - batch.columns[REFERENCE] if REFERENCE in batch.columns else scores.logp_B
        size_B = batch.columns[SIZE].clamp(min=1)
        mean_B, likelihood_B = ratio_B / size_B, (scores.logp_B / size_B).detach()
        ratios = Ratios(ratio_B[::2], ratio_B[1::2], mean_B[::2], mean_B[1::2])
        weights = self._weights()
        losses = [weight * self.pair_loss(name, ratios) for name, weight in weights.items() if name != SFT]
        terms = {
            PAIR: pair_term(torch.stack(losses).sum(0), batch),
            **reward_figures(ratio_B, batch),
            "margin": pair_term(self.beta * (ratios.w_U - ratios.l_U).detach(), batch),
            "ranking": pair_term(wins(likelihood_B[::2], likelihood_B[1::2]), batch),
        }
        return {**terms, SFT: chosen_tokens(weights[SFT] * scores.nll_N, batch)} if SFT in weights else terms

    def pair_loss(self, name: str, ratios: Ratios) -> torch.Tensor:
        """Returns a loss (U,) of each pair."""
        beta, smooth, (w_U, l_U, mean_w_U, mean_l_U) = self.beta, self.label_smoothing, ratios
        x_U = beta * (w_U - l_U)
        win_U, lose_U = F.logsigmoid(x_U), F.logsigmoid(-x_U)
        match name:
            case "sigmoid":
                return -(1 - smooth) * win_U - smooth * lose_U
            case "robust":
                return (-(1 - smooth) * win_U + smooth * lose_U) / (1 - 2 * smooth)
            case "hinge":
                return F.relu(1 - x_U)
            case "ipo":
                return (mean_w_U - mean_l_U - 1 / (2 * beta)).square()
            case "sigmoid_norm":
                return -F.logsigmoid(beta * (mean_w_U - mean_l_U))
            case "exo_pair":
                p_U = torch.sigmoid(x_U)
                return p_U * (win_U - math.log1p(-smooth)) + (1 - p_U) * (lose_U - math.log(smooth))
            case "nca_pair":
                each = F.logsigmoid(beta * w_U), F.logsigmoid(-beta * w_U), F.logsigmoid(-beta * l_U)
                return -each[0] - 0.5 * each[1] - 0.5 * each[2]
            case "bco_pair":
                return -F.logsigmoid(beta * w_U) - F.logsigmoid(-beta * l_U)
            case "sppo_hard":
                return (w_U - 0.5 / beta).square() + (l_U + 0.5 / beta).square()
            case "apo_zero":
                return 1 - torch.sigmoid(beta * w_U) + torch.sigmoid(beta * l_U)
            case "apo_down":
                return torch.sigmoid(beta * w_U) + 1 - torch.sigmoid(x_U)
        assert name == "discopop"
        mix_U = torch.sigmoid(x_U / self.discopop_tau)
        return -(1 - mix_U) * win_U + mix_U * torch.exp(-x_U)
