"""Robust rules, in blocks of coordinates: most read each update; a secure sum can serve the last two.

The median and the trimmed mean (Yin et al. 2018, arXiv 1803.01498, algorithm 1); Krum and Multi-Krum (Blanchard et al.
2017, arXiv 1703.02757, section 4); Bulyan (El Mhamdi et al. 2018, arXiv 1802.07927). Centered clipping (Karimireddy et
al. 2021, arXiv 2012.10333) and, with several sums a round, RFA (Pillutla et al. 2022, arXiv 1912.13445, algorithms 1
and 2). Legend: K clients, P parameters, B the coordinates of a block, S selected clients.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch

from strategies.core.base import AveragingRule, Ends, Finished, Reads, named
from strategies.core.errors import require
from strategies.core.protocol import Aggregate, Broadcast, ClientState, ServerState, Update, Vector
from strategies.core.ranges import ABOVE_0, AT_LEAST_1, Bounds, Range

BELOW_HALF: Bounds = ("at least 0 and below 0.5", lambda x: 0 <= x < 0.5)
ELEMENTS = 2**21  # of a block, over all clients: what is in memory at once does not grow with K or P


@dataclass(frozen=True)
class RobustRule(AveragingRule, ABC):
    """theta += lr * combine(delta_1, ..., delta_K). Reads each update.

    Every client weighs the same: its number of rows is its own claim, which an attacker would make large. On LoRA the
    rule sees A and B as coordinates, not their product.
    """

    weighting: Literal["uniform"] = "uniform"
    reads: ClassVar[Reads] = "each"
    elementwise: ClassVar[bool] = False

    @abstractmethod
    def combine(self, deltas: Sequence[Vector]) -> Vector:
        """The rule itself: one vector (P,) from those of the clients."""

    def way_out(self, count: int) -> str:
        """The setting that makes the rule work with `count` updates."""
        return "take another strategy"

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """theta += lr * combine(deltas); StrategyError with the way out when they are fewer than the rule needs."""
        assert aggregate.each is not None
        count, needed = len(aggregate.each), self.smallest_cohort()
        few = f"{named(self)} as set needs the updates of at least {needed} clients a round, but {count} came"
        way_out = f"raise cohort.size so that {needed} always come, or {self.way_out(count)}"
        require(count >= needed, f"{few}: {way_out}")
        step = self.combine([update.delta for update in aggregate.each])
        return replace(state, round=state.round + 1, params=state.params + self.lr * step)


@dataclass(frozen=True)
class ByzantineRule(RobustRule, ABC):
    """A robust rule that holds against any `f` of the cohort's clients, whatever they send."""

    f: Annotated[int, Range("is the number of clients that may lie")] = 1

    def way_out(self, count: int) -> str:
        """The largest f that the rule allows for `count` updates."""
        fits = [f for f in range(self.f) if replace(self, f=f).smallest_cohort() <= count]
        return f"set strategy.f = {fits[-1]}" if fits else super().way_out(count)


@dataclass(frozen=True)
class Median(RobustRule):
    """theta += lr * median_k delta_k, coordinate by coordinate; of an even number, the mean of the middle two.

    Definition 1, option I. Reads each update. Holds while fewer than half of the cohort lie. Traps: on skewed data a
    coordinate that few clients move is not moved at all; with one or two clients it is the mean.
    """

    kind: Literal["median"] = "median"
    elementwise: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 1803.01498"

    def combine(self, deltas: Sequence[Vector]) -> Vector:
        """The median of every coordinate."""
        return by_coordinate(deltas, lambda x_KB: middle(x_KB, (len(x_KB) - 1) // 2))


@dataclass(frozen=True)
class TrimmedMean(RobustRule):
    """theta += lr * the mean of every coordinate without its smallest and its largest values, floor(trim K) of each.

    Definition 2, option II. Reads each update. Holds while at most the share `trim` of the cohort lies. Where
    floor(trim K) is 0 it would be the plain mean, which is refused unless trim is 0.
    """

    kind: Literal["trimmed_mean"] = "trimmed_mean"
    trim: Annotated[float, Range("is the share cut on each side", BELOW_HALF)] = 0.2
    elementwise: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 1803.01498"

    def cut(self, count: int) -> int:
        """The number of values cut on each side of `count` values, safe from the rounding of trim K."""
        return min(math.floor(self.trim * count + 1e-9), (count - 1) // 2)

    def smallest_cohort(self) -> int:
        """The smallest number of updates of which some are cut."""
        if self.trim == 0:
            return 1
        count = max(3, math.floor(1 / self.trim))
        return count if self.cut(count) else count + 1

    def way_out(self, count: int) -> str:
        """The share that cuts one on each side."""
        return f"set strategy.trim to at least 1/{count}" if count > 2 else super().way_out(count)

    def combine(self, deltas: Sequence[Vector]) -> Vector:
        """The trimmed mean of every coordinate."""
        return by_coordinate(deltas, lambda x_KB: middle(x_KB, self.cut(len(x_KB))))


@dataclass(frozen=True)
class Krum(ByzantineRule):
    """theta += lr * delta_i with the smallest score: the sum of |delta_i - delta_j|^2 over its K - f - 2 nearest j.

    Reads each update. Needs K >= 2f + 3. Of equal scores the client of the smaller number wins. Trap: on skewed data it
    follows one client in the middle and ignores what the others learned; Multi-Krum is milder.
    """

    kind: Literal["krum"] = "krum"
    paper: ClassVar[str] = "arXiv 1703.02757"

    def smallest_cohort(self) -> int:
        """2f + 3: the paper's 2f + 2 < K."""
        return 2 * self.f + 3

    def combine(self, deltas: Sequence[Vector]) -> Vector:
        """The update with the smallest score."""
        return deltas[ranked(squared_distances(deltas), self.f)[0]]


@dataclass(frozen=True)
class MultiKrum(ByzantineRule):
    """theta += lr * the mean of the `m` updates with Krum's smallest scores: m = 1 is Krum, m = K the plain mean.

    Reads each update. Needs K >= 2f + 3 and K >= m; the default of m is K - f - 2, the number of neighbors in a score.
    Trap: above K - f the mean includes liars for sure.
    """

    kind: Literal["multi_krum"] = "multi_krum"
    m: Annotated[int | None, Range("is the number of updates that are averaged", AT_LEAST_1)] = None
    paper: ClassVar[str] = "arXiv 1703.02757"

    def smallest_cohort(self) -> int:
        """Krum's, or m if that is more."""
        return max(2 * self.f + 3, self.m or 1)

    def way_out(self, count: int) -> str:
        """A smaller m where only m is too large."""
        if self.m is not None and 2 * self.f + 3 <= count:
            return f"set strategy.m to at most {count}"
        return super().way_out(count)

    def combine(self, deltas: Sequence[Vector]) -> Vector:
        """The mean of the m updates with the smallest scores, in the order of clients."""
        best = ranked(squared_distances(deltas), self.f)[: self.m or len(deltas) - self.f - 2]
        return by_coordinate([deltas[client] for client in sorted(best)], mean_of_rows)


@dataclass(frozen=True)
class Bulyan(ByzantineRule):
    """theta += lr * in each coordinate, the mean of the S - 2f values nearest to the median of S = K - 2f updates.

    Krum selects the S updates one by one. Reads each update. Needs K >= 4f + 3. The median is one of the values, of an
    even S the lower middle one (the paper leaves it open); of two values equally near the lower is taken. Krum runs
    again on the rest after each selection; its number of neighbors, then K - f - 2 of a smaller K, is kept at one or
    more. The authors' later code averages several updates at each selection and selects two fewer than the paper.
    """

    kind: Literal["bulyan"] = "bulyan"
    paper: ClassVar[str] = "arXiv 1802.07927"

    def smallest_cohort(self) -> int:
        """4f + 3, as the paper demands."""
        return 4 * self.f + 3

    def combine(self, deltas: Sequence[Vector]) -> Vector:
        """The selection, then the mean around the median."""
        squares_KK, left, selected = squared_distances(deltas), list(range(len(deltas))), list[int]()
        while len(selected) < len(deltas) - 2 * self.f:
            selected.append(left.pop(ranked(squares_KK[left][:, left], self.f)[0]))
        return by_coordinate([deltas[client] for client in sorted(selected)], self.around_median)

    def around_median(self, x_SB: torch.Tensor) -> torch.Tensor:
        """The mean of the S - 2f values of each coordinate that are nearest to its median."""
        sorted_SB = sorted_rows(x_SB)
        median_B = sorted_SB[(len(x_SB) - 1) // 2]
        order_SB = (sorted_SB.double() - median_B).abs().argsort(dim=0, stable=True)
        return mean_of_rows(sorted_SB.gather(0, order_SB[: len(x_SB) - 2 * self.f]))


def blocks(deltas: Sequence[Vector]) -> Iterator[tuple[slice, torch.Tensor]]:
    """The coordinates block by block: where the block lies, and a copy of it (K, B)."""
    length = max(1, ELEMENTS // len(deltas))
    for start in range(0, deltas[0].numel(), length):
        block = slice(start, start + length)
        yield block, torch.stack([delta[block] for delta in deltas])


def by_coordinate(deltas: Sequence[Vector], rule: Callable[[torch.Tensor], torch.Tensor]) -> Vector:
    """The vector (P,) of `rule` on every block (K, B) of the clients' vectors."""
    combined = torch.empty_like(deltas[0])
    for block, x_KB in blocks(deltas):
        combined[block] = rule(x_KB)
    return combined


def sorted_rows(x_KB: torch.Tensor) -> torch.Tensor:
    """Every coordinate's values in rising order; numpy sorts short columns several times faster than torch."""
    return torch.from_numpy(np.sort(x_KB.numpy(), axis=0))


def mean_of_rows(x_KB: torch.Tensor) -> torch.Tensor:
    """The mean over K, added up row by row in float64: the same bits wherever a block begins."""
    total_B = torch.zeros(x_KB.shape[1], dtype=torch.float64)
    for row_B in x_KB:
        total_B += row_B
    return (total_B / len(x_KB)).float()


def squared_distances(deltas: Sequence[Vector]) -> torch.Tensor:
    """|delta_i - delta_j|^2 for all pairs (K, K), in float64 from products of blocks.

    Not centered: an attacker's huge vector would drown other distances. A pair errs by 1e-16 of its own squared norms.
    """
    products_KK = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for _, x_KB in blocks(deltas):
        x_KB = x_KB.double()
        products_KK += x_KB @ x_KB.T
    norms_K = products_KK.diagonal()
    return (norms_K[:, None] + norms_K[None, :] - 2 * products_KK).clamp_(min=0)


def middle(x_KB: torch.Tensor, cut: int) -> torch.Tensor:
    """The mean over K without the `cut` smallest and the `cut` largest values."""
    return mean_of_rows(sorted_rows(x_KB)[cut : len(x_KB) - cut])


def ranked(squares_KK: torch.Tensor, f: int) -> list[int]:
    """The rows in the order of Krum's scores, best first; a score sums K - f - 2 neighbors, at least one."""
    neighbors = max(1, len(squares_KK) - f - 2)
    nearest_KK = squares_KK.clone().fill_diagonal_(torch.inf).sort(dim=1).values  # without the distance to itself
    scores = nearest_KK[:, :neighbors].sum(dim=1).tolist()
    return sorted(range(len(scores)), key=scores.__getitem__)


@dataclass(frozen=True)
class CenteredClipping(AveragingRule):
    """v += mean_k clip(delta_k - v, tau), theta += lr v, where clip(x, tau) = x min(1, tau / |x|).

    One pass of the paper's rule, from the last round's v, which is broadcast. Reads the sum: a client's update is its
    clipped distance from v. All clients weigh the same, since an attacker would claim many rows.

    Traps: the clients themselves clip, so this holds against poisoned data and broken training, but against a client
    that breaks the protocol only if its update is proven or checked to be within tau. tau must be about the distance of
    honest changes from their mean: far above, nothing is clipped; far below, v follows slowly. The paper's guarantee
    also needs momentum on the clients (train.state = "keep").
    """

    kind: Literal["centered_clipping"] = "centered_clipping"
    weighting: Literal["uniform"] = "uniform"
    tau: Annotated[float, Range("is the norm that is clipped to", ABOVE_0)] = 1.0
    elementwise: ClassVar[bool] = False
    zero_moments: ClassVar[tuple[str, ...]] = ("v",)
    sends_moments: ClassVar[bool] = True
    rests_at_zero: ClassVar[bool] = False  # a client at rest sends -v
    paper: ClassVar[str] = "arXiv 2012.10333"

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Sends clip(delta - v, tau)."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        apart = update.delta - broadcast.extras["v"]
        norm = torch.linalg.vector_norm(apart, dtype=torch.float64).item()
        return replace(update, delta=apart * (self.tau / max(norm, self.tau))), client_state

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """v += mean clip(delta - v, tau), theta += lr v."""
        v = state.moments["v"] + aggregate.total / aggregate.weight
        return replace(state, round=state.round + 1, params=state.params + self.lr * v, moments={"v": v})


@dataclass(frozen=True)
class Rfa(AveragingRule):
    """theta += lr * z after `passes` times z <- sum b_k delta_k / sum b_k, b_k = p_k / max(nu, |delta_k - z|).

    The smoothed Weiszfeld algorithm for argmin_z sum p_k |delta_k - z|. A pass is a sum over the updates, which a
    secure sum can give: it reads "passes", and a real client receives z and sends b_k delta_k in each. z starts at
    zero, the server's model, so that one pass is the paper's one-step RFA and one huge update moves it little from the
    first pass on; the authors' code starts at the plain mean and counts that as its first pass. Trap: an attacker may
    still claim a large p_k (see `weighting`).
    """

    kind: Literal["rfa"] = "rfa"
    passes: Annotated[int, Range("is the number of sums over the updates", AT_LEAST_1)] = 3
    nu: Annotated[float, Range("keeps distances away from 0", ABOVE_0)] = 1e-6
    reads: ClassVar[Reads] = "passes"
    elementwise: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 1912.13445"

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """A vector down and a vector up for each pass; the first z is the global vector's own zero."""
        down, up = super().floats(broadcast)
        return down + (self.passes - 1) * broadcast.params.numel(), self.passes * up

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """theta += lr * the geometric median of the deltas."""
        assert aggregate.each is not None
        deltas = [update.delta for update in aggregate.each]
        weights_K = torch.tensor([update.weight for update in aggregate.each], dtype=torch.float64)
        z_P = torch.zeros_like(state.params)
        for _ in range(self.passes):
            z_P = weighted_mean(deltas, weights_K / distances(deltas, z_P).clamp(min=self.nu))
        return replace(state, round=state.round + 1, params=state.params + self.lr * z_P)


def distances(deltas: Sequence[Vector], z_P: Vector) -> torch.Tensor:
    """|delta_k - z| for every client (K,), in float64."""
    squares_K = torch.zeros(len(deltas), dtype=torch.float64)
    for block, x_KB in blocks(deltas):
        squares_K += (x_KB.double() - z_P[block]).square().sum(dim=1)
    return squares_K.sqrt()


def weighted_mean(deltas: Sequence[Vector], weights_K: torch.Tensor) -> Vector:
    """sum b_k delta_k / sum b_k (P,)."""
    shares_K = weights_K / weights_K.sum()
    return by_coordinate(deltas, lambda x_KB: (shares_K @ x_KB.double()).float())
