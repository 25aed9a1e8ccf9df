"""The rule of scalars: its walks, its sums, and what it costs on the wire."""

from dataclasses import replace

import torch

from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Broadcast, Update
from strategies.zeroth_order.fedkseed import FedKSeed

LAYOUT = Layout(("amounts",), ((4096,),))


def test_clients_walk_together_or_each_by_itself():
    sent = Broadcast(3, torch.zeros(4096), layout=LAYOUT, seed=7)
    together, apart = FedKSeed(), FedKSeed(draw="own")
    assert together.walk(0, sent, 200).tolist() == together.walk(5, sent, 200).tolist()
    assert apart.walk(0, sent, 200).tolist() != apart.walk(5, sent, 200).tolist()
    assert together.walk(0, sent, 200).tolist() != together.walk(0, replace(sent, round=4), 200).tolist()
    assert set(together.walk(0, replace(sent, params=torch.zeros(2)), 200).tolist()) == {0, 1}


def test_the_mean_of_amounts_by_hand():
    rule = FedKSeed()
    state = rule.init(torch.tensor([1.0, 0.0, -2.0]), Layout(("amounts",), ((3,),)))
    # Two clients of weights 1 and 3 changed the second amount by 4 and 8.
    after = rule.apply(state, Aggregate(4.0, torch.tensor([0.0, 1 * 4.0 + 3 * 8.0, 0.0]), {}, 2))
    assert after.params.tolist() == [1.0, 7.0, -2.0]


def test_the_bytes_of_the_paper():
    """4,096 scalars come down, and 200 numbers with their directions go up: 17,984 bytes."""
    rule, amounts = FedKSeed(), torch.zeros(4096)
    amounts[:200] = 1.0
    down, _ = rule.floats(Broadcast(0, torch.zeros(4096), layout=LAYOUT))
    assert 4 * (down + rule.sent(Update(0, 1.0, amounts))) == 17_984
