"""Reads what a report needs from a run folder, which may be foreign: only TOML, JSON and Parquet, no code."""

import json
import math
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.messages.errors import RunError
from engine.records.metrics import FAULTS, LEDGER, METRICS, round_files
from experiments.report import charts

UNUSED = {"wall_s", "mode"}  # columns that a report does not need


@dataclass
class Run:
    """The contents of a run folder; `curves[split, name]` is round -> value, losses in nats per token, times in s."""

    name: str
    recipe: dict[str, Any]
    recipe_text: str
    manifest: list[tuple[str, str]]
    privacy: str = ""  # the privacy spent, in words
    curves: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    before: tuple[int, dict[str, float]] | None = None  # first round with a held-out loss for each client
    after: tuple[int, dict[str, float]] | None = None  # last such round
    rows: dict[str, float] = field(default_factory=dict)
    ledger: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    faults: list[tuple[int, str, str, str]] = field(default_factory=list)  # round, kind, who, why

    def points(self, split: str, name: str) -> list[charts.Point]:
        """A curve as (round, value), in order; empty where the run has none."""
        return sorted((float(r), v) for r, v in self.curves.get((split, name), {}).items())

    def values(self, split: str, name: str) -> list[float]:
        """The finite values of a curve."""
        return [v for _, v in self.points(split, name) if math.isfinite(v)]


def read_run(folder: Path) -> Run:
    """Reads a run folder, in which only `recipe.toml` is required; RunError names a faulty folder or file."""
    file = folder / "recipe.toml"
    if not file.is_file():
        raise RunError(f"{folder} is not a run folder: that is what `fedpost run` writes, with a recipe.toml inside")
    refuse_ways_out(folder)
    try:
        text = file.read_text("utf-8")
        recipe = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is not valid TOML: {error}") from error
    name = str(recipe.get("name") or folder.resolve().name)
    manifest, privacy = _json(folder / "manifest.json"), _json(folder / "privacy.json")
    statement = str(privacy.get("statement", "")) if isinstance(privacy, dict) else ""
    run = Run(name, recipe, text, list(_flat("", manifest)) if manifest else [], statement)
    for file in round_files(folder / "metrics"):
        _add_metrics(run, _read(file, METRICS))
    for file in round_files(folder / "ledger"):
        table = _read(file, LEDGER).group_by(["party", "kind"]).aggregate([("count", "sum"), ("bytes", "sum")])
        for row in table.to_pylist():
            key = str(row["party"]), str(row["kind"])
            count, total = run.ledger.get(key, (0, 0))
            run.ledger[key] = count + (row["count_sum"] or 0), total + (row["bytes_sum"] or 0)
    for file in round_files(folder / "faults"):
        for row in _read(file, FAULTS).to_pylist():
            run.faults.append((row["round"] or 0, str(row["kind"]), str(row["who"]), str(row["why"])))
    return run


def refuse_ways_out(folder: Path) -> None:
    """Raises RunError if a run folder holds a link that leads out of it, or something like a pipe."""
    inside = folder.resolve()
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(here, name)
            if os.path.islink(path) and not Path(path).resolve().is_relative_to(inside):
                raise RunError(f"{path} is a link that leads out of the run folder: replace it by its target")
        for path in (os.path.join(here, name) for name in files):
            if not os.path.isfile(path):
                raise RunError(f"{path} is neither a file nor a folder: remove it")


def _read(file: Path, schema: pa.Schema) -> pa.Table:
    columns = [column for column in schema if column.name not in UNUSED]
    names = [column.name for column in columns]
    try:
        table = pq.read_table(pa.BufferReader(file.read_bytes()), columns=names)
        table.validate(full=True)  # for example that text is UTF-8
        return table.select(names).cast(pa.schema(columns))
    except (pa.ArrowException, OSError, KeyError) as error:
        first = (str(error).splitlines() or ["no reason given"])[0]
        raise RunError(f"{file} cannot be read, it may be truncated or not be a file of a run: {first}") from error


def _json(file: Path) -> Any:
    """The content of a JSON file; None if there is no such file."""
    try:
        return json.loads(file.read_text("utf-8")) if file.is_file() else None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is not valid JSON: {error}") from error


def _add_metrics(run: Run, table: pa.Table) -> None:
    table = table.filter(pc.and_(pc.is_valid(table["round"]), pc.is_valid(table["value"])))
    alone = pc.is_null(table["client"])
    for row in table.filter(alone).to_pylist():
        run.curves.setdefault((row["split"], row["name"]), {})[row["round"]] = row["value"]
    # There may be a million clients: filter in Arrow, and keep two rounds of losses instead of all.
    each = table.filter(pc.invert(alone))
    losses = each.filter(pc.and_(pc.equal(each["split"], "heldout"), pc.equal(each["name"], "loss")))
    for at in sorted(pc.unique(losses["round"]).to_pylist()):
        now = losses.filter(pc.equal(losses["round"], at))
        of_round = at, dict(zip(now["client"].to_pylist(), now["value"].to_pylist(), strict=True))
        if run.before is None:
            run.before = of_round
        else:
            run.after = of_round
    rows = each.filter(pc.and_(pc.equal(each["split"], "train"), pc.equal(each["name"], "rows")))
    for client, value in zip(rows["client"].to_pylist(), rows["value"].to_pylist(), strict=True):
        run.rows[client] = max(value, run.rows.get(client, 0.0))


def _flat(key: str, value: Any, depth: int = 0) -> Iterator[tuple[str, str]]:
    """A nested dict as dotted keys; lists, and what is deeper than six levels, stay JSON."""
    if isinstance(value, dict) and value and depth < 6:
        for inner, below in value.items():
            yield from _flat(f"{key}.{inner}" if key else inner, below, depth + 1)
    else:
        yield key, value if isinstance(value, str) else json.dumps(value)
