"""Evaluations beside rounds, and runs in parts: each point is there, and there once."""

import threading
from collections import Counter

import pytest

import experiments
from engine.messages.events import Started
from engine.records.metrics import read_log
from experiments.runs.driving import RunStopped

EVERY = ("evaluate.every=1", "cohort.size=3", "train.steps=1")
ROUNDS = 16  # enough for whoever asks the driver to stop


def judged(run):
    """How often each held-out loss of a round was written, and how often clients were sent a model to judge."""
    rows = [row for row in run.metrics.to_pylist() if row["name"] == "loss" and row["split"] != "train"]
    sent = [row for row in read_log(run.folder / "ledger").to_pylist() if row["kind"] == "sum" and row["count"] != 3]
    return (
        Counter((row["round"], row["split"], row["client"]) for row in rows),
        Counter((row["round"], row["count"]) for row in sent),
    )


def once_in_each_of(rounds, run):
    points, sent = judged(run)
    assert {round_ for round_, _, _ in points} == set(range(rounds + 1)) and set(points.values()) == {1}
    assert sent == {(round_, count): 1 for round_ in range(rounds + 1) for _, count in sent}


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_a_finished_run_that_goes_on_judges_no_round_twice(ray_session, small_recipe, tmp_path, before, full):
    if not full:
        pytest.skip("two runs each; one run's evaluations are counted")
    first = small_recipe(*EVERY, "rounds=1", f"evaluate.overlap={str(before).lower()}")
    experiments.run(first, out=tmp_path / "run")
    more = small_recipe(*EVERY, "rounds=2", "evaluate.overlap=true")
    once_in_each_of(2, experiments.run(more, out=tmp_path / "run", resume=True))


@pytest.mark.slow
def test_an_evaluation_that_was_to_come_beside_the_next_round_is_not_lost(ray_session, small_recipe, tmp_path, full):
    if not full:
        pytest.skip("what is written twice is tried unless all is asked for")
    stop = threading.Event()
    recipe = small_recipe(*EVERY, f"rounds={ROUNDS}", "evaluate.overlap=true")
    with pytest.raises(RunStopped):
        experiments.run(
            recipe, out=tmp_path / "run", stop=stop, on_event=lambda event: isinstance(event, Started) and stop.set()
        )
    waiting = small_recipe(*EVERY, f"rounds={ROUNDS}", "evaluate.overlap=false")
    once_in_each_of(ROUNDS, experiments.run(waiting, out=tmp_path / "run", resume=True))
