import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.train import Schedule, TorchOptimizer, Train


def test_factors_by_hand() -> None:
    assert [Schedule().factor(at, 4) for at in range(4)] == [1, 1, 1, 1]
    linear = Schedule(kind="linear", warmup=2, end=0.2)
    assert [linear.factor(at, 6) for at in range(6)] == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4])
    cosine = Schedule(kind="cosine", end=0.0)
    assert [cosine.factor(at, 4) for at in range(5)] == pytest.approx(
        [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2, 0]
    )


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 20), st.floats(0, 1), st.integers(1, 60))
def test_factors_rise_to_one_and_never_leave_their_range(kind: str, warmup: int, end: float, total: int) -> None:
    factors = [Schedule(kind=kind, warmup=warmup, end=end).factor(at, total) for at in range(total)]  # type: ignore[arg-type]
    assert all(0 < factor <= 1 or factor >= end for factor in factors)
    assert factors[:warmup] == sorted(factors[:warmup]) and factors[warmup:] == sorted(factors[warmup:], reverse=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "AdamX"}, r"train\.optimizer\.name is 'AdamX'; did you mean 'Adam'\? There is ASGD, .*RAdam"),
        ({"name": "LBFGS"}, r"train\.optimizer\.name is 'LBFGS'; did you mean"),
        ({"name": "lr_scheduler"}, r"train\.optimizer\.name is 'lr_scheduler'; did you mean"),
        ({"name": "swa_utils"}, r"train\.optimizer\.name is 'swa_utils'; did you mean"),
        ({"name": "swap_in_optimizer_params_and_state"}, r"did you mean .* SGD$"),
        ({"name": "RAdam", "options": {"beta": 1.0}}, r"torch\.optim\.RAdam has no option 'beta'; it takes betas, "),
        ({"name": "RAdam", "lr": -1.0}, r"train\.optimizer\.lr must be at least 0"),
    ],
)
def test_an_optimizer_that_torch_does_not_have(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TorchOptimizer(**options)  # type: ignore[arg-type]


def test_ranges() -> None:
    with pytest.raises(ValueError, match=r"train\.accumulate must be at least 1"):
        Train(steps=1, accumulate=0)
    with pytest.raises(ValueError, match=r"train\.over_rounds\.warmup must be at least 0"):
        Train(steps=1, over_rounds=Schedule(warmup=-1))
    with pytest.raises(ValueError, match=r"train\.over_steps\.end must be at least 0"):
        Train(steps=1, over_steps=Schedule(end=-1))
