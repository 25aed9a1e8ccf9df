"""What a worker tells of its clients: a report of each, and the update itself where the rule reads single updates."""

from dataclasses import dataclass, field

import numpy as np

from engine.messages.exposure import Exposure
from engine.messages.shards import borrow, borrow_all
from strategies.core.protocol import Update

FLOAT_BYTES = 4
NOT_TRAINED = "it could not be trained"
DOWN, UP = "protocol_bytes_down", "protocol_bytes_up"  # metrics of a report


@dataclass(frozen=True)
class Report:
    """What became of one client in a round."""

    client: int
    metrics: dict[str, float]
    failed: str | None = None  # why its update was refused
    late: float = 0.0  # seconds after the deadline, 0 if the client was in time
    seconds: float = field(default=0.0, compare=False)  # of its slot's work; clients in lanes share them equally
    tried: tuple[str, ...] = ()  # why earlier attempts failed
    exposures: tuple[Exposure, ...] = ()  # what all attempts have shown to the base's owner

    @classmethod
    def of_nothing(cls, client: int, tried: tuple[str, ...]) -> "Report":
        """Reports a client that could not be trained, with the causes of all attempts."""
        return cls(client, {DOWN: 0.0, UP: 0.0}, NOT_TRAINED, tried=tried)

    @property
    def good(self) -> bool:
        """Whether its update counts."""
        return self.failed is None and not self.late

    @property
    def why(self) -> str | None:
        """Why the client gave nothing, with the last cause where it is known."""
        return f"{self.failed}: {self.tried[-1]}" if self.failed == NOT_TRAINED and self.tried else self.failed


@dataclass(frozen=True)
class UpdateMessage:
    """An Update as it lies in the object store."""

    client: int
    weight: float
    delta: np.ndarray
    extras: dict[str, np.ndarray]
    metrics: dict[str, float]

    @classmethod
    def of(cls, update: Update) -> "UpdateMessage":
        """Copies the vectors, since the trainer may use their memory for the next client."""
        extras = {name: extra.numpy().copy() for name, extra in update.extras.items()}
        return cls(update.client, update.weight, update.delta.numpy().copy(), extras, update.metrics)

    def update(self) -> Update:
        """Returns the update over the store's own memory, which nobody may write."""
        return Update(self.client, self.weight, borrow(self.delta), borrow_all(self.extras), self.metrics)
