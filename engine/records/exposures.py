"""The log of what clients have shown to the base's owner: rows, tokens and money, first-time rows apart."""

import math
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.messages.exposure import Exposure
from engine.records.metrics import COUNT, NUMBER, ROUND, TEXT, RoundLog, round_files
from strategies.core.access import PARTY

FOLDER = "exposure"
EXPOSURES = pa.schema(
    {
        "round": ROUND,
        "client": TEXT,
        "party": TEXT,
        "kind": TEXT,  # of message: prompt, vector, gradient, hidden state, emulator
        "calls": COUNT,
        "rows": COUNT,  # a row that is sent in several calls counts in each
        "new_rows": COUNT,  # never sent before
        "tokens": COUNT,  # read and written
        "bytes": COUNT,
        "cost": NUMBER,  # null without a price
        "numbers": pa.list_(pa.int32()),  # the client's training rows that were sent, each once
    }
)


class Exposures(RoundLog):
    """One row for each client, round and kind of message. A round in which nothing was shown has no file.

    `sent` holds the rows that each client has sent so far, and `cost` what all calls have cost.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, EXPOSURES)
        self.sent: dict[str, set[int]] = {}
        self.cost = 0.0

    def shown(self, round_: int, client: str, exposures: Iterable[Exposure]) -> None:
        """Adds what a client has shown in a round, all its attempts together."""
        by_kind: dict[str, list[Exposure]] = {}
        for exposure in exposures:
            by_kind.setdefault(exposure.kind, []).append(exposure)
        for kind, calls in by_kind.items():
            numbers = sorted({number for call in calls for number in call.rows})
            cost, known = math.fsum(call.usage.cost for call in calls), self.sent.setdefault(client, set())
            self.note(
                round=round_,
                client=client,
                party=PARTY,
                kind=kind,
                calls=len(calls),
                rows=sum(call.times * len(call.rows) for call in calls),
                new_rows=len({*numbers} - known),
                tokens=sum(call.usage.read + call.usage.written for call in calls),
                bytes=sum(call.nbytes for call in calls),
                cost=None if math.isnan(cost) else cost,
                numbers=[numbers],
            )
            known.update(numbers)
            self.cost += 0.0 if math.isnan(cost) else cost

    def flush(self, round_: int) -> None:
        """Writes the round's file, if anything was shown."""
        if self.blocks:
            super().flush(round_)

    def forget_after(self, round_: int) -> None:
        """Removes later rounds, and reads what was shown before."""
        super().forget_after(round_)
        self.sent, self.cost = {}, 0.0
        for path in round_files(self.folder):
            table = pq.read_table(path, columns=["client", "cost", "numbers"])
            self.cost += pc.sum(table["cost"]).as_py() or 0.0
            for client, numbers in zip(table["client"].to_pylist(), table["numbers"].to_pylist(), strict=True):
                self.sent.setdefault(client, set()).update(numbers)
