"""Writes what a run leaves: checkpoints, and at its end the model and samples of its texts."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from engine.messages.broadcast import share
from engine.messages.events import Checkpointed, Event, RunDone, Sample
from engine.messages.shards import ShardedState
from engine.models.export import model_card
from engine.objectives.figures import shown_names, shown_units
from engine.records.checkpoint import save_checkpoint
from engine.records.metrics import LossTable, loss_table
from engine.rounds.evaluation import PoolEvaluator
from engine.rounds.round_loop import Callback, RoundLoop, RunSetup
from engine.rounds.server import merge_into_base
from engine.system.atomic import write_file
from engine.training.generation import as_text

SAMPLE_TOKENS = 40


def write_checkpoint(
    setup: RunSetup, loop: RoundLoop, state: ShardedState, *, stopping: bool = False
) -> Iterator[Event]:
    """Writes a checkpoint if it is the turn of the round, or the last round; if `stopping`, where it was not."""
    checkpoint = setup.federation.checkpoint
    is_turn = state.round == setup.federation.rounds or state.round % checkpoint.every == 0
    if is_turn != stopping:
        save_checkpoint(setup.folder / "checkpoints", loop.saved(state), checkpoint.keep, setup.server.read)
        yield Checkpointed(state.round)


def finish(
    evaluator: PoolEvaluator, loop: RoundLoop, state: ShardedState, comparisons: Sequence[Callback]
) -> Iterator[Event]:
    """Exports the folder `model` first, which is what the run is for; then come the comparisons, and samples."""
    setup, server = evaluator.setup, evaluator.setup.server
    metrics, merged = setup.folder / "metrics", server.merged_delta(state) is not None
    objective = setup.federation.train.objective

    def figures() -> dict[str, LossTable]:
        return {name: loss_table(metrics, state.round, name) for name in shown_names(objective)}

    def card() -> str:
        tables, facts = {"loss": loss_table(metrics, state.round), **figures()}, setup.store.manifest
        written = model_card(setup.federation, tables, facts, merged=merged, spent=loop.privacy.statement)
        return written if setup.notice is None else f"{written}\n{setup.notice}"

    setup.pool.export(setup.folder / "model", share(server.model_message(state)), card())
    if setup.notice is not None:
        write_file(setup.folder / "model" / "NOTICE", setup.notice.encode())
    for compare in comparisons:
        yield from compare(state)
        evaluator.logs.append(state.round)
    if comparisons:
        write_file(setup.folder / "model" / "README.md", card().encode())

    rows = [objective.sample(row) for table in evaluator.shown_rows() for row in table.to_pylist()]

    def continuations(state: ShardedState) -> Any:
        shared, prompts = share(server.model_message(state)), [prompt for prompt, _ in rows]
        return setup.pool.ask(lambda actor: actor.generate.remote(shared, prompts, SAMPLE_TOKENS))

    after = continuations(state)
    merge_into_base(server, state, None)
    before = continuations(setup.initial)
    texts = zip(rows, before, after, strict=True)
    samples = [Sample(as_text(prompt), completion, old, new) for (prompt, completion), old, new in texts]
    write_file(setup.folder / "samples.json", json.dumps([asdict(sample) for sample in samples], indent=1).encode())
    losses, units = loss_table(metrics, state.round), shown_units(objective)
    yield RunDone(setup.folder, losses, samples, figures(), units)
