"""What all processes of a run hold together, Ray's own daemons left out: of the command, as a user starts it."""

import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from experiments.config.recipe import Recipe, to_toml

DAEMONS = ("raylet", "gcs_server", "log_monitor", "monitor.py", "dashboard", "Agent", "runtime_env", "ray::IDLE")
EVERY_S = 0.25


@dataclass(frozen=True)
class Held:
    """The most that was held, in MB: `pss` counts what processes share once, `rss` in each."""

    rss: float
    pss: float


def held_by_command(work: Recipe, folder: Path) -> Held:
    """Runs the recipe by `fedpost run` and looks at its processes all the time; what it leaves is in `folder`."""
    folder.mkdir()
    recipe = folder / "recipe.toml"
    recipe.write_text(to_toml(work), encoding="utf-8")
    command = [sys.executable, "-m", "experiments", "run", str(recipe), "--out", str(folder / "run")]
    with (folder / "output").open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        seen = [Held(0.0, 0.0)]
        while process.poll() is None:
            seen.append(_held(psutil.Process(process.pid)))
            time.sleep(EVERY_S)
    if process.returncode:
        raise ValueError(f"the command ended with {process.returncode}: {(folder / 'output').read_text()[-500:]}")
    return Held(max(one.rss for one in seen), max(one.pss for one in seen))


def _held(command: psutil.Process) -> Held:
    rss = pss = 0
    with suppress(psutil.NoSuchProcess):
        for process in [command, *command.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                if not any(name in " ".join(process.cmdline()[:4]) for name in DAEMONS):
                    used = process.memory_full_info()
                    rss, pss = rss + used.rss, pss + used.pss
    return Held(rss / 2**20, pss / 2**20)
