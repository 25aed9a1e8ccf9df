"""REINFORCE leave-one-out. Legend: P prompts, G completions of each, B = P G sequences, C tokens of a completion."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from engine.objectives.base import REFERENCE, Context, Term
from engine.objectives.reinforcement.policy_gradient import (
    by_sequence,
    clipped_loss,
    has_others,
    left_out_advantages,
    normalized,
)
from engine.objectives.reinforcement.samples import COUNT, KEY, SAMPLED, Reinforcement, Sampled
from engine.objectives.token_batch import Batch

MEAN, SQUARE = "advantage", "square"


@dataclass(frozen=True, kw_only=True)
class Rloo(Reinforcement):
    """RLOO (arXiv 2402.14740) as TRL's RLOOTrainer computes it.

    An advantage is a reward minus the mean of its group's other rewards. The distance from the reference model, `beta`
    times the sum of a completion's log-ratios, is taken from its reward. The ratio is that of the whole completion.
    `normalize_advantages` divides by the standard deviation over a client's step.
    """

    kind: Literal["rloo"] = "rloo"
    num_generations: int = 2
    beta: float = 0.05
    normalize_advantages: bool = False

    @property
    def couples_rows(self) -> str | None:
        """Standard deviations of a step do."""
        return f"set {KEY}.normalize_advantages = false" if self.normalize_advantages else None

    @property
    def means(self) -> tuple[str, ...]:
        """Two moments of a step's advantages."""
        return (MEAN, SQUARE) if self.normalize_advantages else ()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of each term's units."""
        having = int(has_others(self._rewards(batch, torch.float64)).sum())
        return {**super().counts(batch), **dict.fromkeys(self.means, having)}

    def step_terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        """Computes the advantages and their squares."""
        advantages_B = self._left_out(self._rewards(batch, torch.float64), batch).flatten()
        sequence_B = torch.arange(len(advantages_B), device=advantages_B.device)
        values = {MEAN: advantages_B, SQUARE: advantages_B.square()}
        return {name: Term(values_B, sequence_B) for name, values_B in values.items()}

    def advantages(self, rewards_PG: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Computes the advantages (P, G) of a batch's rewards, NaN where there is none."""
        advantages_PG = self._left_out(rewards_PG.double(), batch)
        if self.normalize_advantages:
            mean_P, square_P, count_P = (batch.columns[name][:: batch.group].double() for name in (MEAN, SQUARE, COUNT))
            normal_PG = normalized(advantages_PG, mean_P[:, None], square_P[:, None], count_P[:, None])
            advantages_PG = torch.where(has_others(rewards_PG), normal_PG, 0)
        return advantages_PG.to(rewards_PG.dtype)

    def _left_out(self, rewards_PG: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The advantages before they are normalized, float64."""
        if self.beta > 0:
            ratio_N = (batch.columns[SAMPLED] - batch.columns[REFERENCE]).double()[self._places(batch)]
            rewards_PG = rewards_PG - self.beta * by_sequence(ratio_N, batch.row_N, len(batch.ids_BT)).view_as(
                rewards_PG
            )
        return left_out_advantages(rewards_PG)

    def unit_losses(self, sampled: Sampled) -> torch.Tensor:
        """Computes the loss of each sequence (B,), whose ratio is that of all its tokens together."""
        logp_N, old_N, _, advantage_B, row_N = sampled
        ratio_B = by_sequence(logp_N - old_N, row_N, len(advantage_B)).exp()
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return clipped_loss(ratio_B, advantage_B, self.epsilon, high)
