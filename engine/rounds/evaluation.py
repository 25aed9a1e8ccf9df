"""Evaluation over all slots: held-out losses, the baselines on the same rows, and samples. Legend: P parameters."""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import ray

from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens
from engine.config.federation import Federation
from engine.messages.broadcast import BroadcastMessage
from engine.messages.shards import Shard
from engine.records.metrics import Ledger, Metrics
from engine.scheduling.dispatcher import Later
from engine.scheduling.pool import Pool
from engine.scheduling.worker_kinds import Reference
from engine.training.judging import ClientLoss, Prompt, mean_loss
from strategies.core.seeds import rng

SAMPLES, SAMPLE_TOKENS = 3, 40
FLOAT_BYTES = 4
Losses = dict[str, float]  # split -> nats per token


@dataclass(frozen=True)
class Begun:
    """An evaluation of the model after `round` on its way, by split."""

    round: int
    parts: list[tuple[str, Later]]


def _evaluated(actor: Any, chunk: list[int], sent: Any, limit: int) -> Reference:
    return actor.evaluate.remote(chunk, sent, limit)


@dataclass(frozen=True)
class Scores:
    """Evaluates on the slots and writes what it finds to the metrics and the ledger.

    What slots are sent stands for a vector (P,): see Server.sent. `vector_bytes` is its size.
    """

    federation: Federation
    slots: Pool
    store: Store
    tokens: Tokens
    metrics: Metrics
    ledger: Ledger
    vector_bytes: int

    def global_model(self, sent: Any, round_: int) -> Losses:
        """The vector's loss on held-out rows, on clients that never train, and on the server's rows if it has any."""
        return self._all_splits(sent, round_, "loss", per_client=True)

    def begun(self, sent: Any, round_: int) -> Begun:
        """An evaluation as `global_model` does it, which waits for slots with nothing else to do."""
        parts = []
        for split in ("heldout", "unseen", "server"):
            clients, _ = self._judged(split)
            limit = self._limit(split)
            call = partial(_evaluated, sent=sent, limit=limit)
            parts.append((split, Later.of(clients, self.slots.size, call)))
        return Begun(round_, parts)

    def ended(self, begun: Begun) -> Losses:
        """What came of it; what no slot has had time for yet is done now."""
        losses = {}
        for split, later in begun.parts:
            left = np.array([client for chunk in later.chunks for client in chunk], np.int64)
            later.chunks.clear()
            later.results.extend(self.slots.map(left, self.tokens.counts("heldout")[left], later.call))
            if later.results:
                losses[split] = self._noted(later.results, begun.round, split, "loss", per_client=True)
        return losses

    def centralised(self, start: Any, round_: int, steps: int) -> Losses:
        """The loss (nats per token) after `steps` steps on the pooled rows: what could be had if that were allowed."""
        clients = list(range(self.store.num_training))
        trained_P = self.slots.ask(lambda actor: actor.centralised.remote(clients, start, steps), long=True)
        return self._all_splits(ray.put(BroadcastMessage(round_, (Shard(trained_P, {}),))), round_, "loss_centralised")

    def not_private(self, sent: Any, round_: int) -> Losses:
        """The loss (nats per token) of what the same federation comes to without privacy: what privacy costs."""
        return self._all_splits(sent, round_, "loss_not_private")

    def local_only(self, start: Any, round_: int, steps: np.ndarray, name: str) -> Losses:
        """The loss where each client (by id) trains alone for its `steps` from `start`: written as loss_`name`.

        Who has no held-out rows is not judged, and so not trained.
        """
        split = "heldout"
        clients, _ = self._judged(split)
        found = self.slots.map(
            clients, steps[clients], lambda actor, chunk: actor.local_only.remote(chunk, start, steps[chunk].tolist())
        )
        return {split: self._note(found, round_, split, f"loss_{name}")}

    def personal(self, wire: BroadcastMessage, round_: int) -> Losses:
        """The loss where each client is judged by its own model; nothing where no client has one."""
        shared, (clients, rows), limit = ray.put(wire), self._judged("heldout"), self._limit("heldout")
        found = self.slots.map(clients, rows, lambda actor, chunk: actor.evaluate_personal.remote(chunk, shared, limit))
        if not found:
            return {}
        self._told(round_, len(found))
        return {"heldout": self._note(found, round_, "heldout", "loss_personal", per_client=True)}

    @cached_property
    def sample_rows(self) -> list[tuple[Prompt, str]]:
        """Prompt and completion of a few rows of unseen (else training) clients, drawn by the seed.

        Of a conversation these are the turns before the assistant's last one, and that.
        """
        clients, _ = self._judged("unseen")
        if not len(clients):
            clients, _ = self._judged("heldout")
        chosen = rng(self.federation.seed, 0, -1, "sample").choice(clients, min(SAMPLES, len(clients)), replace=False)
        rows = [self.store.read_rows(int(client), "heldout").slice(0, 1).to_pylist()[0] for client in chosen]
        return [_split(row["messages"]) if "messages" in row else (row["prompt"], row["completion"]) for row in rows]

    def continued(self, sent: Any) -> list[str]:
        """What the model writes after the prompts of `sample_rows`."""
        prompts = [prompt for prompt, _ in self.sample_rows]
        written: list[str] = self.slots.ask(lambda actor: actor.generate.remote(sent, prompts, SAMPLE_TOKENS))
        return written

    def _all_splits(self, sent: Any, round_: int, name: str, *, per_client: bool = False) -> Losses:
        losses = {}
        for split in ("heldout", "unseen", "server"):
            clients, rows = self._judged(split)
            if len(clients):
                found = self._judge(clients, rows, sent, self._limit(split))
                losses[split] = self._noted(found, round_, split, name, per_client=per_client)
        return losses

    def _noted(self, found: list[ClientLoss], round_: int, split: str, name: str, *, per_client: bool) -> float:
        """As `_note`, and in the ledger what it takes; a baseline is no part of the federation's protocol."""
        if per_client and split != "server":
            self.ledger.received(round_, "client", "sum", len(found), len(found) * self.vector_bytes)
            self._told(round_, len(found))
        return self._note(found, round_, split, name, per_client=per_client)

    def _told(self, round_: int, clients: int) -> None:
        """Clients tell the server their losses; under secure aggregation they do not, and the simulator alone knows."""
        if not self.federation.privacy.secure:
            self.ledger.received(round_, "server", "metric", clients, clients * FLOAT_BYTES)

    def _judge(self, clients: np.ndarray, rows: np.ndarray, shared: Reference, limit: int) -> list[ClientLoss]:
        return self.slots.map(clients, rows, lambda actor, chunk: actor.evaluate.remote(chunk, shared, limit))

    def _judged(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """The clients of a split that have rows to be judged on, and how many rows count of each."""
        training, clients = self.store.num_training, self.store.num_clients
        members = {"heldout": (0, training), "unseen": (training, clients), "server": (clients, None)}
        first, last = members[split]
        rows = np.minimum(self.tokens.counts("heldout")[first:last], self._limit(split))
        return first + np.flatnonzero(rows), rows[rows > 0]

    def _limit(self, split: str) -> int:
        """How many rows of a client count; the server is none, and has a limit of its own."""
        return self.federation.evaluate.server_rows if split == "server" else self.federation.evaluate.rows

    def _note(self, found: list[ClientLoss], round_: int, split: str, name: str, *, per_client: bool = False) -> float:
        if per_client and split != "server" and not self.federation.privacy.secure:
            ordered = sorted(found, key=lambda loss: loss.client)
            names = self.store.names([loss.client for loss in ordered])
            told = [{name: loss.nll / loss.tokens, "tokens": loss.tokens} for loss in ordered]
            self.metrics.add_each(round_, split, names, told)
        mean = mean_loss(found)
        counts = (
            {"tokens": sum(one.tokens for one in found), "rows": sum(one.rows for one in found)} if per_client else {}
        )
        self.metrics.add(round_, split, None, **{name: mean}, **counts)
        return mean


def _split(turns: list[dict[str, str]]) -> tuple[Prompt, str]:
    last = max(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
    return turns[:last], turns[last]["content"]
