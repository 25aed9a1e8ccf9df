"""What all tests share: one Ray session, a tiny base model with its tokenizer, and small data of uneven clients."""

import json
import os
import secrets
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

# Ray reads these when it is imported; children of the tests inherit them. Loopback only, no file in the home folder.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests share the processors with each other and with slots: torch's idle threads would spin on them.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from tests import golden

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run what is marked slow in its full size, not a reduced one")


@pytest.fixture(scope="session")
def full(request):
    """Whether tests marked slow run in their full size."""
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def lower_bound():
    """The largest epsilon that an attack's guesses exclude, at 95% for either rate (Clopper-Pearson).

    It takes what the attacker saw with and without the canary (N,), delta, and the threshold of the guess.
    """
    import math

    from scipy import stats

    def bound(present, absent, delta, threshold):
        hits, alarms, runs = int((present > threshold).sum()), int((absent > threshold).sum()), len(present)
        least = stats.beta.ppf(0.05, hits, runs - hits + 1) if hits else 0.0
        most = stats.beta.ppf(0.95, alarms + 1, runs - alarms)
        return math.log((least - delta) / most) if least > delta else 0.0

    return bound


@pytest.fixture(scope="session")
def command():
    """Runs the command line with arguments, in a folder, with additions to the environment."""

    def run(*arguments, cwd=ROOT, **environment):
        return subprocess.run(
            [sys.executable, "-m", "experiments", *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )

    return run


@pytest.fixture(scope="session")
def ray_session():
    """One Ray of six logical CPUs for all tests of a session: slots of a test take theirs and give them back."""
    import ray

    ray.init("local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def slot_processes(ray_session):
    """Lists the living processes that are slots, whoever's: compare with those of before to find a run's own."""
    import psutil

    def listed():
        slots = set()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # gone, or a zombie
                if "ClientActor" in "".join(process.cmdline()):
                    slots.add(process)
        return slots

    return listed


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A random Llama of a few thousand parameters with a byte-level tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny_base")
    golden.make_base(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """A JSONL file of ten clients with 4 to 22 rows: spell a short word backwards."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in golden.make_rows()))
    return path


@pytest.fixture(scope="session")
def small_recipe(tiny_base, rows_file, tmp_path_factory):
    """Makes a small recipe over them, with changes like those of --set; its store is cached once for all tests."""
    from experiments.config.recipe import parse_recipe

    cache = tmp_path_factory.getbasetemp() / "stores"
    text = f"""
        name = "small"
        seed = 5
        rounds = 4
        [model]
        base = "{tiny_base}"
        [data]
        source = {{ kind = "jsonl", path = "{rows_file}" }}
        splits = {{ heldout = 0.25, unseen = 0.2 }}
        cache = "{cache}"
        [clients]
        slots = 1
        [cohort]
        size = 5
        [train]
        steps = 3
        batch = 4
        max_length = 48
        optimizer = {{ kind = "adamw", lr = 1e-2 }}
        [evaluate]
        every = 2
    """

    def make(*changes):
        return parse_recipe(text, list(changes))

    return make
