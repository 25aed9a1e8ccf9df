from pathlib import Path

import pytest
import torch

from engine.records.client_state import RANK, ClientStates, forget_round, owned_as, owned_by


def value(memory: dict[str, torch.Tensor]) -> list[float]:
    return memory["c"].tolist() if memory else []


def test_a_round_reads_the_newest_memory_that_was_current_before_it(tmp_path: Path) -> None:
    memory = ClientStates(tmp_path / "client_state")
    assert memory.read(7, 5) == {}
    for round_ in (2, 4, 6):
        memory.write(7, round_, {"c": torch.tensor([float(round_), 0.5])}, oldest=0)
    assert [value(memory.read(7, round_)) for round_ in (1, 2, 3, 4, 5, 9)] == [
        [],
        [2, 0.5],
        [2, 0.5],
        [4, 0.5],
        [4, 0.5],
        [6, 0.5],
    ]
    assert memory.read(7 + 256, 9) == {}


def test_what_no_checkpoint_can_ask_for_is_forgotten(tmp_path: Path) -> None:
    memory = ClientStates(tmp_path)
    for round_ in (1, 3, 5):
        memory.write(1, round_, {"c": torch.ones(1)}, oldest=0)
    memory.write(1, 8, {"c": torch.ones(1)}, oldest=4)
    left = sorted(int(path.stem) for path in tmp_path.rglob("*.safetensors"))
    assert left == [3, 5, 8]  # a run resumed from round 4 reads that of round 3


def test_a_round_that_is_run_again_replaces_its_own(tmp_path: Path) -> None:
    memory = ClientStates(tmp_path)
    for number in (1.0, 2.0):
        memory.write(1, 3, {"c": torch.tensor([number])}, oldest=0)
    assert value(memory.read(1, 3)) == [2]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = ClientStates(tmp_path)
    memory.write(1, 3, {"c": torch.tensor([1.0])}, oldest=0)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        memory.write(1, 3, {"c": torch.tensor([2.0])}, oldest=0)
    assert value(memory.read(1, 3)) == [1]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["00003.safetensors"]


def test_owners_do_not_see_each_others_entries() -> None:
    both = owned_as({"c": torch.ones(1)}, "strategy.") | owned_as({"c": torch.zeros(1)}, "optimizer.global.")
    assert set(both) == {"strategy.c", "optimizer.global.c"}
    assert owned_by(both, "strategy.")["c"] == 1 and owned_by(both, "optimizer.global.")["c"] == 0


def test_a_round_is_forgotten_by_the_clients_that_are_named_in_plain_slots_and_in_ranks(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / f"{RANK}0", tmp_path / f"{RANK}1"):
        for client, round_ in ((1, 2), (1, 3), (2, 3)):
            ClientStates(folder).write(client, round_, {"c": torch.ones(1)}, oldest=0)
    forget_round(tmp_path, [1, 5], 3)
    left = sorted((path.parent.name, path.stem) for path in tmp_path.rglob("*.safetensors"))
    assert left == [("1", "00002")] * 3 + [("2", "00003")] * 3
