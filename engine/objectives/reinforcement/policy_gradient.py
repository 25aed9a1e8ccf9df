"""Advantages of sampled completions, and losses whose gradients follow them; the formulas are TRL 1.16.0's.

Legend: P prompts, G completions of each, B = P G sequences in this order, N tokens of all completions, `row_N` the
sequence of each token. A reward is NaN where there is none; its completion has no part in means and the advantage 0.
"""

from typing import Literal

import torch

Level = Literal["token", "sequence"]
SMALLEST = 1e-4  # added to standard deviations


def group_advantages(rewards_PG: torch.Tensor, deviation_P: torch.Tensor | None) -> torch.Tensor:
    """Computes (R - mean) / (std + 1e-4), with the mean of each group (arXiv 2402.03300, section 4.1.2).

    `deviation_P` is the standard deviation to divide by: that of each group, or of all rewards of a step (arXiv
    2508.08221). None divides by nothing (Dr. GRPO, arXiv 2503.20783).
    """
    centered_PG = rewards_PG - rewards_PG.nanmean(1, keepdim=True)
    if deviation_P is not None:
        centered_PG = centered_PG / (deviation_P[:, None] + SMALLEST)
    return centered_PG.nan_to_num(nan=0.0)


def left_out_advantages(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Computes R minus the mean of the group's other rewards (RLOO, arXiv 2402.14740, eq. 8)."""
    counts_P1 = (~rewards_PG.isnan()).sum(1, keepdim=True)
    others_PG = (rewards_PG.nansum(1, keepdim=True) - rewards_PG) / (counts_P1 - 1)
    return (rewards_PG - others_PG).nan_to_num(nan=0.0)


def normalized(
    advantages_PG: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """Computes (A - mean) / (std + 1e-4) from the mean of A and of its square over the `count` advantages of a step."""
    deviation = ((square - mean.square()) * count / (count - 1)).sqrt()
    return ((advantages_PG - mean) / (deviation + SMALLEST)).nan_to_num(nan=0.0)


def has_others(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Returns whether a completion has a reward, and another one of its group has one too."""
    given_PG = ~rewards_PG.isnan()
    return given_PG & (given_PG.sum(1, keepdim=True) > 1)


def deviations(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Returns the standard deviation (n - 1) of each row's rewards (P,); NaN of fewer than two."""
    counts_P = (~rewards_PG.isnan()).sum(1)
    squares_P = (rewards_PG - rewards_PG.nanmean(1, keepdim=True)).square().nansum(1)
    return (squares_P / torch.where(counts_P > 1, counts_P - 1, torch.nan)).sqrt()


def without_signal(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Returns whether all rewards of a group are equal, or fewer than two are there (P,): no completion is better."""
    return ~(deviations(rewards_PG) > 1e-8)


def by_sequence(values_N: torch.Tensor, row_N: torch.Tensor, sequences: int) -> torch.Tensor:
    """Returns the sum of each sequence's tokens (B,)."""
    return values_N.new_zeros(sequences).index_add(0, row_N, values_N)


def sequence_means(values_N: torch.Tensor, row_N: torch.Tensor, sequences: int) -> torch.Tensor:
    """Returns the mean of each sequence's tokens (B,); 0 without any."""
    counts_B = by_sequence(torch.ones_like(values_N), row_N, sequences)
    return by_sequence(values_N, row_N, sequences) / counts_B.clamp(min=1)


def ratios(log_ratio_N: torch.Tensor, row_N: torch.Tensor, sequences: int, level: Level) -> torch.Tensor:
    """Returns pi / pi_old of each token, or the geometric mean over its sequence's (GSPO, arXiv 2507.18071, eq. 7)."""
    if level == "token":
        return log_ratio_N.exp()
    return sequence_means(log_ratio_N, row_N, sequences).exp()[row_N]


def clipped_loss(
    ratio: torch.Tensor, advantage: torch.Tensor, low: float, high: float, most: float | None = None
) -> torch.Tensor:
    """Computes -min(r A, clip(r, 1 - low, 1 + high) A), the first r cut at `most` (two-sided, arXiv 2505.07291)."""
    bounded = ratio if most is None else ratio.clamp(max=most)
    return -torch.min(bounded * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def truncated_loss(ratio: torch.Tensor, advantage: torch.Tensor, logp: torch.Tensor, most: float) -> torch.Tensor:
    """Computes -min(r, most) A ln pi, with no gradient of the ratio (CISPO, arXiv 2506.13585, eq. 4)."""
    return -ratio.clamp(max=most).detach() * advantage * logp


def kl_estimates(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Computes e^d - d - 1 with d = ln pi_ref - ln pi: an estimate of the KL divergence that is never negative."""
    difference = reference - logp
    return difference.exp() - difference - 1
