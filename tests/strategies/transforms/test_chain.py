import pickle
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.aggregation.exact_sum import ExactSum, merge
from strategies import Transforms
from strategies.averaging.drift import FedProx
from strategies.averaging.fedavg import FedAvg
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Broadcast, ClientState, ServerState, Update
from strategies.robust.rules import Krum, Median, Rfa
from strategies.transforms.chain import Clip, Transform, bits, decode, encode
from strategies.transforms.lossy import Int8, Projection, Sign, TopK

SIZE = 40
LOSSY = [TopK, Int8, Sign, Projection]
LOSSLESS = [Clip(bound=1e30), TopK(share=1.0), Projection(share=1.0)]
LOSSLESS += [TopK(share=1.0, error_feedback=False), Projection(share=1.0, error_feedback=False)]


def drawn(*seed: int, size: int = SIZE) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(size).astype(np.float32))


def broadcast_of(round_: int = 0, size: int = SIZE) -> Broadcast:
    return Broadcast(round_, torch.zeros(size), seed=7)


def received(chain: Sequence[Transform], updates: list[Update], round_: int = 0) -> Aggregate:
    """The decoded aggregate of encoded updates, by the engine's exact sum, with each of them too."""
    sent = tuple(encode(chain, update, broadcast_of(round_), {})[0] for update in updates)
    running = ExactSum()
    for update in sent:
        running.add(update)
    state = ServerState(round_, torch.zeros(SIZE), seed=7)
    return decode(chain, replace(merge([running.take()]), each=sent), state)[0]


def over_rounds(chain: Sequence[Transform], deltas: list[torch.Tensor]) -> tuple[torch.Tensor, ClientState]:
    """The sum of what the server makes of one client's updates, round by round, and what the client remembers then."""
    arrived, client_state = torch.zeros(SIZE), dict[str, torch.Tensor]()
    for round_, delta in enumerate(deltas):
        sent, client_state = encode(chain, Update(3, 1.0, delta), broadcast_of(round_), client_state)
        state = ServerState(round_, torch.zeros(SIZE), seed=7)
        arrived += decode(chain, Aggregate(1.0, sent.delta, {}, 1), state)[0].total
    return arrived, client_state


@pytest.fixture(params=get_args(Transforms), ids=lambda kind: kind.__name__)
def transform(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.mark.parametrize("transform", LOSSLESS, ids=repr)
@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(), Median(), Krum(), Rfa()], ids=lambda rule: rule.kind)
def test_what_loses_nothing_changes_no_strategy(transform: Any, strategy: FedAvg) -> None:
    state = replace(strategy.init(drawn(0), Layout(("w",), ((SIZE,),))), seed=7)
    plain = [strategy.finish(Update(k, 0.5 + k / 8, drawn(1, k)), strategy.broadcast(state), {})[0] for k in range(5)]
    expected, came = received([], plain), received([transform], plain)
    assert came.each is not None and expected.each is not None
    torch.testing.assert_close(came.total, expected.total)
    assert all(torch.equal(c.delta, e.delta) for c, e in zip(came.each, expected.each, strict=True))
    torch.testing.assert_close(strategy.apply(state, came).params, strategy.apply(state, expected).params)


def test_a_summed_update_is_the_sum_of_decoded_ones(transform: Any) -> None:
    updates = [Update(k, 0.5 + k / 8, drawn(k)) for k in range(4)]
    came = received([transform], updates)
    assert came.each is not None and came.each[0].delta.shape == came.total.shape == (SIZE,)
    summed = sum((update.weight * update.delta for update in came.each), torch.zeros(SIZE))
    torch.testing.assert_close(came.total, summed)
    assert came.weight == 2.75 and came.count == 4


def test_the_rest_of_an_update_stays_as_it_is(transform: Any) -> None:
    update = Update(4, 0.5, drawn(1), {"control": drawn(2)}, {"loss": 1.0})
    broadcast, client_state = broadcast_of(), {"control": drawn(3)}
    sent, kept = encode([transform], update, broadcast, client_state)
    assert (sent.client, sent.weight, sent.metrics) == (4, 0.5, {"loss": 1.0})
    assert torch.equal(sent.extras["control"], drawn(2))
    assert torch.equal(update.delta, drawn(1)) and torch.equal(broadcast.params, torch.zeros(SIZE))
    assert client_state.keys() == {"control"} and torch.equal(client_state["control"], drawn(3))
    assert bool(kept) == transform.keeps_state
    assert all(name == f"transform0.{transform.kind}.error" for name in kept)
    before = {name: tensor.clone() for name, tensor in kept.items()}
    encode([transform], update, broadcast, kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.items())


def test_the_same_place_encodes_the_same(transform: Any) -> None:
    first, again = (encode([transform], Update(4, 1.0, drawn(1)), broadcast_of(2), {})[0] for _ in range(2))
    assert torch.equal(first.delta, again.delta)


def test_nothing_to_send_is_nothing_sent(transform: Any) -> None:
    arrived, _ = over_rounds([transform], [torch.zeros(SIZE)] * 2)
    assert arrived.tolist() == [0.0] * SIZE


def test_it_travels_and_stays_as_it_is(transform: Any) -> None:
    assert pickle.loads(pickle.dumps(transform)) == transform
    with pytest.raises(FrozenInstanceError):
        transform.kind = "other"


def test_kinds_are_distinct() -> None:
    kinds = [kind().kind for kind in get_args(Transforms)]
    assert kinds == ["clip", "topk", "int8", "sign", "projection"]


@pytest.mark.parametrize("kind", LOSSY)
@given(rounds=st.integers(1, 12), scale=st.floats(1e-3, 1e3))
def test_what_arrives_is_what_was_learned_less_the_residual(kind: Any, rounds: int, scale: float) -> None:
    deltas = [scale * drawn(5, round_) for round_ in range(rounds)]
    arrived, client_state = over_rounds([kind()], deltas)
    (error,) = client_state.values()
    learned = torch.stack(deltas).sum(dim=0)
    torch.testing.assert_close(arrived + error, learned, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("transform", "bound"),
    # A transform that takes the share d of |x|^2 away leaves |e| < sqrt(1-d) / (1 - sqrt(1-d)) |delta| for ever.
    # topk and projection: d = 1/4, 6.5 (for projection in the mean). sign: d = |x|_1^2 / (40 |x|^2) >= 1/40, 78.5.
    # int8: each element is off by less than a 127th of the largest, sqrt(40) / 127 < 0.05 in all.
    [(TopK(share=0.25), 6.5), (Projection(share=0.25), 6.5), (Sign(), 78.5), (Int8(), 0.06)],
)
def test_error_feedback_keeps_the_residual_bounded(transform: Any, bound: float) -> None:
    """Each round brings the same drift and some noise; without error feedback small coordinates would be lost."""
    deltas = [drawn(1) + drawn(6, round_) for round_ in range(300)]
    arrived, client_state = over_rounds([transform], deltas)
    (error,) = client_state.values()
    assert error.norm() < bound * max(delta.norm() for delta in deltas)
    torch.testing.assert_close(arrived / 300, torch.stack(deltas).mean(dim=0), rtol=0, atol=0.2)


@pytest.mark.parametrize("transform", [TopK(share=0.25), Sign()])
def test_without_error_feedback_a_biased_transform_stays_wrong(transform: Any) -> None:
    deltas = [drawn(1)] * 100
    arrived, client_state = over_rounds([replace(transform, error_feedback=False)], deltas)
    assert client_state == {}
    assert (arrived / 100 - drawn(1)).norm() > 0.3 * drawn(1).norm()
    arrived, _ = over_rounds([transform], deltas)
    assert (arrived / 100 - drawn(1)).norm() < 0.1 * drawn(1).norm()


@pytest.mark.parametrize("transform", [TopK(share=0.2), Int8(), Sign()])
def test_what_did_not_move_is_not_moved(transform: Any) -> None:
    """A rule that freezes every second coordinate in one round and the others in the next sees zeros where it froze."""
    even = torch.arange(SIZE) % 2 == 0
    client_state: ClientState = {}
    for round_ in range(6):
        moved = even if round_ % 2 == 0 else ~even
        sent, client_state = encode(
            [transform], Update(3, 1.0, drawn(round_) * moved), broadcast_of(round_), client_state
        )
        assert not sent.delta[~moved].any()
        assert sent.delta[moved].any()


def test_a_chain_remembers_for_each_and_decodes_in_reverse() -> None:
    chain = [Clip(bound=3.0), TopK(share=0.5), Projection(share=0.5), Int8(), Int8(block=5)]
    sent, client_state = encode(chain, Update(3, 1.0, drawn(1)), broadcast_of(), {"own": drawn(2)})
    names = ["transform1.topk.error", "transform2.projection.error", "transform3.int8.error", "transform4.int8.error"]
    assert sorted(client_state) == names
    assert [client_state[name].numel() for name in names] == [40, 40, 20, 20]
    assert sent.delta.shape == (20,)

    arrived, client_state = over_rounds(chain, [drawn(1) / 10] * 200)
    torch.testing.assert_close(arrived / 200, drawn(1) / 10, rtol=0, atol=0.02)


def test_two_projections_are_refused() -> None:
    with pytest.raises(ValueError, match="one projection, not two"):
        encode([Projection(), Projection()], Update(3, 1.0, drawn(1)), broadcast_of(), {})


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ([], 32_000),
        ([Clip()], 32_000),
        ([TopK(share=0.1)], 100 * 32 + 1000),  # a map of 1000 bits is shorter than 100 positions of 10 bits
        ([TopK(share=0.01)], 10 * 32 + 10 * 10),
        ([TopK(share=1.0)], 32_000),
        ([Int8(block=256)], 8000 + 4 * 32),
        ([Int8(block=1)], 8000 + 1000 * 32),
        ([Sign(block=500)], 1000 + 2 * 32),
        ([Projection(share=0.1)], 3200),
        ([Projection(share=0.1), Int8(block=100)], 100 * 8 + 32),
        ([TopK(share=0.1), Sign(block=500)], 100 + 1000 + 2 * 32),
        ([TopK(share=0.01), Int8(block=10)], 10 * 8 + 10 * 10 + 10 * 32),  # at most a scale for each value
        ([Int8(block=500), TopK(share=0.01)], 10 * 8 + 10 * 10 + 2 * 32),
    ],
    ids=str,
)
def test_bits_on_the_wire(chain: list[Any], expected: int) -> None:
    assert bits(chain, 1000) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clip(bound=0.0), r"clip's bound .* not 0\.0"),
        (lambda: Clip(bound=float("nan")), r"clip's bound .* not nan"),
        (lambda: Clip(bound=float("inf")), r"clip's bound .* not inf"),
        (lambda: TopK(share=0.0), r"topk's share .* not 0\.0"),
        (lambda: TopK(share=1.5), r"topk's share .* not 1\.5"),
        (lambda: Projection(share=float("nan")), r"projection's share .* not nan"),
        (lambda: Int8(block=0), r"int8's block .* not 0"),
        (lambda: Sign(block=-1), r"sign's block .* not -1"),
    ],
)
def test_bad_values_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
