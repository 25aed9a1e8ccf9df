import tracemalloc
from pathlib import Path

import pyarrow.compute as pc
import pytest

from engine.messages.events import DROPOUT, Fault
from engine.records import metrics as log
from engine.records.metrics import LEDGER, METRICS, Faults, Ledger, Metrics, loss_table, read_log


def rounds(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_figures_come_back_in_the_long_table(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics")
    metrics.add(0, "train", "ann", loss=2.5, rows=3)
    metrics.add(0, "train", None, loss=2.0)
    metrics.flush(0)
    metrics.add(1, "heldout", None, loss=1.5)
    metrics.flush(1)
    table = read_log(tmp_path / "metrics")
    assert table.schema == METRICS
    assert table.drop_columns("wall_s").to_pylist() == [
        {"round": 0, "split": "train", "client": "ann", "name": "loss", "value": 2.5},
        {"round": 0, "split": "train", "client": "ann", "name": "rows", "value": 3.0},
        {"round": 0, "split": "train", "client": None, "name": "loss", "value": 2.0},
        {"round": 1, "split": "heldout", "client": None, "name": "loss", "value": 1.5},
    ]


def test_the_ledger_comes_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "ideal")
    ledger.received(2, "server", "update", 10, 2**40)
    ledger.flush(2)
    table = read_log(tmp_path)
    assert table.schema == LEDGER
    expected = {"round": 2, "party": "server", "kind": "update", "count": 10, "bytes": 2**40, "mode": "ideal"}
    assert table.to_pylist() == [expected]


def test_a_round_without_rows_has_the_schema_too(tmp_path: Path) -> None:
    Metrics(tmp_path).flush(0)
    assert read_log(tmp_path).schema == METRICS


def test_a_round_that_is_run_again_replaces_its_own(tmp_path: Path) -> None:
    for loss in (2.0, 1.0):
        metrics = Metrics(tmp_path)
        metrics.add(0, "train", None, loss=loss)
        metrics.flush(0)
    assert read_log(tmp_path)["value"].to_pylist() == [1.0]


def test_a_resumed_run_forgets_what_it_will_write_again(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    for round_ in (0, 9, 10, 11):
        metrics.flush(round_)
    metrics.forget_after(9)
    assert rounds(tmp_path) == ["round-00000.parquet", "round-00009.parquet"]
    metrics.forget_after(-1)
    assert rounds(tmp_path) == []
    Metrics(tmp_path / "absent").forget_after(0)


def test_rounds_are_read_in_their_order_whatever_their_digits(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    for round_ in (100_000, 99_999):
        metrics.add(round_, "train", None, loss=1.0)
        metrics.flush(round_)
    assert read_log(tmp_path)["round"].to_pylist() == [99_999, 100_000]


def test_a_copy_that_somebody_has_put_beside_is_neither_read_nor_removed(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.add(1, "heldout", None, loss=1.5)
    metrics.flush(1)
    copy = tmp_path / "round-00001 (copy).parquet"
    copy.write_bytes((tmp_path / "round-00001.parquet").read_bytes())
    assert read_log(tmp_path).num_rows == 1
    metrics.forget_after(0)
    assert rounds(tmp_path) == [copy.name]


def test_seconds_go_on_where_the_run_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 500.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)
    metrics = Metrics(tmp_path, wall_s=60.0)
    now = 502.5
    metrics.add(3, "train", None, loss=1.0)
    assert metrics.wall_s == 62.5
    assert metrics.blocks[0]["wall_s"].to_pylist() == [62.5]


def test_no_rounds_yet(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="holds no rounds yet"):
            read_log(folder)


def test_a_broken_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "round-00000.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"[Pp]arquet"):
        read_log(tmp_path)


def test_who_drops_out_of_a_round_that_is_played_again_is_noted_once(tmp_path: Path) -> None:
    for why in ("first", "second"):
        faults = Faults(tmp_path)
        faults.happened(3, [Fault("slot", "0", why), Fault(DROPOUT, "ann", "drawn")], 1.0)
        faults.flush(3)
    assert read_log(tmp_path).select(["who", "why"]).to_pylist() == [
        {"who": "0", "why": "first"},
        {"who": "0", "why": "second"},
        {"who": "ann", "why": "drawn"},
    ]


def test_later_faults_of_a_round_leave_its_drop_outs(tmp_path: Path) -> None:
    faults = Faults(tmp_path)
    faults.happened(3, [Fault(DROPOUT, "ann", "drawn")], 1.0)
    faults.flush(3)
    faults.happened(3, [Fault("driver", "1", "killed")], 2.0)
    faults.append(3)
    assert read_log(tmp_path)["who"].to_pylist() == ["ann", "1"]


def test_metrics_are_added_to_a_round_that_has_been_written(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.add(3, "heldout", None, loss=1.0)
    metrics.flush(3)
    assert metrics.judged(3) and not metrics.judged(3, "loss_not_private")
    metrics.add(3, "heldout", None, loss_not_private=2.0)
    metrics.append(3)
    metrics.append(3)  # nothing is added twice
    assert read_log(tmp_path)["name"].to_pylist() == ["loss", "loss_not_private"]
    assert metrics.judged(3) and metrics.judged(3, "loss_not_private")


def test_what_went_wrong_is_kept_when_a_round_is_played_again(tmp_path: Path) -> None:
    for why in ("first", "second"):
        faults = Faults(tmp_path)
        faults.forget_after(2)
        faults.happened(3, [Fault("slot", "0", why)], 1.0)
        faults.flush(3)
        Faults(tmp_path).flush(4)
    assert read_log(tmp_path)["why"].to_pylist() == ["first", "second"]


def test_losses_are_read_without_the_rows_of_single_clients(tmp_path: Path) -> None:
    metrics, clients = Metrics(tmp_path), [f"client-{client}" for client in range(50_000)]
    for round_, loss in ((0, 4.0), (1, 3.0), (2, 2.0)):
        metrics.add_each(round_, "heldout", clients, [{"loss": loss, "tokens": 7.0}] * len(clients))
        metrics.add(round_, "heldout", None, loss=loss, tokens=7.0)
        metrics.add(round_, "train", None, loss=9.0)
        metrics.flush(round_)
    metrics.add(2, "unseen", None, loss=2.5)
    metrics.add(2, "heldout", None, loss_centralized=1.5, loss_local_only=3.5, loss_personal=1.75)
    metrics.add(2, "heldout", None, **{"loss.accuracy": 0.75, "loss_centralized.accuracy": 0.875, "loss.margin": 2.0})
    metrics.blocks.insert(0, read_log(tmp_path).filter(pc.field("round") == 2))
    metrics.flush(2)
    tracemalloc.start()
    table = loss_table(tmp_path, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table == {
        "round 0": {"heldout": 4.0},
        "end": {"heldout": 2.0, "unseen": 2.5},
        "centralized": {"heldout": 1.5},
        "local only": {"heldout": 3.5},
        "personal": {"heldout": 1.75},
    }
    assert loss_table(tmp_path, 2, "accuracy") == {"end": {"heldout": 0.75}, "centralized": {"heldout": 0.875}}
    assert loss_table(tmp_path, 2, "reward") == {}
    assert peak < 2_000_000, f"{peak} bytes of Python objects for {4 * len(clients)} rows of clients"
