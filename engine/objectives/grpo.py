"""Reinforcement: group-relative policy optimization (GRPO) and REINFORCE leave-one-out (RLOO) on own samples.

Legend: P prompts, G completions of each, B = P G sequences, N tokens of all completions, U units of a loss.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field

from engine.messages.checks import at_least
from engine.messages.errors import RunError
from engine.objectives.policy_gradient import (
    Level,
    Scale,
    by_sequence,
    clipped_loss,
    group_advantages,
    kl_estimates,
    left_out_advantages,
    normalized,
    ratios,
    sequence_means,
    truncated_loss,
)
from engine.objectives.rewards import Rewards

KEY = "train.objective"


class Sampled(NamedTuple):
    """What is known of sampled completions: log-probabilities of each token, and each sequence's advantage.

    `logp_N` is by the present weights, `old_N` by those that sampled, `reference_N` by the reference model.
    """

    logp_N: torch.Tensor
    old_N: torch.Tensor
    reference_N: torch.Tensor | None
    advantage_B: torch.Tensor
    row_N: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Grpo:
    """GRPO (arXiv 2402.03300) with the losses of TRL's GRPOTrainer, whose names the options have."""

    kind: Literal["grpo"] = "grpo"
    rewards: tuple[Annotated[Rewards, Field(discriminator="kind")], ...]
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo"] = "dapo"
    importance_sampling_level: Level = "token"
    scale_rewards: Scale = "group"
    num_generations: int = 8
    max_completion_length: int = 64
    temperature: float = 1.0
    every: int = 1
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    mask_truncated_completions: bool = False

    def __post_init__(self) -> None:
        if not self.rewards:
            raise RunError(f"{KEY}.rewards is empty: name at least one reward")
        at_least(KEY, 2, num_generations=self.num_generations)
        at_least(KEY, 1, max_completion_length=self.max_completion_length, every=self.every)
        at_least(KEY, 0, beta=self.beta, epsilon=self.epsilon, epsilon_high=self.epsilon_high, delta=self.delta)

    def advantages(self, rewards_PG: torch.Tensor) -> torch.Tensor:
        """Computes the advantages (P, G) of rewards, NaN where there is none."""
        return group_advantages(rewards_PG, self.scale_rewards)

    def unit_losses(self, sampled: Sampled) -> torch.Tensor:
        """Computes the loss of each token (N,), or with "grpo" and "dr_grpo" of each sequence (B,).

        The loss is their mean. "dapo", "bnpo" and "cispo" divide by the tokens of the client's step, "grpo" by those of
        each sequence, "dr_grpo" by the most tokens that a completion may have.
        """
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


@dataclass(frozen=True, kw_only=True)
class Rloo:
    """RLOO (arXiv 2402.14740) as TRL's RLOOTrainer, whose names the options have; the KL term is part of the reward."""

    kind: Literal["rloo"] = "rloo"
    rewards: tuple[Annotated[Rewards, Field(discriminator="kind")], ...]
    num_generations: int = 2
    max_completion_length: int = 64
    temperature: float = 1.0
    every: int = 1
    beta: float = 0.05
    normalize_advantages: bool = False
    epsilon: float = 0.2
    epsilon_high: float | None = None
    mask_truncated_completions: bool = False

    def advantages(self, rewards_PG: torch.Tensor) -> torch.Tensor:
        """Computes the advantages (P, G) of rewards, NaN where there is none."""
        advantages_PG = left_out_advantages(rewards_PG)
        return normalized(advantages_PG, rewards_PG) if self.normalize_advantages else advantages_PG

    def unit_losses(self, sampled: Sampled) -> torch.Tensor:
        """Computes the loss of each sequence (B,), whose ratio is that of all its tokens together."""
        logp_N, old_N, _, advantage_B, row_N = sampled
        ratio_B = by_sequence(logp_N - old_N, row_N, len(advantage_B)).exp()
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return clipped_loss(ratio_B, advantage_B, self.epsilon, high)
