"""Puts the parts of a run together: what its rounds work with, and the round loop."""

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
from engine.rounds.secure_round import SecureCollector, start_relay
from engine.rounds.server import Shards
from engine.scheduling.cost_model import Costs
from engine.scheduling.pool import Pool


@dataclass(frozen=True)
class RunParts:
    """What all of a run's rounds work with: the recipe, the pool, the model's shards, the rows, the run folder.

    `initial` is the state before the first round, `elsewhere` the URI that the folder is copied to, if it is.
    """

    federation: Federation
    pool: Pool
    shards: Shards
    initial: ShardedState
    store: Store
    tokens: Tokens
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
    federation, store, shards = parts.federation, parts.store, parts.shards
    planner = Planner(federation, parts.tokens, parts.population, Costs.of(saved.costs if saved else []))
    round_, clip = (saved.state.round, saved.clip) if saved else (0, None)
    rows = parts.tokens.counts("train")[: parts.population]
    steps = planner.most_steps() * shards.trainings(parts.initial)  # all trainings of a client see its rows
    privacy = PrivacyAccount.open(federation, parts.pool.layout, parts.folder, rows, steps, round_, clip)
    journal = Journal.open(parts.folder, parts.elsewhere, saved.last_sum if saved else 0)
    quorum = Quorum(federation, store)
    path = federation.clients.availability.trace
    trace = None if path is None else Trace.open(Path(path), store.names(list(range(store.num_clients))))
    collector: Collector
    if federation.privacy.secure:
        train = federation.train
        most_tokens = planner.most_steps() * train.batch * train.accumulate * train.max_length
        relay = start_relay(shards, federation.privacy.secagg.on_slot_death)
        collector = SecureCollector(federation, relay, most_tokens, journal, quorum.shortfall, trace)
        collector.refuse_small_ring(privacy.plan, privacy.clip, federation.cohort.largest(parts.population), round_)
    else:
        collector = ClearCollector(federation, shards, trace)
    return RoundLoop(
        federation,
        planner,
        shards,
        collector,
        quorum,
        privacy,
        journal,
        Recorder(store, parts.pool, logs, round_),
        client_states=parts.folder / "client_state",
        lanes=lanes,
        aborts=saved.aborts if saved else 0,
    )
