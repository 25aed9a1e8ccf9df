"""A run's figures and its ledger, as one Parquet file a round, so that a round that is run again replaces its own."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.messages.events import DROPOUT, Fault
from engine.system.atomic import write_file

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


FAULTS = pa.schema(
    [
        ("round", pa.int32()),
        ("kind", pa.string()),
        ("who", pa.string()),
        ("why", pa.string()),
        ("wall_s", pa.float64()),
    ]
)


@dataclass
class RoundLog:
    """Collects one table's rows and writes them into `folder`, a file a round."""

    folder: Path
    schema: pa.Schema
    blocks: list[pa.Table] = field(default_factory=list)

    def note(self, **columns: Any) -> None:
        """Rows by column: lists of one length, or one value for all of these rows."""
        length = next((len(values) for values in columns.values() if isinstance(values, list)), 1)
        arrays = []
        for name, type_ in zip(self.schema.names, self.schema.types, strict=True):
            values = columns[name]
            whole = pa.array(values, type_) if isinstance(values, list) else pa.repeat(pa.scalar(values, type_), length)
            arrays.append(whole)
        self.blocks.append(pa.Table.from_arrays(arrays, schema=self.schema))

    def flush(self, round_: int) -> None:
        """Writes the round's file whole and forgets its rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.concat_tables(self.blocks or [self.schema.empty_table()]), sink)
        write_file(_file(self.folder, round_), sink.getvalue().to_pybytes())
        self.blocks.clear()

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
        names, found = list(values), list(values.values())
        self.note(round=round_, split=split, client=client, name=names, value=found, wall_s=self.wall_s)

    def judged(self, round_: int) -> bool:
        """Whether the model after a round has been judged, as its file tells."""
        path = _file(self.folder, round_)
        asked = [("round", "=", round_), ("name", "=", "loss"), ("split", "in", ("heldout", "unseen", "server"))]
        return path.exists() and pq.read_table(path, filters=asked).num_rows > 0

    def add_each(self, round_: int, split: str, clients: list[str], values: list[dict[str, float]]) -> None:
        """The same for many clients at once."""
        self.note(
            round=round_,
            split=split,
            client=[client for client, own in zip(clients, values, strict=True) for _ in own],
            name=[name for own in values for name in own],
            value=[value for own in values for value in own.values()],
            wall_s=self.wall_s,
        )


class Ledger(RoundLog):
    """Who received what in the simulated protocol: round, party, kind, count, bytes, and secure aggregation's mode."""

    def __init__(self, folder: Path, mode: str = "off") -> None:
        super().__init__(folder, LEDGER)
        self.mode = mode

    def received(self, round_: int, party: str, kind: str, count: int, nbytes: int) -> None:
        """`party` received `count` messages of one kind, `nbytes` bytes together."""
        self.note(round=round_, party=party, kind=kind, count=count, bytes=nbytes, mode=self.mode)


class Faults(RoundLog):
    """What went wrong: round, kind, who, why, wall_s. A round without any has no file; nothing is taken back."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, FAULTS)

    def happened(self, round_: int, faults: Sequence[Fault], wall_s: float) -> None:
        """Notes what happened in a round; of thousands of clients at once, if need be."""
        if faults:
            columns = {key: [asdict(fault)[key] for fault in faults] for key in ("kind", "who", "why")}
            self.note(round=round_, **columns, wall_s=wall_s)

    def flush(self, round_: int) -> None:
        """As of all logs, where there is anything to write; after what the round's file holds already.

        But for drop-outs: a round that is played again has the same, and by now they are noted once more.
        """
        path = _file(self.folder, round_)
        if self.blocks:
            held = [pq.read_table(path, schema=FAULTS, filters=pc.field("kind") != DROPOUT)] if path.exists() else []
            self.blocks[:0] = held
            super().flush(round_)

    def forget_after(self, round_: int) -> None:
        """Keeps all: a round that is played again went wrong nevertheless."""


class Logs(NamedTuple):
    """What a run writes down, round by round."""

    metrics: Metrics
    ledger: Ledger
    faults: Faults


def _file(folder: Path, round_: int) -> Path:
    return folder / f"round-{round_:05d}.parquet"


def _round(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))


def read_log(folder: Path) -> pa.Table:
    """All rounds' rows of a run's `metrics` or `ledger` folder, in the order of rounds; ValueError without any."""
    paths = sorted(folder.glob("round-*.parquet"), key=_round)
    if not paths:
        raise ValueError(f"{folder} holds no rounds yet")
    return pa.concat_tables([pq.read_table(path) for path in paths])


def loss_table(folder: Path, last: int) -> dict[str, dict[str, float]]:
    """Aggregate losses by column (round 0, end, baselines) and split, from a run's `metrics` folder.

    Arrow drops the rows of single clients while it reads, and only the rounds that the table names are read: of a
    long run with many clients neither fits into memory as Python objects.
    """
    columns = {("loss", 0): "round 0", ("loss_local_only", last): "local only"}
    columns |= {("loss_centralised", last): "centralised", ("loss", last): "end"}
    columns |= {("loss_not_private", last): "not private"}
    columns |= {("loss_personal", last): "personal", ("loss_finetuned", last): "fine-tuned"}
    field = pc.field
    aggregate = field("client").is_null() & field("split").isin(("heldout", "unseen", "server"))
    aggregate &= field("name").isin([name for name, _ in columns])
    table: dict[str, dict[str, float]] = {}
    for round_ in sorted({0, last}):
        path = _file(folder, round_)
        for row in pq.read_table(path, filters=aggregate).to_pylist() if path.exists() else ():
            if column := columns.get((row["name"], round_)):
                table.setdefault(column, {})[row["split"]] = row["value"]
    return table
