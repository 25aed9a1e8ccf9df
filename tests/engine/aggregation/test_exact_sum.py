import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.aggregation.exact_sum import (
    BLOCK,
    LIMIT,
    ROOM,
    STEP,
    ExactSum,
    NonFiniteUpdate,
    PartialSum,
    cut,
    merge,
    merge_sections,
)
from strategies.core.protocol import Aggregate, Update
from strategies.core.sharding import Partition

SIZE = 5
floats = st.floats(-100, 100, width=32)
updates = st.builds(
    lambda weight, delta, extra: Update(0, weight, torch.tensor(delta), {"extra": torch.tensor(extra)}),
    st.floats(2**-20, 1),
    st.lists(floats, min_size=SIZE, max_size=SIZE),
    st.lists(floats, min_size=2, max_size=2),
)


def partial(*given: Update) -> PartialSum:
    running = ExactSum()
    for update in given:
        running.add(update)
    return running.take()


def bits(aggregate: Aggregate) -> tuple[object, ...]:
    extras = {name: extra.numpy().tobytes() for name, extra in aggregate.extras.items()}
    return aggregate.total.numpy().tobytes(), extras, aggregate.weight, aggregate.count


@settings(deadline=None)
@given(st.lists(updates, min_size=1, max_size=12), st.data())
def test_no_order_and_no_grouping_into_slots_changes_a_bit(given: list[Update], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(given))
    slots = [ExactSum() for _ in range(data.draw(st.integers(1, 4)))]
    for update in shuffled:
        data.draw(st.sampled_from(slots)).add(update)
    assert bits(merge([slot.take() for slot in slots])) == bits(merge([partial(*given)]))


@settings(deadline=None)
@given(st.lists(updates, min_size=1, max_size=12))
def test_it_agrees_with_an_exactly_rounded_sum(given: list[Update]) -> None:
    aggregate = merge([partial(*given)])
    grid = len(given) * 2.0**-41  # each addend may move by half a step
    for i, total in enumerate(aggregate.total.tolist()):
        exact = math.fsum(update.weight * update.delta[i].item() for update in given)
        assert total == pytest.approx(exact, rel=1e-6, abs=grid)
    assert aggregate.weight == pytest.approx(math.fsum(update.weight for update in given), rel=1e-6)
    assert aggregate.total.dtype == torch.float32


@settings(deadline=None)
@given(st.lists(st.floats(-2000, 2000, width=32), min_size=1, max_size=20), st.floats(2**-20, 1))
def test_small_and_large_values_are_rounded_alike(values: list[float], weight: float) -> None:
    def sums(*beside: float) -> list[int]:
        """The grid's integers of the values, beside a value that may need the wider range."""
        vector = torch.tensor([*values, *beside])
        return partial(Update(0, weight, vector)).vectors["delta"].tolist()[: len(values)]

    expected = [round(np.float64(np.float32(value)) * (weight * STEP)) for value in values]
    assert sums() == sums(1.1 * ROOM / weight) == expected


def test_by_hand() -> None:
    update = Update(0, 0.5, torch.tensor([2.0, -4.0]), {"c": torch.tensor([1.0])})
    two = Update(1, 0.25, torch.tensor([8.0, 0.0]), {"c": torch.tensor([3.0])})
    aggregate = merge([partial(update), partial(two)])
    assert aggregate.total.tolist() == [3, -2]
    assert aggregate.extras["c"].tolist() == [4], "extras are not weighted"
    assert (aggregate.weight, aggregate.count, aggregate.each) == (0.75, 2, None)


def test_vectors_of_several_lengths_are_refused_before_anything_is_added() -> None:
    running, good = ExactSum(), Update(0, 0.5, torch.ones(3), {"c": torch.ones(2)})
    running.add(good)
    for wrong in (Update(1, 1.0, torch.ones(2)), Update(1, 1.0, torch.ones(3), {"c": torch.ones(3)})):
        with pytest.raises(ValueError, match=r"values for client 1, and \d for others: .* must be of one length"):
            running.add(wrong)
    assert bits(merge([running.take()])) == bits(merge([partial(good)]))


def test_parts_of_sums_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.aggregation.exact_sum.BLOCK", 4)
    running = [ExactSum(), ExactSum()]
    for client in range(5):
        delta, extra = torch.arange(21.0) / (client + 3), torch.full((6,), 0.1 * client)
        running[client % 2].add(Update(client, 0.3, delta, {"c": extra}))
    sections = [[total.section(first, 8) for total in running] for first in (0, 8, 16)]
    assert [len(section[0].vectors["c"]) for section in sections] == [6, 0, 0]
    copied = [
        [replace(taken, vectors={n: v.copy() for n, v in taken.vectors.items()}) for taken in section]
        for section in sections
    ]
    merged = merge_sections(copied)
    assert merged is not None and bits(merged) == bits(merge([total.take() for total in running]))
    assert copied == [[], [], []], "what has been merged is let go"


def test_cut_shards_what_is_as_long_as_delta_and_keeps_the_rest_whole() -> None:
    """Beside a gang, whose ranks have shards of the one and all of the other, each rank can go on."""
    weights, partition = torch.tensor([0.5, 6.0]), Partition((((0, 1), (3, 4)), ((1, 3),)))
    plain = partial(Update(0, 0.5, torch.tensor([2.0, 4.0, 6.0, 8.0]), {"c": torch.arange(4.0), "weights": weights}))
    for rank, total, c in ((0, [1, 4], [0, 3]), (1, [2, 3], [1, 2])):
        shard = Update(1, 0.25, torch.full((2,), 40.0), {"c": torch.ones(2), "weights": 2 * weights})
        aggregate = merge([cut(plain, partition, rank), partial(shard)])
        assert aggregate.total.tolist() == [x + 10 for x in total]
        assert aggregate.extras["c"].tolist() == [x + 1 for x in c]
        assert aggregate.extras["weights"].tolist() == [1.5, 18]
        assert (aggregate.weight, aggregate.count) == (0.75, 2)


def test_a_slot_without_updates_hands_empty_shards_in() -> None:
    partition = Partition((((0, 1), (3, 4)), ((1, 3),)))
    shard = cut(ExactSum().take(), partition, 1)
    assert shard.count == 0
    assert merge([shard, partial(Update(1, 0.5, torch.ones(2)))]).count == 1


def test_vectors_longer_than_a_block() -> None:
    delta = torch.arange(2.0 * BLOCK + 3)
    assert torch.equal(merge([partial(Update(0, 1.0, delta), Update(1, 1.0, delta))]).total, 2 * delta)


def test_closing_starts_again_at_nothing() -> None:
    running = ExactSum()
    running.add(Update(0, 1.0, torch.ones(2)))
    first = running.take()
    running.add(Update(1, 1.0, torch.full((2,), 5.0)))
    assert merge([running.take()]).total.tolist() == [5, 5]
    assert merge([first]).total.tolist() == [1, 1]


@pytest.mark.parametrize(
    "bad",
    [
        Update(9, 1.0, torch.tensor([1.0, math.nan])),
        Update(9, 1.0, torch.tensor([-math.inf, 1.0])),
        Update(9, math.nan, torch.ones(2)),
        Update(9, math.inf, torch.ones(2)),
        Update(9, 1.0, torch.ones(2), {"c": torch.tensor([math.nan])}),
    ],
    ids=["nan", "infinity", "nan weight", "infinite weight", "nan extra"],
)
def test_what_is_not_finite_is_refused_and_leaves_no_trace(bad: Update) -> None:
    running, good = ExactSum(), Update(0, 0.5, torch.tensor([1.0, 2.0]), {"c": torch.ones(1)})
    running.add(good)
    with pytest.raises(NonFiniteUpdate, match="its update holds NaN or infinity"):
        running.add(bad)
    ours, expected = running.take(), partial(good)
    assert (ours.weight, ours.count, ours.bound) == (expected.weight, expected.count, expected.bound)
    assert {name: sums.tolist() for name, sums in ours.vectors.items()} == {
        name: sums.tolist() for name, sums in expected.vectors.items()
    }


@pytest.mark.parametrize("late", [math.nan, math.inf, LIMIT, 1.5 * ROOM], ids=["nan", "infinity", "huge", "no fault"])
def test_blocks_before_a_bad_one_are_taken_out_again(late: float) -> None:
    good, delta = Update(0, 0.5, torch.full((2 * BLOCK + 3,), 0.3)), torch.full((2 * BLOCK + 3,), 0.1)
    delta[0], delta[-1] = 1.5 * ROOM, late  # blocks of both kinds of rounding
    running, bad = ExactSum(), Update(1, 1.0, delta, {})
    running.add(good)
    if late < LIMIT:
        running.add(bad)
        assert running.take().vectors["delta"][-1] == round(late * STEP) + round(np.float32(0.3) * (0.5 * STEP))
        return
    with pytest.raises(NonFiniteUpdate):
        running.add(bad)
    assert np.array_equal(running.take().vectors["delta"], partial(good).vectors["delta"])


@pytest.mark.parametrize("huge", [LIMIT, 1e38])
def test_the_range_is_checked_before_anything_is_added(huge: float) -> None:
    running = ExactSum()
    running.add(Update(0, 1.0, torch.ones(1)))
    with pytest.raises(NonFiniteUpdate, match="beyond the exact sum's range"):  # of one client: it alone is left out
        running.add(Update(1, 1.0, torch.tensor([huge])))
    assert merge([running.take()]).total.tolist() == [1]
    running.add(Update(0, 1.0, torch.tensor([LIMIT / 2])))
    with pytest.raises(ValueError, match="beyond the exact sum's range") as caught:  # of several: nobody's fault alone
        running.add(Update(1, 1.0, torch.tensor([LIMIT / 2])))
    assert not isinstance(caught.value, NonFiniteUpdate)
    assert merge([running.take()]).total.tolist() == [LIMIT / 2]


def test_the_range_is_checked_over_all_slots() -> None:
    half = partial(Update(0, 0.5, torch.tensor([LIMIT])))
    with pytest.raises(ValueError, match="range"):
        merge([half, half])
    just_below = torch.tensor([LIMIT - 1])
    assert merge([partial(Update(0, 1.0, just_below))]).total.tolist() == [LIMIT - 1]


def test_nothing_to_average_is_an_error() -> None:
    for partials in ([], [partial()], [partial(), partial()]):
        with pytest.raises(ValueError, match="no client of the cohort gave an update"):
            merge(partials)


def test_idle_slots_do_not_count() -> None:
    worked = partial(Update(0, 1.0, torch.ones(2)))
    assert bits(merge([partial(), worked, partial()])) == bits(merge([worked]))


def test_partial_sums_may_be_read_only_and_stay_as_they_are() -> None:
    """What comes out of Ray's object store cannot be written."""
    given = [partial(Update(k, 1.0, torch.full((3,), k + 1.0))) for k in range(3)]
    frozen = []
    for closed in given:
        vectors = {name: sums.copy() for name, sums in closed.vectors.items()}
        for sums in vectors.values():
            sums.flags.writeable = False
        frozen.append(replace(closed, vectors=vectors))
    aggregate = merge(frozen)
    assert aggregate.total.tolist() == [6, 6, 6]
    aggregate.total.add_(1)  # the aggregate is the caller's own
    assert all(np.array_equal(a.vectors["delta"], b.vectors["delta"]) for a, b in zip(given, frozen, strict=True))
