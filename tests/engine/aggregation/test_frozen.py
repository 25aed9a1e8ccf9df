"""What a rule freezes gets no noise and no place in secure sums. Legend: P parameters, S of a rank's shard."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from engine.aggregation.accumulators import RingSum
from engine.aggregation.privacy_account import plan_noise
from engine.aggregation.ring_encoding import (
    FIGURE,
    NOISY,
    ring_aggregate,
    ring_sums,
    rounding,
    sent_masks_of,
)
from engine.aggregation.ring_shard import RingShard
from engine.aggregation.server_step import noisy, server_step
from engine.config.privacy import Privacy, SecAgg
from engine.config.train import Sgd, Train
from strategies.averaging.drift import Scaffold
from strategies.averaging.fedavg import FedAvg
from strategies.core.cohort import UniformCohort
from strategies.core.layout import LORA_A, LORA_B, Layout
from strategies.core.lora_algebra import slices
from strategies.core.protocol import Update
from strategies.core.sharding import Partition
from strategies.lora.frozen_half import FedSvd, FfaLora, RoLora
from strategies.lora.products import Flora
from strategies.personalized.personal_models import FedDpa, FedSaLora
from strategies.privacy.central import AdaptiveDp, CentralDp
from strategies.privacy.distributed import DistributedDp
from strategies.secagg.masks import Masks

LAYOUT = Layout(
    (
        "norm",
        "q.lora_A.default.weight",
        "q.lora_B.default.weight",
        "v.lora_A.default.weight",
        "v.lora_B.default.weight",
    ),
    ((100,), (4, 300), (500, 4), (4, 200), (300, 4)),
    scale=2.0,
)
CLIENTS, MOST_TOKENS, CLIP, DELTA = 4, 100, 0.5, 1e-3
TOLD = {"loss": 1.0, "learned": 10.0, "tokens": 12.0, "steps": 2.0, "rates": 0.2}
UNIFORM = {"weighting": "uniform"}
KINDS = {
    "central": CentralDp(noise_multiplier=1.0, clip=CLIP, delta=DELTA, joint=True),
    "adaptive": AdaptiveDp(noise_multiplier=1.0, clip=CLIP, delta=DELTA, quantile_noise=2.0, joint=True),
    "distributed": DistributedDp(noise_multiplier=1.0, clip=CLIP, delta=DELTA, survivors=1.0, joint=True),
}


@dataclass(frozen=True)
class HalfScaffold(Scaffold):
    """SCAFFOLD on B alone, on whole vectors or on parts of them."""

    extras_are_changes: ClassVar[bool] = True  # so that it may have noise

    def sent_masks(self, round_, layout):
        """All but A, of both sums."""
        mask = FfaLora().sent_masks(round_, layout)["delta"]
        return {"delta": mask, "c": mask}


def frozen_in(strategy, round_):
    """The coordinates that must stay, from the tensors' names alone."""
    mask = torch.zeros(LAYOUT.size, dtype=torch.bool)
    marker = {FfaLora: LORA_A, RoLora: (LORA_A, LORA_B)[round_ % 2], FedSaLora: LORA_B}[type(strategy)]
    for part in slices(LAYOUT, marker):
        mask[part] = True
    return mask


def federated(federation, strategy, dp=None, mode="off"):
    """The federation under a rule, with cohorts of four and four rounds."""
    bounds = dict.fromkeys(strategy.beside(LAYOUT), 8.0) if mode == "ideal" else {}
    privacy = Privacy(secagg=SecAgg(mode=mode, bounds=bounds), rows_cap=1)
    privacy = replace(privacy, dp=dp) if dp else privacy
    train, cohort = Train(steps=1, optimizer=Sgd(lr=0.1)), UniformCohort(size=CLIENTS)
    return replace(federation, strategy=strategy, privacy=privacy, rounds=4, cohort=cohort, train=train)


def drawn(seed):
    """A small vector (P,)."""
    return 0.01 * torch.from_numpy(np.random.default_rng(seed).standard_normal(LAYOUT.size)).float()


def updates_of(strategy, state, still=False):
    """What four clients send in a round."""
    broadcast = strategy.broadcast(state)
    deltas = [torch.zeros(LAYOUT.size) if still else drawn(10 * state.round + k) for k in range(CLIENTS)]
    return [strategy.finish(Update(k, 1.0, x, metrics=TOLD), broadcast, {})[0] for k, x in enumerate(deltas)]


def secured(recipe, plan, state, updates):
    """The sums of a round's clients through the ring, and what the server makes of them."""
    sums = ring_sums(recipe, LAYOUT, plan, CLIP, CLIENTS, MOST_TOKENS, state.round)
    sent_masks = sent_masks_of(recipe, LAYOUT, state.round)
    ring = RingSum(RingShard(sums, sent_masks), recipe, plan, state.round)
    for update in updates:
        ring.add(update)
    totals = sums.decode(ring.masked([]))
    return sums, ring_aggregate(totals, recipe, LAYOUT, plan, state.round)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "strategy", [FfaLora(**UNIFORM), RoLora(**UNIFORM), FedSaLora(**UNIFORM)], ids=lambda s: s.kind
)
def test_what_is_frozen_stays_bit_for_bit_and_all_else_gets_the_noise(federation, strategy, kind):
    """Clients change nothing, so that what moves is noise: of z clip / clients in each coordinate that is sent."""
    recipe = federated(federation, strategy, KINDS[kind], "ideal" if kind == "distributed" else "off")
    plan = plan_noise(recipe, LAYOUT, np.full(100, 4), 12)[0]
    state, clip = strategy.init(drawn(99), LAYOUT), CLIP
    for round_ in range(4):
        before, frozen, sent_masks = state, frozen_in(strategy, round_), sent_masks_of(recipe, LAYOUT, round_)
        if kind == "distributed":
            _, aggregate = secured(recipe, plan, state, updates_of(strategy, state, still=True))
            state, _ = server_step(state, aggregate, None, clip, recipe, LAYOUT, sent_masks)
            deviation = CLIP / CLIENTS
        else:
            deviation = (plan.update_noise if kind == "adaptive" else 1.0) * clip / CLIENTS
            state, clip = server_step(state, None, plan, clip, recipe, LAYOUT, sent_masks)
        moved = state.params - before.params
        assert torch.equal(state.params[frozen], before.params[frozen])
        assert moved[~frozen].all()
        for part in (slice(0, 100), *slices(LAYOUT, LORA_A), *slices(LAYOUT, LORA_B)):
            if not frozen[part].any():
                noise, size = moved[part], part.stop - part.start
                assert noise.var().item() == pytest.approx(deviation**2, rel=6 * (2 / size) ** 0.5)
                assert abs(noise.mean().item()) < 6 * deviation / size**0.5


@pytest.mark.parametrize("kind", ["central", "distributed"])
def test_the_local_adapter_of_feddpa_gets_no_noise(federation, kind):
    strategy = FedDpa(**UNIFORM)
    recipe = federated(federation, strategy, KINDS[kind], "ideal" if kind == "distributed" else "off")
    plan = plan_noise(recipe, LAYOUT, np.full(100, 4), 12)[0]
    state = strategy.init(drawn(99), LAYOUT)
    if kind == "central":
        aggregate, _ = noisy(None, plan, CLIP, recipe, LAYOUT, 0, sent_masks_of(recipe, LAYOUT, 0))
    else:
        still = [Update(k, 1.0, torch.zeros(LAYOUT.size), metrics=TOLD) for k in range(CLIENTS)]
        _, aggregate = secured(recipe, plan, state, still)
    for pair in LAYOUT.lora_pairs(strategy.apply(state, aggregate).params - state.params):
        assert pair.a_RI[:2].all() and pair.b_OR[:, :2].all()
        assert not pair.a_RI[2:].any() and not pair.b_OR[:, 2:].any()


def test_control_variates_of_frozen_coordinates_get_no_noise(federation):
    recipe = federated(federation, HalfScaffold(), KINDS["central"])
    plan = plan_noise(recipe, LAYOUT, np.full(100, 4), 12)[0]
    sent_masks = recipe.strategy.sent_masks(0, LAYOUT)["delta"]
    aggregate, _ = noisy(None, plan, CLIP, recipe, LAYOUT, 0, sent_masks_of(recipe, LAYOUT, 0))
    assert aggregate.extras["c"][sent_masks].all() and not aggregate.extras["c"][~sent_masks].any()
    assert not torch.equal(aggregate.total, aggregate.extras["c"])


def test_the_ring_holds_live_coordinates_alone(federation):
    """By hand: 100 + 2000 + 1200 coordinates without A, 100 + 1200 + 800 without B; count, weight, four figures."""
    lengths = [sum(part.stop - part.start for part in slices(LAYOUT, half)) for half in (LORA_A, LORA_B)]
    assert lengths == [2000, 3200]

    def length(strategy, round_=0, dp=None):
        recipe = federated(federation, strategy, dp, "ideal")
        plan = plan_noise(recipe, LAYOUT, np.full(100, 4), 12)[0] if dp else None
        return ring_sums(recipe, LAYOUT, plan, CLIP, CLIENTS, MOST_TOKENS, round_)

    assert length(FedAvg()).length == 2 + 5300 + 4
    assert length(FfaLora()).length == length(FedSvd()).length == 2 + 3300 + 4
    assert [length(RoLora(), round_).length for round_ in (0, 1, 2)] == [2 + 3300 + 4, 2 + 2100 + 4, 2 + 3300 + 4]
    assert length(FedSaLora()).length == 2 + 2100 + 4
    assert length(FedDpa()).length == 2 + 100 + 2600 + 4
    assert length(HalfScaffold()).length == 2 + 2 * 3300 + 4
    # Rounding adds to the norm for each coordinate: less than a step of the ring, for fewer coordinates.
    whole, half = length(FedAvg()), length(FfaLora())
    assert rounding(half) ** 2 / rounding(whole) ** 2 == pytest.approx(3300 / 5300)
    # The rotation is over the coordinates that are sent, filled up to a power of two: 4096 in place of 8192.
    rings = [length(strategy, 1, KINDS["distributed"]) for strategy in (FedAvg(**UNIFORM), FfaLora(**UNIFORM))]
    assert [sums.sums[0].length for sums in rings] == [8192, 4096]
    # One ring for all rounds of RoLoRA, whose halves are not as long.
    both = [length(RoLora(**UNIFORM), round_, KINDS["distributed"]).sums[0] for round_ in (0, 1)]
    assert both[0] == both[1] and (both[0].name, both[0].length) == (NOISY, 4096)


def test_where_products_travel_beside_the_adapters_take_no_place(federation):
    recipe = federated(federation, Flora(), mode="ideal")
    sums = ring_sums(recipe, LAYOUT, None, CLIP, CLIENTS, MOST_TOKENS, 0).sums
    lengths = {entry.name: entry.length for entry in sums if not entry.name.startswith(FIGURE)}
    assert lengths == {"delta": 100, "product": 500 * 300 + 300 * 200}


@pytest.mark.parametrize("strategy", [FfaLora(), RoLora(), FedSaLora(), FedDpa()], ids=lambda s: s.kind)
def test_the_secured_sum_is_the_plain_one_within_the_ring_steps(federation, strategy):
    recipe = federated(federation, strategy, mode="ideal")
    state = replace(strategy.init(drawn(99), LAYOUT), round=1)
    mask = strategy.sent_masks(1, LAYOUT)["delta"]
    sent = [Update(k, 0.25 * (k + 1), drawn(k) * mask, metrics=TOLD) for k in range(CLIENTS)]
    sums, aggregate = secured(recipe, None, state, sent)
    plain = sum(update.weight * update.delta.double() for update in sent)
    apart = (aggregate.total.double() - plain).abs()
    assert 0 < apart.max() < CLIENTS * 1.01 / sums.scale("delta")
    assert not aggregate.total[~mask].any() and aggregate.weight == pytest.approx(2.5)


@pytest.mark.parametrize("strategy", [FfaLora(), RoLora(), HalfScaffold()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("cut", ["contiguous", "by_tensor"])
def test_shards_of_a_secured_sum_are_the_whole_bit_for_bit(federation, strategy, cut):
    recipe = federated(federation, strategy, mode="ideal")
    state = strategy.init(drawn(99), LAYOUT)
    mask, beside = strategy.sent_masks(0, LAYOUT)["delta"], strategy.beside(LAYOUT)
    sent = [
        Update(k, 0.5, drawn(k) * mask, {name: drawn(20 + k) * mask for name in beside}, TOLD) for k in range(CLIENTS)
    ]
    sums, whole = secured(recipe, None, state, sent)
    partition = Partition.contiguous(LAYOUT.size, 3, 2) if cut == "contiguous" else Partition.by_tensor(LAYOUT, 3)
    sent_masks, shards = sent_masks_of(recipe, LAYOUT, 0), []
    for rank in range(3):
        place = RingShard(sums, sent_masks, partition, rank)
        ring = RingSum(place, recipe, None, 0)
        for update in sent:
            extras = {name: partition.cut(extra, rank) for name, extra in update.extras.items()}
            ring.add(replace(update, delta=partition.cut(update.delta, rank), extras=extras))
        masks = Masks(sums.bits, added=(bytes(32),))
        removals = Masks(sums.bits, subtracted=(bytes(32),))
        _, shard = place.unmasked([ring.masked([masks])[place.head :]], removals, CLIENTS, 2.0)
        shards.append(shard.aggregate())
        assert len(shards[-1].total) == len(partition.cut(torch.zeros(LAYOUT.size), rank))
    assert torch.equal(partition.join([shard.total for shard in shards]), whole.total)
    for name in beside:
        assert torch.equal(partition.join([shard.extras[name] for shard in shards]), whole.extras[name])
    held = sum(RingShard(sums, sent_masks, partition, rank).length for rank in range(3))
    assert held == sums.length + 2 * 2  # each shard has the head of two coordinates, and the first one's counts


@pytest.mark.parametrize("cut", ["contiguous", "by_tensor"])
def test_a_shards_noise_is_on_its_live_coordinates(federation, cut):
    recipe = federated(federation, HalfScaffold(), KINDS["central"])
    plan = plan_noise(recipe, LAYOUT, np.full(100, 4), 12)[0]
    partition = Partition.contiguous(LAYOUT.size, 2) if cut == "contiguous" else Partition.by_tensor(LAYOUT, 2)
    mask, totals = recipe.strategy.sent_masks(0, LAYOUT)["delta"], []
    for rank in range(2):
        sent_masks = {name: partition.cut(mask, rank) for name, mask in sent_masks_of(recipe, LAYOUT, 0).items()}
        shard = Layout(("shard",), ((len(partition.cut(mask, rank)),),))
        totals.append(noisy(None, plan, CLIP, recipe, shard, 0, sent_masks, rank)[0].total)
    total = partition.join(totals)
    assert total[mask].all() and not total[~mask].any()
    assert total[mask].var().item() == pytest.approx(CLIP**2, rel=6 * (2 / 3300) ** 0.5)


def test_fewer_coordinates_change_no_epsilon(federation):
    """The noise in each coordinate is as before. A shorter ring is finer, and rounds away less of epsilon."""
    for kind, dp in KINDS.items():
        mode = "ideal" if kind == "distributed" else "off"
        recipes = (federated(federation, rule, dp, mode) for rule in (FedAvg(**UNIFORM), FfaLora(**UNIFORM)))
        plans = [plan_noise(recipe, LAYOUT, np.full(100, 4), 12)[0] for recipe in recipes]
        spent = [plan.spent(4, simulated=True).epsilon for plan in plans]
        if kind == "distributed":
            assert spent[1] <= spent[0] == pytest.approx(spent[1], rel=1e-6)
        else:
            assert spent[1] == spent[0] > 0
