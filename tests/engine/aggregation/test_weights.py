"""How much one client counts: hand-computed weights, and what the sums of a round are without it."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import numpy as np
import pytest
import torch

from datasets_partition.store.build import build
from engine.aggregation.accumulators import RingSum
from engine.aggregation.exact_sum import ExactSum, merge
from engine.aggregation.ring_encoding import ring_aggregate, ring_sums, sent_masks_of
from engine.aggregation.ring_shard import RingShard
from engine.config.federation import Federation
from engine.config.privacy import Privacy, SecAgg
from engine.config.train import Sgd, Train
from engine.messages.broadcast import BroadcastMessage
from engine.system.page_protection import release
from engine.workers.worker import ClientActor
from experiments.cli.contract import engine_stored, engine_sum
from strategies import Strategies
from strategies.averaging.fedavg import FedAvg
from strategies.averaging.reweighting import FedNova, QFedAvg
from strategies.contract.case import LORA, Case, drawn
from strategies.core.base import Rule
from strategies.core.protocol import GLOBAL, Update
from strategies.lora.hetlora import HetLora
from strategies.lora.products import FedExLora, FlexLora, Flora
from strategies.privacy.budget import ExampleDp
from strategies.privacy.central import AdaptiveDp, CentralDp
from strategies.privacy.distributed import DistributedDp

CAP, CLIP = 50, 1.0
LARGEST = 20
ROWS = dict.fromkeys(range(LARGEST), 20) | {LARGEST: 2000}  # of each client of a population
SGD = Train(steps=3, batch=2, optimizer=Sgd(lr=0.1))
CENTRAL = CentralDp(noise_multiplier=0.0, clip=CLIP, joint=True)
SUMS = SecAgg(mode="ideal")


def test_weights_by_hand() -> None:
    capped = Privacy(dp=CENTRAL, rows_cap=CAP)
    assert [capped.weight(rows, 2000) for rows in (1, 20, 50, 2000)] == [0.02, 0.4, 1.0, 1.0]
    assert Privacy(secagg=SUMS, rows_cap=CAP).weight(20, 2000) == 0.4
    # Without a cap all count the same, and no other client's rows are asked for.
    assert Privacy(dp=CENTRAL).weight(20, 2000) == Privacy(secagg=SUMS).weight(20, 2000) == 1.0
    # What is private of a row is so before it leaves the client.
    assert Privacy().weight(20, 2000) == 0.01
    assert Privacy(dp=ExampleDp(noise_multiplier=1.0)).weight(20, 2000) == 0.01
    assert Privacy(rows_cap=CAP).weight(2000, 50) == 1.0


def test_the_cohort_s_largest_client_weighs_more_than_half() -> None:
    def full(rows: list[int], largest: int, **privacy: Any) -> float:
        return Privacy(**privacy).full_rows(np.array(rows, np.int64), largest)

    assert full([10, 1_000_000], 1_000_000) == full([500_001], 1_000_000) == 1_000_000
    assert full([500_000], 1_000_000) == 500_000  # exactly half
    assert full([10, 20], 1_000_000) == 1_000_000 / 2**15
    assert Privacy().weight(20, full([10, 20], 1_000_000)) == 0.65536  # 20 * 2^15 / 1,000,000
    assert full([1], 2**31 - 1) == (2**31 - 1) / 2**30
    assert full([], 7) == 7 / 4  # nobody takes part, as in an empty Poisson cohort
    assert full([10, 2000], 2000, rows_cap=CAP) == CAP and full([10], 2000, rows_cap=CAP) == CAP / 4
    # Under privacy nothing about the cohort's rows reaches a client.
    assert math.isnan(full([10], 2000, rows_cap=CAP, secagg=SUMS)) and math.isnan(full([10], 2000, dp=CENTRAL))


@pytest.mark.parametrize("largest", [20, 1_000_000, 5_000_000, 2**31 - 1])
@pytest.mark.parametrize("rule", [FedAvg(), FedNova(), QFedAvg(), FlexLora(), Flora()], ids=lambda rule: rule.kind)
def test_a_huge_client_elsewhere_makes_no_sum_coarser(rule: Rule, largest: int) -> None:
    """Clients move by 1e-6; each is off by 2^-41, with a weight above 1/2 (FedNova's above 1/6, after three steps)."""
    rows, running, exact, weights = (10, 20), ExactSum(), dict[str, torch.Tensor](), 0.0
    full_rows = Privacy().full_rows(np.array(rows), largest)
    broadcast = rule.broadcast(replace(rule.init(drawn(LORA, 0), LORA), population=2))
    for client, number in enumerate(rows):
        metrics = {"steps": 3.0, "rates": 0.3, "loss_before": 1.0}
        delta = 1e-6 * drawn(LORA, 1, client).clamp(-1, 1)
        update, _ = rule.finish(Update(client, number / full_rows, delta, metrics=metrics), broadcast, {})
        running.add(update)
        weights += update.weight
        for name, vector in {"delta": update.weight * update.delta.double(), **update.extras}.items():
            exact[name] = exact.get(name, torch.zeros(1)) + vector.double()
    aggregate = merge([running.take()])
    assert aggregate.weight == pytest.approx(weights, rel=1e-6)
    for name, vector in {"delta": aggregate.total, **aggregate.extras}.items():
        size = weights if name == "bend" else exact[name].abs().max()  # qfedavg adds it to the weights
        assert (vector - exact[name]).abs().max() <= 3e-6 * size, name


@pytest.mark.parametrize("cap", [None, 6], ids=["rows over the largest", "capped"])
def test_a_slot_weighs_its_clients_before_their_rule_sees_them(small_recipe, tmp_path: Path, cap: int | None) -> None:
    recipe = small_recipe("clients.slots=1", *([] if cap is None else [f"privacy.rows_cap={cap}"]))
    data = recipe.data
    store = build(data.source, data.partition, data.splits, recipe.seed, data.cache)
    slot = ClientActor(recipe, tmp_path)
    _, packed, base = slot.load_base()
    layout, initial = slot.attach(packed, base, slot.tokenize(store, None), first=True)
    state = recipe.strategy.init(torch.from_numpy(initial), layout)
    message = replace(BroadcastMessage.of(recipe.strategy.broadcast(state)), full_rows=8.0)
    slot.run([(0,), (1,), (7,)], message)
    release(base)
    rows = slot.attached.runner.tokens.counts("train").tolist()
    expected = [min(rows[client], cap or rows[client]) / 8 for client in (0, 1, 7)]
    assert min(rows) < 6 < max(rows)
    assert merge([slot.sum.take()]).weight == pytest.approx(sum(expected), rel=1e-6)


@dataclass(frozen=True)
class Unbounded(FedAvg):
    """A rule of somebody's own that says what its weights are."""

    bounded_weights: ClassVar[bool] = False


DISTRIBUTED = DistributedDp(noise_multiplier=1.0)
PRIVATE = [
    Privacy(secagg=SUMS),
    Privacy(dp=CENTRAL),
    Privacy(dp=AdaptiveDp(noise_multiplier=0.1)),
    Privacy(secagg=SUMS, dp=DISTRIBUTED),
]


@pytest.mark.parametrize("privacy", PRIVATE, ids=["secagg", "central", "adaptive", "distributed"])
def test_weights_that_nothing_public_bounds_are_refused(federation: Federation, privacy: Privacy) -> None:
    with pytest.raises(
        ValueError, match=r'by their rows, .* set privacy\.rows_cap, or strategy\.weighting = "uniform"'
    ):
        replace(federation, privacy=privacy)
    replace(federation, privacy=replace(privacy, rows_cap=CAP))
    replace(federation, strategy=FedAvg(weighting="uniform"), privacy=privacy)
    capped = replace(privacy, rows_cap=CAP)
    for strategy in (HetLora(gamma=1.0), Unbounded(weighting="uniform")):
        with pytest.raises(ValueError, match="weighs clients without a bound"):
            replace(federation, strategy=strategy, privacy=capped)
    replace(federation, strategy=HetLora(weighting="uniform", gamma=1.0), privacy=capped)


def test_the_statement_says_where_weights_come_from(federation: Federation) -> None:
    capped = replace(federation, privacy=Privacy(dp=CENTRAL, rows_cap=CAP))
    assert capped.privacy.describe_weights(capped.strategy) == "weights min(rows, 50) / 50"
    assert capped.privacy.describe_weights(FedAvg(weighting="uniform")) == "weight 1 for each client"
    rows = replace(federation, privacy=Privacy(dp=ExampleDp(noise_multiplier=1.0)))
    assert "outside of epsilon" in rows.privacy.describe_weights(rows.strategy)


# Those that tune a kind of model.peft of their own weigh as FedAvg does.
WEIGHED = [kind for kind in get_args(Strategies) if "weighting" in kind.__dataclass_fields__ and not kind.tunes]
SUMMED = [kind for kind in WEIGHED if kind.reads == "sum"]
UNPRUNED = {HetLora: {"gamma": 1.0}}
RULES = [
    kind(weighting=weighting, **UNPRUNED.get(kind, {}))
    for kind in SUMMED
    for weighting in get_args(get_type_hints(kind)["weighting"])
]


def sent(federation: Federation, client: int, rows: int, most: int) -> Update:
    """What a client adds to the sums; its training is its own, far longer than the clip, and of a step for ten rows."""
    strategy, plan = federation.strategy, CENTRAL.plan(federation.cohort, 100, 1)
    broadcast = strategy.broadcast(replace(strategy.init(drawn(LORA, 0), LORA), population=len(ROWS)))
    steps = math.ceil(rows / 10)
    metrics = {"steps": float(steps), "rates": 0.1 * steps, "loss_before": 1.0}
    update = Update(client, federation.privacy.weight(rows, most), 10 * drawn(LORA, 1, client), metrics=metrics)
    ends = {run: start for run, start in strategy.starts(broadcast, {}).items() if run != GLOBAL}
    return plan.encode(strategy.finish(update, broadcast, {}, ends)[0], CLIP)


def summed(federation: Federation, rows: dict[int, int]) -> torch.Tensor:
    """All sums of a round in which everybody of this population takes part, as one vector."""
    updates = [sent(federation, client, number, max(rows.values())) for client, number in rows.items()]
    parts = [[update.delta.double() * update.weight, *update.extras.values()] for update in updates]
    return torch.stack([torch.cat(part) for part in parts]).sum(0)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}-{rule.weighting}")
def test_one_client_moves_the_sums_by_no_more_than_epsilon_counts_on(federation: Federation, rule: Rule) -> None:
    private = {"train": SGD, "privacy": Privacy(dp=CENTRAL, rows_cap=CAP)}
    if not (rule.bounded_weights and rule.rests_at_zero) or (rule.beside(LORA) and not rule.extras_are_changes):
        with pytest.raises(
            ValueError, match=r"weighs clients without|which is no change of the model|have not trained"
        ):
            replace(federation, strategy=rule, **private)
        return
    federation = replace(federation, strategy=rule, **private)
    whole = summed(federation, ROWS)
    for client in (0, LARGEST):  # all but the last are alike
        without = {other: rows for other, rows in ROWS.items() if other != client}
        removed = float((whole - summed(federation, without)).norm())
        added = float((summed(federation, ROWS | {LARGEST + 1: 5000}) - whole).norm())
        # Another one in its place moves the sums by up to twice the clip, which is what "replace one" is charged with.
        replaced = float((whole - summed(federation, without | {LARGEST + 1: 5000})).norm())
        assert 0 < removed <= CLIP * (1 + 1e-6) and 0 < added <= CLIP * (1 + 1e-6)
        assert 0 < replaced <= 2 * CLIP * (1 + 1e-6)


@pytest.mark.parametrize(
    "rule", [FedAvg(), FlexLora(), FlexLora(sketch=2), FedExLora(), Flora(), FedNova()], ids=lambda rule: rule.kind
)
def test_where_nobody_moves_the_model_stays_for_twenty_secured_rounds(federation: Federation, rule: Rule) -> None:
    bounds = dict.fromkeys(rule.beside(LORA), 50.0)
    secagg = replace(SUMS, bounds=bounds)
    federation = replace(federation, strategy=rule, train=SGD, privacy=Privacy(secagg=secagg, rows_cap=CAP))
    rows = dict(enumerate([5, 20, 50, 2000]))
    case = Case(rule, LORA, engine_sum, engine_stored)
    state = start = case.start()
    sums = ring_sums(federation, LORA, None, 0.0, len(rows), 100, 0)
    metrics = {"steps": 1.0, "rates": 0.1, "loss": 1.0, "learned": 10.0, "tokens": 12.0}
    for _ in range(20):
        broadcast = rule.broadcast(state)
        ring = RingSum(RingShard(sums, sent_masks_of(federation, LORA, state.round)), federation, None, state.round)
        for client, number in rows.items():
            weight = federation.privacy.weight(number, max(rows.values()))
            still = rule.starts(broadcast, {})[GLOBAL] - broadcast.params
            update, _ = rule.finish(Update(client, weight, still, metrics=metrics), broadcast, {})
            ring.add(update)
        totals = sums.decode(ring.masked([]))
        assert totals.weight == pytest.approx(0.1 + 0.4 + 1.0 + 1.0, abs=1e-6)
        state = rule.apply(state, ring_aggregate(totals, federation, LORA, None, state.round)[0])
    assert state.round == 20
    for before, after in zip(case.effective(start), case.effective(state), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
