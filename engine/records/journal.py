"""The sums that secure aggregation has unmasked, on disk before any client is asked for shares.

The difference of two sums of nearly the same clients from one model may be a single client's update. A round that is
played again, by a new driver or after --resume, may therefore unmask the same clients or nobody.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from datasets_partition.sources.location import located, within
from engine.system.atomic import make_folder, write_file

JOURNAL = "unmasked"


class SumRefused(ValueError):
    """A sum must not be unmasked: it could tell what too few clients sent."""


class Unmasked(NamedTuple):
    """The clients whose sum was asked for in a round, and from which models, by the last round whose sum is in them."""

    clients: tuple[int, ...]
    models: tuple[int, ...]


@dataclass
class Journal:
    """A run's unmasked sums, one file a round in `run`'s folder; nothing of them is held in memory.

    `elsewhere` is the URI of the run folder's copy, which gets each file at once: a run that continues from there must
    know every sum. `model` names the present model as `Unmasked` does: by the last round whose sum is in it.
    """

    run: Path
    elsewhere: str | None = None
    model: int = 0

    def summed(self, round_: int) -> None:
        """Notes that the sum of this round is now in the model."""
        self.model = round_

    def clients(self, round_: int) -> frozenset[int] | None:
        """Returns the clients whose sum of this round has been asked for; None if none, or its file is damaged."""
        entry = _read(self._path(round_), round_)
        return None if entry is None else frozenset(entry.clients)

    def admit(self, round_: int, clients: Sequence[int], refuse_thin: Callable[[Sequence[int]], None]) -> None:
        """Writes to disk that the sum of `clients` is about to be asked for.

        SumRefused, and nothing is written, if this sum and an earlier one together could tell what too few clients
        sent: `refuse_thin` raises it for the clients by which two sums of one model differ.
        """
        asked, path = tuple(sorted(clients)), self._path(round_)
        entry = _read(path, round_)
        if entry is None and path.exists():
            raise SumRefused(
                f"a sum of this round was asked for before, and {path}, which says of whom, cannot be read: another "
                f"sum could tell one client's update"
            )
        if entry is not None and entry.clients != asked:
            changed = len(set(entry.clients) ^ set(asked))
            raise SumRefused(
                f"a sum of {len(entry.clients)} clients of this round was asked for before, and who is there now "
                f"differs by {changed}: another sum could tell one client's update"
            )
        before = entry.models if entry else ()
        if self.model not in before:  # otherwise this is the same sum, which tells nothing new
            self._refuse_close(round_, asked, refuse_thin)
        # Written even if nothing is new: a driver may have died before the copy elsewhere had it.
        facts = {"round": round_, "clients": asked, "models": [*dict.fromkeys((*before, self.model))]}
        content = json.dumps(facts | {"digest": _digest(facts)}).encode()
        make_folder(path.parent)
        write_file(path, content)
        if self.elsewhere is not None:
            _copy(content, within(self.elsewhere, f"{JOURNAL}/{path.name}"))

    def _refuse_close(self, round_: int, asked: tuple[int, ...], refuse_thin: Callable[[Sequence[int]], None]) -> None:
        """Raises SumRefused if another round had a sum from the present model that `asked` is too close to."""
        numbers = (path.stem.removeprefix("round-") for path in (self.run / JOURNAL).glob("round-*.json"))
        for other in sorted(int(number) for number in numbers if number.isdecimal()):
            if other <= self.model or other == round_:  # rounds up to the model's had no sum from it
                continue
            past = _read(self._path(other), other)
            if past is None:
                raise SumRefused(
                    f"round {other} may have had a sum of nearly the same clients from the same model, and "
                    f"{self._path(other)}, which says of whom, cannot be read: start again with another seed"
                )
            if self.model not in past.models or past.clients == asked:
                continue
            try:
                refuse_thin(sorted(set(past.clients) ^ set(asked)))
            except SumRefused as error:
                raise SumRefused(
                    f"round {other} had a sum from the same model, and of the clients that are in one of the two sums "
                    f"alone {error}: the difference could tell one client's update"
                ) from None

    def _path(self, round_: int) -> Path:
        return self.run / JOURNAL / f"round-{round_:05d}.json"


def _copy(content: bytes, place: str) -> None:
    """Writes a file at a URI; OSError, which ends the run, if it cannot be written."""
    try:
        system, path = located(place)
        system.create_dir(str(PurePosixPath(path).parent), recursive=True)
        with system.open_output_stream(path) as stream:
            stream.write(content)
    except OSError as error:
        raise OSError(
            f"{place} cannot be written ({str(error).splitlines()[0]}), and a run that goes on from there must know of "
            f"each sum before it is unmasked: make room or give leave, and run again with --resume"
        ) from error


def _read(path: Path, round_: int) -> Unmasked | None:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.pop("digest") != _digest(facts) or facts["round"] != round_:
            return None
        return Unmasked(tuple(map(int, facts["clients"])), tuple(map(int, facts["models"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _digest(facts: dict[str, object]) -> str:
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
