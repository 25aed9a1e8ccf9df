"""How a round's work is cut and handed out, without Ray where that is possible."""

import numpy as np

from engine.costs import Costs
from engine.pulling import ENOUGH, REFILLED, packs
from engine.relay import placement


def test_packs_are_a_function_of_the_cohort_and_its_steps() -> None:
    clients, steps = np.array([5, 3, 9, 1, 7]), np.array([2, 8, 2, 9, 4])
    assert packs(clients, steps, 2) == [(1, 3), (7, 5), (9,)]
    assert packs(clients, steps, 1) == [(1,), (3,), (7,), (5,), (9,)]
    assert packs(clients, steps, 8) == [(1, 3, 7, 5, 9)]
    assert packs(clients[:0], steps[:0], 8) == []
    many = packs(np.arange(1000), np.ones(1000), 4)
    assert {len(pack) for pack in many} <= {REFILLED * 4 - 1, REFILLED * 4} and len(many) >= ENOUGH
    assert sorted(client for pack in many for client in pack) == list(range(1000))


def test_placement_gives_each_client_one_slot_and_balances() -> None:
    costs = [3.0, 1, 4, 1, 5, 9, 2]
    placed = placement([(client,) for client in range(7)], costs, range(3))
    assert sorted(client for packs in placed.values() for (client,) in packs) == list(range(7))
    loads = [sum(costs[client] for (client,) in packs) for packs in placed.values()]
    assert max(loads) - min(loads) <= 2
    assert set(placement([(0,)], [1.0], [1, 2])) == {1}
    assert placement([(0, 1), (2,), (3, 4)], [5.0, 1, 3], range(2)) == {0: ((0, 1),), 1: ((3, 4), (2,))}


def test_seconds_are_learnt_as_a_line_through_steps_and_tokens() -> None:
    costs = Costs()
    steps, tokens = np.array([1.0, 2, 5, 9]), np.array([100.0, 900, 50, 400])
    assert costs.seconds(steps, tokens).tolist() == tokens.tolist()  # nothing is known yet
    for _ in range(3):
        costs.learn(steps, tokens, 0.02 * steps + 0.001 * tokens)
    found = Costs.of(costs.sums).seconds(np.array([3.0]), np.array([10.0]))
    np.testing.assert_allclose(found, [0.02 * 3 + 0.001 * 10], rtol=1e-6)
    costs.learn(steps, tokens, np.array([1.0, 0, 0, 0]))  # nonsense gives no negative costs
    assert (costs.seconds(steps, tokens) >= 0).all()


def test_clients_that_are_all_alike_teach_no_order() -> None:
    costs = Costs()
    costs.learn(np.full(3, 4.0), np.full(3, 100.0), np.array([1.0, 1.1, 0.9]))
    short, long = costs.seconds(np.array([4.0, 8.0]), np.array([100.0, 200.0]))
    assert long == 2 * short > 0
