"""Central noise: what a client can move, what the server adds, how the clipping norm follows, and an attack."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from strategies.core.cohort import PoissonCohort, UniformCohort
from strategies.core.protocol import Aggregate, Update
from strategies.core.seeds import rng
from strategies.privacy.budget import ExampleDp, delta_for
from strategies.privacy.central import BLOCK, WITHIN, AdaptiveDp, CentralDp, CentralPlan, bounded, with_noise
from strategies.privacy.noise import seeded_words

Bound = Callable[[np.ndarray, np.ndarray, float, float], float]


def words(seed: int = 1):
    return seeded_words(rng(seed, 0, -1, "decode"))


def update(delta: list[float], weight: float = 1.0, **extras: list[float]) -> Update:
    tensors = {name: torch.tensor(values, dtype=torch.float32) for name, values in extras.items()}
    return Update(3, weight, torch.tensor(delta, dtype=torch.float32), tensors)


def test_an_update_is_clipped_as_one_vector_and_keeps_its_weight() -> None:
    # |(3, 0, -4, 12)| = 13
    clipped, norm = bounded(update([3, 0, -4], 0.5, c=[12]), 6.5, joint=True)
    assert norm == 13 and clipped.weight == 0.5
    torch.testing.assert_close(clipped.delta, torch.tensor([1.5, 0, -2]))
    torch.testing.assert_close(clipped.extras["c"], torch.tensor([6.0]))
    same, norm = bounded(update([3, 0, -4]), 5.0, joint=False)
    assert norm == 5 and same.delta.tolist() == [3, 0, -4]


@pytest.mark.parametrize(
    ("sent", "joint", "message"),
    [
        (update([1.0], 1.5), False, "client 3 has the weight 1.5, and clipping needs one from 0 to 1"),
        (update([1.0], 1.0, c=[1.0]), False, r"client 3 sends \['c'\] beside its delta, which nothing clips"),
        (update([math.nan]), False, "client 3 holds NaN or infinity"),
        (update([1.0], 1.0, c=[math.inf]), True, "client 3 holds NaN or infinity"),
    ],
)
def test_what_would_not_be_bounded_is_refused(sent: Update, joint: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bounded(sent, 1.0, joint)


@pytest.mark.parametrize("weight", [math.nan, -1.0, math.inf])
def test_weights_that_are_none(weight: float) -> None:
    with pytest.raises(ValueError, match="clipping needs one from 0 to 1"):
        bounded(update([1.0], weight), 1.0, joint=False)


def test_one_client_moves_the_sums_by_the_clipping_norm_at_most() -> None:
    draw = rng(5, 0, 0, "sample")
    for _ in range(1000):
        size, clip = 10 ** draw.uniform(-3, 6), 10 ** draw.uniform(-2, 2)
        values = torch.from_numpy(draw.normal(size=50) * size).float()
        sent = Update(0, 10 ** draw.uniform(-3, 0), values[:40], {"c": values[40:]})
        clipped, _ = bounded(sent, clip, joint=True)
        moved = math.hypot(
            float(torch.linalg.vector_norm(clipped.delta.double() * clipped.weight)),
            float(torch.linalg.vector_norm(clipped.extras["c"].double())),
        )
        assert moved <= clip * (1 + 1e-12)


def plan(z: float = 2.0, clip: float = 0.5, joint: bool = False) -> CentralPlan:
    return CentralDp(noise_multiplier=z, clip=clip, joint=joint).plan(PoissonCohort(size=20), 1000, 10)


def test_the_server_adds_noise_of_z_clip_and_divides_by_a_constant() -> None:
    aggregate = Aggregate(7.0, torch.full((10**6,), 3.0), {"c": torch.zeros(1000)}, 9)
    noisy, clip = plan(joint=True).decode(aggregate, 0.5, words(), {})
    assert (noisy.weight, noisy.count, clip) == (20.0, 20, 0.5)
    noise = noisy.total.double() - 3
    assert float(noise.std()) == pytest.approx(1.0, rel=0.003)
    assert abs(float(noise.mean())) < 4e-3
    assert float(noisy.extras["c"].std()) == pytest.approx(1.0, rel=0.1)
    assert not torch.equal(noisy.extras["c"], noise[:1000].float())
    assert torch.equal(aggregate.total, torch.full((10**6,), 3.0))


def test_seeds_decide_the_noise_and_none_leaves_the_sum() -> None:
    x = torch.zeros(BLOCK + 3)
    assert torch.equal(with_noise(x, 1, words(1)), with_noise(x, 1, words(1)))
    assert not torch.equal(with_noise(x, 1, words(1)), with_noise(x, 1, words(2)))
    assert with_noise(x, 1, words())[-3:].abs().min() > 0
    assert with_noise(x, 0, words()) is x


def test_a_plan_names_what_its_epsilon_rests_on() -> None:
    cost = plan().spent(10, simulated=True)
    assert (cost.unit, cost.sampling, cost.simulated, cost.steps) == ("client", "poisson", True, 10)
    assert cost.delta == pytest.approx(1000**-1.1)
    fixed = CentralDp(noise_multiplier=2.0).plan(UniformCohort(size=20), 1000, 10)
    assert fixed.spent(10, simulated=False).sampling == "none"
    assert fixed.spent(10, simulated=False).epsilon > cost.epsilon
    replaced = CentralDp(noise_multiplier=2.0, sampling="fixed").plan(UniformCohort(size=20), 1000, 10)
    assert replaced.spent(10, simulated=False).relation == "replace one"


def test_epsilon_in_noise_out() -> None:
    derived = CentralDp(epsilon=4.0, delta=1e-4).plan(UniformCohort(size=20), 1000, 10)
    assert derived.spent(10, simulated=False).epsilon == pytest.approx(4.0, rel=1e-3)
    assert derived.spent(10, simulated=False).epsilon <= 4.0
    assert derived.spent(5, simulated=False).epsilon < 3.0


def test_no_noise_is_an_infinite_epsilon() -> None:
    assert plan(z=0.0).spent(1, simulated=False).epsilon == math.inf


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "needs noise_multiplier or epsilon, one of them"),
        ({"noise_multiplier": 1.0, "epsilon": 1.0}, "needs noise_multiplier or epsilon, one of them"),
        ({"noise_multiplier": 0.0, "epsilon": 8.0}, "asks for epsilon 8.0 with a noise multiplier of 0"),
        (
            {"noise_multiplier": -1.0},
            "noise_multiplier is the noise over the largest norm and must be at least 0, not -1.0",
        ),
        ({"epsilon": 0.0}, r"privacy\.dp\.epsilon is .* and must be a number above 0, not 0.0"),
        ({"noise_multiplier": 1.0, "delta": 1.0}, r"privacy\.dp\.delta is .* and must be above 0 and below 1, not 1.0"),
        ({"noise_multiplier": 1.0, "clip": 0.0}, r"privacy\.dp\.clip is the largest L2 norm"),
    ],
)
def test_faults_of_the_section(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CentralDp(**wrong)


def test_an_epsilon_that_the_cohort_does_not_bear_is_refused() -> None:
    with pytest.raises(ValueError, match="the cohort has a fixed size, where a Poisson epsilon would be false"):
        CentralDp(noise_multiplier=1.0, sampling="poisson").plan(UniformCohort(size=5), 100, 1)
    with pytest.raises(ValueError, match="a Poisson cohort has no fixed size"):
        CentralDp(noise_multiplier=1.0, sampling="fixed").plan(PoissonCohort(size=5), 100, 1)


def test_a_large_delta_warns() -> None:
    with pytest.warns(UserWarning, match=r"delta = 0\.01 is above 1 / 1000: to publish one client at random"):
        CentralDp(noise_multiplier=1.0, delta=0.01).plan(UniformCohort(size=5), 1000, 1)
    assert delta_for(None, 1000) < 1e-3


def follow(dp: AdaptiveDp, rounds: int = 100, cohort: int = 100) -> float:
    """The clipping norm after so many rounds with norms exp(N(0, 0.3)), whose median is 1."""
    plan = dp.plan(PoissonCohort(size=cohort), 10_000, rounds)
    clip = plan.clip
    for round_ in range(rounds):
        norms = np.exp(rng(1, round_, 0, "sample").normal(0, 0.3, cohort))
        sent = [plan.encode(Update(k, 1.0, torch.tensor([norm])), clip) for k, norm in enumerate(norms.tolist())]
        extras = {WITHIN: sum((update.extras[WITHIN] for update in sent), torch.zeros(1))}
        total = sum((update.delta for update in sent), torch.zeros(1))
        noisy, clip = plan.decode(Aggregate(cohort, total, extras, cohort), clip, words(round_), {})
        assert noisy.extras == {}
    return clip


@pytest.mark.parametrize("first", [0.1, 5.0])
def test_the_clipping_norm_finds_the_median(first: float) -> None:
    assert follow(AdaptiveDp(noise_multiplier=1.0, clip=first)) == pytest.approx(1, rel=0.1)


def test_another_quantile() -> None:
    expected = math.exp(0.3 * stats.norm.ppf(0.9))
    assert follow(AdaptiveDp(noise_multiplier=1.0, quantile=0.9)) == pytest.approx(expected, rel=0.1)


def test_one_step_of_the_clipping_norm_by_hand() -> None:
    plan = AdaptiveDp(noise_multiplier=0.0, clip=2.0).plan(PoissonCohort(size=4), 100, 1)
    inside, outside = (plan.encode(update([norm]), 2.0) for norm in (1.0, 3.0))
    assert (inside.extras[WITHIN].item(), outside.extras[WITHIN].item()) == (0.5, -0.5)
    # three of four within: 2 exp(-0.2 (0.75 - 0.5))
    aggregate = Aggregate(4.0, torch.zeros(1), {WITHIN: torch.tensor([1.0])}, 4)
    assert plan.decode(aggregate, 2.0, words(), {})[1] == pytest.approx(2 * math.exp(-0.05))


def test_both_sums_together_cost_what_one_does() -> None:
    plan = AdaptiveDp(noise_multiplier=1.0).plan(PoissonCohort(size=100), 10_000, 10)
    # z^-2 = z_delta^-2 + (2 sigma_b)^-2, with sigma_b = 100 / 20
    assert plan.update_noise**-2 + (2 * 5.0) ** -2 == pytest.approx(1.0)
    aggregate = Aggregate(100.0, torch.zeros(10**6), {WITHIN: torch.zeros(1)}, 100)
    noise = plan.decode(aggregate, 0.5, words(), {})[0].total
    assert float(noise.std()) == pytest.approx(0.5 * plan.update_noise, rel=0.003)


def test_too_much_noise_for_the_quantile_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leaves nothing for the clipping norm's own noise of 0\.5"):
        AdaptiveDp(noise_multiplier=1.0).plan(PoissonCohort(size=10), 1000, 10)
    AdaptiveDp(noise_multiplier=0.99).plan(PoissonCohort(size=10), 1000, 10)


@pytest.mark.parametrize("wrong", [{"quantile": 1.0}, {"rate": 0.0}, {"quantile_noise": 0.0}])
def test_faults_of_adaptive_clipping(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"privacy\.dp\.{next(iter(wrong))}"):
        AdaptiveDp(noise_multiplier=1.0, **wrong)


def attacked(noise: float, lower_bound: Bound, runs: int = 1000) -> float:
    """Whether a canary took part, guessed from the noisy sum along it; `noise` is the share that is really added."""
    dp = CentralDp(noise_multiplier=1.0, delta=1e-5).plan(UniformCohort(size=4), 100, 1)
    others = [dp.encode(update([0.1, -0.2, 0.3, 0.0]), 1.0).delta for _ in range(3)]
    canary = dp.encode(update([0.0, 0.0, 0.0, 50.0]), 1.0).delta
    source = words(11)

    def run(present: bool) -> float:
        total = sum(others, canary if present else torch.zeros(4))
        return float(with_noise(total, noise * dp.noise_multiplier * dp.clip, source)[3])

    present, absent = (np.array([run(which) for _ in range(runs)]) for which in (True, False))
    return lower_bound(present, absent, 1e-5, 0.8)


def test_an_attack_stays_below_epsilon_and_would_notice_a_quarter_of_the_noise(lower_bound: Bound) -> None:
    claimed = CentralDp(noise_multiplier=1.0, delta=1e-5).plan(UniformCohort(size=4), 100, 1).spent(1, simulated=False)
    assert 0 < attacked(1.0, lower_bound) <= claimed.epsilon < attacked(0.25, lower_bound)


def test_rows_within_a_client() -> None:
    plan = ExampleDp(epsilon=3.0, delta=1e-4).plan(fewest_rows=500, all_rows=5000, batch=5, steps=100)
    cost = plan.spent(100, simulated=False)
    assert (cost.unit, cost.sampling) == ("example", "poisson")
    assert cost.epsilon == pytest.approx(3.0, rel=1e-3) and cost.epsilon <= 3.0
    assert plan.scheme.rate == 0.01
    ordered = ExampleDp(noise_multiplier=plan.noise_multiplier, sampling="none", delta=1e-4).plan(500, 5000, 5, 100)
    assert ordered.spent(100, simulated=False).epsilon > 10 * cost.epsilon


def test_faults_of_rows_within_a_client() -> None:
    with pytest.raises(ValueError, match="is not for rows"):
        ExampleDp(noise_multiplier=1.0, sampling="fixed")
    with pytest.raises(ValueError, match=r"privacy\.dp\.clip"):
        ExampleDp(noise_multiplier=1.0, clip=-1.0)
    with pytest.raises(ValueError, match="clients need rows"):
        ExampleDp(noise_multiplier=1.0).plan(0, 100, 4, 10)
    with pytest.warns(UserWarning, match="to publish one row at random"):
        ExampleDp(noise_multiplier=1.0, delta=0.1).plan(2, 20, 4, 10)
