"""The differential privacy of a run: which noise its rounds get, and what that has cost so far, on disk."""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.aggregation.exact_sum import STEP
from engine.aggregation.ring_encoding import ring_sums, sent_lengths_of
from engine.config.federation import Federation
from engine.messages.errors import RunError
from engine.system.atomic import write_file
from strategies.core.layout import Layout
from strategies.privacy.central import CentralPlan
from strategies.privacy.checks import NoisePlan

Planned = tuple[NoisePlan | None, tuple[str, ...]]  # the noise of a run, and warnings


def plan_noise(federation: Federation, layout: Layout, rows: np.ndarray, steps: int) -> Planned:
    """Returns the noise of a run whose clients have `rows` (N,), and warnings; ValueError if none gives the epsilon.

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
            # One ring for all rounds: a round that sends fewer coordinates fills up with zeros.
            length = max(sum(sent_lengths_of(federation, layout, round_).values()) for round_ in range(rounds))
            plan = dp.plan(cohort, clients, rounds, length, federation.privacy.secagg.bits)
        elif dp.adds_to == "gradients":
            batch = federation.train.batch * federation.train.accumulate
            plan = dp.plan(int(rows.min()), int(rows.sum()), batch, steps)
    messages = (str(warning.message) for warning in caught if issubclass(warning.category, UserWarning))
    return plan, tuple(dict.fromkeys(messages))


def coarse_weights(federation: Federation, layout: Layout, plan: NoisePlan | None, rows: np.ndarray) -> tuple[str, ...]:
    """Returns a warning if a large `privacy.rows_cap` leaves typical clients, of those with `rows` (N,), few steps.

    A typical client has the median of rows, and an update whose P coordinates are the clipping norm over sqrt(P), or
    secure aggregation's bound where that is less. Rounding is off by up to a step.
    """
    privacy, cap = federation.privacy, federation.privacy.rows_cap
    # Distributed noise is far above the ring's steps.
    if cap is None or not privacy.public_weights or federation.strategy.weighs_alike or privacy.dp.adds_to == "ring":
        return ()
    step, size, clip = 1 / STEP, math.inf, math.inf
    if plan is not None and plan.adds_to == "sum":
        clip, size = plan.clip, plan.clip / math.sqrt(max(1, sent_lengths_of(federation, layout, 0)["delta"]))
    if privacy.secure:
        sums = ring_sums(federation, layout, plan, clip, max(2, federation.cohort.largest(len(rows))), 1, 0)
        step, size = 1 / sums.scale("delta"), min(size, privacy.secagg.bound)
    typical = int(min(cap, max(1, np.median(rows))))
    share = step * cap / (typical * size)
    if share <= 0.01:  # int8, which is known to train well, rounds to 1/127 of the largest coordinate
        return ()
    return (
        f"with privacy.rows_cap = {cap} a client with {typical} rows has the weight {typical / cap:.2g}, and rounding "
        f"moves its coordinates by up to {share:.2g} of their size: set privacy.rows_cap to a usual number of rows",
    )


@dataclass
class PrivacyAccount:
    """The noise of a run's rounds and its cost, written to the file `path` before a round's noise is drawn.

    Fresh noise is charged again when a round is run again; noise from the seed is the same noise. `uncopied` in the
    file is how many more rounds may have been charged where it was copied from. `clip` is the next round's clipping
    norm, which an adaptive plan changes. A client takes `steps` noisy steps a round; `unit` is what a client is where
    it is not one person. `warned` is what the user should know, and `statement` is the cost so far in words.
    """

    federation: Federation
    path: Path
    noise_plan: NoisePlan | None = None
    clip: float = 0.0
    steps: int = 0
    unit: str | None = None
    warned: tuple[str, ...] = ()
    charged: int = 0
    statement: str | None = None

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

        ValueError where no noise gives what the recipe asks for; RunError if the cost so far cannot be read.
        """
        privacy, path = federation.privacy, folder / "privacy.json"
        if clip is None:
            clip = privacy.dp.clip if privacy.dp.adds_to == "sum" else 0.0
        plan, warned = plan_noise(federation, layout, rows, steps * federation.rounds)
        if federation.shown_rows is not None:
            warned += (f"{federation.shown_rows}, which privacy would have kept with their clients",)
        warned += coarse_weights(federation, layout, plan, rows)
        account = cls(federation, path, plan, clip, steps, unit, warned)
        if plan is None:
            return account
        try:
            facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            fresh = max(round_, int(facts.get("rounds", 0))) + int(facts.get("uncopied", 0))
            account.charged, account.statement = round_ if privacy.simulated else fresh, facts.get("statement")
        except (ValueError, TypeError, AttributeError) as error:
            why = f"{path}, the record of privacy spent, cannot be read ({error}): start again in another --out"
            raise RunError(why) from error
        return account

    @property
    def central(self) -> CentralPlan | None:
        """The noise that the server adds to the sums, where it does."""
        return self.noise_plan if self.noise_plan is not None and self.noise_plan.adds_to == "sum" else None

    def charge(self) -> dict[str, float]:
        """Charges one more round on disk; returns the cost of all by names of metrics, nothing without noise."""
        plan, federation = self.noise_plan, self.federation
        if plan is None:
            return {}
        self.charged += 1
        total = self.charged * self.steps if plan.adds_to == "gradients" else self.charged
        # Cohorts and batches come from the seed even where noise does not: an adversary who knows it learns more.
        epsilon = plan.spent(total, simulated=federation.privacy.simulated or plan.scheme.sampling != "none")
        weights = federation.privacy.describe_weights(federation.strategy)
        self.statement = f"{epsilon}, {weights}"
        if self.unit is not None and epsilon.unit == "client":
            self.statement += (
                f", where one client is {self.unit}: k clients together have k times this epsilon, "
                "at (e^(k epsilon) - 1) / (e^epsilon - 1) times this delta"
            )
        if federation.shown_rows is not None:
            self.statement += f", outside of epsilon: {federation.shown_rows}"
        facts = {"rounds": self.charged, **vars(epsilon), "weights": weights, "statement": self.statement}
        if math.isinf(epsilon.epsilon):  # which JSON does not have
            facts["epsilon"] = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, json.dumps(facts, indent=1).encode())
        multiplier = plan.noise_multiplier
        return {"epsilon": epsilon.epsilon, "delta": epsilon.delta, "noise_multiplier": multiplier, "clip": self.clip}
