"""How a round's work is cut and handed out, without Ray where that is possible."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from engine.aggregation.exact_sum import ExactSum, PartialSum
from engine.messages.events import Fault
from engine.messages.reports import Report
from engine.messages.tasks import Work
from engine.rounds.planner import Costs
from engine.rounds.secure_round import placement
from engine.scheduling.dispatcher import ENOUGH, REFILLED, Dispatcher, units_of
from engine.scheduling.pool import MAX_DEATHS, Pool


def test_units_are_a_function_of_the_cohort_and_its_steps() -> None:
    clients, steps = np.array([5, 3, 9, 1, 7]), np.array([2, 8, 2, 9, 4])
    assert units_of(clients, steps, 2) == [(1, 3), (7, 5), (9,)]
    assert units_of(clients, steps, 1) == [(1,), (3,), (7,), (5,), (9,)]
    assert units_of(clients, steps, 8) == [(1, 3, 7, 5, 9)]
    assert units_of(clients[:0], steps[:0], 8) == []
    many = units_of(np.arange(1000), np.ones(1000), 4)
    assert {len(unit) for unit in many} <= {REFILLED * 4 - 1, REFILLED * 4} and len(many) >= ENOUGH
    assert sorted(client for unit in many for client in unit) == list(range(1000))


def test_placement_gives_each_client_one_slot_and_balances() -> None:
    costs = [3.0, 1, 4, 1, 5, 9, 2]
    placed = placement([(client,) for client in range(7)], costs, range(3))
    assert sorted(client for units in placed.values() for (client,) in units) == list(range(7))
    loads = [sum(costs[client] for (client,) in units) for units in placed.values()]
    assert max(loads) - min(loads) <= 2
    assert set(placement([(0,)], [1.0], [1, 2])) == {1}
    assert placement([(0, 1), (2,), (3, 4)], [5.0, 1, 3], range(2)) == {0: ((0, 1),), 1: ((3, 4), (2,))}


def test_seconds_are_learned_as_a_line_through_steps_and_tokens() -> None:
    costs = Costs()
    steps, tokens = np.array([1.0, 2, 5, 9]), np.array([100.0, 900, 50, 400])
    assert costs.seconds(steps, tokens).tolist() == (tokens / 1000).tolist()  # nothing is known yet
    for _ in range(3):
        costs.learn(steps, tokens, 0.02 * steps + 0.001 * tokens)
    seconds = Costs(np.array(costs.sums.tolist())).seconds(np.array([3.0]), np.array([10.0]))
    np.testing.assert_allclose(seconds, [0.02 * 3 + 0.001 * 10], rtol=1e-6)
    costs.learn(steps, tokens, np.array([1.0, 0, 0, 0]))  # nonsense gives no negative costs
    assert (costs.seconds(steps, tokens) >= 0).all()


def test_seconds_that_steps_and_tokens_do_not_explain_are_spread_over_the_tokens() -> None:
    costs = Costs()
    costs.learn(np.array([1.0, 9.0]), np.array([900.0, 100.0]), np.array([9.0, 0.1]))
    assert costs.seconds(np.array([5.0]), np.array([100.0])) == pytest.approx(1.0, rel=0.02)


def test_clients_that_are_all_alike_teach_no_order() -> None:
    costs = Costs()
    costs.learn(np.full(3, 4.0), np.full(3, 100.0), np.array([1.0, 1.1, 0.9]))
    short, long = costs.seconds(np.array([4.0, 8.0]), np.array([100.0, 200.0]))
    assert long == 2 * short > 0


class Light:
    """A slot that only answers, dies of units that have `fatal` clients, and hangs on `slow` ones.

    If there are `marks` to make, it dies no more often than there are.
    """

    def __init__(self, fatal: dict[int, int], slow: int, pace: float, marks: list[Path]) -> None:
        self.fatal, self.slow, self.pace, self.marks = fatal, slow, pace, marks

    def run(self, chunk: list[tuple[int, ...]]) -> list[int]:
        for unit in chunk:
            if any(client in unit and len(unit) > size for client, size in self.fatal.items()):
                left = [mark for mark in self.marks if not mark.exists()]
                for mark in left[:1]:
                    mark.touch()
                if left or not self.marks:
                    os._exit(1)
            time.sleep(60 if self.slow in unit else self.pace)
        return [client for unit in chunk for client in unit]

    def run_each(self, chunk: list[tuple[int, ...]], message: str) -> list[object]:
        clients = self.run(chunk)
        return [[Report(client, {}) for client in clients], *(f"update of {client}" for client in clients)]

    def section_of_sum(self, first: int, size: int) -> PartialSum:
        return ExactSum().section(first, size)

    def forget_sum(self) -> None:
        """Nothing was added."""


class LightPool:
    """Two such slots, the first of them slow until it is made anew; `died` says how often that was."""

    def __init__(
        self,
        fatal: dict[int, int],
        slow: int = -1,
        timeout_s: float | None = None,
        pace: float = 0.0,
        marks: list[Path] | None = None,
        retries: int = 1,
    ) -> None:
        self.fatal, self.timeout_s, self.patience_s, self.alive = fatal, timeout_s, None, [0, 1]
        self.pace, self.marks = pace, marks or []
        self.died, self.deaths, self.faults = 0, 0, list[Fault]()
        self.kind_of = [0, 0]
        self.federation = SimpleNamespace(clients=SimpleNamespace(retries=retries))
        self.actors = [self._spawn(slow), self._spawn(-1)]

    def _spawn(self, slow):  # type: ignore[no-untyped-def]
        actor = ray.remote(Light).options(num_cpus=0).remote(self.fatal, slow, self.pace, self.marks)
        ray.get(actor.run.remote([]))
        return actor

    def kinds_for(self, clients: np.ndarray) -> np.ndarray:
        return np.zeros(len(clients), np.int64)

    def lost_with_node(self, slot: int) -> bool:
        return False

    def replace(self, slot: int, error: Exception) -> None:
        self.died, self.deaths = self.died + 1, self.deaths + 1
        assert self.deaths <= MAX_DEATHS
        ray.kill(self.actors[slot])
        self.actors[slot] = self._spawn(-1)


def pulled(pool: LightPool, units: list[tuple[int, ...]]) -> tuple[list[int], list[tuple[int, ...]], list[int]]:
    """Returns the finished clients, the units that they were in, and the clients that were given up."""
    dispatcher = Dispatcher(
        pool,  # type: ignore[arg-type]
        units,
        lambda unit: 1.0,
        lambda actor, chunk: actor.run.remote(chunk),
        give_up=lambda client, why: client,
    )
    finished = dispatcher.run().values()
    for actor in pool.actors:
        ray.kill(actor)
    return (
        sorted(client for of_slot in finished for client in of_slot.results),
        sorted(unit for of_slot in finished for unit in of_slot.units),
        dispatcher.given_up,
    )


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_a_client_that_ends_its_slots_is_given_up(full: bool) -> None:
    if not full:
        pytest.skip("one under a rule that reads each update is tried")
    pool = LightPool({7: 0})
    clients, _, given_up = pulled(pool, [(client,) for client in range(20)])
    assert given_up == [7] and clients == [client for client in range(20) if client != 7]
    assert 2 <= pool.died <= 3


class LightSlots(LightPool, Pool):
    """Such slots under a rule that reads each update."""

    timeout_s = None

    def __init__(self, fatal: dict[int, int]) -> None:
        super().__init__(fatal)
        self.federation.strategy = SimpleNamespace(reads="each")
        self.later, self.partition = [], None
        self.worker_kinds = (SimpleNamespace(lanes=False),)
        self.patience = SimpleNamespace(answer_s=None)


@pytest.mark.usefixtures("ray_session")
def test_who_is_given_up_leaves_no_update() -> None:
    pool, clients = LightSlots({3: 0}), np.arange(6)
    worked = pool.train(Work(clients, np.ones(6), np.ones(6)), ray.put("broadcast"), lanes=1)
    for actor in pool.actors:
        ray.kill(actor)
    assert {client: ray.get(update) for client, update in worked.each.items()} == {
        client: f"update of {client}" for client in (0, 1, 2, 4, 5)
    }
    assert [report.client for report in worked.reports if report.failed] == [3]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_more_such_clients_than_deaths_are_forgiven_in_a_row(full: bool) -> None:
    if not full:
        pytest.skip("one such client is tried")
    fatal = [3, 8, 15, 16, 30]
    pool = LightPool(dict.fromkeys(fatal, 0))
    clients, _, given_up = pulled(pool, [(client,) for client in range(40)])
    assert sorted(given_up) == fatal and len(clients) == 35 and pool.died > MAX_DEATHS


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_a_unit_that_ends_its_slots_is_halved_until_it_does_not(full: bool) -> None:
    if not full:
        pytest.skip("a quarter of a minute")
    pool = LightPool({5: 2})
    clients, units, given_up = pulled(pool, [(0, 1), (2, 3, 4, 5, 6, 7), (8, 9)])
    assert given_up == [] and clients == list(range(10))
    assert units == [(0, 1), (2, 3, 4), (5,), (6, 7), (8, 9)]
    assert [(fault.kind, fault.who) for fault in pool.faults] == [("lanes", "2, 3, 4, 5, 6, 7"), ("lanes", "5, 6, 7")]


@pytest.mark.usefixtures("ray_session")
def test_a_unit_whose_slots_die_no_more_often_than_is_tried_again_stays_whole(tmp_path: Path) -> None:
    pool = LightPool({5: 2}, marks=[tmp_path / name for name in ("one", "two", "three")], retries=3)
    clients, units, given_up = pulled(pool, [(2, 3, 4, 5, 6, 7)])
    assert pool.died == 3 and clients == [2, 3, 4, 5, 6, 7] and given_up == []
    assert units == [(2, 3, 4, 5, 6, 7)] and pool.faults == []


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_a_silent_slot_is_replaced(full: bool) -> None:
    if not full:
        pytest.skip("a whole run with a silent slot is tried")
    pool = LightPool({}, slow=0, timeout_s=3.0, pace=0.7)  # whose slot gets the first client
    replace = pool.replace

    def long(slot: int, error: Exception) -> None:
        time.sleep(5)  # meanwhile the other slot answers, and nobody listens
        replace(slot, error)

    pool.replace = long  # type: ignore[method-assign]
    clients, _, given_up = pulled(pool, [(client,) for client in range(12)])
    assert clients == list(range(12)) and given_up == [] and pool.died == 1


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_a_large_cohort_is_no_reason_to_end_slots_that_work(full: bool) -> None:
    if not full:
        pytest.skip("a quarter of a minute")
    pool = LightPool({}, timeout_s=3.0, pace=0.22)  # a quarter of the work takes longer
    clients, _, given_up = pulled(pool, [(client,) for client in range(60)])
    assert clients == list(range(60)) and given_up == [] and pool.died == 0
