"""`fedpost strategies --check MODULE:CLASS`: the contract of strategies, with the engine's sum and disk."""

import tempfile
import traceback
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, cast

from engine.aggregation.exact_sum import ExactSum, merge
from engine.messages.errors import RunError
from engine.messages.shards import ShardedState
from engine.records.checkpoint import Saved, load_checkpoint, save_checkpoint
from experiments.config.user_code import imported
from experiments.report.terminal import console, plain
from strategies.contract.case import FULL, LORA, Case, DoesNotApply
from strategies.contract.checks import CHECKS, Check, lacks
from strategies.core.base import Rule
from strategies.core.protocol import Aggregate, ServerState, Update


def engine_sum(updates: list[Update]) -> Aggregate:
    """The sum of the updates, as the engine computes it."""
    running = ExactSum()
    for update in updates:
        running.add(update)
    return merge([running.take()])


def engine_stored(state: ServerState) -> ServerState:
    """The state after it was saved to a checkpoint and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), Saved(ShardedState(state.round, (state,)), 1.5), keep=1)
        loaded = load_checkpoint(Path(folder))
    assert loaded is not None
    return cast(ServerState, loaded.state.shards[0])


def cases(strategy: Rule) -> list[Case]:
    """The strategy on adapters and, unless it needs adapters, on a fully tuned model."""
    layouts = (LORA,) if strategy.needs_lora else (LORA, FULL)
    return [Case(strategy, layout, engine_sum, engine_stored) for layout in layouts]


def show_check(named: str) -> bool:
    """Prints the result of each check of the class MODULE:CLASS; returns whether it passes all."""
    strategy, screen, broken = _made(named), console(), 0
    listed = cases(strategy)
    for check in CHECKS:
        results = [_result(check, case) for case in listed]
        skipped = [result for result in results if isinstance(result, DoesNotApply)]
        failures = list(dict.fromkeys(result for result in results if isinstance(result, str)))
        name, broken = check.__name__.replace("_", " "), broken + bool(failures)
        if len(skipped) == len(listed):
            screen.print(plain(f"-       {name} (does not apply: {skipped[0]})", "dim"))
            continue
        screen.print(plain("failed ", "red") if failures else plain("ok     ", "green"), plain(name))
        for line in [line for failure in failures for line in failure.split("\n")]:
            screen.print(plain(f"        {line}"))
    kept = f"{broken} of {len(CHECKS)} promises are broken" if broken else "the contract is kept"
    layouts = "on adapters" if strategy.needs_lora else "on adapters and in full"
    screen.print(plain(f"{named}, with its defaults, {layouts}: {kept}"))
    return not broken


def _result(check: Check, case: Case) -> str | DoesNotApply | None:
    """What is wrong, or why the check does not apply; None if the strategy passes."""
    try:
        check(case)
    except DoesNotApply as reason:
        return reason
    except AssertionError as broken:
        return str(broken)
    except Exception as error:  # the user's code may raise anything
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
    return None


def _made(named: str) -> Any:
    if ":" not in named:
        raise RunError(f"--check takes MODULE:CLASS, such as my_module:MyStrategy, not {named!r}")
    kind = imported("--check", named, "apply")
    if missing := lacks(kind):
        remedy = "extend strategies.core.base.Rule, which has a default for everything but apply"
        raise RunError(f"{named} is not a strategy, it lacks {', '.join(missing)}: {remedy}")
    if needed := [field.name for field in fields(kind) if field.default is field.default_factory is MISSING]:
        raise RunError(f"{named} is checked with its defaults, and these keys have none: {', '.join(needed)}")
    return kind()
