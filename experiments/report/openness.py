"""How open the base of a run was, who refused it, and what its owner was shown."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets_partition.sources.location import first_line
from engine.messages.errors import RunError
from engine.records.exposures import EXPOSURES, FOLDER
from engine.records.metrics import round_files

FACTS = {  # labels by keys of openness.json
    "licence": "licence",
    "mof_class": "class of the Model Openness Framework",
    "corpus": "training data",
    "refused_clients": "clients that refused",
    "refused_rows": "their rows",
}
SUMS = ("calls", "rows", "new_rows", "tokens", "bytes")


@dataclass
class Openness:
    """Facts about the base with their labels, and for each kind of message sums of what its owner was shown."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    shown: list[tuple[str, ...]] = field(default_factory=list)


def read_openness(folder: Path) -> Openness:
    """Reads openness.json and the log of exposures, as far as a run folder has them; RunError if one is damaged."""
    file, openness = folder / "openness.json", Openness()
    try:
        facts: Any = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        openness.facts = [(label, str(facts[key])) for key, label in FACTS.items() if facts.get(key) is not None]
        others = facts.get("refused_other_bases", {}).items()
        openness.facts += [(f"would refuse {base}", str(count)) for base, count in others]
    except (ValueError, RecursionError, AttributeError, OSError) as error:
        raise RunError(f"{file} is not valid JSON of a run: {error}") from error
    totals: dict[str, dict[str, float]] = {}
    for path in round_files(folder / FOLDER):
        try:
            table = pq.read_table(pa.BufferReader(path.read_bytes()), columns=["kind", *SUMS, "cost"])
            table = table.cast(pa.schema([EXPOSURES.field(name) for name in table.column_names]))
        except (pa.ArrowException, OSError, KeyError) as error:
            raise RunError(f"{path} cannot be read, it may be truncated: {first_line(error)}") from error
        for kind in pc.unique(table["kind"]).to_pylist():
            of_kind, sums = table.filter(pc.equal(table["kind"], kind)), totals.setdefault(str(kind), {})
            for name in (*SUMS, "cost"):
                if (value := pc.sum(of_kind[name]).as_py()) is not None:
                    sums[name] = sums.get(name, 0) + value
    for kind, sums in totals.items():
        cost = f"{sums['cost']:,.2f}" if "cost" in sums else "not given"
        openness.shown.append((kind, *(f"{int(sums.get(name, 0)):,}" for name in SUMS), cost))
    return openness
