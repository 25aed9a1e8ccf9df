"""Reads what a report needs from a run folder, which may be foreign: only TOML, JSON and Parquet, no code."""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets_partition.sources.location import first_line
from engine.messages.errors import RunError
from engine.messages.events import DROPOUT
from engine.records.metrics import FAULTS, LEDGER, METRICS, round_files
from experiments.report import charts
from experiments.report.openness import Openness, read_openness
from experiments.report.rollouts import Rollouts, read_rollouts

MAX_LISTED = 40  # faults, and other things that a table of the page lists
MANY = 200_000  # rows of single clients that are kept before they are merged
OF_CLIENTS = pa.schema([("client", pa.string()), ("value", pa.float64())])


@dataclass
class Run:
    """The contents of a run folder, recipe and manifest by dotted keys.

    `curves[split, name]` is round -> value, losses in the unit of the run's objective, times in s. Of single clients,
    of which there may be a million, there are tables with columns client and value: `losses` of the first and of the
    last round that has them, and the most `rows` that each trained on.
    """

    name: str
    recipe: dict[str, str]
    recipe_text: str
    manifest: dict[str, str]
    privacy: str = ""  # the privacy spent, in words
    curves: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    losses: list[tuple[int, pa.Table]] = field(default_factory=list)
    rows: pa.Table = field(default_factory=lambda: OF_CLIENTS.empty_table())
    ledger: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)  # the first MAX_LISTED of all `fault_count`
    fault_count: int = 0
    rollouts: list[Rollouts] = field(default_factory=list)
    openness: Openness = field(default_factory=Openness)

    def points(self, split: str, name: str) -> list[charts.Point]:
        """A curve as (round, value), in order; empty where the run has none."""
        return sorted((float(r), v) for r, v in self.curves.get((split, name), {}).items())


def read_run(folder: Path) -> Run:
    """Reads a run folder, in which only `recipe.toml` is required; RunError names a faulty folder or file."""
    file = folder / "recipe.toml"
    if not file.is_file():
        raise RunError(f"{folder} is not a run folder: that is what `fedpost run` writes, with a recipe.toml inside")
    refuse_ways_out(folder)
    recipe, manifest, privacy = (_texts(folder / name) for name in ("recipe.toml", "manifest.json", "privacy.json"))
    name = recipe.get("name") or folder.resolve().name
    run = Run(name, recipe, file.read_text("utf-8"), manifest, privacy.get("statement", ""))
    run.rollouts, run.openness = read_rollouts(folder), read_openness(folder)
    for table in _tables(folder / "metrics", METRICS):
        _add_metrics(run, table)
    run.rows, run.losses = _most(run.rows), [(round_, _most(losses)) for round_, losses in run.losses]
    for table in _tables(folder / "ledger", LEDGER):
        for row in table.group_by(["party", "kind"]).aggregate([("count", "sum"), ("bytes", "sum")]).to_pylist():
            key = str(row["party"]), str(row["kind"])
            count, total = run.ledger.get(key, (0, 0))
            run.ledger[key] = count + (row["count_sum"] or 0), total + (row["bytes_sum"] or 0)
    dropouts = list[dict[str, Any]]()
    for table in _tables(folder / "faults", FAULTS):
        run.fault_count += table.num_rows
        is_dropout = pc.fill_null(pc.equal(table["kind"], DROPOUT), False)
        for listed, chosen in ((run.faults, pc.invert(is_dropout)), (dropouts, is_dropout)):
            listed += table.filter(chosen).slice(0, MAX_LISTED - len(listed)).to_pylist()
    run.faults = (run.faults + dropouts)[:MAX_LISTED]  # dropouts last: there are many, and the recipe asks for them
    return run


def refuse_ways_out(folder: Path) -> None:
    """Raises RunError if a run folder holds a link that leads out of it, or something like a pipe."""
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise RunError(f"{path} is a link that leads out of the run folder: replace it by its target")
        if not (path.is_file() or path.is_dir()):
            raise RunError(f"{path} is neither a file nor a folder: remove it")


def _tables(folder: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yields the tables of a log, one round after another; RunError if a file is damaged."""
    columns = pa.schema([column for column in schema if column.name not in ("wall_s", "mode")])
    for file in round_files(folder):
        try:
            table = pq.read_table(pa.BufferReader(file.read_bytes()), columns=columns.names)
            table.validate(full=True)  # for example that text is UTF-8
            yield table.select(columns.names).cast(columns)
        except (pa.ArrowException, OSError, KeyError) as error:
            what = f"{file} cannot be read, it may be truncated or not be a file of a run"
            raise RunError(f"{what}: {first_line(error)}") from error


def _texts(file: Path) -> dict[str, str]:
    """The values of a TOML or JSON file as text by dotted keys; none if there is no such file."""
    language, read = ("TOML", tomllib.loads) if file.suffix == ".toml" else ("JSON", json.loads)
    try:
        values = leaves(read(file.read_text("utf-8"))) if file.is_file() else {}
        return {k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in values.items()}
    except (ValueError, RecursionError, AttributeError) as error:
        raise RunError(f"{file} is not valid {language}: {error}") from error


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by their dotted keys."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values


def _add_metrics(run: Run, table: pa.Table) -> None:
    table = table.filter(pc.and_(pc.is_valid(table["round"]), pc.is_valid(table["value"])))
    alone = pc.is_null(table["client"])
    for row in table.filter(alone).to_pylist():
        run.curves.setdefault((row["split"], row["name"]), {})[row["round"]] = row["value"]
    # There may be a million clients: their rows stay in Arrow, and of losses two rounds are kept.
    each = table.filter(pc.invert(alone))
    losses = _of_clients(each, "heldout", "loss")
    for round_ in sorted(pc.unique(losses["round"]).to_pylist()):
        run.losses[1:] = [(round_, losses.filter(pc.equal(losses["round"], round_)).select(OF_CLIENTS.names))]
    rows = pa.concat_tables([run.rows, _of_clients(each, "train", "rows").select(OF_CLIENTS.names)])
    # The first chunk is what the last merge has left.
    full = rows.num_rows > MANY and rows.num_rows > 2 * len(rows["client"].chunk(0))
    run.rows = _most(rows) if full else rows


def _most(rows: pa.Table) -> pa.Table:
    """The largest value of each client, in the order of clients."""
    grouped = rows.group_by("client").aggregate([("value", "max")]).rename_columns(rows.schema.names)
    return grouped.sort_by("client").combine_chunks()


def _of_clients(table: pa.Table, split: str, name: str) -> pa.Table:
    return table.filter(pc.and_(pc.equal(table["split"], split), pc.equal(table["name"], name)))
