"""Differential privacy in the driver: the plan of a run, its noise, and what has been spent of the budget, on disk."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.aggregation.ring_encoding import live_lengths, noise, travelling
from engine.config.federation import Federation
from engine.system.atomic import write_file
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Mask
from strategies.privacy.accounting import Epsilon
from strategies.privacy.adaptive import WITHIN, AdaptivePlan
from strategies.privacy.central import CentralDp, CentralPlan
from strategies.privacy.distributed import DistributedDp, DistributedPlan
from strategies.privacy.per_example import ExampleDp, ExamplePlan

Plan = CentralPlan | DistributedPlan | ExamplePlan


@dataclass(frozen=True)
class Planned:
    """A plan of noise, and what the user should know about it."""

    plan: Plan
    warned: tuple[str, ...]


def plan_noise(federation: Federation, layout: Layout, clients: int, fewest_rows: int, steps: int) -> Planned | None:
    """The noise of a run with `clients` that may be drawn; None without differential privacy.

    Example-level noise is for the client with the fewest rows, and for `steps` local steps in all its rounds. Takes
    seconds where noise is to be found for an epsilon. ValueError where there is none.
    """
    dp, rounds, cohort = federation.privacy.dp, federation.rounds, federation.cohort
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan: Plan
        if isinstance(dp, CentralDp):
            plan = dp.plan(cohort, clients, rounds)
        elif isinstance(dp, DistributedDp):
            # One ring for all rounds: a round with fewer live coordinates fills up with zeros.
            length = max(sum(live_lengths(federation, layout, round_).values()) for round_ in range(rounds))
            plan = dp.plan(cohort, clients, rounds, length, federation.privacy.secagg.bits)
        elif isinstance(dp, ExampleDp):
            plan = dp.plan(fewest_rows, federation.train.batch * federation.train.accumulate, steps)
        else:
            return None
    said = tuple(str(one.message) for one in caught if issubclass(one.category, UserWarning))
    return Planned(plan, tuple(dict.fromkeys(said)))


@dataclass
class Spending:
    """What noisy sums have cost so far, in `path`: written before a round's noise is drawn.

    Fresh noise is charged again when a round is run again; noise from the seed is the same noise. `uncopied` in the
    file is how many more rounds may have been charged where it was copied from. `weights` says where clients' weights
    come from.
    """

    path: Path
    plan: Plan
    simulated: bool
    weights: str
    charged: int = 0
    said: str | None = None

    @classmethod
    def open(cls, path: Path, plan: Plan, weights: str, *, simulated: bool, round_: int) -> "Spending":
        """Goes on from what is on disk, for a run that goes on from `round_`."""
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            fresh = max(round_, int(found.get("rounds", 0))) + int(found.get("uncopied", 0))
            charged = round_ if simulated else fresh
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, which says what privacy has been spent, cannot be read ({error}): start anew in another --out"
            ) from error
        return cls(path, plan, simulated, weights, charged, found.get("statement"))

    def charge(self, steps: int) -> Epsilon:
        """Counts one more round, in which a client takes `steps` noisy steps; what all cost, once it is on disk."""
        self.charged += 1
        total = self.charged * steps if isinstance(self.plan, ExamplePlan) else self.charged
        # Cohorts and batches come from the seed even where noise does not: who knows it is told more.
        sampled = self.plan.scheme.sampling != "none"
        epsilon = self.plan.spent(total, simulated=self.simulated or sampled)
        self.said = f"{epsilon}, {self.weights}"
        said = {"rounds": self.charged, **vars(epsilon), "weights": self.weights, "statement": self.said}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, json.dumps(said, indent=1).encode())
        return epsilon


def noisy(
    aggregate: Aggregate | None,
    plan: CentralPlan,
    clip: float,
    federation: Federation,
    layout: Layout,
    round_: int,
    live: Mapping[str, Mask],
    rank: int = 0,
) -> tuple[Aggregate, float]:
    """The sums with the server's noise, and the next clipping norm; a round without clients is noise alone.

    Of a shard, `layout` and the masks `live` are what a shard's vectors have, and each `rank` has noise of its own.
    """
    if aggregate is None:
        lengths = federation.strategy.beside(layout) | ({WITHIN: 1} if isinstance(plan, AdaptivePlan) else {})
        extras = {name: torch.zeros(length) for name, length in lengths.items()}
        aggregate = Aggregate(0.0, torch.zeros(travelling(federation, layout)), extras, 0)
    return plan.decode(aggregate, clip, noise(federation, round_, -1 - rank), live)
