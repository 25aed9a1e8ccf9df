"""Puts the parts of a run together: the pool's shards, the server, and the round loop."""

from dataclasses import dataclass
from pathlib import Path

from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens
from engine.aggregation.privacy_account import PrivacyAccount
from engine.config.availability import Trace
from engine.config.federation import Federation
from engine.messages.shards import ShardedState
from engine.records.checkpoint import Saved
from engine.records.journal import Journal
from engine.records.metrics import Logs
from engine.rounds.collectors import ClearCollector, Collector, Quorum
from engine.rounds.planner import Planner
from engine.rounds.recorder import Recorder
from engine.rounds.round_loop import RoundLoop
from engine.rounds.secure_collector import SecureCollector, start_relay
from engine.rounds.server import Server
from engine.scheduling.cost_model import Costs
from engine.scheduling.pool import Pool
from strategies.core.layout import Layout


@dataclass(frozen=True)
class RunParts:
    """What all of a run's rounds work with: the recipe, the started pool, the server, the rows, the run folder.

    `initial` is the state before the first round, `elsewhere` the URI that the folder is copied to, if it is.
    """

    federation: Federation
    pool: Pool
    server: Server
    initial: ShardedState
    store: Store
    tokens: Tokens
    layout: Layout
    folder: Path
    elsewhere: str | None = None

    @property
    def population(self) -> int:
        """How many clients may train."""
        return self.store.num_training


def round_loop(parts: RunParts, logs: Logs, lanes: int = 1, saved: Saved | None = None) -> RoundLoop:
    """Returns the loop of a run's rounds, from the start or from what was `saved`.

    Plans the noise of all rounds and how updates come in; ValueError if the recipe asks for what cannot be had.
    """
    federation, population, server = parts.federation, parts.population, parts.server
    planner = Planner(federation, parts.tokens, population, Costs.of(saved.costs if saved else []))
    rows = parts.tokens.counts("train")[:population]
    steps = planner.most_steps() * server.shards.trainings(parts.initial)  # all trainings of a client see its rows
    round_, clip = (saved.state.round, saved.clip) if saved else (0, None)
    privacy = PrivacyAccount.open(federation, parts.layout, parts.folder, rows, steps, round_, clip)
    journal = Journal(parts.folder, parts.elsewhere, saved.last_sum if saved else 0)
    quorum = Quorum(federation, parts.store)
    path = federation.clients.availability.trace
    trace = None if path is None else Trace.open(Path(path), parts.store.names(list(range(parts.store.num_clients))))
    collector: Collector
    if federation.privacy.secure:
        collector = _secure_collector(parts, planner, journal, quorum, trace)
        _refuse_small_ring(parts, collector, privacy, round_)
    else:
        collector = ClearCollector(federation, parts.pool, server.shards, trace)
    return RoundLoop(
        federation,
        planner,
        server,
        collector,
        quorum,
        privacy,
        journal,
        Recorder(parts.store, parts.pool, logs, round_),
        client_states=parts.folder / "client_state",
        lanes=lanes,
        aborts=saved.aborts if saved else 0,
    )


def _secure_collector(
    parts: RunParts, planner: Planner, journal: Journal, quorum: Quorum, trace: Trace | None
) -> SecureCollector:
    federation, train, shards = parts.federation, parts.federation.train, parts.server.shards
    most_tokens = planner.most_steps() * train.batch * train.accumulate * train.max_length
    relay = start_relay(parts.pool, federation.privacy.secagg.on_slot_death)
    return SecureCollector(federation, relay, shards, parts.layout, most_tokens, journal, quorum.shortfall, trace)


def _refuse_small_ring(parts: RunParts, collector: SecureCollector, privacy: PrivacyAccount, round_: int) -> None:
    """Raises an error, before anybody trains, if the largest cohort does not fit the graph or the ring of a round."""
    federation = parts.federation
    largest = max(2, federation.cohort.largest(parts.population))
    federation.privacy.secagg.parameters(largest)
    for later in range(round_, federation.rounds):
        collector.client_clip(privacy.plan, privacy.clip, largest, later)
