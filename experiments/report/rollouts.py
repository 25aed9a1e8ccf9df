"""What the model of a run writes on a few held-out prompts, evaluation after evaluation, with its rewards."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.messages.errors import RunError
from engine.records.metrics import ROLLOUTS

EVALUATIONS, PROMPTS = 5, 5  # that are shown: the first, the last, and some between
KINDS = ("sampled", "greedy")


@dataclass(frozen=True)
class Rollouts:
    """A prompt, and of each evaluation: the round, and text and reward of a sample and of the likeliest tokens."""

    prompt: str
    answers: list[tuple[int, list[tuple[str, str]]]]


def read_rollouts(folder: Path) -> list[Rollouts]:
    """Reads the rollouts of a run folder, none if it has none; RunError if a file is damaged."""
    files = {int(file.stem): file for file in sorted((folder / ROLLOUTS).glob("*.json")) if file.stem.isdecimal()}
    rounds, last = sorted(files), len(files) - 1
    few = dict.fromkeys(rounds[round(i * last / (EVALUATIONS - 1))] for i in range(EVALUATIONS)) if rounds else {}
    answers: dict[str, list[tuple[int, list[tuple[str, str]]]]] = {}
    for number in few:
        for prompt, pairs in _read(files[number]):
            answers.setdefault(prompt, []).append((number, pairs))
    return [Rollouts(*pair) for pair in answers.items()][:PROMPTS]


def _read(file: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    try:
        content: Any = json.loads(file.read_text("utf-8"))
        return [(str(each["prompt"]), [_answer(each[kind]) for kind in KINDS]) for each in content]
    except (ValueError, RecursionError, TypeError, KeyError, OSError) as error:
        raise RunError(f"{file} is not a file of rollouts: {type(error).__name__}: {error}") from error


def _answer(given: dict[str, Any]) -> tuple[str, str]:
    """The text and the reward in words."""
    reward = given["reward"]
    return str(given["text"]), "none" if reward is None else f"{float(reward):.3g}"
