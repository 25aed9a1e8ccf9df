"""What the driver does about the base's owner: it asks public questions each round, and stops when money runs out."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.config.federation import Federation
from engine.messages.errors import RunError
from engine.messages.events import Event, Fault
from engine.messages.shards import ShardedState
from engine.records.exposures import Exposures
from engine.rounds.round_loop import Callback
from engine.scheduling.pool import Pool
from engine.system.atomic import write_file

ANSWERS = "provider_answers.json"


@dataclass(frozen=True)
class ProviderProbe:
    """Asks the provider about the same public tokens in each round; other answers mean that it has changed.

    A digest of the last answers lies in the run's folder, so that a resumed run compares with those before.
    """

    pool: Pool
    folder: Path

    def changes(self, round_: int) -> tuple[Fault, ...]:
        """Returns that the provider has changed since the last round, if it has."""
        file = self.folder / ANSWERS
        answers: str = self.pool.ask(lambda actor: actor.probe.remote(round_))
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if before is not None and before["answers"] == answers:
            return ()
        write_file(file, json.dumps({"round": round_, "answers": answers}).encode())
        if before is None or before["round"] >= round_:  # a round that is played again
            return ()
        why = f"the provider changed: from round {round_} on it answers the same public tokens otherwise"
        return (Fault("provider", "the provider", why),)


def stop_at_cost(federation: Federation, exposures: Exposures, checkpoint: Callback) -> Callback:
    """Makes the callback that ends a run whose calls have cost `model.access.max_cost`; its checkpoint is written."""
    most = federation.model.access.max_cost

    def after_round(state: ShardedState) -> Iterator[Event]:
        if most is None or exposures.cost < most or state.round == federation.rounds:
            return
        yield from checkpoint(state)
        currency = next(
            price.currency
            for round_ in range(state.round, 0, -1)
            if (price := federation.model.access.in_round(round_).price) is not None
        )
        raise RunError(
            f"the calls of {state.round} rounds have cost {exposures.cost:.2f} {currency}, and model.access.max_cost "
            f"is {most:g}: the run has ended there, and with a higher one --resume continues it"
        )

    return after_round
