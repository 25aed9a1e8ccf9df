"""Writes a round's metrics, ledger and faults, from what was collected."""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from datasets_partition.store.store import Store
from engine.messages.events import DROPOUT, Event, Fault, RoundDone
from engine.messages.shards import ShardedState
from engine.records.logs import Logs
from engine.rounds.collectors import Collected, Message
from engine.scheduling.pool import Pool
from strategies.core.access import PARTY

Faults = tuple[Fault, ...]
Metrics = dict[str, float]
NO_UPDATE = ("sum", "metric")  # kinds of messages to the server that no protocol of updates counts


@dataclass
class Recorder:
    """Writes down rounds. `round` is the one that is being played, to which faults belong."""

    store: Store
    pool: Pool
    logs: Logs
    round: int = 0

    def begin(self, round_: int) -> None:
        """Makes `round_` the one that is being played."""
        self.round = round_

    def faults(self, more: Iterable[Fault] = ()) -> Faults:
        """Writes down and returns `more` faults and those of the pool since the last call."""
        faults = (*self.pool.faults, *more)
        self.pool.faults.clear()
        self.logs.faults.happened(self.round, faults, self.logs.metrics.wall_s)
        return faults

    def collected(self, collected: Collected, others: Faults = ()) -> Faults:
        """Writes down who failed or dropped out, also of a round that ends the run, and other faults; returns them."""
        failed = (
            Fault("client", self.store.name(report.client), why)
            for report in collected.reports
            for why in (*report.tried, *([report.failed] if report.failed and not report.tried else []))
        )
        faults = self.faults((*failed, *others))
        dropouts = [Fault(DROPOUT, name, why) for name, why in self._gone(collected).items()]
        self.logs.faults.happened(self.round, dropouts, self.logs.metrics.wall_s)
        return faults

    def played(
        self, collected: Collected, faults: Faults, times: Metrics, privacy: Metrics, statement: str | None
    ) -> RoundDone:
        """Writes down a round; `times` are in seconds, `privacy` is the noise's cost, `statement` the same in words."""
        round_, metrics, good, gone = self.round, self.logs.metrics, collected.good, self._gone(collected)
        failed = {self.store.name(report.client): report.why for report in collected.reports if report.why is not None}
        for report in collected.reports:
            if report.exposures:
                self.logs.exposures.shown(round_, self.store.name(report.client), report.exposures)
        if collected.by_client:
            names = self.store.names([report.client for report in good])
            metrics.add_each(round_, "train", names, [report.metrics for report in good])
        clients, aborted = 0 if collected.aborted else len(good), float(collected.aborted is not None)
        round_s, messages = times["round_s"], collected.messages
        tokens_per_s = collected.metrics["tokens"] / round_s
        down = sum(sent.nbytes for sent in messages if sent.party != "server")
        messages = [*messages, *_to_owner(collected)]
        up = sum(sent.nbytes for sent in messages if sent.party == "server" and sent.kind not in NO_UPDATE)
        counts = {"clients": clients, "failed": len(failed), "dropped": len(gone), "aborted": aborted}
        sizes = {"protocol_bytes_down": down, "protocol_bytes_up": up, "store_bytes": collected.store_bytes}
        others = {"balance": self._balance(collected.busy), "faults": len(faults)}
        clipped = {} if collected.clipped is None else {"clipped": collected.clipped}
        metrics.add(round_, "train", None, **collected.metrics)
        metrics.add(round_, "engine", None, **times, tokens_per_s=tokens_per_s, **counts, **sizes, **others, **clipped)
        if privacy:
            metrics.add(round_, "privacy", None, **privacy)
        for sent in messages:
            self.logs.ledger.received(round_, sent.party, sent.kind, sent.count, sent.nbytes)
        shown = collected.metrics["loss"], round_s, tokens_per_s, clients, failed, gone, collected.aborted
        return RoundDone(round_, *shown, statement, faults)

    def after_round(self, state: ShardedState) -> Iterator[Event]:
        """Writes the files of the round."""
        self.logs.flush(state.round)
        yield from ()

    def _gone(self, collected: Collected) -> dict[str, str]:
        return dict(zip(self.store.names([*collected.gone]), collected.gone.values(), strict=True))

    def _balance(self, busy: list[float]) -> float:
        """The mean over the longest of the slots' working times, without slots that no longer exist."""
        present = [seconds for slot, seconds in enumerate(busy) if seconds or slot in self.pool.alive]
        return statistics.mean(present) / max(present) if any(present) else 1.0


def _to_owner(collected: Collected) -> list[Message]:
    """What reached the base's owner, by kind, where it alone has the base."""
    shown = [exposure for report in collected.reports for exposure in report.exposures]
    kinds = dict.fromkeys(exposure.kind for exposure in shown)
    by_kind = {kind: [exposure.nbytes for exposure in shown if exposure.kind == kind] for kind in kinds}
    return [Message(PARTY, kind, len(sizes), sum(sizes)) for kind, sizes in by_kind.items()]
