"""`fedpost objectives`: all objectives and rewards, as text for a terminal of 100 columns."""

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import get_args

from rich.text import Text

from datasets_partition.core.types import IN_WORDS
from engine.objectives import Objectives
from engine.objectives.reinforcement.rewards import Rewards
from experiments.cli.listing import first_sentence, wrapped
from experiments.report.terminal import plain

LEGEND = {
    "recipe": 'objective = "dpo", or with keys, objective = { kind = "grpo", rewards = [{ kind = "length", target = 5 '
    '}] }; a reward of your own: { kind = "my_module:my_reward", weight = 0.5 }',
    "--check": "checks a reward of your own: fedpost objectives --check my_module:my_reward",
}


def objective_listing() -> Iterator[Text]:
    """Each objective with the rows that it learns from, its summary and its keys; then the rewards."""
    for title, members in (("objective", get_args(Objectives)), ("rewards", get_args(Rewards))):
        yield plain(title, "bold underline")
        for member in members:
            formats = ", ".join(IN_WORDS[name] for name in getattr(member, "formats", ()))
            yield from wrapped(f"{member.kind:<12}{formats}".rstrip(), " " * 12, "bold")
            yield from wrapped("    " + first_sentence(str(member.__doc__)), "    ")
            keys = [field for field in fields(member) if field.name != "kind"]
            named = ", ".join(f"{key.name}={'...' if key.default is MISSING else key.default}" for key in keys)
            yield from wrapped("    " + named, "    ", "dim")
        yield Text()
    for word, meaning in LEGEND.items():
        yield from wrapped(f"{word:<10}{meaning}", " " * 10)
