"""Scaling studies: figures only where all numbers of slots lead to the same bits."""

import pytest

from experiments.bench.scenarios import slots as scaling
from experiments.bench.scenarios.slots import Scaled, as_figures, draw, study


@pytest.mark.slow
def test_a_study_of_a_recipe(ray_session, small_recipe, full):
    if not full:
        pytest.skip("half a minute")
    alone, two = results = study(small_recipe(), [1, 2], rounds=2)
    assert (alone.slots, two.slots) == (1, 2)
    assert alone.efficiency == pytest.approx(1.0)
    assert two.efficiency == pytest.approx(two.tokens_per_s / alone.tokens_per_s / 2)
    assert all(0 < result.balance <= 1 for result in results)
    assert {"tokens_per_s_2", "efficiency_2", "balance_1"} < set(as_figures(results))
    assert all("measured" in chart and "ideal" in chart for chart in draw(results))


def test_other_bits_give_no_figure(monkeypatch, small_recipe):
    monkeypatch.setattr(scaling, "_play", lambda work, folder, slots, address: (10.0, 1.0, bytes(slots), work.clients))
    with pytest.raises(ValueError, match="2 slots lead to other bits than 1"):
        study(small_recipe(), [1, 2])
    assert study(small_recipe(), [1, 2], weak=True)[1] == Scaled(2, 10.0, 0.5, 1.0)


@pytest.mark.slow
def test_slots_that_do_not_fit_are_refused(ray_session, small_recipe, full):
    if not full:
        pytest.skip("a quarter of a minute")
    with pytest.raises(ValueError, match="3 slots were asked for, and 1 fit"):
        study(small_recipe("clients.num_cpus=6"), [3], rounds=1)


def test_a_cohort_without_a_size_does_not_grow(small_recipe):
    with pytest.raises(ValueError, match=r"a cohort grows with the slots .* cohort\.kind"):
        study(small_recipe('cohort={kind="poisson", rate=0.5}'), [1, 2], weak=True)


@pytest.mark.parametrize("slots", ["", "two", "0,1"])
def test_slots_that_are_none_are_refused(command, small_recipe, tmp_path, slots):
    (tmp_path / "recipe.toml").write_text("name = 1")
    ended = command("bench", "scale", tmp_path / "recipe.toml", "--slots", slots)
    assert ended.returncode == 2 and f"--slots is {slots!r}: give numbers of slots such as 1,2,4" in ended.stderr


def test_scale_needs_a_recipe(command):
    ended = command("bench", "scale")
    assert ended.returncode == 2 and "fedpost bench scale takes a recipe" in ended.stderr
