"""Clients that are missing: drawn by the seed, too slow for a deadline, or away by a trace."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from engine.messages.checks import below_one
from engine.messages.errors import RunError
from strategies.core.seeds import rng
from strategies.secagg.protocol import Phase

LEAVES: tuple[Phase, ...] = ("keys", "shares", "masked input")
# Why a client is missing: the text before a colon is the same for all clients with that reason.
AWAY = "away by clients.availability.trace"
DRAWN = "dropped out by clients.availability.dropout"
DIED_WITH_SLOT = 'dropped out with its slot, as privacy.secagg.on_slot_death = "dropout" asks'
LEFT_OUT = "left out: the sum of this round that was asked for before is without it"
COLUMNS = {"client": pa.string(), "first": pa.int64(), "last": pa.int64()}


@dataclass(frozen=True)
class Trace:
    """Rounds in which clients are there, always without a span: `spans` (S, 2), those of client c from `starts[c]`."""

    starts: np.ndarray
    spans: np.ndarray

    @classmethod
    def open(cls, path: Path, names: list[str]) -> "Trace":
        """Reads a Parquet or CSV file of client (its name), first, last; `names` are in the order of client numbers.

        Names are text, also in a CSV file: "007" is not client "7". RunError for a wrong file, name, or span of rounds.
        """
        table = _read(path)
        numbers = pc.index_in(table["client"], pa.array(names, pa.string()))
        first, last = table["first"], table["last"]
        # A comparison with null is null, and a null here is refused before.
        known = f"whose clients are {', '.join(map(repr, names[:3]))} and so on"
        faults = {
            "has an empty value": pc.or_(pc.or_(pc.is_null(table["client"]), pc.is_null(first)), pc.is_null(last)),
            f"names no client of the data, {known}": pc.is_null(numbers),
            "ends before it begins": pc.less(last, first),
            "begins before round 1, which is the first": pc.less(first, 1),
        }
        for fault, rows in faults.items():
            if (row := pc.index(rows, True).as_py()) >= 0:
                said = ", ".join(f"{name} = {table[name][row].as_py()!r}" for name in COLUMNS)
                place = f"row {row + 1} of the trace {path} (clients.availability.trace)"
                raise RunError(f"{place} {fault}: correct it ({said})")
        clients, spans = numbers.to_numpy(), np.stack([first, last], axis=1)
        order = np.argsort(clients, kind="stable")
        return cls(np.searchsorted(clients[order], np.arange(len(names) + 1)), spans[order])

    def away(self, client: int, round_: int) -> bool:
        """Whether a client is missing in a round, counted from 1."""
        spans = self.spans[self.starts[client] : self.starts[client + 1]]
        return len(spans) > 0 and not ((spans[:, 0] <= round_) & (round_ <= spans[:, 1])).any()


def _read(path: Path) -> pa.Table:
    """The columns of a trace, with names as they are written."""
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path, columns=list(COLUMNS))
            if pa.types.is_integer(table["client"].type) or pa.types.is_floating(table["client"].type):
                raise pa.ArrowInvalid("its client column holds numbers, and names are text")
        else:
            kinds = csv.ConvertOptions(column_types=COLUMNS, include_columns=list(COLUMNS))
            table = csv.read_csv(path, convert_options=kinds)
        return table.cast(pa.schema(list(COLUMNS.items())))
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise RunError(
            f"the trace {path} (clients.availability.trace) cannot be read as Parquet or CSV with the columns "
            f"client, first and last: {str(error).splitlines()[0]}"
        ) from error


def too_late(seconds: float) -> str:
    """Returns why a late client does not count."""
    return f"too late: {seconds:.3g} s after clients.availability.deadline_s"


class Leaving(NamedTuple):
    """A client drops out before it answers the phase `before`, and why."""

    before: Phase
    why: str


@dataclass(frozen=True)
class Availability:
    """Simulated drop-outs: the share `dropout` of a cohort, and clients that take longer than `deadline_s`.

    The seed draws who drops out; under secure aggregation they leave before they offer keys, shares or their vector.
    With `step_s`, the seconds of an optimizer step for the median client, time is simulated: each client has a fixed
    slowdown, drawn lognormally with sigma `slowness`, and late clients need not train. Without it the clock decides.
    `trace` is a Parquet or CSV file of `client` (its name), `first` and `last`: clients in it are there in these
    rounds, counted from 1, and in no others; a client may have several rows.
    """

    dropout: float = 0.0
    deadline_s: float | None = None
    step_s: float | None = None
    slowness: float = 0.0
    trace: str | None = None

    def __post_init__(self) -> None:
        below_one("clients.availability", dropout=self.dropout)
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise RunError(f"clients.availability.deadline_s must be above 0, not {self.deadline_s}")
        if self.step_s is not None and not 0 < self.step_s < math.inf:
            raise RunError(f"clients.availability.step_s must be above 0, not {self.step_s}")
        if not 0 <= self.slowness < math.inf:
            raise RunError(f"clients.availability.slowness is a sigma, and must be at least 0, not {self.slowness}")
        if self.step_s is not None and self.deadline_s is None:
            why = "simulates clients' time, which only a deadline uses: set deadline_s too"
            raise RunError(f"clients.availability.step_s {why}")
        if self.slowness and self.step_s is None:
            raise RunError("clients.availability.slowness is the spread of clients around step_s: set step_s too")

    @property
    def by_clock(self) -> bool:
        """Whether lateness depends on the machine's own pace, so that runs are not the same bit by bit."""
        return self.deadline_s is not None and self.step_s is None

    def late_by_seed(self, client: int, steps: int, seed: int) -> float:
        """The simulated seconds by which a client is late after its steps; 0 if it is in time."""
        if self.deadline_s is None or self.step_s is None:
            return 0.0
        # A client has one slowdown for all rounds: it is drawn for round -1, for which nothing else is.
        slow = rng(seed, -1, client, "availability").lognormal(0.0, self.slowness)
        return max(0.0, steps * self.step_s * slow - self.deadline_s)

    def late_by_clock(self, trained_s: float) -> float:
        """The seconds by which a client is late on the clock; 0 where it is in time, or time is simulated."""
        return 0.0 if self.deadline_s is None or self.step_s is not None else max(0.0, trained_s - self.deadline_s)

    def gone(self, cohort: Iterable[int], seed: int, round_: int, trace: Trace | None = None) -> dict[int, Leaving]:
        """The clients of the cohort that drop out in a round (counted from 0), and before which answer."""
        gone: dict[int, Leaving] = {}
        for client in map(int, cohort):
            if trace is not None and trace.away(client, round_ + 1):
                gone[client] = Leaving(LEAVES[0], AWAY)
            elif self.dropout:  # no draws for a large cohort without it
                draw = rng(seed, round_, client, "availability")
                if draw.random() < self.dropout:
                    gone[client] = Leaving(LEAVES[draw.integers(3)], DRAWN)
        return gone
