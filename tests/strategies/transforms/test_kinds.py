"""Each transform's arithmetic on a few numbers, worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from strategies.core.protocol import Aggregate, Broadcast, ClientState, ServerState, Update
from strategies.core.seeds import torch_rng
from strategies.transforms.chain import Clip
from strategies.transforms.lossy import Int8, Projection, Sign, TopK, drawn


def sent(
    transform: Any, delta: list[float], error: list[float] | None = None, client: int = 3
) -> tuple[list[float], list[float]]:
    """What is sent and what is remembered."""
    client_state: ClientState = {} if error is None else {"error": torch.tensor(error, dtype=torch.float32)}
    broadcast = Broadcast(0, torch.zeros(len(delta)), seed=7)
    rng = torch_rng(7, 0, client, "encode")
    update, kept = transform.encode(
        Update(client, 0.5, torch.tensor(delta, dtype=torch.float32)), broadcast, client_state, rng
    )
    return update.delta.tolist(), kept["error"].tolist() if kept else []


def test_clip_shortens_what_is_too_long() -> None:
    # |(3, 0, -4)| = 5
    assert sent(Clip(bound=2.5), [3, 0, -4]) == ([1.5, 0, -2], [])
    assert sent(Clip(bound=5.0), [3, 0, -4]) == ([3, 0, -4], [])
    # 1e30 squared is beyond float32
    torch.testing.assert_close(torch.tensor(sent(Clip(bound=5.0), [3e30, 0, -4e30])[0]), torch.tensor([3.0, 0, -4]))


def test_topk_sends_the_largest_and_keeps_the_rest() -> None:
    assert sent(TopK(share=0.5), [1, -5, 3, 2]) == ([0, -5, 3, 0], [1, 0, 0, 2])
    # 1 + 1, -5 + 0, 3 + 0, 2 + 4: the residual brings the last one to the front
    assert sent(TopK(share=0.25), [1, -5, 3, 2], [1, 0, 0, 4]) == ([0, 0, 0, 6], [2, -5, 3, 0])
    assert sent(TopK(share=0.25, error_feedback=False), [1, -5, 3, 2], [1, 0, 0, 4]) == ([0, -5, 0, 0], [])
    assert sent(TopK(share=0.01), [1, -5, 3, 2])[0] == [0, -5, 0, 0]


def test_topk_takes_its_share_of_what_is_not_zero() -> None:
    # two of four move, half of them is one
    assert sent(TopK(share=0.5), [0, -5, 3, 0])[0] == [0, -5, 0, 0]


def test_a_residual_waits_where_nothing_moved() -> None:
    assert sent(TopK(share=1.0), [0, 1, 2], [9, 8, 7]) == ([0, 9, 9], [9, 0, 0])


def test_sign_sends_the_mean_magnitude() -> None:
    # (1 + 5 + 3 + 3) / 4 = 3
    assert sent(Sign(), [1, -5, 3, 3]) == ([3, -3, 3, 3], [-2, -2, 0, 0])
    # 1 - 2, -5 - 2, 3 + 0, 3 - 4: (1 + 7 + 3 + 1) / 4 = 3, and the residual is what is left of these
    assert sent(Sign(), [1, -5, 3, 3], [-2, -2, 0, -4]) == ([-3, -3, 3, -3], [2, -4, 0, 2])
    # blocks of two: (1 + 5) / 2 and (3 + 7) / 2
    assert sent(Sign(block=2, error_feedback=False), [1, -5, 3, 7]) == ([3, -3, 5, 5], [])
    # the last block is the shorter one; a zero stays one and does not count
    assert sent(Sign(block=3, error_feedback=False), [1, 0, 5, 7]) == ([3, 0, 3, 7], [])


def test_int8_leaves_its_own_grid_alone() -> None:
    # s = 254 / 127 = 2
    assert sent(Int8(), [254, -2, 0, -100]) == ([254, -2, 0, -100], [0, 0, 0, 0])
    # s = 2 in the first block, 1 in the second
    assert sent(Int8(block=2), [254, -4, -127, 33]) == ([254, -4, -127, 33], [0, 0, 0, 0])


def test_int8_rounds_to_a_neighbor_and_remembers_the_rest() -> None:
    # s = 1: 0.25 becomes 0 or 1, -2.5 becomes -3 or -2
    for client in range(20):
        (top, low, middle), error = sent(Int8(), [127, 0.25, -2.5], client=client)
        assert top == 127 and low in (0, 1) and middle in (-3, -2)
        assert error == [0, 0.25 - low, -2.5 - middle]


def test_int8_is_unbiased() -> None:
    draws = [sent(Int8(), [127, 0.25, -2.5], client=client)[0] for client in range(2000)]
    mean = torch.tensor(draws).mean(dim=0)
    # a draw's deviation is sqrt(0.25 * 0.75) and 0.5; four deviations of the mean of 2000
    assert abs(mean[1] - 0.25) < 4 * 0.433 / math.sqrt(2000)
    assert abs(mean[2] + 2.5) < 4 * 0.5 / math.sqrt(2000)


@pytest.mark.parametrize("delta", [[1e-45, 0.0], [3e38, -3e38], [0.0, 0.0]])
def test_int8_survives_the_ends_of_the_range(delta: list[float]) -> None:
    assert all(math.isfinite(x) for half in sent(Int8(), delta) for x in half)


def decoded(transform: Projection, y: list[float], round_: int, size: int) -> list[float]:
    state = ServerState(round_, torch.zeros(size), seed=7)
    aggregate = Aggregate(1.0, torch.tensor(y, dtype=torch.float32), {}, 1)
    return transform.decode(aggregate, state, torch_rng(7, round_, -1, "decode"))[0].total.tolist()


def test_projection_adds_up_buckets_with_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.array([0, 1, 0]), np.array([1, 1, -1], np.int8)
    monkeypatch.setattr("strategies.transforms.lossy.drawn", lambda *place: table)
    # S = [[1, 0, -1], [0, 1, 0]]: y = (5 - 3, 4); S' y = (2, 4, -2)
    plain = Projection(share=0.67, error_feedback=False)
    assert sent(plain, [5, 4, 3]) == ([2, 4], [])
    assert decoded(plain, [2, 4], 0, 3) == [2, 4, -2]
    # with error feedback the bucket of two is halved: (1, 4, -1) arrives, (4, 0, 4) is left
    assert sent(Projection(share=0.67), [5, 4, 3]) == ([2, 4], [4, 0, 4])
    assert decoded(Projection(share=0.67), [2, 4], 0, 3) == [1, 4, -1]
    # 5 + 4, 4 + 0, 3 + 4: y = (2, 4), so the server sees the same, and the residual grows along what S does not see
    assert sent(Projection(share=0.67), [5, 4, 3], [4, 0, 4]) == ([2, 4], [8, 0, 8])


def test_a_rounds_projection_is_shared_and_the_next_is_another() -> None:
    first = [x.tolist() for x in drawn(7, 0, 12, 4)]
    assert first == [x.tolist() for x in drawn(7, 0, 12, 4)]
    assert sorted(first[0]) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert set(first[1]) == {-1, 1}
    assert first != [x.tolist() for x in drawn(7, 1, 12, 4)]
    assert first != [x.tolist() for x in drawn(8, 0, 12, 4)]


def test_the_projection_is_the_one_recorded_here() -> None:
    """A machine that draws otherwise cannot decode what another sent."""
    bucket, sign = drawn(7, 3, 8, 3)
    assert (bucket.tolist(), sign.tolist()) == ([2, 2, 0, 0, 1, 0, 1, 1], [-1, 1, -1, 1, 1, 1, 1, 1])


def test_projection_there_and_back_is_unbiased() -> None:
    x = torch.tensor([1.0, -2.0, 3.0, 0.0, 0.5, -1.0])
    transform, total = Projection(share=0.5, error_feedback=False), torch.zeros(6)
    for round_ in range(2000):
        broadcast = Broadcast(round_, torch.zeros(6), seed=7)
        update, _ = transform.encode(Update(0, 1.0, x), broadcast, {}, torch_rng(7, round_, 0, "encode"))
        total += torch.tensor(decoded(transform, update.delta.tolist(), round_, 6))
    # A coordinate shares its bucket with one other and errs by 3 at most: four deviations of the mean, 12 / sqrt(2000).
    torch.testing.assert_close(total / 2000, x, rtol=0, atol=12 / math.sqrt(2000))
