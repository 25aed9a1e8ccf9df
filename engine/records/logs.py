"""All logs of a run together."""

from pathlib import Path
from typing import NamedTuple

from engine.records.exposures import FOLDER, Exposures
from engine.records.metrics import Faults, Ledger, Metrics


class Logs(NamedTuple):
    """All that a run writes round by round."""

    metrics: Metrics
    ledger: Ledger
    faults: Faults
    exposures: Exposures

    @classmethod
    def under(cls, folder: Path, mode: str = "off", wall_s: float = 0.0) -> "Logs":
        """The logs of the run in `folder`, which has taken `wall_s` seconds before; `mode` is secure aggregation's."""
        ledger, faults = Ledger(folder / "ledger", mode), Faults(folder / "faults")
        return cls(Metrics(folder / "metrics", wall_s), ledger, faults, Exposures(folder / FOLDER))

    def flush(self, round_: int) -> None:
        """Writes the round's files."""
        for log in self:
            log.flush(round_)

    def append(self, round_: int) -> None:
        """Adds to the files of a round that has been written."""
        for log in self:
            log.append(round_)

    def clear(self) -> None:
        """Drops the rows of a round that is not to be written."""
        for log in self:
            log.blocks.clear()
