"""What differential privacy does not go with: combinations whose epsilon would be false are refused before a run."""

from collections.abc import Collection
from typing import Literal

from strategies.dp_adaptive import WITHIN, AdaptiveDp
from strategies.dp_central import CentralDp
from strategies.dp_distributed import DistributedDp
from strategies.dp_example import ExampleDp
from strategies.local_only import LocalOnly
from strategies.types import Strategy

Dp = CentralDp | AdaptiveDp | DistributedDp | ExampleDp


def check_dp(dp: Dp, strategy: Strategy, extras: Collection[str], secagg: Literal["off", "ideal", "full"]) -> None:
    """Raises ValueError with the reason and the nearest that works.

    `extras` are the names of the sums that the strategy's clients send beside their delta.
    """
    name = type(strategy).__name__
    if isinstance(dp, ExampleDp):
        if strategy.loss_before:
            raise ValueError(
                f"strategy {name} sends the loss before training, to which example-level noise adds nothing: take "
                f"another, or client-level privacy"
            )
        return  # what leaves a client is private already, whatever happens to it
    if isinstance(strategy, LocalOnly):
        raise ValueError(f"strategy {name} sends nothing that could be made private: leave privacy.dp out")
    if strategy.reads != "sum":
        what = "each update" if strategy.reads == "each" else "several sums of the same updates"
        raise ValueError(
            f"strategy {name} reads {what}, and the noise of privacy.dp covers one sum a round: take a strategy that "
            f"reads the sum"
        )
    if extras and not dp.joint:
        raise ValueError(
            f"strategy {name} sends {', '.join(sorted(extras))} beside the update, which privacy.dp does not clip: set "
            f"privacy.dp.joint = true to clip all of it together, or take a strategy with one sum"
        )
    assert WITHIN not in extras
    if isinstance(dp, DistributedDp) and secagg == "off":
        raise ValueError(
            "distributed noise is each client's small part, which hides nothing where the server sees single updates: "
            'set privacy.secagg.mode, or privacy.dp.kind = "central"'
        )
