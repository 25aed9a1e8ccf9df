"""What a run writes about a round: metrics, ledger and faults, from what was collected."""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from datasets_partition.store.store import Store
from engine.messages.events import DROPOUT, Event, Fault, RoundDone
from engine.messages.shards import ShardedState
from engine.records.metrics import Logs
from engine.rounds.collectors import Collected
from engine.scheduling.pool import Pool


@dataclass(frozen=True)
class Played:
    """A round that has ended: what was collected, and how long all of it and the server's part took.

    `privacy` is what noise has cost by the names of metrics, `statement` the same in words.
    """

    round: int
    collected: Collected
    faults: tuple[Fault, ...]
    seconds: float
    apply_s: float
    privacy: dict[str, float]
    statement: str | None


@dataclass
class Recorder:
    """Writes down rounds. `round` is the one that is being played, to which faults belong."""

    store: Store
    pool: Pool
    logs: Logs
    round: int = 0

    def faults(self, more: Iterable[Fault] = ()) -> tuple[Fault, ...]:
        """Writes down and returns `more` faults and those of the pool since the last call."""
        faults = (*self.pool.faults, *more)
        self.pool.faults.clear()
        self.logs.faults.happened(self.round, faults, self.logs.metrics.wall_s)
        return faults

    def collected(self, collected: Collected) -> tuple[Fault, ...]:
        """Writes down who failed or dropped out, also of a round that ends the run; returns the faults."""
        faults = self.faults(
            Fault("client", self.store.name(report.client), why)
            for report in collected.reports
            for why in (*report.tried, *([report.failed] if report.failed and not report.tried else []))
        )
        dropouts = [Fault(DROPOUT, name, why) for name, why in self._gone(collected).items()]
        self.logs.faults.happened(self.round, dropouts, self.logs.metrics.wall_s)
        return faults

    def played(self, played: Played) -> RoundDone:
        """Writes down a round; returns what is shown of it."""
        metrics, collected = self.logs.metrics, played.collected
        good, gone = collected.good, self._gone(collected)
        failed = {self.store.name(report.client): report.why for report in collected.reports if report.why is not None}
        if collected.by_client:
            names = self.store.names([report.client for report in good])
            metrics.add_each(played.round, "train", names, [report.metrics for report in good])
        clients = 0 if collected.aborted else len(good)
        rate, loss = collected.metrics["tokens"] / played.seconds, collected.metrics["loss"]
        metrics.add(played.round, "train", None, **collected.metrics)
        metrics.add(
            played.round,
            "engine",
            None,
            round_s=played.seconds,
            apply_s=played.apply_s,
            tokens_per_s=rate,
            clients=clients,
            failed=len(failed),
            dropped=len(gone),
            aborted=float(collected.aborted is not None),
            **_protocol_bytes(collected),
            store_bytes=collected.store_bytes,
            balance=self._balance(collected.busy),
            faults=len(played.faults),
        )
        if collected.clipped is not None:
            metrics.add(played.round, "engine", None, clipped=collected.clipped)
        if played.privacy:
            metrics.add(played.round, "privacy", None, **played.privacy)
        for sent in collected.messages:
            self.logs.ledger.received(played.round, sent.party, sent.kind, sent.count, sent.nbytes)
        aborted, statement, faults = collected.aborted, played.statement, played.faults
        return RoundDone(played.round, loss, played.seconds, rate, clients, failed, gone, aborted, statement, faults)

    def after_round(self, state: ShardedState) -> Iterator[Event]:
        """Writes the files of the round."""
        self.logs.flush(state.round)
        yield from ()

    def _gone(self, collected: Collected) -> dict[str, str]:
        """Why clients came too late or not at all, by their names."""
        gone = collected.gone
        return dict(zip(self.store.names([*gone]), gone.values(), strict=True))

    def _balance(self, busy: list[float]) -> float:
        """The mean over the longest of the slots' working times, without slots that no longer exist."""
        present = [seconds for slot, seconds in enumerate(busy) if seconds or slot in self.pool.alive]
        return statistics.mean(present) / max(present) if any(present) else 1.0


def _protocol_bytes(collected: Collected) -> dict[str, int]:
    """What the simulated protocol sends to clients, and to the server of what they send it."""
    messages, no_update = collected.messages, ("sum", "metric")
    return {
        "protocol_bytes_down": sum(sent.nbytes for sent in messages if sent.party != "server"),
        "protocol_bytes_up": sum(
            sent.nbytes for sent in messages if sent.party == "server" and sent.kind not in no_update
        ),
    }
