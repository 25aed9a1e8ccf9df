"""Null clients: the engine's own rounds, with nothing trained in them."""

import pytest
import torch

from engine.messages.events import RoundDone
from experiments.bench import null
from experiments.bench.null import CHANGE, null_recipe, play
from experiments.bench.scenarios import overhead, population


def test_rounds_of_null_clients_move_the_model_by_what_each_sends(ray_session, tmp_path):
    work = null_recipe(tmp_path, 50, 20, 1)
    done = play(work, tmp_path / "run", 2)
    assert len(done.seconds) == 2 and done.start_s > 0
    assert done.nbytes == pytest.approx(done.parameters * (4 + 8 * 2), rel=0.01)  # as Ray counts them


@pytest.mark.slow
def test_a_round_that_moves_otherwise_gives_no_figure(ray_session, tmp_path, monkeypatch, full):
    if not full:
        pytest.skip("the gate is tried without a round")
    monkeypatch.setattr(null, "CHANGE", 2 * CHANGE)  # here, and not in the slots
    with pytest.raises(ValueError, match="after round 1 of 20 null clients the model is"):
        play(null_recipe(tmp_path, 50, 20, 0), tmp_path / "run", 1)


def test_the_gate_is_exact():
    done = RoundDone(3, 1.0, 1.0, 1.0, 7, {})
    null._refuse_other(torch.full((4,), 3 * CHANGE), 3, done)
    with pytest.raises(ValueError, match="off"):
        null._refuse_other(torch.full((4,), 3 * CHANGE + 1e-5), 3, done)


@pytest.mark.slow
def test_small_runs_have_the_promised_keys(ray_session, full):
    if not full:
        pytest.skip("minutes")
    figures = overhead.measure(small=True)
    assert {"ms_per_client_0mb", "ms_per_client_4mb", "ms_per_client_35mb"} < set(figures)
    assert figures["bytes_over_bound"].value == pytest.approx(1, abs=0.1)
    found = population.measure(small=True)
    assert {"driver_rss_growth_mb", "start_s", "start_s_1e3", "start_s_1e4"} < set(found)
