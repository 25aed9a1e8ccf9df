"""The end of a run, killed at each of its writes: `resume` finishes it, and only then says that it has finished."""

import json
import os
from pathlib import Path

import pytest

import experiments
from engine.rounds.driver import Driver
from experiments.runs import driving

WRITTEN = ["model", "samples.json", "report.html", "finished.json"]  # by the end of a run, in this order


class Killed(BaseException):
    """No code of the run catches it, as a kill is not caught."""


@pytest.fixture
def killed_at(monkeypatch):
    """Lets the driver work in this process, and die before or after one of WRITTEN is in its place, or not at all.

    Returns a function that takes its name, and returns the list of those written since.
    """
    replace, written, death = os.replace, [], {}

    def limited(source, target):
        name = Path(target).name
        if death.get(name) == "before":
            raise Killed
        replace(source, target)
        if name in WRITTEN:
            written.append(name)
        if death.get(name) == "after":
            raise Killed

    monkeypatch.setattr(os, "replace", limited)
    monkeypatch.setattr(driving, "drive", lambda recipe, plan, stop: Driver(recipe, plan).run())

    def arm(*moment):
        written.clear()
        death.clear()
        death.update([moment] if moment else [])
        return written

    return arm


@pytest.mark.slow
def test_killed_at_any_write_of_its_end_a_run_is_finished_by_resume(
    ray_session, small_recipe, tmp_path, killed_at, full
):
    recipe, out = small_recipe("rounds=1", "evaluate.every=0"), tmp_path / "run"
    deaths = [("model", "after"), ("finished.json", "before")]
    if full:
        deaths = [("model", "before"), *deaths, ("samples.json", "after"), ("report.html", "after")]
    for number, (name, when) in enumerate(deaths):
        written = killed_at(name, when)
        with pytest.raises(Killed):
            experiments.run(recipe, out=out, resume=number > 0)
        assert written == WRITTEN[: WRITTEN.index(name) + (when == "after")]
        assert not (out / "finished.json").exists()
    written = killed_at()
    run = experiments.run(recipe, out=out, resume=True)
    assert written == WRITTEN
    assert len(json.loads((out / "samples.json").read_text())) == len(run.samples) > 0
    with pytest.raises(ValueError, match="has finished"):
        experiments.run(recipe, out=out, resume=True)
