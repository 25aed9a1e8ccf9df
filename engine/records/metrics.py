"""A run's metrics, ledger and faults, in one Parquet file a round each: a round that is run again replaces its own."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.messages.errors import RunError
from engine.messages.events import DROPOUT, Fault
from engine.system.atomic import write_file

ROUND, TEXT, COUNT, NUMBER = pa.int32(), pa.string(), pa.int64(), pa.float64()
METRICS = pa.schema({"round": ROUND, "split": TEXT, "client": TEXT, "name": TEXT, "value": NUMBER, "wall_s": NUMBER})
LEDGER = pa.schema({"round": ROUND, "party": TEXT, "kind": TEXT, "count": COUNT, "bytes": COUNT, "mode": TEXT})
ROLLOUTS = "rollouts"  # the folder of what models write on a few held-out prompts, a JSON file an evaluation
FAULTS = pa.schema({"round": ROUND, "kind": TEXT, "who": TEXT, "why": TEXT, "wall_s": NUMBER})
JUDGED = ("heldout", "unseen", "server")  # splits that models are evaluated on
AT_END = {  # columns of the loss table by names of metrics
    "loss": "end",
    "loss_local_only": "local only",
    "loss_centralized": "centralized",
    "loss_not_private": "not private",
    "loss_personal": "personal",
    "loss_finetuned": "fine-tuned",
    "loss_emulator": "emulator",
}
LossTable = dict[str, dict[str, float]]  # column (round 0, end, baselines) -> split -> mean


@dataclass
class RoundLog:
    """Collects the rows of one table and writes them into `folder`, a file a round."""

    folder: Path
    schema: pa.Schema
    blocks: list[pa.Table] = field(default_factory=list)

    def note(self, **columns: Any) -> None:
        """Adds rows by column: lists of one length, or one value for all of these rows."""
        length = next((len(values) for values in columns.values() if isinstance(values, list)), 1)
        lists = {name: values if isinstance(values, list) else [values] * length for name, values in columns.items()}
        self.blocks.append(pa.table(lists, self.schema))

    def flush(self, round_: int) -> None:
        """Writes the round's file, whole or not at all, and drops its rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.concat_tables(self.blocks or [self.schema.empty_table()]), sink)
        write_file(_file(self.folder, round_), sink.getvalue().to_pybytes())
        self.blocks.clear()

    def append(self, round_: int) -> None:
        """Adds the rows since the last flush, if there are any, to those of the round's file."""
        path = _file(self.folder, round_)
        if self.blocks:
            self.blocks[:0] = [pq.read_table(path, schema=self.schema)] if path.exists() else []
            RoundLog.flush(self, round_)

    def forget_after(self, round_: int) -> None:
        """Removes the files of rounds after `round_`, which a resumed run will write again."""
        for path in (path for path in round_files(self.folder) if _round(path) > round_):
            path.unlink()


class Metrics(RoundLog):
    """The long table of metrics: round, split, client (None: all of them), name, value, wall_s."""

    def __init__(self, folder: Path, wall_s: float = 0.0) -> None:
        super().__init__(folder, METRICS)
        self.started = time.monotonic() - wall_s

    @property
    def wall_s(self) -> float:
        """The seconds of this run, including those before it was resumed."""
        return time.monotonic() - self.started

    def judged(self, round_: int, name: str = "loss") -> bool:
        """Returns whether the file of a round holds a loss of the model after it, or of another by its `name`."""
        path = _file(self.folder, round_)
        losses = [("round", "=", round_), ("name", "=", name), ("split", "in", JUDGED)]
        return path.exists() and pq.read_table(path, filters=losses).num_rows > 0

    def add(self, round_: int, split: str, client: str | None, **values: float) -> None:
        """Adds one row per named value."""
        self.add_each(round_, split, [client], [values])

    def add_each(
        self, round_: int, split: str, clients: Sequence[str | None], values: Sequence[Mapping[str, float]]
    ) -> None:
        """Adds one row per named value of each client."""
        names = [client for client, figures in zip(clients, values, strict=True) for _ in figures]
        keys = [name for figures in values for name in figures]
        column = [value for figures in values for value in figures.values()]
        self.note(round=round_, split=split, client=names, name=keys, value=column, wall_s=self.wall_s)


class Ledger(RoundLog):
    """Who received what in the simulated protocol: round, party, kind, count, bytes, and secure aggregation's mode."""

    def __init__(self, folder: Path, mode: str = "off") -> None:
        super().__init__(folder, LEDGER)
        self.mode = mode

    def received(self, round_: int, party: str, kind: str, count: int, nbytes: int) -> None:
        """Adds that `party` received `count` messages of one kind, `nbytes` bytes in all."""
        self.note(round=round_, party=party, kind=kind, count=count, bytes=nbytes, mode=self.mode)


class Faults(RoundLog):
    """What went wrong: round, kind, who, why, wall_s. A round without faults has no file; nothing is taken back."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, FAULTS)

    def happened(self, round_: int, faults: Sequence[Fault], wall_s: float) -> None:
        """Adds the faults of a round, which may be of thousands of clients."""
        if faults:
            columns = {name: [getattr(fault, name) for fault in faults] for name in ("kind", "who", "why")}
            self.note(round=round_, **columns, wall_s=wall_s)

    def flush(self, round_: int) -> None:
        """Adds the faults of a round that was played to its file, if there are any.

        Drop-outs of the file are replaced: a round that is played again has the same ones.
        """
        path = _file(self.folder, round_)
        if self.blocks and path.exists():
            self.blocks.insert(0, pq.read_table(path, schema=FAULTS, filters=pc.field("kind") != DROPOUT))
        if self.blocks:
            super().flush(round_)

    def forget_after(self, round_: int) -> None:
        """Keeps all: the faults of a round that is played again did happen."""


def _file(folder: Path, round_: int) -> Path:
    return folder / f"round-{round_:05d}.parquet"


def _round(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))


def round_files(folder: Path) -> list[Path]:
    """Returns a log's files in the order of rounds, without what others have put beside them, such as copies."""
    paths = (path for path in folder.glob("round-*.parquet") if path.stem.removeprefix("round-").isdecimal())
    return sorted(paths, key=_round)


def read_log(folder: Path) -> pa.Table:
    """Reads all rows of a run's `metrics`, `ledger` or `faults` folder in the order of rounds; RunError without any."""
    paths = round_files(folder)
    if not paths:
        raise RunError(f"{folder} holds no rounds yet")
    return pa.concat_tables([pq.read_table(path) for path in paths])


def loss_table(folder: Path, last: int, figure: str | None = None) -> LossTable:
    """Reads aggregate losses, or the means of another `figure`, from a run's `metrics` folder."""
    table: LossTable = {}
    ending = "" if figure is None else f".{figure}"
    # Arrow drops the rows of single clients while it reads: as Python objects they would not fit into memory.
    for round_, named in ((0, {"loss": "round 0"}), (last, AT_END)):
        path, columns = _file(folder, round_), {f"{name}{ending}": column for name, column in named.items()}
        aggregate = pc.field("client").is_null() & pc.field("split").isin(JUDGED) & pc.field("name").isin([*columns])
        for row in pq.read_table(path, filters=aggregate).to_pylist() if path.exists() else ():
            table.setdefault(columns[row["name"]], {})[row["split"]] = row["value"]
    return table


def with_unit(name: str, unit: str) -> str:
    """Returns a title such as "loss (nats per token)"."""
    return f"{name} ({unit})" if unit else name
