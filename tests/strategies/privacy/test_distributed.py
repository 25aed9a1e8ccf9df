"""Noise of whole numbers that clients add: rotation, rounding, what fits a ring, what survives, and the mean."""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.core.cohort import PoissonCohort, UniformCohort
from strategies.core.protocol import Update
from strategies.core.seeds import rng
from strategies.privacy import distributed as dp_distributed
from strategies.privacy.distributed import DistributedDp, DistributedPlan
from strategies.privacy.integers import fit, inflated, largest_l1, padded, rotate, rotate_back, rounded, signs
from strategies.privacy.noise import SkellamSum, byte_words, seeded_words


def words(seed: int = 1):
    return seeded_words(rng(seed, 0, 0, "encode"))


def drawn_signs(plan: DistributedPlan, round_: int = 0) -> np.ndarray:
    return signs(rng(7, round_, -1, "projection"), plan.ring.dimension)


def wrapped(total: np.ndarray, bits: int) -> np.ndarray:
    """What secure aggregation makes of it: the remainder modulo 2^b, read as a signed number."""
    half = 2 ** (bits - 1)
    return (total + half) % (2 * half) - half


@given(st.integers(1, 70), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_the_rotation_keeps_norms_and_is_undone(length: int, seed: int) -> None:
    x = rng(seed, 0, 0, "sample").normal(size=length)
    flips = signs(rng(seed, 0, 0, "projection"), padded(length))
    y = rotate(x, flips)
    assert np.linalg.norm(y) == pytest.approx(np.linalg.norm(x))
    np.testing.assert_allclose(rotate_back(y, flips, length), x, atol=1e-12)


def test_the_rotation_by_hand() -> None:
    # H of 4: rows ++++ +-+- ++-- +--+
    assert rotate(np.array([2.0, 0, 4]), np.array([1, -1, -1, 1])).tolist() == [-1, -1, 3, 3]
    assert [padded(n) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 8]


def test_the_rotation_spreads_a_single_coordinate() -> None:
    single = np.zeros(1000)
    single[17] = 5
    assert np.abs(rotate(single, signs(rng(1, 0, 0, "projection"), 1024))).max() == pytest.approx(5 / 32)


@given(st.floats(0.1, 1000), st.integers(1, 200), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_rounded_norms_stay_in_bounds(norm: float, dimension: int, seed: int) -> None:
    y = rng(seed, 0, 0, "sample").normal(size=dimension)
    y *= norm / np.linalg.norm(y)
    bound = inflated(norm, dimension)
    q = rounded(y, bound, words(seed))
    assert np.linalg.norm(q) <= bound <= norm + math.sqrt(dimension)
    assert np.abs(q - y).max() <= 1
    assert np.abs(q).sum() <= largest_l1(bound, dimension) * (1 + 1e-12)


def test_rounding_is_right_on_average() -> None:
    y = np.full(10**6, 0.3)
    q = rounded(y, math.inf, words())
    assert abs(q.mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 10**6)
    assert not rounded(np.zeros(1000), math.inf, words()).any()


def test_a_fine_ring_hardly_inflates_the_norm() -> None:
    # The specification: 32 bits, 1000 clients, 2^23 coordinates: a hundred-thousandth
    ring = fit(1000, 900, 1.0, 1.0, 2**23, 32)
    assert inflated(ring.scale, ring.dimension) / ring.scale < 1 + 1e-5


@given(st.integers(2, 300), st.floats(0.3, 10), st.integers(1, 10**6), st.sampled_from([12, 16, 24, 32]))
@settings(deadline=None, max_examples=60)
def test_signal_and_six_deviations_fit_the_ring(clients: int, z: float, length: int, bits: int) -> None:
    ring = fit(clients, clients, 0.5, z, length, bits)
    if ring.deviation:
        noise, half = math.sqrt(clients) * ring.deviation, 2 ** (bits - 1) - 1
        assert ring.signal + 6 * noise <= ring.bound <= half
        # The probability that noise, taken as normal, wraps one of the coordinates.
        assert ring.dimension * math.erfc((half - ring.signal) / (noise * math.sqrt(2))) <= 2e-6
        # what all clients add is z clip in ring steps, exactly
        assert noise == pytest.approx(z * 0.5 * ring.scale)


def test_a_ring_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="a ring of 8 bits is too small for 100 clients with a noise multiplier of 1:"):
        DistributedDp(noise_multiplier=1.0).plan(UniformCohort(size=100), 1000, 5, 100, 8)


@pytest.mark.parametrize("kind", ["skellam", "discrete_gaussian"])
@pytest.mark.parametrize("bits", [16, 32])
def test_the_mean_through_the_ring(kind: str, bits: int) -> None:
    dp = DistributedDp(noise_multiplier=0.5, noise=kind, clip=2.0, joint=True)
    plan = dp.plan(UniformCohort(size=10), 1000, 5, 300, bits)
    draw = rng(3, 0, 0, "sample")
    flips, total, exact = drawn_signs(plan), np.zeros(512, np.int64), np.zeros(300)
    for client in range(10):
        values = torch.from_numpy(draw.normal(size=300) * 0.05).float()
        sent = Update(client, 0.5, values[:260], {"b": values[260:270], "a": values[270:]})
        total += plan.encode(sent, flips, words(client))
        exact += np.concatenate([values[:260].numpy() / 2, values[270:].numpy(), values[260:270].numpy()])
    aggregate = plan.decode(wrapped(total, bits), 10, {"a": 30, "b": 10}, flips)
    assert (aggregate.weight, aggregate.count) == (10.0, 10)
    sums = torch.cat([aggregate.total, aggregate.extras["a"], aggregate.extras["b"]]).double().numpy()
    # ten clients' noise, where eight give z clip = 1
    assert (sums - exact).std() == pytest.approx(math.sqrt(10 / 8), rel=0.15)


@pytest.mark.parametrize("kind", ["skellam", "discrete_gaussian"])
def test_what_survives_dropouts_is_at_least_the_noise_promised(kind: str) -> None:
    dp = DistributedDp(noise_multiplier=1.5, noise=kind, clip=0.7, survivors=0.5, corrupt=0.1)
    plan = dp.plan(UniformCohort(size=20), 1000, 5, 2**14)
    assert plan.least == 10
    flips, nothing = drawn_signs(plan), torch.zeros(2**14)
    total = sum(plan.encode(Update(k, 1.0, nothing), flips, words(k)) for k in range(8))  # 2 of 10 add none
    aggregate = plan.decode(total, 10, {}, flips)
    assert float(aggregate.total.std()) == pytest.approx(1.5 * 0.7, rel=0.03)
    with pytest.raises(ValueError, match="9 clients' noise is less than epsilon counts on, which is that of 10"):
        plan.decode(total, 9, {}, flips)


@pytest.mark.parametrize("kind", ["skellam", "discrete_gaussian"])
def test_epsilon_of_the_ring_is_near_that_of_central_noise(kind: str) -> None:
    plan = DistributedDp(epsilon=5.0, delta=1e-5, noise=kind).plan(UniformCohort(size=50), 5000, 20, 10_000)
    cost = plan.spent(20, simulated=True)
    assert cost.epsilon == pytest.approx(5.0, rel=1e-3) and cost.epsilon <= 5.0
    assert (cost.unit, cost.sampling, cost.relation, cost.accountant) == ("client", "none", "zero out one", "RDP")
    # the ring pays for its rounding, 20 bits more than 32
    coarse = DistributedDp(epsilon=5.0, delta=1e-5, noise=kind).plan(UniformCohort(size=50), 5000, 20, 10_000, 18)
    assert coarse.noise_multiplier > plan.noise_multiplier


def test_the_integers_of_one_client_move_the_sum_by_what_epsilon_counts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_distributed, "skellam", lambda source, count, variance: np.zeros(count, np.int64))
    plan = DistributedDp(noise_multiplier=1.0).plan(UniformCohort(size=10), 100, 5, 60, 16)
    flips, draw = drawn_signs(plan), rng(4, 0, 0, "sample")
    longest = 0.0
    for seed in range(1000):
        sent = Update(0, min(1.0, 10 ** draw.uniform(-2, 1)), torch.from_numpy(draw.normal(size=60)).float() * 100)
        longest = max(longest, float(np.linalg.norm(plan.encode(sent, flips, words(seed)))))
    assert isinstance(plan.noise, SkellamSum)
    assert 0.999 * plan.noise.norm < longest <= plan.noise.norm


def test_poisson_cohorts_need_a_cap_and_claim_no_sampling() -> None:
    with pytest.raises(ValueError, match=r"a ring must know its largest cohort: set cohort\.cap, such as to 66"):
        DistributedDp(noise_multiplier=1.0).plan(PoissonCohort(size=32), 1000, 5, 100)
    cohort = PoissonCohort(size=32, cap=100)
    dp = DistributedDp(noise_multiplier=1.0).plan(cohort, 1000, 5, 100)
    assert dp.ring.clients == 100 and dp.least == 26
    assert dp.spent(5, simulated=False).sampling == "none"
    for sampling in ("poisson", "fixed"):
        with pytest.raises(ValueError, match=r'no sampling hides anything: set privacy\.dp\.sampling = "none"'):
            DistributedDp(noise_multiplier=1.0, sampling=sampling)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"noise_multiplier": 0.0}, "distributed noise of 0 is none"),
        ({"noise_multiplier": 1.0, "survivors": 0.0}, "are shares of the cohort"),
        ({"noise_multiplier": 1.0, "survivors": 0.5, "corrupt": 0.5}, "are shares of the cohort"),
        ({"noise_multiplier": 1.0, "clip": math.inf}, r"privacy\.dp\.clip"),
    ],
)
def test_faults_of_the_section(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistributedDp(**wrong)


def test_an_update_of_another_length_is_refused() -> None:
    plan = DistributedDp(noise_multiplier=1.0).plan(UniformCohort(size=10), 100, 5, 60)
    with pytest.raises(ValueError, match="the sums have 60 numbers, and client 2 sends 61"):
        plan.encode(Update(2, 1.0, torch.zeros(61)), drawn_signs(plan), words())


def test_noise_comes_from_the_source_alone() -> None:
    plan = DistributedDp(noise_multiplier=1.0).plan(UniformCohort(size=10), 100, 5, 60)
    sent, flips = Update(0, 1.0, torch.ones(60)), drawn_signs(plan)
    assert (plan.encode(sent, flips, words(1)) == plan.encode(sent, flips, words(1))).all()
    system = byte_words(os.urandom)
    assert (plan.encode(sent, flips, system) != plan.encode(sent, flips, system)).any()
