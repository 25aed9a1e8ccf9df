"""Group-relative policy optimization and its relatives. Legend: P prompts, G completions of each, B = P G sequences."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from engine.messages.checks import at_least
from engine.objectives.reinforcement.policy_gradient import (
    Level,
    by_sequence,
    clipped_loss,
    deviations,
    group_advantages,
    kl_estimates,
    ratios,
    sequence_means,
    truncated_loss,
)
from engine.objectives.reinforcement.samples import KEY, SPREAD, Reinforcement, Sampled
from engine.objectives.token_batch import Batch


@dataclass(frozen=True, kw_only=True)
class Grpo(Reinforcement):
    """GRPO (arXiv 2402.03300) with the losses of TRL's GRPOTrainer.

    An advantage is a reward minus its group's mean, over a standard deviation: the group's ("group"), that of the
    client's step ("batch"), or nothing ("none"). "dapo", "bnpo" and "cispo" divide the sum over tokens by the tokens of
    the client's step, "grpo" by those of each completion, "dr_grpo" by the most that a completion may have.
    `epsilon_high` bounds ratios from above, by default as `epsilon` does; with "cispo" it is the largest ratio itself.
    `delta` bounds the ratio where the advantage is negative.
    """

    kind: Literal["grpo"] = "grpo"
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo"] = "dapo"
    importance_sampling_level: Level = "token"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    use_bias_correction_kl: bool = True
    delta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(KEY, 0, delta=self.delta)

    @property
    def by_sequence(self) -> bool:
        """Two of the losses have a value for each sequence."""
        return self.loss_type in ("grpo", "dr_grpo")

    @property
    def couples_rows(self) -> str | None:
        """Token counts and standard deviations of a step do."""
        changes: Mapping[str, bool] = {
            f'{KEY}.loss_type = "dr_grpo"': not self.by_sequence,
            f'{KEY}.scale_rewards = "group"': self.scale_rewards == "batch",
        }
        needed = " and ".join(change for change, is_needed in changes.items() if is_needed)
        return f"set {needed}" if needed else None

    def advantages(self, rewards_PG: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Computes the advantages (P, G) of a batch's rewards, NaN where there is none."""
        if self.scale_rewards == "none":
            return group_advantages(rewards_PG, None)
        if self.scale_rewards == "batch":
            return group_advantages(rewards_PG, batch.columns[SPREAD][:: batch.group].to(rewards_PG.dtype))
        return group_advantages(rewards_PG, deviations(rewards_PG))

    def unit_losses(self, sampled: Sampled) -> torch.Tensor:
        """Computes the loss of each token (N,), or of each sequence (B,)."""
        logp_N, old_N, reference_N, advantage_B, row_N = sampled
        sequences, advantage_N = len(advantage_B), advantage_B[row_N]
        ratio_N = ratios(logp_N - old_N, row_N, sequences, self.importance_sampling_level)
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.loss_type == "cispo":
            values_N = truncated_loss(ratio_N, advantage_N, logp_N, high)
        else:
            values_N = clipped_loss(ratio_N, advantage_N, self.epsilon, high, self.delta)
        if self.beta > 0:
            assert reference_N is not None
            kl_N = kl_estimates(logp_N, reference_N)
            values_N = values_N + self.beta * (kl_N * ratio_N if self.use_bias_correction_kl else kl_N)
        if self.loss_type == "grpo":
            return sequence_means(values_N, row_N, sequences)
        if self.loss_type == "dr_grpo":
            return by_sequence(values_N, row_N, sequences) / self.max_completion_length
        return values_N
