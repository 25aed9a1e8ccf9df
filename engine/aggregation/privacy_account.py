"""The differential privacy of a run: which noise its rounds get, and what that has cost so far, on disk."""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.aggregation.exact_sum import STEP
from engine.aggregation.ring_encoding import live_lengths, ring_sums
from engine.config.federation import Federation
from engine.messages.errors import RunError
from engine.system.atomic import write_file
from strategies.core.layout import Layout
from strategies.privacy.accounting import Epsilon
from strategies.privacy.central import CentralPlan
from strategies.privacy.checks import NoisePlan

COARSE = 0.01  # of a coordinate; int8, which is known to train well, rounds to 1/127 of the largest one


class Planned(NamedTuple):
    """A plan of noise, None without differential privacy, and what the user should know about it."""

    plan: NoisePlan | None
    warned: tuple[str, ...] = ()


def plan_noise(federation: Federation, layout: Layout, rows: np.ndarray, steps: int) -> Planned:
    """Returns the noise of a run whose clients have `rows` (N,); ValueError where none gives the epsilon asked for.

    Example-level noise is for the client with the fewest rows, and for `steps` local steps in all its rounds; its delta
    is for the rows of all clients. Takes seconds where the noise for an epsilon is searched.
    """
    dp, rounds, cohort, clients = federation.privacy.dp, federation.rounds, federation.cohort, len(rows)
    plan: NoisePlan | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if dp.adds_to == "sum":
            plan = dp.plan(cohort, clients, rounds)
        elif dp.adds_to == "ring":
            # One ring for all rounds: a round with fewer live coordinates fills up with zeros.
            length = max(sum(live_lengths(federation, layout, round_).values()) for round_ in range(rounds))
            plan = dp.plan(cohort, clients, rounds, length, federation.privacy.secagg.bits)
        elif dp.adds_to == "gradients":
            batch = federation.train.batch * federation.train.accumulate
            plan = dp.plan(int(rows.min()), int(rows.sum()), batch, steps)
    messages = (str(warning.message) for warning in caught if issubclass(warning.category, UserWarning))
    return Planned(plan, tuple(dict.fromkeys(messages)))


def coarse_weights(federation: Federation, layout: Layout, plan: NoisePlan | None, rows: np.ndarray) -> str | None:
    """Returns a warning if a large `privacy.rows_cap` leaves typical clients, of those with `rows` (N,), few steps.

    A typical client has the median of rows, and an update whose P coordinates are the clipping norm over sqrt(P), or
    secure aggregation's bound where that is less. Rounding is off by up to a step.
    """
    privacy, cap = federation.privacy, federation.privacy.rows_cap
    if cap is None or not privacy.public_weights or federation.strategy.weighs_alike:
        return None
    if plan is not None and plan.adds_to == "ring":  # its noise is far above the ring's steps
        return None
    step, size, clip = 1 / STEP, math.inf, math.inf
    if plan is not None and plan.adds_to == "sum":
        clip = plan.clip
        size = clip / math.sqrt(max(1, live_lengths(federation, layout, 0)["delta"]))
    if privacy.secure:
        sums = ring_sums(federation, layout, plan, clip, max(2, federation.cohort.largest(len(rows))), 1, 0)
        step, size = 1 / sums.scale("delta"), min(size, privacy.secagg.bound)
    typical = int(min(cap, max(1, np.median(rows))))
    share = step * cap / (typical * size)
    if share <= COARSE:
        return None
    return (
        f"with privacy.rows_cap = {cap} a client with {typical} rows has the weight {typical / cap:.2g}, and rounding "
        f"moves its coordinates by up to {share:.2g} of their size: set privacy.rows_cap to a usual number of rows"
    )


@dataclass
class Spending:
    """What noisy sums have cost so far, in the file `path`, which is written before a round's noise is drawn.

    Fresh noise is charged again when a round is run again; noise from the seed is the same noise. `uncopied` in the
    file is how many more rounds may have been charged where it was copied from. `weights` says where clients' weights
    come from, `outside` what the run shows beside the noisy sums (None: nothing), `unit` what a client is where it is
    not one person, and `statement` is what all of it comes to, in words.
    """

    path: Path
    plan: NoisePlan
    simulated: bool
    weights: str
    charged: int = 0
    statement: str | None = None
    outside: str | None = None
    unit: str | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        plan: NoisePlan,
        weights: str,
        *,
        simulated: bool,
        round_: int,
        outside: str | None = None,
        unit: str | None = None,
    ) -> "Spending":
        """Continues from what is on disk, for a run that continues from `round_`; RunError if it cannot be read."""
        try:
            facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            fresh = max(round_, int(facts.get("rounds", 0))) + int(facts.get("uncopied", 0))
            charged = round_ if simulated else fresh
            return cls(path, plan, simulated, weights, charged, facts.get("statement"), outside, unit)
        except (ValueError, TypeError, AttributeError) as error:
            raise RunError(
                f"{path}, the record of privacy spent, cannot be read ({error}): start again in another --out"
            ) from error

    def charge(self, steps: int) -> Epsilon:
        """Counts one more round, in which a client takes `steps` noisy steps, on disk; returns the cost of all."""
        self.charged += 1
        total = self.charged * steps if self.plan.adds_to == "gradients" else self.charged
        # Cohorts and batches come from the seed even where noise does not: an adversary who knows it learns more.
        sampled = self.plan.scheme.sampling != "none"
        epsilon = self.plan.spent(total, simulated=self.simulated or sampled)
        self.statement = f"{epsilon}, {self.weights}"
        if self.unit is not None and epsilon.unit == "client":
            self.statement += (
                f", where one client is {self.unit}: k clients together have k times this epsilon, "
                "at (e^(k epsilon) - 1) / (e^epsilon - 1) times this delta"
            )
        if self.outside is not None:
            self.statement += f", outside of epsilon: {self.outside}"
        facts = {"rounds": self.charged, **vars(epsilon), "weights": self.weights, "statement": self.statement}
        if math.isinf(epsilon.epsilon):  # which JSON does not have
            facts["epsilon"] = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, json.dumps(facts, indent=1).encode())
        return epsilon


@dataclass
class PrivacyAccount:
    """The noise of a run's rounds and what they have cost; without differential privacy both are None.

    `clip` is the next round's clipping norm, which an adaptive plan changes from round to round. A client takes `steps`
    noisy steps a round. `warned` is what the user should know.
    """

    plan: NoisePlan | None = None
    spending: Spending | None = None
    clip: float = 0.0
    steps: int = 0
    warned: tuple[str, ...] = ()

    @classmethod
    def open(
        cls,
        federation: Federation,
        layout: Layout,
        folder: Path,
        rows: np.ndarray,
        steps: int,
        round_: int = 0,
        clip: float | None = None,
        unit: str | None = None,
    ) -> "PrivacyAccount":
        """Plans the noise of a run in `folder` whose clients have `rows` (N,), and continues from `round_`.

        ValueError where no noise gives what the recipe asks for.
        """
        privacy, shown = federation.privacy, federation.shown_rows
        if clip is None:
            clip = privacy.dp.clip if privacy.dp.adds_to == "sum" else 0.0
        plan, warned = plan_noise(federation, layout, rows, steps * federation.rounds)
        if shown is not None:
            warned += (f"{shown}, which privacy would have kept with their clients",)
        if coarse := coarse_weights(federation, layout, plan, rows):
            warned += (coarse,)
        if plan is None:
            return cls(clip=clip, steps=steps, warned=warned)
        path, weights = folder / "privacy.json", privacy.describe_weights(federation.strategy)
        spending = Spending.open(
            path, plan, weights, simulated=privacy.simulated, round_=round_, outside=shown, unit=unit
        )
        return cls(plan, spending, clip, steps, warned)

    @property
    def central(self) -> CentralPlan | None:
        """The noise that the server adds to the sums, where it does."""
        return self.plan if self.plan is not None and self.plan.adds_to == "sum" else None

    @property
    def statement(self) -> str | None:
        """What the noise of all rounds has cost, in words."""
        return self.spending.statement if self.spending else None

    def charge(self) -> dict[str, float]:
        """Charges one more round; returns what it has cost by the names of metrics, nothing without noise."""
        if self.plan is None or self.spending is None:
            return {}
        epsilon, multiplier = self.spending.charge(self.steps), self.plan.noise_multiplier
        return {"epsilon": epsilon.epsilon, "delta": epsilon.delta, "noise_multiplier": multiplier, "clip": self.clip}
