"""A broadcast crosses Ray whole or in shards, and is the same for the clients. Legend: P parameters."""

from dataclasses import replace

import ray
import torch

from engine.messages.broadcast import BroadcastMessage
from engine.messages.shards import Shard
from strategies.averaging.drift import Scaffold
from strategies.core.layout import Layout
from strategies.core.sharding import Partition

LAYOUT = Layout(("w",), ((7,),))
RULE = Scaffold()


def state():
    start = RULE.init(torch.arange(7.0), LAYOUT)
    return replace(start, round=3, moments={"c": torch.arange(7.0) / 8})


def test_a_whole_broadcast_shares_the_vectors_memory():
    sent = RULE.broadcast(state())
    message = BroadcastMessage.of(sent)
    received = message.received(RULE, LAYOUT, 5)
    assert message.nbytes == 2 * 7 * 4 and message.vector().data_ptr() == sent.params.data_ptr()
    assert received.params.data_ptr() == sent.params.data_ptr()
    assert received.extras["c"].data_ptr() == sent.extras["c"].data_ptr()
    assert (received.round, received.layout, received.seed) == (3, LAYOUT, 5)


def test_shards_are_received_by_a_rank_as_cut_and_by_a_single_process_as_whole(ray_session):
    whole, partition = state(), Partition.contiguous(7, 2)
    shards = [
        Shard.of(partition.cut(whole.params, rank), {"c": partition.cut(whole.moments["c"], rank)}) for rank in (0, 1)
    ]
    message = BroadcastMessage(3, tuple(map(ray.put, shards)), partition=partition)
    second = message.received(RULE, LAYOUT, 5, rank=1)
    assert second.params.tolist() == message.vector(1).tolist() == [4.0, 5.0, 6.0]
    assert second.extras["c"].tolist() == [0.5, 0.625, 0.75] and second.round == 3
    joined = message.received(RULE, LAYOUT, 5)
    assert torch.equal(joined.params, whole.params) and torch.equal(message.vector(), whole.params)
    assert torch.equal(joined.extras["c"], whole.moments["c"]) and joined.layout == LAYOUT and joined.seed == 5
