"""Combinations of a strategy and differential privacy whose epsilon would be false: refused before a run."""

from collections.abc import Collection
from typing import Literal

from strategies.core.base import Rule, named
from strategies.core.errors import StrategyError
from strategies.privacy.central import AdaptiveDp, CentralDp, CentralPlan
from strategies.privacy.distributed import DistributedDp, DistributedPlan
from strategies.privacy.per_example import ExampleDp, ExamplePlan

Dp = CentralDp | AdaptiveDp | DistributedDp | ExampleDp
NoisePlan = CentralPlan | DistributedPlan | ExamplePlan  # told apart by `adds_to`: the sum, the ring, or gradients


def check_dp(
    dp: Dp,
    strategy: Rule,
    extras: Collection[str],
    secagg: Literal["off", "ideal", "full"],
    *,
    mixed_ranks: bool = False,
) -> None:
    """Raises StrategyError with the reason and the nearest combination that works.

    `extras` are the names of the sums that the strategy's clients send beside their delta; `mixed_ranks` says whether
    clients have different LoRA ranks.
    """
    name = named(strategy)
    if dp.unit == "example":
        if strategy.loss_before:
            raise StrategyError(
                f"{name} sends the loss before training, to which example-level noise adds nothing: take "
                f"another, or client-level privacy"
            )
        return  # what leaves a client is private already
    if not strategy.sends_update:
        raise StrategyError(f"{name} sends nothing that could be made private: leave privacy.dp out")
    if strategy.reads != "sum":
        what = "each update" if strategy.reads == "each" else "several sums of the same updates"
        raise StrategyError(
            f"{name} reads {what}, and the noise of privacy.dp covers one sum a round: take a strategy that "
            f"reads the sum"
        )
    if extras and not strategy.extras_are_changes:
        raise StrategyError(
            f"{name} sends {', '.join(sorted(extras))} beside the update, which is no change of the model: "
            f"privacy.dp would clip the update along with it and add noise to what the rule counts on: take "
            f'"fedavg" or "fedprox"'
        )
    if mixed_ranks and not strategy.keeps_higher_ranks:
        raise StrategyError(
            f"in {name} a client of a low rank shrinks what lies beyond its own rank, trained or not, which "
            f'privacy.dp would multiply by the cohort over the expected one: take "flora", or leave model.peft.ranks '
            f"out"
        )
    if not strategy.rests_at_zero:
        raise StrategyError(
            f"in {name} clients that have not trained send a change (rests_at_zero), which privacy.dp would multiply "
            f'by the cohort over the expected one: take another rule, such as "fedavgm", or "hetlora" with gamma = 1'
        )
    if extras and not dp.joint:
        raise StrategyError(
            f"{name} sends {', '.join(sorted(extras))} beside the update, which privacy.dp does not clip: set "
            f"privacy.dp.joint = true to clip all of it together, or take a strategy with one sum"
        )
    if dp.adds_to == "ring" and secagg == "off":
        raise StrategyError(
            "distributed noise is each client's small part, which hides nothing where the server sees single updates: "
            'set privacy.secagg.mode, or privacy.dp.kind = "central"'
        )
