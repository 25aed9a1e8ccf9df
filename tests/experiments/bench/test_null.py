"""Null clients: the engine's own rounds, with nothing trained in them."""

import pytest
import torch

from experiments.bench.harness import Bench, measure
from experiments.bench.scenarios import null_clients
from experiments.bench.scenarios.null_clients import CHANGE, null_recipe, play, refuse_other_change


def test_rounds_of_null_clients_move_the_model_by_what_each_sends(ray_session, tmp_path):
    work = null_recipe(Bench(tmp_path, small=True), 50, 20, 1)
    played = play(work, tmp_path / "run", 2)
    assert len(played.seconds) == 2 and played.start_s > 0
    assert played.nbytes == pytest.approx(played.parameters * (4 + 8 * 2), rel=0.01)  # as Ray counts them


@pytest.mark.slow
def test_a_round_that_moves_otherwise_gives_no_figure(ray_session, tmp_path, monkeypatch, full):
    if not full:
        pytest.skip("the gate is tried without a round")
    monkeypatch.setattr(null_clients, "CHANGE", 2 * CHANGE)  # here, and not in the slots
    with pytest.raises(ValueError, match="after round 1 of 20 null clients the model's change"):
        play(null_recipe(Bench(tmp_path, small=True), 50, 20, 0), tmp_path / "run", 1)


def test_the_gate_is_exact():
    refuse_other_change(torch.full((4,), 3 * CHANGE), 3, 7)
    with pytest.raises(ValueError, match=r"after round 3 of 7 null clients .* are 1e-05 apart"):
        refuse_other_change(torch.full((4,), 3 * CHANGE + 1e-5), 3, 7)


@pytest.mark.slow
def test_small_runs_have_the_promised_keys(ray_session, full):
    if not full:
        pytest.skip("minutes")
    figures = measure("overhead", small=True)
    assert {"ms_per_client_0mb", "ms_per_client_4mb", "ms_per_client_35mb"} < set(figures)
    assert figures["bytes_over_bound"].value == pytest.approx(1, abs=0.1)
    starts = measure("population", small=True)
    assert {"driver_rss_growth_mb", "start_s", "start_s_1e3", "start_s_1e4"} < set(starts)
