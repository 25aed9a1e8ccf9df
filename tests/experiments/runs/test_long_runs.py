"""Long runs of many clients: the driver, the command, and the report hold nothing that grows with rounds x clients."""

import gc
import json
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace

import psutil
import pytest
import ray.cloudpickle

import experiments
from engine.config.sections import Checkpoint
from engine.messages.events import RoundDone
from engine.rounds.driver import Driver
from engine.scheduling.pool import Pool
from experiments.bench.harness import Bench
from experiments.bench.scenarios.null_clients import NullClient, null_recipe
from experiments.report.page import write_report

REPORT = (
    "import resource, sys; from pathlib import Path; from experiments.report.page import write_report; "
    "write_report([Path(sys.argv[1])], Path(sys.argv[2])); "
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
)


def held():
    """What this process holds: objects that Python's collector knows, and MB of its own memory."""
    gc.collect()
    return len(gc.get_objects()), psutil.Process().memory_full_info().uss / 2**20


class NullDriver(Driver):
    """A driver of clients that train nothing; it writes what it holds after an early round and after the last."""

    def run(self):
        """As any driver's."""
        Pool.client, rounds = NullClient, self.federation.rounds
        for event in super().run():
            if isinstance(event, RoundDone) and event.round in (rounds // 10, rounds):
                (self.options.folder.parent / f"driver-{event.round}.json").write_text(json.dumps(held()))
            yield event


@pytest.mark.slow
def test_memory_is_flat_and_the_report_reads_no_client_as_an_object(ray_session, tmp_path, monkeypatch, full):
    rounds, clients, slots = (2000, 1000, 2) if full else (20, 100, 1)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr("engine.rounds.driver.Driver", NullDriver)
    recipe = null_recipe(Bench(tmp_path, small=True), 2 * clients, clients, 0)
    sections = {"checkpoint": Checkpoint(every=rounds), "clients": replace(recipe.clients, slots=slots)}
    recipe = replace(recipe, rounds=rounds, **sections)
    command = []

    def note(event):
        if isinstance(event, RoundDone) and event.round in (rounds // 10, rounds):
            command.append(held())

    began = time.monotonic()
    run = experiments.run(recipe, out=tmp_path / "run", on_event=note)
    seconds = time.monotonic() - began
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    driver = [json.loads((tmp_path / f"driver-{round_}.json").read_text()) for round_ in (rounds // 10, rounds)]
    print(f"{rounds} rounds of {clients} clients: {seconds:.0f} s; objects and MB early and late:", driver, command)
    for (early, early_mb), (late, late_mb) in (driver, command):
        assert late - early < rounds * clients / 10, "objects grow"
        assert late_mb - early_mb < (64 if full else 16), "memory grows"

    tracemalloc.start()
    write_report([run.folder], tmp_path / "report.html")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"the report's Python objects: {most / 2**20:.1f} MiB")
    assert most < (32 if full else 8) * 2**20
    if full:
        began = time.monotonic()
        reported = subprocess.run(
            [sys.executable, "-c", REPORT, run.folder, tmp_path / "again.html"], capture_output=True, text=True
        )
        print(f"the report alone: {time.monotonic() - began:.1f} s, {reported.stdout.strip()} MiB in all")
        assert float(reported.stdout) < 700
