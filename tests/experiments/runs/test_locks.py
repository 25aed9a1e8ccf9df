"""Two commands in one run folder: the second is refused, and a dead one is in nobody's way."""

import signal
import subprocess
import sys

import pytest

import experiments
from engine.messages.events import Preparing, RoundDone
from experiments.config.recipe import to_toml
from experiments.runs.resuming import alone_in

HOLD = "import sys, time; from pathlib import Path; from experiments.runs.resuming import alone_in\n"
HOLD += "with alone_in(Path(sys.argv[1])): print('there', flush=True); time.sleep(600)"


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_second_start_is_refused_before_it_touches_anything(ray_session, small_recipe, command, tmp_path):
    recipe, out = small_recipe("rounds=2", "evaluate.every=0"), tmp_path / "run"
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    said = []

    def second(event):
        if (isinstance(event, Preparing) and not said) or (isinstance(event, RoundDone) and event.round == 2):
            resume = ["--resume"] if said else []
            before = None if said else contents(out)  # later the driver writes meanwhile
            ended = command("run", tmp_path / "recipe.toml", "--out", out, *resume)
            assert ended.returncode == 2 and before in (None, contents(out))
            said.append(ended.stderr + ended.stdout)

    run = experiments.run(recipe, out=out, on_event=second)
    assert len(said) == 2 and all(f"another command on this machine is working on {out}: wait" in text for text in said)
    assert run.report.exists()


def test_a_killed_command_leaves_no_lock_and_a_refused_one_no_folder(tmp_path):
    out = tmp_path / "some" / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "there\n"
        with pytest.raises(ValueError, match="another command on this machine is working on"), alone_in(out):
            pass
        holder.send_signal(signal.SIGKILL)
    with alone_in(out):
        assert not any(out.iterdir())
    out.rmdir()
    out.parent.rmdir()
    with pytest.raises(ValueError, match="of no use"), alone_in(out):
        raise ValueError("of no use")
    assert not out.parent.exists() and tmp_path.exists()
    with pytest.raises(ValueError, match="cannot be a run folder"):
        (tmp_path / "file").touch()
        with alone_in(tmp_path / "file" / "run"):
            pass
