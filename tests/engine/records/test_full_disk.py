"""Where Ray's object store is full, and so is the disk that it spills to: one sentence, as of any full disk."""

import subprocess
import sys

FILL = """
import os, sys, time
from pathlib import Path
import numpy as np, ray
from engine.rounds.driver import Driver, RunOptions
from engine.config.federation import Federation
from engine.config.sections import Model
from engine.config.train import Train

def fill():
    kept = [ray.put(np.ones(20_000_000, np.uint8)) for _ in range(10)]

class Filling(Driver):
    def _run(self, at_end):
        yield from ()
        fill() if self.options.resume else ray.get(ray.remote(fill).remote())

config = {"local_fs_capacity_threshold": 0.0001, "local_fs_monitor_interval_ms": 100}  # any disk is too full for it
ray.init("local", num_cpus=1, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False,
         logging_level="error", _node_ip_address="127.0.0.1", _system_config=config)
time.sleep(1)
federation = Federation(name="x", seed=1, rounds=1, model=Model(), train=Train(steps=1))
for here in (True, False):
    try:
        list(Filling(federation, RunOptions(Path("store"), Path("run"), {}, resume=here)).run())
    except ValueError as error:
        print(error)
"""


def test_a_full_store_on_a_full_disk_is_a_sentence_from_the_driver_and_from_a_slot() -> None:
    result = subprocess.run([sys.executable, "-c", FILL], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    assert len(said) == 2 and said[0] == said[1]
    assert said[0].startswith("Ray's object store is full, and so is the disk that it spills to (")
    assert said[0].endswith("free some space there and run again with --resume: what was written before is whole")
