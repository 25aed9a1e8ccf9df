"""The rows and the clients that are kept from training."""

from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datasets_partition.core.dealing import middles, positions
from datasets_partition.core.types import DataError


class Held(NamedTuple):
    """One array over the rows, two over the clients; who is not `kept` takes part in nothing."""

    heldout: NDArray[np.bool_]
    unseen: NDArray[np.bool_]
    kept: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Shares kept from training: `heldout` of each training client's rows, and `unseen` of the people, whole.

    A person is a client, or all clients that a partition cuts one person's rows into. A share `server` of all rows is
    the server's. Clients with fewer than `min_rows` rows are left out before people are drawn. `draw` holds out random
    rows of a client, or the last in the partition's order. Of rows with the same content the first stays, unless
    `duplicates` keeps all; content that is then trained and held out is an error, unless `leaks` allows it.

    With `by = "prompt"` all rows of a prompt are on one side of each split, and shares of rows are met as nearly as
    whole prompts allow. A partition that draws gives a prompt to one client; a natural key leaves its rows with their
    clients, and a prompt of training and of unseen clients is a leak. The prompt of a conversation is what comes before
    the assistant's last turn; rows with an empty prompt stay apart.
    """

    heldout: float = 0.1
    unseen: float = 0.1
    server: float = 0.0
    min_rows: int = 1
    draw: Literal["random", "last"] = "random"
    duplicates: Literal["drop", "keep"] = "drop"
    leaks: Literal["error", "allow"] = "error"
    # Without a place in the text that names a store, where the builder adds it: earlier stores are used on.
    by: Literal["row", "prompt"] = field(default="row", repr=False)

    def __post_init__(self) -> None:
        for name, share in (("heldout", self.heldout), ("unseen", self.unseen), ("server", self.server)):
            if not 0 <= share < 1:
                raise DataError(f"data.splits.{name} is {share}: give a share from 0 up to, but not including, 1")
        if self.min_rows < 1:
            raise DataError(f"data.splits.min_rows is {self.min_rows}: give 1 or more")

    def server_rows(self, groups: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.bool_]:
        """Draws the server's rows, all or none of a group (one number a row): their share, rounded to the nearest."""
        order, sizes = rng.permutation(int(groups.max()) + 1), np.bincount(groups)
        drawn = np.zeros(len(sizes), dtype=np.bool_)
        drawn[order[middles(sizes[order]) < _nearest(self.server * len(groups))]] = True
        return drawn[groups]

    def assign(
        self,
        clients: NDArray[np.int32],
        people: NDArray[np.int64],
        rng: np.random.Generator,
        prompts: NDArray[np.int64] | None = None,
    ) -> Held:
        """Decides for rows in the partition's order, whose clients are `clients` (one int32 a row).

        `people` numbers each client's person: all clients of a person are unseen, or none. Counts are rounded, halves
        up, but each client keeps a training row, and a person trains. With `prompts`, the number of each row's prompt,
        all training clients hold out the same whole prompts. DataError if no client has `min_rows` rows.
        """
        rows = np.bincount(clients, minlength=len(people))
        kept = rows >= self.min_rows
        if not kept.any():
            raise DataError(
                f"data.splits.min_rows is {self.min_rows}, but no client has more than {rows.max()} rows: lower it"
            )
        candidates = np.unique(people[kept])
        drawn = min(_nearest(self.unseen * len(candidates)), len(candidates) - 1)
        unseen = kept & np.isin(people, rng.permutation(candidates)[:drawn])
        held = np.minimum(_nearest(self.heldout * rows), np.maximum(rows - 1, 0))
        if prompts is not None:
            heldout, trains = unseen[clients], (kept & ~unseen)[clients]
            heldout[trains] = self._whole_prompts(clients[trains], prompts[trains], held, rng)
            return Held(heldout, unseen, kept)
        held = np.where(kept, np.where(unseen, rows, held), 0)
        # Each client's rows in a random order, or from the last to the first: the first ones of each are held out.
        turn = rng.permutation(len(clients)) if self.draw == "random" else -np.arange(len(clients))
        heldout = np.empty(len(clients), dtype=np.bool_)
        heldout[np.lexsort((turn, clients))] = positions(rows) < np.repeat(held, rows)
        return Held(heldout, unseen, kept)

    def _whole_prompts(
        self,
        clients: NDArray[np.int32],
        prompts: NDArray[np.int64],
        wanted: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> NDArray[np.bool_]:
        """Holds prompts out, in a random order or from the last row to the first, each at all of its clients.

        A prompt is passed over if it would bring one of its clients further from the number of rows `wanted` of it, or
        leave it no training row.
        """
        turns = rng.permutation(int(prompts.max()) + 1)
        if self.draw == "last":
            rows = np.bincount(clients)
            to_end = np.empty(len(clients), dtype=np.int64)
            to_end[np.argsort(clients, kind="stable")] = np.repeat(rows, rows) - positions(rows)
            nearest = np.full(len(turns), len(clients) + 1)
            np.minimum.at(nearest, prompts, to_end)
            turns = np.argsort(np.lexsort((turns, nearest)))
        shares, counts = np.unique(turns[prompts] * len(wanted) + clients, return_counts=True)
        each = zip(*(part.tolist() for part in (*np.divmod(shares, len(wanted)), counts)), strict=True)
        missing, training = wanted.tolist(), np.bincount(clients, minlength=len(wanted)).tolist()
        heldout = np.zeros(len(turns), dtype=np.bool_)
        for turn, group in groupby(each, key=itemgetter(0)):
            at = [(client, count) for _, client, count in group]
            heldout[turn] = all(count <= 2 * missing[client] and count < training[client] for client, count in at)
            if heldout[turn]:
                for client, count in at:
                    missing[client] -= count
                    training[client] -= count
        return heldout[turns[prompts]]


def _nearest(counts: Any) -> Any:
    return np.floor(counts + 0.5).astype(np.int64)  # np.rint would round 0.5 to 0 and 1.5 to 2
