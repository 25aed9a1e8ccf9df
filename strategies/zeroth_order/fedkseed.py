"""FedKSeed: full tuning of which only scalars travel. Legend: K candidate seeds, T steps of a client."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from strategies.core.base import AveragingRule, NeedsSgd
from strategies.core.protocol import Broadcast, Update
from strategies.core.seeds import rng

SGD = NeedsSgd("moves along one direction at a time", 'take model.peft = "lora" with "fedavg"', momentum=0.0)


@dataclass(frozen=True)
class FedKSeed(AveragingRule):
    """FedKSeed (Qin et al. 2023, arXiv 2312.06353, algorithm 1). Reads the sum.

    K seeds give directions z_1 ... z_K, the same on each machine. In a step a client takes one of them, j, and moves by
    its learning rate against it: g = (L(w + eps z_j) - L(w - eps z_j)) / (2 eps), w -= lr g z_j, c_j -= lr g. Only c
    travels, and c += server_lr sum_k p_k (c_k - c). Everybody makes the model again from the base: w = w_0 +
    sum_j c_j z_j. (The paper sums a_j = g and multiplies by lr at the end; c = -lr a lets the rate change.)

    `draw` "shared": all clients walk through the directions that the round draws, so that few of the K are ever used
    and sums are dense; "own": each client draws its own, as published. Traps: a direction's loss says little, so that
    many steps are needed; replaying takes time in proportion to the directions in use; with "own" most sums c_j come
    from one client, which they tell of.
    """

    kind: Literal["fedkseed"] = "fedkseed"
    draw: Literal["shared", "own"] = "shared"
    tunes: ClassVar[tuple[str, ...]] = ("seeds",)
    paper: ClassVar[str] = "arXiv 2312.06353"

    @property
    def needs_optimizer(self) -> NeedsSgd:
        """SGD without momentum."""
        return SGD

    @property
    def picks_coordinates(self) -> bool:
        """With their own draws clients change other numbers, though not by their data."""
        return self.draw == "own"

    def walk(self, client: int, broadcast: Broadcast, steps: int) -> np.ndarray:
        """The directions (T,) of a client's steps, each equally likely."""
        whose = -1 if self.draw == "shared" else client
        return rng(broadcast.seed, broadcast.round, whose, "directions").integers(len(broadcast.params), size=steps)

    def sent(self, update: Update) -> int:
        """A direction's number and its change for each that was walked along."""
        return 2 * int(update.delta.count_nonzero())
