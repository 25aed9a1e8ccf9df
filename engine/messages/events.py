"""The events of a run: the driver yields them, and whoever started the run shows them."""

from dataclasses import dataclass, field
from pathlib import Path

DROPOUT = "dropout"  # the kind of a client that is absent or late because the recipe asks for it


@dataclass(frozen=True)
class Fault:
    """What went wrong, whether or not it could be repaired: its kind, which one, and why."""

    # "slot", "client", "lanes" (clients that train together), "driver", "round", "provider", "access" (a client asked
    # the base's owner for more than its level grants), "policy" (a client refuses the base), or DROPOUT
    kind: str
    who: str
    why: str


@dataclass(frozen=True)
class Preparing:
    """A step before the first round has begun."""

    step: str


@dataclass(frozen=True)
class Started:
    """All is in place; `notes` are what the user should know beforehand, such as a large delta."""

    slots: int
    asked: int | str
    training: int
    unseen: int
    dropped_rows: int
    parameters: int
    base_bytes: int
    without_gpu: int  # slots that were to have a GPU and run on the CPU
    resumed: int | None  # the round that a resumed run goes on from
    lanes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RoundDone:
    """A round has ended: mean training loss, seconds, tokens per second, and who gave no usable update, and why.

    `gone` says why clients came too late or not at all, `aborted` why the model stays as it was. `epsilon` is what all
    noisy rounds so far have cost, with its assumptions. All `faults` were repaired but those of clients in `failed`.
    """

    round: int
    loss: float
    seconds: float
    tokens_per_s: float
    clients: int
    failed: dict[str, str]
    gone: dict[str, str] = field(default_factory=dict)
    aborted: str | None = None
    epsilon: str | None = None
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class Checkpointed:
    """All that a run needs to go on after this round is on disk."""

    round: int


@dataclass(frozen=True)
class DriverLost:
    """The driver died, or a slot while it started; another goes on from the last checkpoint, if there is one."""

    why: str


@dataclass(frozen=True)
class Stopped:
    """The run has ended before its last round because it was asked to; the checkpoint of `round` is whole."""

    round: int


@dataclass(frozen=True)
class Evaluated:
    """Held-out losses after a round, by split (heldout, unseen, server), or a baseline's.

    `figures` are others that the objective shows beside its loss, such as the accuracy of pairs, by name and split.
    """

    round: int
    losses: dict[str, float]
    baseline: str | None = None
    figures: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One held-out prompt: what its author wrote, and what the model writes before and after."""

    prompt: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class RunDone:
    """The run's end: its folder, losses by column (round 0, end, baselines) and split, and samples.

    `figures` are others that the objective shows, by name, column and split; `units` are those of "loss" and of each.
    """

    folder: Path
    losses: dict[str, dict[str, float]]
    samples: list[Sample] = field(default_factory=list)
    figures: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)


Event = Preparing | Started | RoundDone | Evaluated | Checkpointed | DriverLost | Stopped | RunDone
