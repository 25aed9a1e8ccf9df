"""Null clients: the engine's own rounds, with nothing trained in them."""

import pytest
import torch

from engine.events import RoundDone
from experiments.bench import null
from experiments.bench.null import CHANGE, null_recipe, play


def test_rounds_of_null_clients_move_the_model_by_what_each_sends(ray_session, tmp_path):
    work = null_recipe(tmp_path, 50, 20, 0)
    done = play(work, tmp_path / "run", 2)
    assert len(done.seconds) == 2 and done.start_s > 0
    assert done.nbytes == [done.parameters * (4 + 8 * 2)] * 2


def test_a_round_that_moves_otherwise_gives_no_figure(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr(null, "CHANGE", 2 * CHANGE)  # here, and not in the slots
    with pytest.raises(ValueError, match="after round 1 of 20 null clients the model is"):
        play(null_recipe(tmp_path, 50, 20, 0), tmp_path / "run", 1)


def test_the_gate_is_exact():
    done = RoundDone(3, 1.0, 1.0, 1.0, 7, {})
    null._refuse_other(torch.full((4,), 3 * CHANGE), 3, done)
    with pytest.raises(ValueError, match="off"):
        null._refuse_other(torch.full((4,), 3 * CHANGE + 1e-5), 3, done)
