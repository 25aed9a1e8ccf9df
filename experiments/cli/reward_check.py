"""`fedpost objectives --check MODULE:FUNCTION`: whether a reward of one's own is a function of what it is given."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.messages.errors import RunError
from engine.objectives.reinforcement.rewards import checked
from experiments.config.user_code import reward_function
from experiments.report.terminal import console, plain, say

ROOT = Path(__file__).resolve().parents[2]
PROBE = "import sys; from experiments.cli.reward_check import print_values; print_values(sys.argv[1])"
Function = Callable[[Any, str, dict[str, Any]], Any]


class AnyRow(dict[str, Any]):
    """A row that has every column: the text "42" where nothing else is said."""

    def __missing__(self, name: str) -> str:
        return "42"


SIX = "What is six times seven?"
CASES: list[tuple[Any, str, AnyRow]] = [
    (SIX, "It is 42.", AnyRow(completion_tokens=5, ended=True)),
    (SIX, "", AnyRow(completion_tokens=1, ended=True)),
    ("", "def f(x):\n    return x", AnyRow(completion_tokens=9, ended=False)),
    ([{"role": "user", "content": SIX}], "Six times seven is \\boxed{42}.", AnyRow(completion_tokens=12, ended=True)),
    ("Übersetze:", "grün, 绿色, \N{GREEN APPLE}\x00", AnyRow(completion="", completion_tokens=8, ended=True)),
    ("Count.", "one two three " * 200, AnyRow(completion_tokens=600, ended=False)),
]


def show_reward_check(named: str) -> bool:
    """Prints the result of each check of the function MODULE:FUNCTION; returns whether it passes all."""
    if ":" not in named:
        raise RunError(f"--check takes MODULE:FUNCTION, such as my_module:my_reward, not {named!r}")
    function, screen = reward_function("--check", named), console()
    checks: dict[str, Callable[[], str | None]] = {
        "gives a finite number or None": lambda: _fault_of_values(function),
        "leaves its prompt and row alone": lambda: _fault_of_arguments(function),
        "gives the same when called again": lambda: _change(function, values(function)),
        "gives the same after other completions": lambda: _change(function, values(function, reverse=True)),
        "gives the same in another process": lambda: _fault_elsewhere(function, named),
    }
    broken = 0
    for name, check in checks.items():
        fault = check()
        broken += fault is not None
        screen.print(plain("failed ", "red") if fault else plain("ok     ", "green"), plain(name))
        if fault:
            screen.print(plain(f"        {fault}"))
    each = ", ".join("none" if value is None else value for value in values(function))
    screen.print(plain(f"{named} gives {each}: {broken or 'none'} of {len(checks)} promises are broken"))
    return not broken


def values(function: Function, *, reverse: bool = False) -> list[str | None]:
    """The function's values of all cases as text, or its errors; computed from the first to the last, or in reverse."""
    each = dict[int, str | None]()
    for number in sorted(range(len(CASES)), reverse=reverse):
        try:
            value = checked(function(*copy.deepcopy(CASES[number])))
            each[number] = None if value is None else f"{value:.17g}"
        except Exception as error:  # the user's code may raise anything
            each[number] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return [each[number] for number in range(len(CASES))]


def print_values(named: str) -> None:
    """Prints the function's values, for another process to read."""
    say(json.dumps(values(reward_function("--check", named))))


def _fault_of_values(function: Function) -> str | None:
    for value, (_, completion, _) in zip(values(function), CASES, strict=True):
        if value is not None and ": " in value:
            return f"{value} (the completion is {completion[:40]!r})"
    return None


def _fault_of_arguments(function: Function) -> str | None:
    for case in CASES:
        given = copy.deepcopy(case)
        try:
            function(*given)
        except Exception:  # the first check tells of it
            continue
        if given != case:
            return "it changes its prompt or its row, which other rewards read too"
    return None


def _change(function: Function, others: list[str | None]) -> str | None:
    for value, other in zip(values(function), others, strict=True):
        if value != other:
            return f"it gives {value} and then {other}: it may keep nothing, and draw no random numbers"
    return None


def _fault_elsewhere(function: Function, named: str) -> str | None:
    """Another process has other hashes of texts, and so other orders of sets."""
    paths = os.pathsep.join([str(ROOT), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", PROBE, named]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode:
        return f"another process cannot call it: {ended.stderr.strip().splitlines()[-1]}"
    change = _change(function, json.loads(ended.stdout.splitlines()[-1]))
    return change and f"{change}, nor go by the order of a set"
