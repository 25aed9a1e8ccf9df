"""Combinations of a strategy and differential privacy whose epsilon would be false: refused before a run."""

from collections.abc import Collection
from typing import Literal

from strategies.core.base import Rule, named
from strategies.core.errors import require
from strategies.privacy.budget import ExampleDp, ExamplePlan
from strategies.privacy.central import AdaptiveDp, CentralDp, CentralPlan
from strategies.privacy.distributed import DistributedDp, DistributedPlan

Secagg = Literal["off", "ideal", "full"]
Dp = CentralDp | AdaptiveDp | DistributedDp | ExampleDp
NoisePlan = CentralPlan | DistributedPlan | ExamplePlan  # told apart by `adds_to`: the sum, the ring, or gradients


def check_dp(dp: Dp, strategy: Rule, extras: Collection[str], secagg: Secagg, *, mixed_ranks: bool = False) -> None:
    """Raises StrategyError with the reason and the nearest combination that works.

    `extras` are the names of the sums that clients send beside their delta; with `mixed_ranks` their LoRA ranks differ.
    """
    name = named(strategy)
    if dp.unit == "example":
        loss = f"{name} sends the loss before training, to which example-level noise adds nothing"
        require(not strategy.loss_before, f"{loss}: take another, or client-level privacy")
        return  # what leaves a client is private already
    require(strategy.sends_update, f"{name} sends nothing that could be made private: leave privacy.dp out")
    what = "each update" if strategy.reads == "each" else "several sums of the same updates"
    covered = "the noise of privacy.dp covers one sum a round: take a strategy that reads the sum"
    require(strategy.reads == "sum", f"{name} reads {what}, and {covered}")
    beside = f"{name} sends {', '.join(sorted(extras))} beside the update, which"
    counts = "privacy.dp would clip the update along with it and add noise to what the rule counts on"
    changes = strategy.extras_are_changes or not extras
    require(changes, f'{beside} is no change of the model: {counts}: take "fedavg" or "fedprox"')
    grows = "which privacy.dp would multiply by the cohort over the expected one"
    shrinks = f"in {name} a client of a low rank shrinks what lies beyond its own rank, trained or not, {grows}"
    keeps = strategy.keeps_higher_ranks or not mixed_ranks
    require(keeps, f'{shrinks}: take "flora", or leave model.peft.ranks out')
    moves = f"in {name} clients that have not trained send a change (rests_at_zero), {grows}"
    others = 'take another rule, such as "fedavgm", or "hetlora" with gamma = 1'
    require(strategy.rests_at_zero, f"{moves}: {others}")
    joint = "set privacy.dp.joint = true to clip all of it together, or take a strategy with one sum"
    require(not extras or dp.joint, f"{beside} privacy.dp does not clip: {joint}")
    hides = "distributed noise is each client's small part, which hides nothing where the server sees single updates"
    summed = dp.adds_to != "ring" or secagg != "off"
    require(summed, f'{hides}: set privacy.secagg.mode, or privacy.dp.kind = "central"')
