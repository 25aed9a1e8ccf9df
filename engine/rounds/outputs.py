"""Writes what a run leaves: checkpoints, and at its end the model and samples of its texts."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from datasets_partition.core.turns import Conversation, conversation_of
from datasets_partition.core.types import OPTIONS
from engine.messages.events import Checkpointed, Event, Finished, Sample
from engine.messages.shards import ShardedState
from engine.models.export import model_card
from engine.records.checkpoint import save_checkpoint
from engine.records.metrics import loss_table
from engine.rounds.evaluation import PoolEvaluator
from engine.rounds.round_loop import Callback, RoundLoop, RunParts
from engine.rounds.server import move_base
from engine.system.atomic import write_file
from engine.training.generation import Prompt, as_text, words
from strategies.core.seeds import rng

SAMPLE_TOKENS = 40


def write_checkpoint(
    parts: RunParts, loop: RoundLoop, state: ShardedState, *, stopping: bool = False
) -> Iterator[Event]:
    """Writes a checkpoint if it is the turn of the round, or the last round; if `stopping`, where it was not."""
    checkpoint = parts.federation.checkpoint
    is_turn = state.round == parts.federation.rounds or state.round % checkpoint.every == 0
    if is_turn != stopping:
        save_checkpoint(parts.folder / "checkpoints", loop.saved(state), checkpoint.keep, parts.shards.read)
        yield Checkpointed(state.round)


def finish(
    evaluator: PoolEvaluator, loop: RoundLoop, state: ShardedState, comparisons: Sequence[Callback]
) -> Iterator[Event]:
    """Exports the folder `model` first, which is what the run is for; then come the comparisons, and samples."""
    parts, shards = evaluator.parts, evaluator.parts.shards
    metrics, merged = parts.folder / "metrics", shards.merged(state) is not None

    def card() -> str:
        losses, facts = loss_table(metrics, state.round), parts.store.manifest
        return model_card(parts.federation, losses, facts, merged=merged, spent=loop.privacy.statement)

    parts.pool.export(parts.folder / "model", shards.vector(state), card())
    for compare in comparisons:
        yield from compare(state)
        evaluator.logs.append(state.round)
    if comparisons:
        write_file(parts.folder / "model" / "README.md", card().encode())

    rows, vector = _sampled_rows(evaluator), shards.vector(state)

    def continuations(vector: Any) -> Any:
        prompts = [prompt for prompt, _ in rows]
        return parts.pool.ask(lambda actor: actor.generate.remote(vector, prompts, SAMPLE_TOKENS))

    after = continuations(vector)
    del vector  # the object store need not hold two
    move_base(shards, state, None)
    before = continuations(shards.vector(parts.initial))
    texts = zip(rows, before, after, strict=True)
    samples = [Sample(as_text(prompt), completion, old, new) for (prompt, completion), old, new in texts]
    write_file(parts.folder / "samples.json", json.dumps([asdict(sample) for sample in samples], indent=1).encode())
    yield Finished(parts.folder, loss_table(metrics, state.round), samples)


def _sampled_rows(evaluator: PoolEvaluator) -> list[tuple[Prompt, str]]:
    """Prompt and completion (or last turn) of a few rows of unseen (else training) clients, drawn by the seed."""
    federation, store = evaluator.parts.federation, evaluator.parts.store
    unseen = evaluator.judged("unseen")
    clients = unseen if len(unseen) else evaluator.judged("heldout")
    draw = rng(federation.seed, 0, -1, "sample")
    chosen = draw.choice(clients, min(federation.samples, len(clients)), replace=False)
    rows = [store.read_rows(int(client), "heldout").slice(0, 1).to_pylist()[0] for client in chosen]
    return [_sampled(row) for row in rows]


def _sampled(row: dict[str, Any]) -> tuple[Prompt, str]:
    if "messages" not in row:
        return row["prompt"], row["completion"]
    turns, learned, options = conversation_of(row["messages"], row.get(OPTIONS))
    # The last words of the assistant; after a conversation without any, those that the model adds.
    last = max((number for number, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
    prompt = Conversation(turns[:last], learned[:last], options) if last else ""
    return prompt, "".join(words(turn) for turn in turns[last : last + 1])
