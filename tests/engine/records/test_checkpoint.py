import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.messages.shards import ShardedState
from engine.records.checkpoint import FACTS, STATE, Saved, _digest, load_checkpoint, save_checkpoint
from strategies.core.protocol import ServerState


def saved(round_: int, value: float = 1.0) -> Saved:
    moments = {"m": torch.tensor([value, 0.5]), "v.slow": torch.tensor([-0.0, 1e-45])}
    state = ServerState(round_, torch.tensor([value, 2.0]), moments, torch.tensor([3.0]))
    return Saved(ShardedState(round_, (state,)), 12.25)


def loaded(folder: Path) -> Saved:
    checkpoint = load_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint


def vector(checkpoint: Saved) -> ServerState:
    (shard,) = checkpoint.state.shards
    assert isinstance(shard, ServerState) and shard.round == checkpoint.state.round
    return shard


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, saved(3, 0.1), keep=2)
    assert loaded(tmp_path).wall_s == 12.25
    ours, theirs = vector(loaded(tmp_path)), vector(saved(3, 0.1))
    assert (ours.round, ours.moments.keys()) == (3, theirs.moments.keys())
    pairs = [(ours.params, theirs.params), (ours.merged_delta, theirs.merged_delta)]
    pairs += [(ours.moments[name], theirs.moments[name]) for name in theirs.moments]
    for read, written in pairs:
        assert read is not None and written is not None
        assert read.numpy().tobytes() == written.numpy().tobytes()


def test_shards_come_back_in_their_order_each_through_where_the_state_holds_it(tmp_path: Path) -> None:
    """As the driver does it with references: `read` fetches a shard, `hold` gives what the state holds of it."""
    store = {f"ref-{rank}": ServerState(4, torch.full((2 + rank,), float(rank))) for rank in range(12)}
    save_checkpoint(tmp_path, Saved(ShardedState(4, tuple(store)), 1.0), keep=1, read=store.__getitem__)
    names = sorted(path.name for path in (tmp_path / "00004").iterdir())
    assert names == [FACTS, *(f"shard-{rank:05d}.safetensors" for rank in range(12))]
    checkpoint = load_checkpoint(tmp_path, hold=lambda shard: shard.params.tolist())
    assert checkpoint is not None
    assert checkpoint.state.shards == tuple([float(rank)] * (2 + rank) for rank in range(12))
    assert checkpoint.state.nbytes == 4 * sum(range(2, 14))


def test_which_round_names_the_model_comes_back_and_older_checkpoints_name_their_own(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, replace(saved(3), last_sum=2), keep=2)
    assert loaded(tmp_path).last_sum == 2
    facts = json.loads((tmp_path / "00003" / FACTS).read_text())
    older = {name: value for name, value in facts.items() if name not in ("last_sum", "digest")}
    (tmp_path / "00003" / FACTS).write_text(json.dumps(older | {"digest": _digest(older)}))
    assert loaded(tmp_path).last_sum == 3


def test_without_moments_and_merged_delta(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Saved(ShardedState(0, (ServerState(0, torch.zeros(2)),)), 0.0), keep=1)
    assert (vector(loaded(tmp_path)).moments, vector(loaded(tmp_path)).merged_delta) == ({}, None)


def test_none_yet(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "checkpoints") is None


def test_the_last_few_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    for round_ in range(8, 13):
        save_checkpoint(tmp_path, saved(round_, round_), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00011", "00012"]
    assert vector(loaded(tmp_path)).params[0] == 12


def test_other_folders_beside_them_are_none(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, saved(3), keep=2)
    (tmp_path / "5x").mkdir()
    assert loaded(tmp_path).state.round == 3


def test_the_newest_is_the_highest_round_whatever_its_digits(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, saved(99_999), keep=2)
    save_checkpoint(tmp_path, saved(100_000), keep=2)
    assert loaded(tmp_path).state.round == 100_000
    save_checkpoint(tmp_path, saved(100_001), keep=1)
    assert loaded(tmp_path).state.round == 100_001


def test_what_privacy_needs_comes_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, replace(saved(1), clip=0.25, aborts=2), keep=1)
    assert (loaded(tmp_path).clip, loaded(tmp_path).aborts) == (0.25, 2)


def test_the_same_round_again_replaces_its_own(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, saved(1, 1.0), keep=2)
    save_checkpoint(tmp_path, saved(1, 5.0), keep=2)
    assert vector(loaded(tmp_path)).params[0] == 5
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (STATE, b""),
        (STATE, b"not safetensors"),
        (STATE, None),
        (FACTS, b"{"),
        (FACTS, b"[]"),
        (FACTS, b"{}"),
        (FACTS, b"\xff"),
        (FACTS, None),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, file: str, content: bytes | None) -> None:
    save_checkpoint(tmp_path, saved(4), keep=2)
    path = tmp_path / "00004" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=f"the checkpoint {tmp_path / '00004'} cannot be read"):
        load_checkpoint(tmp_path)


def test_where_the_newest_cannot_be_read_the_one_before_is_taken(tmp_path: Path) -> None:
    for round_ in (3, 4):
        save_checkpoint(tmp_path, saved(round_, round_), keep=2)
    (tmp_path / "00004" / STATE).unlink()
    checkpoint = loaded(tmp_path)
    assert checkpoint.state.round == 3 and len(checkpoint.passed_over) == 1
    assert checkpoint.passed_over[0].startswith(f"the checkpoint {tmp_path / '00004'} cannot be read")
    (tmp_path / "00003" / FACTS).write_text("{}")
    with pytest.raises(ValueError, match=r"00004 cannot be read.*, nor can one before: start again"):
        load_checkpoint(tmp_path)


def test_one_that_was_passed_over_is_neither_kept_nor_does_it_push_out_a_good_one(tmp_path: Path) -> None:
    for round_ in (10, 20):
        save_checkpoint(tmp_path, saved(round_), keep=2)
    (tmp_path / "00020" / STATE).unlink()
    assert loaded(tmp_path).state.round == 10
    save_checkpoint(tmp_path, saved(11), keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00010", "00011"]
    save_checkpoint(tmp_path, saved(20), keep=3)
    (tmp_path / "00020" / STATE).unlink()
    save_checkpoint(tmp_path, saved(12), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["00012"] and loaded(tmp_path).state.round == 12


def test_what_others_leave_among_checkpoints_stays(tmp_path: Path) -> None:
    for name in (".DS_Store", ".nfs0000001", ".00001.77"):
        (tmp_path / name).touch()
    for name in (".snapshot", ".00002.77"):  # the second is of a process that was killed while it wrote
        (tmp_path / name / "inside").mkdir(parents=True)
    save_checkpoint(tmp_path, saved(3), keep=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".DS_Store", ".nfs0000001", ".00001.77", ".snapshot", "00003"}


@pytest.mark.parametrize("file", [STATE, FACTS])
def test_no_flipped_bit_is_taken_for_what_was_written(tmp_path: Path, file: str) -> None:
    save_checkpoint(tmp_path, saved(4), keep=2)
    path = tmp_path / "00004" / file
    content = path.read_bytes()
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="00004 cannot be read"):
            load_checkpoint(tmp_path)


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, saved(4), keep=2)
    path = tmp_path / "00004" / STATE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="00004 cannot be read"):
        load_checkpoint(tmp_path)


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, saved(1), keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, saved(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["00001"]
    assert loaded(tmp_path).state.round == 1


def test_no_file_can_run_code_when_it_is_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, saved(1), keep=1)
    files = sorted((tmp_path / "00001").iterdir())
    assert [path.suffix for path in files] == [".json", ".safetensors"]
    facts = {"round": 1, "wall_s": 12.25, "clip": 0.0, "aborts": 0, "lanes": 1, "costs": [], "last_sum": 0}
    written = json.loads(files[0].read_bytes())
    assert written.items() >= facts.items() and written.keys() - facts.keys() == {"files", "digest"}
    assert b"{" in files[1].read_bytes()[:16]  # eight bytes of length, then the header: neither zip nor pickle
