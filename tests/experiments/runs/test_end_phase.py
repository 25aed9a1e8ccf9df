"""A run killed at any of its writes: `resume` finishes it with the same result, and says only then that it has."""

import os
import shutil
import sys
from pathlib import Path

import pyarrow.compute as pc
import pytest
import ray.cloudpickle

import experiments
from engine.messages.errors import RunError
from engine.messages.events import DriverLost
from engine.records.metrics import read_log
from engine.rounds import driver
from engine.rounds.driver import Driver
from engine.rounds.round_loop import RoundLoop
from engine.scheduling.pool import Pool
from experiments.runs import driving

DEATHS = ("manifest.json", "round-00001.parquet", "00001", "model", "samples.json")
TIMES = {"round_s", "apply_s", "evaluate_s", "tokens_per_s", "balance", "store_bytes"}
SECURE = ("strategy=ditto", "privacy.secagg.mode=full", "privacy.rows_cap=4")
NOISY = (
    "evaluate.overlap=true",
    "evaluate.without_privacy=true",
    "privacy.dp={kind='central', clip=1.0, noise_multiplier=1.0}",
    "privacy.rows_cap=4",
)


class DyingDriver(Driver):
    """A driver whose process ends before it writes some files, each the first time."""

    def _run(self, at_end):
        replace = os.replace

        def limited(source, target):
            name = Path(target).name
            mark = self.options.folder.with_name(f"died-{name}")
            if name in DEATHS and not mark.exists():
                mark.touch()
                os._exit(1)
            replace(source, target)

        os.replace = limited
        return super()._run(at_end)


@pytest.fixture
def in_process(monkeypatch):
    """Lets drivers work in this process, one after another on the same slots, as a kill of the driver leaves them."""
    pools = []

    class KeptPool(Pool):
        """Starts once, and leaves its slots to the next driver."""

        @classmethod
        def start(cls, *arguments):
            pools[:] = pools or [super().start(*arguments)]
            pools[0].later = []
            return pools[0]

        def stop(self):
            """Leaves the slots to the next driver."""

    monkeypatch.setattr(driver, "Pool", KeptPool)
    monkeypatch.setattr(driving, "drive", lambda recipe, options, stop: Driver(recipe, options).run())
    yield
    for pool in pools:
        Pool.stop(pool)


def moments(recipe, out, monkeypatch):
    """Plays a run and returns what a kill at each of its writes would leave: the file's name and a copy of the folder.

    A write shows in the folder when its file is renamed, so a copy is made before each renaming.
    """
    replace, copies = os.replace, []

    def copied(source, target):
        if Path(target).is_relative_to(out):
            copies.append((Path(target).relative_to(out), out.with_name(f"killed-{len(copies):03d}")))
            shutil.copytree(out, copies[-1][1])
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", copied)
        experiments.run(recipe, out=out)
    return copies


def result(out):
    """What must not depend on a kill: all files by name, and the content of those that hold no times."""
    names = {path.relative_to(out) for path in out.rglob("*") if path.is_file() and not path.name.startswith(".")}
    contents = {
        name: (out / name).read_bytes()
        for name in names
        if name.suffix in (".safetensors", ".json", ".toml", ".md") and name.name != "facts.json"
    }
    metrics = read_log(out / "metrics").filter(~pc.field("name").isin(list(TIMES))).drop_columns("wall_s")
    return names, contents, metrics.to_pylist(), read_log(out / "ledger").to_pylist()


def test_rounds_without_privacy_that_fail_are_a_fault_and_the_run_has_its_model(
    ray_session, small_recipe, tmp_path, in_process, monkeypatch
):
    play, out = RoundLoop.play, tmp_path / "run"

    def diverging(loop, state):
        if loop.federation.privacy.dp.kind == "none":
            raise RunError("training diverged")
        return play(loop, state)

    monkeypatch.setattr(RoundLoop, "play", diverging)
    run = experiments.run(small_recipe("rounds=1", "cohort.size=4", *NOISY), out=out)
    assert (run.model / "README.md").exists() and "not private" not in run.losses
    assert read_log(out / "faults")["why"].to_pylist() == ["played again without privacy: training diverged"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [SECURE, NOISY], ids=["secure", "noisy"])
def test_killed_at_any_write_a_run_is_finished_by_resume(
    ray_session, small_recipe, tmp_path, in_process, monkeypatch, changes, full
):
    if changes == SECURE and not full:
        pytest.skip("a run with noise is tried")
    recipe = small_recipe("rounds=2", "evaluate.every=1", "cohort.size=4", *changes)
    out = tmp_path / "run"
    killed = moments(recipe, out, monkeypatch)
    undisturbed = result(out)
    for written in ("recipe.toml", "manifest.json", "model", "samples.json", "report.html", "finished.json"):
        assert Path(written) in [name for name, _ in killed]
    with pytest.raises(ValueError, match="has finished"):
        experiments.run(recipe, out=out, resume=True)
    if not full:  # one write of each kind
        killed = list({name.name: (name, folder) for name, folder in killed if name.parts[0][0] != "."}.values())
    for name, folder in killed:
        shutil.rmtree(out)
        shutil.copytree(folder, out)
        assert not (out / "finished.json").exists()
        experiments.run(recipe, out=out, resume=(out / "recipe.toml").exists())
        assert result(out) == undisturbed, name


@pytest.mark.slow
def test_drivers_that_die_before_their_writes_leave_the_same_run(
    ray_session, small_recipe, tmp_path, monkeypatch, full
):
    if not full:
        pytest.skip("what each write leaves is tried in one process")
    recipe = small_recipe("rounds=2", "evaluate.every=1", "cohort.size=4", "strategy=ditto")
    experiments.run(recipe, out=tmp_path / "undisturbed")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr("engine.rounds.driver.Driver", DyingDriver)
    events = []
    experiments.run(recipe, out=tmp_path / "run", on_event=events.append)
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert sum(isinstance(event, DriverLost) for event in events) == len(DEATHS)
    assert len(read_log(tmp_path / "run" / "faults")) == len(DEATHS)
    shutil.rmtree(tmp_path / "run" / "faults")
    assert result(tmp_path / "run") == result(tmp_path / "undisturbed")
