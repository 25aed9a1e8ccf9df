"""Damaged files of every kind that is read: refused by a sentence, or read, and never a crash, a hang or half a folder.

Recipes are tried in test_config_any_input.py.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.messages.events import Fault
from engine.messages.shards import ShardedState
from engine.records.checkpoint import Saved, load_checkpoint, save_checkpoint
from engine.records.metrics import Faults, Ledger, Metrics
from strategies.core.protocol import ServerState

ROOT = Path(__file__).resolve().parents[3]
CHILD = Path(__file__).with_name("fuzzed.py")


def tried(kind: str, folder: Path, count: int) -> dict[str, int]:
    """What came of so many cases in a process of their own; where it died or hung, the test fails with the case."""
    command = [sys.executable, "-P", CHILD, kind, folder, "0", count]
    log, errors = folder / "log", folder / "errors"
    with log.open("w") as out, errors.open("w") as err:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=out, stderr=err, env={"PYTHONPATH": str(ROOT)}, cwd=folder
        )
        try:
            status: int | str = process.wait(60 + count * 0.1)
        except subprocess.TimeoutExpired:
            process.kill()
            status = "hung"
    lines = log.read_text().splitlines()
    assert status == 0, f"{kind}, case {lines[-1:]}: {status}\n{errors.read_text()[-4000:]}"
    results: dict[str, int] = json.loads(lines[-1])
    assert sum(results.values()) == count
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "few", "many"), [("rows", 120, 4000), ("report", 120, 3000), ("store", 120, 3000)])
def test_damaged_files(tmp_path: Path, full: bool, kind: str, few: int, many: int) -> None:
    if kind == "report":
        _write_run(tmp_path / "run")
    results = tried(kind, tmp_path, many if full else few)
    assert results["refused"] > 0.3 * sum(results.values()) and results["read"] > 0, results


def _write_run(folder: Path) -> None:
    """A run folder with all that a report reads."""
    metrics, ledger, faults = Metrics(folder / "metrics"), Ledger(folder / "ledger"), Faults(folder / "faults")
    for round_ in range(3):
        metrics.add(round_, "heldout", None, loss=3.0 - round_)
        metrics.add_each(round_, "heldout", ["a", "b"], [{"loss": 3.0}, {"loss": 2.0 - round_}])
        metrics.add_each(round_, "train", ["a", "b"], [{"rows": 4.0}, {"rows": 5.0}])
        metrics.add(round_, "engine", None, round_s=1.0, failed=1.0, clients=3.0, tokens_per_s=100.0)
        ledger.received(round_, "server", "update", 3, 100)
        faults.happened(round_, [Fault("slot", "a", "killed"), Fault("client", "b", "out of memory")], 1.0)
        metrics.flush(round_), ledger.flush(round_), faults.flush(round_)
    (folder / "recipe.toml").write_text('name = "x"\nrounds = 2\n[model]\nbase = "tiny"\n[cohort]\nsize = 3\n')
    (folder / "manifest.json").write_text(json.dumps({"seed": 7, "data": {"key": "k", "rows": 3, "files": ["a"]}}))
    (folder / "privacy.json").write_text(json.dumps({"rounds": 2, "statement": "epsilon 1 at delta 0.1"}))


@pytest.mark.slow
def test_any_other_bit_of_a_checkpoint_is_found(tmp_path: Path, full: bool) -> None:
    both, alone = tmp_path / "both", tmp_path / "alone"
    values = {round_: torch.linspace(-1, round_, 5) for round_ in (1, 2)}
    states = {round_: ServerState(round_, v, {"m": v * v}) for round_, v in values.items()}
    whole = {round_: Saved(ShardedState(round_, (state,)), 12.5) for round_, state in states.items()}
    for saved in whole.values():
        save_checkpoint(both, saved, keep=2)
    shutil.copytree(both / "00002", alone / "00002")
    draw, cases = random.Random(1), 0
    for name in ("facts.json", "state.safetensors"):
        content = (both / "00002" / name).read_bytes()
        for at in range(len(content)):
            for bit in range(8) if full else [draw.randrange(8)]:
                changed = content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]
                for folder in (both, alone):
                    (folder / "00002" / name).write_bytes(changed)
                cases += 1
                loaded = load_checkpoint(both)
                assert loaded is not None and _same(loaded, whole[loaded.state.round]), (name, at, bit)
                if loaded.state.round == 1:
                    with pytest.raises(ValueError, match="cannot be read"):
                        load_checkpoint(alone)
        for folder in (both, alone):
            (folder / "00002" / name).write_bytes(content)
    assert cases > (3000 if full else 400)


def _same(first: Saved, second: Saved) -> bool:
    states = [saved.state.shards[0] for saved in (first, second)]
    tensors = [[state.params, *state.moments.values()] for state in states]
    facts = [(saved.wall_s, saved.clip, saved.aborts, saved.lanes, saved.costs) for saved in (first, second)]
    return facts[0] == facts[1] and all(torch.equal(*pair) for pair in zip(*tensors, strict=True))
