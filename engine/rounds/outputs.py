"""What a run leaves: checkpoints, and at its end the model as files, then what it writes before and after."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from engine.messages.events import Checkpointed, Event, Finished, Sample
from engine.messages.shards import ShardedState
from engine.models.model_card import model_card
from engine.records.checkpoint import save_checkpoint
from engine.records.metrics import loss_table
from engine.rounds.evaluation import PoolEvaluator
from engine.rounds.round_loop import RoundLoop, RunParts
from engine.rounds.server import move_base
from engine.system.atomic import write_file
from engine.training.generation import Prompt, as_text
from strategies.core.seeds import rng

SAMPLE_TOKENS = 40


@dataclass
class Checkpoints:
    """Writes a checkpoint by `checkpoint.every`, after the last round, and before the run stops.

    `written` is the last round that has one.
    """

    parts: RunParts
    loop: RoundLoop
    written: int = -1

    def after_round(self, state: ShardedState) -> Iterator[Event]:
        """Writes the round's checkpoint if it is its turn."""
        federation = self.parts.federation
        if state.round == federation.rounds or state.round % federation.checkpoint.every == 0:
            yield from self.write(state)

    def write(self, state: ShardedState) -> Iterator[Event]:
        """Writes the round's checkpoint unless it is written."""
        if state.round == self.written:
            return
        read, keep = self.parts.shards.read, self.parts.federation.checkpoint.keep
        save_checkpoint(self.parts.folder / "checkpoints", self.loop.saved(state), keep, read)
        self.written = state.round
        yield Checkpointed(state.round)


@dataclass(frozen=True)
class Finish:
    """Exports the model first, which is what the run is for, and then writes samples."""

    parts: RunParts
    evaluator: PoolEvaluator
    loop: RoundLoop

    def after_run(self, state: ShardedState) -> Iterator[Event]:
        """Writes the folder `model` and the samples."""
        parts, shards = self.parts, self.parts.shards
        losses = loss_table(parts.folder / "metrics", state.round)
        merged, spent = shards.merged(state) is not None, self.loop.privacy.statement
        card = model_card(self.parts.federation, losses, parts.store.manifest, merged=merged, spent=spent)
        rows = self._rows()
        prompts = [prompt for prompt, _ in rows]
        vector = shards.vector(state)
        parts.pool.export(parts.folder / "model", vector, card)
        after = self._continuations(vector, prompts)
        del vector  # the object store need not hold two
        move_base(shards, state, None)
        before = self._continuations(shards.vector(parts.initial), prompts)
        samples = [
            Sample(as_text(prompt), completion, old, new)
            for (prompt, completion), old, new in zip(rows, before, after, strict=True)
        ]
        content = json.dumps([asdict(sample) for sample in samples], indent=1)
        write_file(parts.folder / "samples.json", content.encode())
        yield Finished(parts.folder, losses, samples)

    def _rows(self) -> list[tuple[Prompt, str]]:
        """Prompt and completion of a few rows of unseen (else training) clients, drawn by the seed.

        Of a conversation these are the turns before the assistant's last one, and that one.
        """
        clients, _ = self.evaluator.judged("unseen")
        if not len(clients):
            clients, _ = self.evaluator.judged("heldout")
        draw = rng(self.parts.federation.seed, 0, -1, "sample")
        chosen = draw.choice(clients, min(self.parts.federation.samples, len(clients)), replace=False)
        store = self.parts.store
        rows = [store.read_rows(int(client), "heldout").slice(0, 1).to_pylist()[0] for client in chosen]
        return [
            _last_turn(row["messages"]) if "messages" in row else (row["prompt"], row["completion"]) for row in rows
        ]

    def _continuations(self, vector: Any, prompts: list[Prompt]) -> list[str]:
        """What the model writes after the prompts."""
        texts: list[str] = self.parts.pool.ask(lambda actor: actor.generate.remote(vector, prompts, SAMPLE_TOKENS))
        return texts


def _last_turn(turns: list[dict[str, str]]) -> tuple[Prompt, str]:
    last = max(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
    return turns[:last], turns[last]["content"]
