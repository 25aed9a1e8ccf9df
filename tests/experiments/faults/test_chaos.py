"""Long runs of which whatever they consist of is killed at random, the command and its cluster too: the same bits."""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import experiments
from engine.records.metrics import read_log
from experiments.config.recipe import to_toml

ROOT = Path(__file__).resolve().parents[3]
ADAPTER = "adapter_model.safetensors"
# How likely each is to be next, if it is there.
VICTIMS = {"ClientActor": 8, "Gang": 4, "Rank": 4, "Driver": 3, "command": 2, "raylet": 1, "gcs_server": 1}
SLOTS = {"ClientActor", "Gang"}
SURE = {*SLOTS, "Driver", "command"}  # each that there is in a run is struck at least once
ENDING = {"command", "raylet", "gcs_server"}  # without its cluster the command ends, and so does all of it with it
LONGEST_S = 1200


def alive(command):
    """Which living processes of a run there are to kill, by kind."""
    processes = {"command": [command]}
    for process in command.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            called = process.cmdline()
            title = Path(called[0]).name.removeprefix("ray::") if called else ""
            kind = next((kind for kind in VICTIMS if title.startswith(kind)), None)
            if kind:
                processes.setdefault(kind, []).append(process)
    return processes


def last_round(out):
    """The last one that has a checkpoint."""
    return max((int(folder.name) for folder in (out / "checkpoints").glob("[0-9]*")), default=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rounds", "kills", "slots"),
    [(200, 16, ("clients.slots=2",)), (120, 8, ("clients.slots=1", "clients.zero={stage=2, ranks=2, timeout_s=15}"))],
    ids=["slots", "gangs"],
)
def test_chaos(ray_session, small_recipe, tmp_path, full, rounds, kills, slots):
    if not full:
        pytest.skip("ten minutes")
    changes = ("evaluate.every=0", "train.steps=1", f"rounds={rounds}", *slots)
    quiet = experiments.run(small_recipe(*changes), out=tmp_path / "quiet")
    recipe, out, draw, killed = tmp_path / "recipe.toml", tmp_path / "run", random.Random(0), Counter()
    recipe.write_text(to_toml(small_recipe(*changes)))
    deadline, due = time.monotonic() + LONGEST_S, 1
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    while time.monotonic() < deadline:
        again = ["--resume"] if out.exists() else []
        with (tmp_path / "log").open("a") as log:
            command = [sys.executable, "-m", "experiments", "run", str(recipe), "--out", str(out), *again]
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        ended = False
        while process.poll() is None:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(draw.uniform(0.1, 0.5))
            if killed.total() < kills and last_round(out) >= due:
                with suppress(psutil.NoSuchProcess):
                    there = alive(psutil.Process(process.pid))
                    # Else most would be the command's deaths while it starts, when nothing else is there.
                    if there.keys() & SLOTS:
                        kinds = [kind for kind in there if kind in SURE and kind not in killed] or [*there]
                        (kind,) = draw.choices(kinds, [VICTIMS[kind] for kind in kinds])
                        draw.choice(there[kind]).kill()
                        killed[kind] += 1
                        ended |= kind in ENDING
                        due = last_round(out) + draw.randint(0, 2 * rounds // kills)
        if process.returncode == 0:
            break
        said = (tmp_path / "log").read_text()[-3000:]
        # Drivers that die one after another end a run as well; it says how it goes on, and here that is done.
        assert ended or "without getting further" in said, (killed, said)
    assert killed.total() >= kills / 2 and killed["Driver"] and killed["command"] and SLOTS & killed.keys(), killed
    assert (out / "model" / ADAPTER).read_bytes() == (quiet.model / ADAPTER).read_bytes()
    rows = [row for row in read_log(out / "metrics").to_pylist() if (row["split"], row["name"]) == ("train", "rows")]
    assert len(rows) == len({(row["round"], row["client"]) for row in rows}) == len(quiet_rows(quiet))


def quiet_rows(run):
    """The clients of all rounds of a run."""
    return [row for row in run.metrics.to_pylist() if (row["split"], row["name"]) == ("train", "rows")]
