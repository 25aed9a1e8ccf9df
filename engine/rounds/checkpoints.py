"""When a run writes its checkpoints."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.config.federation import Federation
from engine.messages.events import Checkpointed, Event
from engine.messages.shards import ShardedState
from engine.records.checkpoint import save_checkpoint
from engine.rounds.round_loop import RoundLoop


@dataclass
class Checkpoints:
    """Writes a checkpoint by `checkpoint.every`, after the last round, and before the run stops.

    `written` is the last round that has one.
    """

    federation: Federation
    folder: Path
    loop: RoundLoop
    written: int = -1

    def after_round(self, state: ShardedState) -> Iterator[Event]:
        """Writes the round's checkpoint if it is its turn."""
        if state.round == self.federation.rounds or state.round % self.federation.checkpoint.every == 0:
            yield from self.write(state)

    def write(self, state: ShardedState) -> Iterator[Event]:
        """Writes the round's checkpoint unless it is written."""
        if state.round == self.written:
            return
        read, keep = self.loop.server.shards.read, self.federation.checkpoint.keep
        save_checkpoint(self.folder / "checkpoints", self.loop.saved(state), keep, read)
        self.written = state.round
        yield Checkpointed(state.round)
