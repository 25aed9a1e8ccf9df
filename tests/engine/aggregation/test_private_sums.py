"""Client-level privacy as a mechanism: every rule with every weighting, chain of transforms and kind of noise.

What planning accepts must hold: one client more, less or in another's place moves the sums by no more than epsilon is
computed from; nothing is sent where no noise goes; and without training the model stays where it was.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from engine.aggregation.accumulators import RingSum
from engine.aggregation.exact_sum import STEP, ExactSum, merge
from engine.aggregation.privacy_account import plan_noise
from engine.aggregation.ring_encoding import FIGURE, ring_aggregate, ring_sums, rounding, sent_masks_of
from engine.aggregation.ring_shard import RingShard
from engine.aggregation.server_step import server_step
from engine.config.federation import Federation
from engine.config.privacy import Privacy, SecAgg
from engine.config.train import Sgd, Train
from experiments.cli.contract import engine_stored, engine_sum
from strategies import Strategies
from strategies.contract.case import LORA, METRICS, Case, drawn
from strategies.core.base import Rule
from strategies.core.cohort import PoissonCohort, UniformCohort
from strategies.core.protocol import GLOBAL, ClientState, ServerState, Update
from strategies.lora.hetlora import HetLora
from strategies.lora.products import FlexLora
from strategies.privacy.central import WITHIN, AdaptiveDp, CentralDp, CentralPlan
from strategies.privacy.distributed import DistributedDp
from strategies.robust.rules import CenteredClipping
from strategies.secagg.ring import Sums
from strategies.transforms.chain import Clip, Transform, encode
from strategies.transforms.lossy import Int8, Projection, Sign, TopK

CLIP, CAP, ROUNDS = 0.3, 50, 20
ROWS = [1, 20, 2000, 30, 70]  # of each client, below and above the cap
EXPECTED, LARGEST = 2, 4
ARRIVING = [2, 1, 0, 4]  # clients, round after round: full, thin, empty, overfull
LOSSY = [TopK(share=0.3), Int8(block=4), Sign(block=4), Projection(share=0.5)]
CHAINS: list[tuple[Transform, ...]] = [
    (),
    (Clip(bound=0.7),),
    *((transform,) for transform in LOSSY),
    *((replace(transform, error_feedback=False),) for transform in LOSSY),
    (Clip(bound=0.7), TopK(share=0.3), Int8(block=4)),
    (TopK(share=0.5), Sign(block=4), Clip(bound=0.7)),
    (Projection(share=0.5), Int8(block=4)),
    (Int8(block=4), Projection(share=0.5)),
]
KEYS = {"clip": CLIP, "joint": True, "sampling": "none", "delta": 1e-3}
NOISES = {
    "central": (CentralDp(noise_multiplier=1.0, **KEYS), "off"),
    "adaptive": (AdaptiveDp(noise_multiplier=1.0, quantile_noise=2.0, **KEYS), "off"),
    "central in a ring": (CentralDp(noise_multiplier=1.0, **KEYS), "ideal"),
    "adaptive in a ring": (AdaptiveDp(noise_multiplier=1.0, quantile_noise=2.0, **KEYS), "ideal"),
    "distributed": (DistributedDp(noise_multiplier=1.0, survivors=0.5, **KEYS), "ideal"),
}


def weightings(kind: type) -> list[Rule]:
    if "weighting" not in kind.__dataclass_fields__:
        return [kind()]
    return [kind(weighting=weighting) for weighting in get_args(get_type_hints(kind)["weighting"])]


RULES = [
    *(rule for kind in get_args(Strategies) for rule in weightings(kind)),
    FlexLora(sketch=1),
    HetLora(weighting="uniform", gamma=1.0),
]
SETTINGS = ("weighting", "sketch", "gamma")
EACH_RULE = pytest.mark.parametrize(
    "rule", RULES, ids=lambda rule: " ".join([rule.kind, *(str(getattr(rule, name, "")) for name in SETTINGS)]).strip()
)


@dataclass(frozen=True, eq=False)
class Mechanism:
    """A recipe that planning accepts, with its plan; noise is left out of what `part` and `play` compute."""

    federation: Federation
    plan: object

    @property
    def rule(self) -> Rule:
        return self.federation.strategy

    @property
    def central(self) -> bool:
        return isinstance(self.plan, CentralPlan)

    def sums(self, round_: int) -> Sums | None:
        secure = self.federation.privacy.secure
        return ring_sums(self.federation, LORA, self.plan, CLIP, LARGEST, 100, round_) if secure else None

    def train(
        self, state: ServerState, client: int, client_state: ClientState, scale: float
    ) -> tuple[Update, ClientState]:
        """A client's update after all transforms, and its next state; its training is its own and longer than CLIP."""
        broadcast = self.rule.broadcast(state)
        change = scale * (1 + client) * drawn(LORA, 1 + state.round, client)
        ends = {run: start + change for run, start in self.rule.starts(broadcast, client_state).items()}
        metrics = METRICS | {"learned": 10.0, "tokens": 12.0}
        weight = self.federation.privacy.weight(ROWS[client], max(ROWS))
        update = Update(client, weight, ends.pop(GLOBAL) - broadcast.params, metrics=metrics)
        update, after = self.rule.finish(update, broadcast, client_state, ends)
        update, kept = encode(self.federation.transforms, update, broadcast, client_state)
        return update, after | kept

    def part(self, update: Update, clip: float, round_: int) -> np.ndarray | ExactSum:
        """What a client adds to the round's sum."""
        sums = self.sums(round_)
        if self.central:
            update = self.plan.encode(update, clip if sums is None else clip - rounding(sums))
        masks = sent_masks_of(self.federation, LORA, round_)
        for name, vector in {"delta": update.delta, **update.extras}.items():
            assert name not in masks or not vector[~masks[name]].any(), "it sends something where no noise goes"
        if sums is None:
            exact = ExactSum()
            exact.add(update)
            return exact
        ring = RingSum(RingShard(sums, masks), self.federation, self.plan, round_)
        ring.add(update)
        return ring.masked([])

    def vector(self, parts: list[np.ndarray | ExactSum], round_: int) -> dict[str, np.ndarray]:
        """The sums that the server sees, by name, in units of 1 (of the ring's steps under distributed noise)."""
        sums = self.sums(round_)
        if sums is None:
            steps = [taken.section(0, 1000).vectors for taken in parts]
            return {name: sum(step[name] for step in steps) / STEP for name in steps[0]}
        totals = sums.decode(np.sum(parts, axis=0, dtype=np.uint32)).sums
        return {name: total.astype(float) for name, total in totals.items() if not name.startswith(FIGURE)}

    def play(
        self, state: ServerState, arriving: list[int], client_states: list[ClientState], clip: float
    ) -> tuple[ServerState, float]:
        """A round in which nobody's training changes anything."""
        parts = []
        for client in arriving:
            update, client_states[client] = self.train(state, client, client_states[client], 0.0)
            parts.append(self.part(update, clip, state.round))
        sums, aggregate = self.sums(state.round), None
        if parts and sums is None:
            aggregate = merge([taken.take() for taken in parts])
        elif parts:
            totals = sums.decode(np.sum(parts, axis=0, dtype=np.uint32))
            aggregate, _ = ring_aggregate(totals, self.federation, LORA, self.plan, state.round)
        sent_masks, plan = sent_masks_of(self.federation, LORA, state.round), self.plan if self.central else None
        return server_step(state, aggregate, plan, clip, self.federation, LORA, sent_masks)


def without_noise(plan):
    """The plan with the same clip and the same ring, and no noise."""
    if isinstance(plan, CentralPlan):
        return replace(plan, noise_multiplier=0.0)
    return replace(plan, ring=replace(plan.ring, deviation=0))


def accepted(federation: Federation, rule: Rule, noise: str, chains=CHAINS, expected=EXPECTED) -> Iterator[Mechanism]:
    """The rule with each chain of transforms that planning lets it have under this noise, and with Poisson cohorts.

    Rules that these do not go with have cohorts of a fixed size.
    """
    dp, mode = NOISES[noise]
    bounds = {} if mode == "off" or dp.kind == "distributed" else dict.fromkeys(rule.beside(LORA), 1.0)
    privacy = Privacy(secagg=SecAgg(mode=mode, bounds=bounds), dp=dp, rows_cap=CAP)
    train = Train(steps=3, batch=2, optimizer=Sgd(lr=0.1))
    for chain in chains:
        for cohort in (PoissonCohort(size=expected, cap=LARGEST), UniformCohort(size=expected)):
            try:
                recipe = replace(
                    federation,
                    strategy=rule,
                    transforms=chain,
                    privacy=privacy,
                    train=train,
                    rounds=ROUNDS,
                    cohort=cohort,
                )
            except ValueError:
                continue
            yield Mechanism(recipe, plan_noise(recipe, LORA, np.array(4 * ROWS), 3)[0])
            break


def begun(it: Mechanism, rounds: int = 1) -> tuple[ServerState, list[ClientState]]:
    """A trained state of rules on adapters, a fresh one of others, whose momentum would go on; clients have trained."""
    case = Case(it.rule, LORA, engine_sum, engine_stored)
    state, client_states = case.start(), [{} for _ in ROWS]
    for round_ in range(rounds):
        broadcast, updates = replace(state, round=round_), []
        for client, client_state in enumerate(client_states):
            update, client_states[client] = it.train(broadcast, client, client_state, 0.5)
            updates.append(update)
    if it.rule.needs_lora:
        state = case.after(rounds).state
    return state, client_states


def lengths(plan, difference: dict[str, np.ndarray]) -> float:
    """How far one client moves the sums, in standard deviations of their noise times z."""
    within = difference.pop(WITHIN, np.zeros(1))
    rest = math.sqrt(sum(float(vector @ vector) for vector in difference.values()))
    if not hasattr(plan, "update_noise"):
        return rest / CLIP
    return math.hypot(rest / (plan.update_noise * CLIP), float(within[0]) / plan.quantile_noise)


def hold_to_the_clip(quiet: Mechanism, parts: list[np.ndarray | ExactSum], round_: int) -> None:
    """Three clients take part; each is removed, the fourth is added, and takes each one's place."""
    plan, cohort, newcomer = quiet.plan, [0, 1, 2], 3

    def moved(clients: list[int]) -> dict[str, np.ndarray]:
        seen = quiet.vector([parts[client] for client in clients], round_)
        return {name: vector - whole[name] for name, vector in seen.items()}

    whole = quiet.vector(parts[:3], round_)
    for client in cohort:
        left = [other for other in cohort if other != client]
        removed, added, replaced = moved(left), moved([*cohort, newcomer]), moved([*left, newcomer])
        if quiet.central:
            assert 0 < lengths(plan, removed) <= 1 + 1e-9 and 0 < lengths(plan, added) <= 1 + 1e-9
            assert 0 < lengths(plan, replaced) <= 2 + 2e-9  # "replace one" counts on twice the clip
            continue
        for difference in (removed["noisy"], added["noisy"]):
            assert 0 < np.linalg.norm(difference) <= plan.noise.norm
            assert np.abs(difference).sum() <= plan.noise.norm_l1


@pytest.mark.parametrize("noise", NOISES)
@EACH_RULE
def test_one_client_moves_the_sums_by_no_more_than_epsilon_counts_on(
    federation: Federation, rule: Rule, noise: str
) -> None:
    for it in accepted(federation, rule, noise):
        state, client_states = begun(it)
        # An adaptive clip's plan says how much noise each of its two sums gets; `part` draws none of it.
        quiet = it if it.central else Mechanism(it.federation, without_noise(it.plan))
        for round_ in (state.round, state.round + 1)[: 1 + rule.freezes]:  # RoLoRA freezes the other half
            at = replace(state, round=round_)
            updates = [it.train(at, client, client_states[client], 1.0)[0] for client in range(4)]
            hold_to_the_clip(quiet, [quiet.part(update, CLIP, round_) for update in updates], round_)


@EACH_RULE
def test_a_client_at_rest_sends_zeros_whatever_it_has_kept(federation: Federation, rule: Rule) -> None:
    for it in accepted(federation, rule, "central"):
        _, client_states = begun(it)  # with what transforms keep
        now = Case(rule, LORA, engine_sum, engine_stored).after(2)
        state, trained = now.state, now.client_states
        for client in (0, 1):
            update, after = it.train(state, client, client_states[client] | trained[client], 0.0)
            assert not any(vector.any() for vector in (update.delta, *update.extras.values())), it.federation.transforms
            again, _ = it.train(replace(state, round=state.round + 1), client, after, 0.0)
            assert not any(vector.any() for vector in (again.delta, *again.extras.values())), it.federation.transforms


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("rule", [kind() for kind in get_args(Strategies)], ids=lambda rule: rule.kind)
def test_without_training_the_model_stays_for_twenty_rounds(federation: Federation, rule: Rule, noise: str) -> None:
    # Clients at rest send zeros, so that chains differ by their way back alone.
    for it in accepted(federation, rule, noise, [(), (Projection(share=0.5), Int8(block=4)), (TopK(share=0.5),)]):
        state, client_states = begun(it)
        varies = it.federation.cohort.kind == "poisson"
        least = 0 if it.central else it.plan.least  # below, a secured round has no result
        quiet, clip = Mechanism(it.federation, without_noise(it.plan)), CLIP
        case, before = Case(rule, LORA, engine_sum, engine_stored), state
        for round_ in range(ROUNDS):
            arriving = max(least, min(ARRIVING[round_ % 4], LARGEST if varies else EXPECTED))
            state, clip = quiet.play(state, list(range(arriving)), client_states, clip)
        assert state.round == before.round + ROUNDS
        for old, new in zip(case.effective(before), case.effective(state), strict=True):
            assert torch.equal(old, new), it.federation.transforms


@pytest.mark.parametrize("rule", [kind() for kind in get_args(Strategies)], ids=lambda rule: rule.kind)
def test_momentum_does_not_grow_where_more_clients_come_than_expected(federation: Federation, rule: Rule) -> None:
    """Momentum may go on without training, with the same step at most, however many clients at rest take part."""
    for it in accepted(federation, rule, "central", [()], expected=1):
        case, quiet = Case(rule, LORA, engine_sum, engine_stored), Mechanism(it.federation, without_noise(it.plan))
        now = case.after(2)
        state, client_states = now.state, now.client_states
        client_states, moved = client_states[: len(ROWS)], []
        arriving = list(range(LARGEST if it.federation.cohort.kind == "poisson" else 1))
        for _ in range(ROUNDS):
            before = state
            state, _ = quiet.play(state, arriving, client_states, 100.0)
            olds, news = (case.effective(at) if rule.needs_lora else [at.params] for at in (before, state))
            moved.append(math.hypot(*(float((new - old).norm()) for old, new in zip(olds, news, strict=True))))
        assert max(moved) <= 1.01 * moved[0]


@pytest.mark.parametrize("rule", [CenteredClipping(), HetLora(weighting="uniform")], ids=lambda rule: rule.kind)
def test_rules_whose_clients_at_rest_send_something_are_refused(federation: Federation, rule: Rule) -> None:
    """At rest, a client sends centered clipping's last step back, and HetLoRA's tail if its own was cut."""
    sent, _ = Case(rule, LORA, engine_sum, engine_stored).after(2).cohort(scale=0.0)
    assert any(update.delta.any() for update in sent)
    with pytest.raises(
        ValueError, match=r"clients that have not trained send .*\"fedavgm\", or \"hetlora\" with gamma = 1"
    ):
        replace(federation, strategy=rule, privacy=Privacy(dp=NOISES["central"][0]))
