import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.core.seeds import rng
from strategies.secagg.ring import Sum, Sums
from tests.strategies.secagg.conftest import encoded_by


def fresh(client=0):
    return rng(7, 0, client, "encode")


def delta(clients, length=3, bits=32, kind="plain", bound=1.0, **options):
    return Sums((Sum("delta", length, bound, kind),), clients, bits, **options)


def total(encoded, bits):
    added = encoded[0].copy()
    for vector_L in encoded[1:]:
        added += vector_L
    return added & np.uint32(2**bits - 1)


def test_by_hand():
    # half = 127, Q = 63, s = 62: -1 is -62, 0.5 is 31, 2 is clipped to 62; integers leave nothing to round
    sums = delta(2, bits=8)
    assert (sums.half, sums.peak, sums.scale("delta"), sums.length, sums.nbytes) == (127, 63, 62, 4, 4)
    encoded = encoded_by(sums, {"delta": np.array([-1, 0.5, 2])}, 1.0, fresh())
    assert encoded.tolist() == [1, 256 - 62, 31, 62]
    totals = sums.decode(total([encoded, encoded], 8))
    assert totals.count == 2 and totals.weight == 2
    assert totals.sums["delta"].tolist() == [-2, 1, 2]


def test_weights_by_hand():
    # floor(255 / 2) = 127 levels: a quarter is 31.75 of them, rounded to 32
    sums = delta(2, bits=8, kind="weighted")
    encoded = [encoded_by(sums, {"delta": np.array([-1, 0, 1.0])}, weight, fresh()) for weight in (0.25, 1.0)]
    assert [vector_L[:2].tolist() for vector_L in encoded] == [[1, 32], [1, 127]]
    # 62 * 32 / 127 is rounded to 15 or 16
    assert encoded[0][2:].tolist() in [[256 - 16, 0, 15], [256 - 15, 0, 15], [256 - 16, 0, 16], [256 - 15, 0, 16]]
    assert encoded[1][2:].tolist() == [256 - 62, 0, 62]
    totals = sums.decode(total(encoded, 8))
    assert totals.weight == 159 / 127
    np.testing.assert_allclose(totals.sums["delta"], [-159 / 127, 0, 159 / 127], atol=1 / 62)


def test_kinds_lie_side_by_side():
    sums = Sums((Sum("a", 2, 1.0, "weighted"), Sum("rows", 1, 500, "noisy"), Sum("z", 2, 500, "noisy")), 3, 20)
    assert sums.starts == {"a": 2, "rows": 4, "z": 5} and sums.length == 7 and sums.nbytes == 18
    values = {"a": np.array([0.5, -0.5]), "rows": np.array([40]), "z": np.array([-300, 2**20 + 5])}
    totals = sums.decode(total([encoded_by(sums, values, 1.0, fresh(u)) for u in range(3)], 20))
    np.testing.assert_allclose(totals.sums["a"], [1.5, -1.5], atol=3 / sums.scale("a"))
    assert totals.sums["rows"].tolist() == [120]
    assert totals.sums["z"].tolist() == [-900, 15]  # noise beyond the ring wraps
    assert (totals.count, totals.weight) == (3, 3)


@pytest.mark.parametrize("bits", [8, 16, 20, 24, 32])
def test_all_clients_at_the_bound_are_exact_and_one_more_does_not_fit(bits):
    most = (2 ** (bits - 1) - 1) // 2  # Q = 2
    sums = delta(most, bits=bits)
    encoded = encoded_by(sums, {"delta": np.array([1.0, -1.0, 0.0])}, 1.0, fresh())
    added = (encoded.astype(np.uint64) * most % 2**bits).astype(np.uint32)
    assert sums.decode(added).sums["delta"].tolist() == [most, -most, 0]
    with pytest.raises(ValueError, match=f"at most {most} clients do"):
        delta(most + 1, bits=bits)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("n", "bits"), [(2, 8), (10, 8), (50, 8), (10, 16), (200, 16), (7, 24), (3, 32), (200, 32)])
def test_all_clients_at_any_bound_are_within_a_step(n, bits, sign):
    for bound in (1e-3, 0.3, 7.0, 1e6):
        sums = delta(n, bits=bits, bound=bound)
        encoded = [encoded_by(sums, {"delta": np.full(3, 2 * sign * bound)}, 1.0, fresh(u)) for u in range(n)]
        decoded = sums.decode(total(encoded, bits)).sums["delta"]
        np.testing.assert_allclose(decoded, n * sign * bound, atol=n / sums.scale("delta"))


@settings(deadline=None)
@given(st.data())
def test_the_mean_is_within_a_step_of_the_clipped_mean(data):
    bits = data.draw(st.sampled_from([12, 16, 24, 32]))
    n, length = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 8))
    numbers = st.floats(-3, 3, width=32)
    x = np.array(data.draw(st.lists(st.lists(numbers, min_size=length, max_size=length), min_size=n, max_size=n)))
    weights = np.array(data.draw(st.lists(st.floats(0.25, 1), min_size=n, max_size=n)))
    sums = Sums((Sum("a", length, 2.0, "weighted"), Sum("b", length, 1.0)), max(n, 2), bits)
    encoded = [encoded_by(sums, {"a": x[u], "b": x[u]}, weights[u], fresh(u)) for u in range(n)]
    totals = sums.decode(total(encoded, bits))
    assert totals.count == n
    exact = np.array([sums.level(w) for w in weights]) / sums.weight_levels
    np.testing.assert_allclose(totals.weight, exact.sum(), rtol=1e-12)
    slack = 1e-9
    assert np.all(abs(totals.sums["a"] - exact @ x.clip(-2, 2)) < n / sums.scale("a") + slack)
    assert np.all(abs(totals.sums["b"] - x.clip(-1, 1).sum(0)) < n / sums.scale("b") + slack)


@pytest.mark.parametrize("value", [0.0, 0.3, -0.7])
def test_rounding_is_unbiased(value):
    draws, n, bits = 1_000_000, 50, 16
    sums = delta(n, draws, bits)
    x = np.full(draws, value)
    totals = sums.decode(encoded_by(sums, {"delta": x}, 1.0, fresh())).sums["delta"]
    step = 1 / sums.scale("delta")
    assert abs(totals - x).max() < step
    assert abs((totals - x).mean()) < 5 * step / 2 / math.sqrt(draws)
    if value == 0:
        assert not totals.any()


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_shard_is_encoded_as_in_the_whole(first, length):
    sums = Sums((Sum("c", 3, 5, "noisy"), Sum("a", 80, 1.0, "weighted")), 5, 16)
    x = np.linspace(-1, 1, 80).astype(np.float32)
    generator = fresh()
    whole = encoded_by(sums, {"c": np.arange(3), "a": x}, 0.5, generator)
    part = sums.encode_piece("a", x[first : first + length], 0.5, generator, first)
    at = sums.starts["a"] + first
    np.testing.assert_array_equal(part, whole[at : at + length])
    np.testing.assert_array_equal(sums.decode_piece("a", part), sums.decode(whole).sums["a"][first : first + length])


def test_long_vectors_are_encoded_in_pieces():
    sums = delta(3, 40_000, 24)
    x = np.linspace(-1, 1, 40_000)
    whole = encoded_by(sums, {"delta": x}, 1.0, fresh())
    expected = np.floor(x * sums.scale("delta") + fresh().random(40_001)[1:]).astype(np.int64) % 2**24
    np.testing.assert_array_equal(whole[1:], expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"delta": np.array([0, np.nan, 0])}, "NaN or infinity"),
        ({"delta": np.array([0, np.inf, 0])}, "NaN or infinity"),
    ],
)
def test_values_that_have_no_place_are_refused(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        encoded_by(delta(4), values, 1.0, fresh())
    assert "nan" not in str(caught.value) and "inf," not in str(caught.value)


@pytest.mark.parametrize("weight", [-1.0, 1.0001, math.nan, math.inf])
def test_weights_that_are_none_are_refused(weight):
    with pytest.raises(ValueError, match="weight must be"):
        encoded_by(delta(4, kind="weighted"), {"delta": np.zeros(3)}, weight, fresh())


def test_noisy_numbers_must_be_whole():
    with pytest.raises(ValueError, match="whole numbers"):
        encoded_by(Sums((Sum("rows", 1, 5, "noisy"),), 3), {"rows": np.array([1.0])}, 1.0, fresh())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: delta(2, bits=33), "2 to 32 bits"),
        (lambda: delta(200, bits=8), "at most 63 clients do"),
        (lambda: delta(2, bound=0.0), "bound above 0"),
        (lambda: delta(2, bound=math.nan), "bound above 0"),
        (lambda: delta(2, bound=1e-320), "too small"),
        (lambda: delta(2, bound=128, kind="noisy", bits=8), "ends at 127"),
        (lambda: Sums((Sum("a", 1, 1.0), Sum("a", 1, 1.0)), 2), "same name"),
    ],
)
def test_rings_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_digest_covers_everything():
    variants = [
        delta(4),
        delta(5),
        delta(4, length=2),
        delta(4, bits=31),
        delta(4, bound=2.0),
        delta(4, kind="weighted"),
    ]
    variants += [Sums((), 4)]
    assert len({sums.digest for sums in variants}) == len(variants)
