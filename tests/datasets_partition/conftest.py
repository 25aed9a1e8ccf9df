"""The generator of random numbers that partitioners and splits get, and rows as both kinds of files give them."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from datasets_partition.core.types import Rows
from datasets_partition.formats.conversion import Conversion


@pytest.fixture(scope="session")
def rng():
    """Makes a generator like the one that the store's builder makes, from a small seed."""
    return lambda seed=5: np.random.Generator(np.random.Philox(key=seed))


def from_json(*rows: dict[str, Any], leave_out: tuple[str, ...] = (), **columns: str) -> Rows:
    conversion = Conversion(columns, "error", leave_out=leave_out)
    conversion.add_objects([(f"row {number}", row) for number, row in enumerate(rows, 1)])
    return conversion.rows("rows")


def from_arrow(*rows: dict[str, Any], leave_out: tuple[str, ...] = (), **columns: str) -> Rows:
    conversion = Conversion(columns, "error", leave_out=leave_out)
    conversion.add_batches(pa.Table.from_pylist(list(rows)).to_batches(), "rows")
    return conversion.rows("rows")


both = pytest.mark.parametrize("convert", [from_json, from_arrow])
