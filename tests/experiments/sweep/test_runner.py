"""Several runs in one Ray: a failed one stops no other, and what has finished is left alone."""

import json
import threading

import pytest

from engine.messages.errors import RunError
from engine.messages.events import RoundDone
from experiments.runs.driving import RunStopped
from experiments.sweep.runner import FAILED, refuse_failed, run_all


def test_a_sweep_goes_on_where_it_stopped_and_names_what_fails(ray_session, small_recipe, tmp_path):
    short = ("rounds=1", "evaluate.every=0", "cohort.size=2")
    recipes = {
        "faulty": small_recipe(*short, "train.max_length=2"),
        "first": small_recipe(*short),
    }
    stop, begun = threading.Event(), []

    def listener(name, recipe):
        begun.append(name)

        def show(event):
            if isinstance(event, RoundDone) and name == "first":
                stop.set()

        return show

    children = []
    try:
        children = run_all(recipes, tmp_path, listener, stop)
    except RunStopped as stopped:  # after its only round, a run has ended by itself
        pytest.fail(str(stopped))
    assert [child.name for child in children] == ["faulty", "first"] == begun
    assert [child.failed is None for child in children] == [False, True]
    assert "no training row left" in children[0].failed
    assert json.loads((tmp_path / FAILED).read_text()) == {"faulty": children[0].failed}
    with pytest.raises(RunError, match="faulty: "):
        refuse_failed(children)
    # Again: only what has no result is tried.
    begun.clear()
    again = run_all(recipes, tmp_path, listener)
    assert begun == ["faulty"] and [child.folder for child in again] == [child.folder for child in children]
