"""The natural partition in time: each client's rows in the order of their times, for drift."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datasets_partition.core.columns import column, keys
from datasets_partition.core.errors import DataError
from datasets_partition.core.types import Assignment

# What a column of text may hold, tried in this order: numbers, or ISO dates and times, without or with a time zone.
FORMS = (pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC"))


@dataclass(frozen=True, kw_only=True)
class ByTime:
    """A client for each value of `key`, as in `Natural`, whose rows are in the order of the column `time`.

    `time` holds numbers, dates or times, or text that is all numbers or all ISO 8601. Rows of the same time stay in
    the source's order.
    """

    kind: Literal["time"] = "time"
    key: str = "client"
    time: str

    def assign(self, table: pa.Table, rng: np.random.Generator) -> Assignment:
        """Uses no randomness. Raises DataError if a column is missing, or does not hold what it should in each row."""
        clients, names = keys(table, "data.partition.key", self.key)
        times = column(table, "data.partition.time", self.time)
        kind = times.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            times = _parsed(times, self.time)
        elif not (pa.types.is_temporal(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise DataError(f"data.partition.time names {self.time!r}, which holds {kind}: name a column of times")
        timeless = times.null_count
        if pa.types.is_floating(times.type):
            timeless += pc.sum(pc.is_nan(times), min_count=0).as_py()
        if timeless:
            raise DataError(
                f"data.partition.time names {self.time!r}, which is null in {timeless} of {table.num_rows} rows: "
                "fill it in, or leave those rows out of the source"
            )
        ranks = np.empty(len(times), np.int64)
        ranks[np.argsort(times.to_numpy(), kind="stable")] = np.arange(len(times))
        return Assignment(clients, names, order=ranks)


def _parsed(times: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    reasons = []
    for form in FORMS:
        try:
            return times.cast(form)
        except pa.ArrowInvalid as error:
            reasons.append(str(error))
    raise DataError(
        f"data.partition.time names {name!r}, whose text is not all numbers or all ISO dates ({reasons[2]}): "
        "write times such as 2024-05-31T12:00:00, all with a time zone or all without"
    )
