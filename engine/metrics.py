"""A run's figures and its ledger, as one Parquet file a round, so that a round that is run again replaces its own."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from engine.atomic import write_file

METRICS = pa.schema(
    [
        ("round", pa.int32()),
        ("split", pa.string()),
        ("client", pa.string()),
        ("name", pa.string()),
        ("value", pa.float64()),
        ("wall_s", pa.float64()),
    ]
)
LEDGER = pa.schema(
    [
        ("round", pa.int32()),
        ("party", pa.string()),
        ("kind", pa.string()),
        ("count", pa.int64()),
        ("bytes", pa.int64()),
        ("mode", pa.string()),
    ]
)


@dataclass
class RoundLog:
    """Collects one table's rows and writes them into `folder`, a file a round."""

    folder: Path
    schema: pa.Schema
    rows: list[dict[str, object]] = field(default_factory=list)

    def flush(self, round_: int) -> None:
        """Writes the round's file whole and forgets its rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(self.rows, self.schema), sink)
        write_file(self.folder / f"round-{round_:05d}.parquet", sink.getvalue().to_pybytes())
        self.rows.clear()

    def forget_after(self, round_: int) -> None:
        """Removes the files of rounds after `round_`, which a resumed run will write again."""
        for path in self.folder.glob("round-*.parquet"):
            if _round(path) > round_:
                path.unlink()


class Metrics(RoundLog):
    """The long table of metrics: round, split, client (None = all), name, value, wall_s."""

    def __init__(self, folder: Path, wall_s: float = 0.0) -> None:
        super().__init__(folder, METRICS)
        self.started = time.monotonic() - wall_s

    @property
    def wall_s(self) -> float:
        """Seconds of this run, those before a resume included."""
        return time.monotonic() - self.started

    def add(self, round_: int, split: str, client: str | None, **values: float) -> None:
        """One row per named value."""
        for name, value in values.items():
            row = {"round": round_, "split": split, "client": client, "name": name, "value": value}
            self.rows.append(row | {"wall_s": self.wall_s})


class Ledger(RoundLog):
    """Who received what in the simulated protocol: round, party, kind, count, bytes, and secure aggregation's mode."""

    def __init__(self, folder: Path, mode: str = "off") -> None:
        super().__init__(folder, LEDGER)
        self.mode = mode

    def received(self, round_: int, party: str, kind: str, count: int, nbytes: int) -> None:
        """`party` received `count` messages of one kind, `nbytes` bytes together."""
        row = {"round": round_, "party": party, "kind": kind, "count": count, "bytes": nbytes}
        self.rows.append(row | {"mode": self.mode})


def _round(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))


def read_log(folder: Path) -> pa.Table:
    """All rounds' rows of a run's `metrics` or `ledger` folder, in the order of rounds; ValueError without any."""
    paths = sorted(folder.glob("round-*.parquet"), key=_round)
    if not paths:
        raise ValueError(f"{folder} holds no rounds yet")
    return pa.concat_tables([pq.read_table(path) for path in paths])


def loss_table(metrics: pa.Table, last: int) -> dict[str, dict[str, float]]:
    """Aggregate losses by column (round 0, end, baselines) and split, from a run's metrics."""
    columns = {("loss", 0): "round 0", ("loss_local_only", last): "local only"}
    columns |= {("loss_centralised", last): "centralised", ("loss", last): "end"}
    columns |= {("loss_not_private", last): "not private"}
    columns |= {("loss_personal", last): "personal", ("loss_finetuned", last): "fine-tuned"}
    table: dict[str, dict[str, float]] = {}
    for row in metrics.to_pylist():
        column = columns.get((row["name"], row["round"]))
        if column and row["client"] is None and row["split"] in ("heldout", "unseen", "server"):
            table.setdefault(column, {})[row["split"]] = row["value"]
    return table
