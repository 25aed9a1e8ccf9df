"""The driver never holds an unmasked update: a canary in one is not in its memory, the object store, or any log."""

import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import pytest
import ray.cloudpickle
import torch

import experiments
from engine.aggregation.ring_encoding import ring_sums
from engine.messages.events import RoundDone
from strategies.averaging.fedavg import FedAvg
from strategies.core.layout import Layout
from strategies.core.seeds import rng

WORDS = 16
PAGE = 4096
# An adapter of this rank makes vectors that are too long for a message: they cross the object store.
CHANGES = (
    "rounds=1",
    "clients.slots=2",
    "evaluate.every=0",
    "model.peft={kind='lora', r=16}",
    "clients.max_failed=0.5",
)
FULL = ("privacy.secagg.mode=full", "privacy.secagg.dropout=0.34", "privacy.secagg.threshold=2", "privacy.rows_cap=1")


@dataclass(frozen=True)
class Canary(FedAvg):
    """FedAvg whose clients put 16 numbers of their own into their change, and write them down where the test looks.

    One of them, if `spoils` is set, adds what no sum can use: the first that finds the file `spoilt` missing.
    """

    kind: str = "canary"  # type: ignore[assignment]
    weighting: str = "uniform"  # type: ignore[assignment]
    folder: str = ""
    spoils: bool = False
    seen: ClassVar[list[torch.Tensor]] = []

    def finish(self, update, broadcast, memory, ends=None):
        update, memory = super().finish(update, broadcast, memory, ends)
        canary = torch.from_numpy(np.frombuffer(os.urandom(2 * WORDS), np.int16) / 2.0**17).float()
        np.save(Path(self.folder) / f"{update.client}.npy", canary.numpy())
        rest = update.delta[WORDS:].clone()
        with suppress(FileExistsError):
            if self.spoils:
                (Path(self.folder) / "spoilt").touch(exist_ok=False)
                rest[-1] = float("nan")
        return replace(update, delta=torch.cat([canary, rest])), memory

    def apply(self, state, aggregate):
        self.seen.append(aggregate.total)  # stays in the driver as long as its process
        (Path(self.folder) / "modules").write_text(" ".join(sys.modules))
        return super().apply(state, aggregate)


@dataclass
class Seen:
    """What there is to search after a round: the driver's memory, the object store, and Ray's logs."""

    memory: list[bytes]
    store: list[bytes]
    logs: list[bytes]

    def holds(self, needle):
        return any(needle in part for part in [*self.memory, *self.store, *self.logs])


@pytest.fixture
def canaries(ray_session, small_recipe, tmp_path):
    """Runs a round in two slots; gives the recipe, the canaries by client, the round's event, and what was seen."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def play(name, *changes, spoils=False):
        recipe = small_recipe(*CHANGES, *changes)
        folder = tmp_path / name
        folder.mkdir()
        recipe, rounds = replace(recipe, strategy=Canary(folder=str(folder), spoils=spoils)), []

        def look(event):
            if isinstance(event, RoundDone):
                rounds.append((event, Seen(*memory_and_logs("ray::Driver"))))

        experiments.run(recipe, out=folder / "run", on_event=look)
        return recipe, {int(path.stem): np.load(path) for path in folder.glob("*.npy")}, *rounds[0]

    yield play
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def memory_and_logs(name):
    """The private memory of the child process of that name, the object store's pages, and all files beside its logs."""
    memory, stores, logs = [], {}, set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                target = os.readlink(link)
                if "plasma" in target and target not in stores:
                    stores[target] = pages(link)
            if name in "".join(process.cmdline()):
                memory += private_memory(process.pid)
                logs |= {Path(file.path).parent for file in process.open_files() if "logs" in file.path}
    assert memory and stores and logs
    return memory, list(stores.values()), [p.read_bytes() for folder in logs for p in folder.rglob("*") if p.is_file()]


def private_memory(pid):
    """All readable and writable memory of a process that is not shared with others."""
    content = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            first, last, access = re.match(r"(\w+)-(\w+) (\S+)", line).groups()
            if access.startswith("rw") and "/dev/shm" not in line:
                content.append(region(memory, int(first, 16), int(last, 16)))
    return content


def region(memory, first, last):
    """The bytes between two addresses, in as many reads as it takes."""
    parts = []
    while first < last:
        memory.seek(first)
        try:
            part = memory.read(min(last - first, 2**24))
        except OSError:  # a page that cannot be read, such as a stack's guard
            part = b""
        parts.append(part or bytes(PAGE))
        first += len(parts[-1])
    return b"".join(parts)


def pages(link):
    """What was ever written to a shared memory file: the holes between are left out."""
    parts, place = [], 0
    file = os.open(link, os.O_RDONLY)
    try:
        with suppress(OSError):  # beyond the last page
            while True:
                place = os.lseek(file, place, os.SEEK_DATA)
                end = os.lseek(file, place, os.SEEK_HOLE)
                while place < end:
                    parts.append(os.pread(file, min(end - place, 2**24), place))
                    place += len(parts[-1])
    finally:
        os.close(file)
    return b"".join(parts)


def on_grid(values):
    """The numbers as the exact sum in the clear holds them."""
    return np.rint(values.astype(np.float64) * 2.0**40).astype(np.int64)


def forms(canary, encoded):
    """All forms in which an update might be held."""
    return [canary, canary.astype(np.float64), on_grid(canary), encoded]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("active", ["true", "false"])
def test_the_driver_never_holds_an_unmasked_update(canaries, active, full, tmp_path):
    if active == "false" and not full:
        pytest.skip("of two profiles one is tried unless all are asked for")
    # Control: in the clear, the sum of one client with the weight 1 is its update, and it is found in both places.
    _, planted, _, seen = canaries("clear", "cohort.size=1")
    (canary,) = planted.values()
    assert any(canary.tobytes() in part for part in seen.memory)
    assert any(on_grid(canary).tobytes() in part for part in seen.store)

    active = f"privacy.secagg.active={active}"
    recipe, planted, event, seen = canaries("secure", "cohort.size=3", *FULL, active, spoils=True)
    assert len(planted) == 3 and event.clients == 2
    ((why,),) = [list(event.failed.values())]
    assert why == "its update holds NaN or infinity"
    sums = ring_sums(recipe, Layout(("w",), ((WORDS,),)), None, 0.0, 3, 3 * 4 * 48, 0)
    encoded = {
        client: sums.encode_piece("delta", canary, 1.0, rng(recipe.seed, 0, client, "rounding"))
        for client, canary in planted.items()
    }
    for client, canary in planted.items():
        for needle in forms(canary, encoded[client]):
            assert not seen.holds(needle[: WORDS // 2].tobytes())  # nor then the whole
    # What it does have is the sum of the two that could be used.
    pairs = [(first, second) for first in planted for second in planted if first < second]
    totals = [sums.decode_piece("delta", encoded[a] + encoded[b]).astype(np.float32) for a, b in pairs]
    assert sum(any(total.tobytes() in part for part in seen.memory) for total in totals) == 1
    # No model is ever in that process, nor are the libraries of models: they would double its memory.
    modules = (tmp_path / "secure" / "modules").read_text().split()
    assert "torch" in modules and not {"transformers", "peft"} & {*modules}
