"""What is tried if clients raise or run out of memory: once more, then in smaller units, then each client alone."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from engine.messages.tasks import Unit, halves
from engine.system.failures import last_line

Result = TypeVar("Result")


@dataclass(frozen=True)
class Attempted(Generic[Result]):
    """A client's result (None: it could not be trained), and why each earlier attempt, or all of them, failed."""

    client: int
    result: Result | None
    why: tuple[str, ...] = ()


def attempted(
    unit: Unit, train: Callable[[Unit], list[Result]], retries: int, why: tuple[str, ...] = ()
) -> list[Attempted[Result]]:
    """Returns what `train` makes of each client of a unit, in their order.

    A unit that runs out of memory is halved. Another, and a client alone, is tried `retries` times more; then the
    unit is taken apart, and each of its clients tried once. A process that loses its GPU ends.
    """
    try:
        return [Attempted(client, result, why) for client, result in zip(unit, train(unit), strict=True)]
    except Exception as error:  # whatever a client's rows, or a user's own rule, may raise
        if isinstance(error, torch.AcceleratorError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # no call of CUDA works here any more: the pool starts another process
        short = out_of_memory(error)
        cause = f"{type(error).__name__}: {last_line(error)}"
    # Only here does nothing refer to the error's frames any more, and to the tensors in them.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    why = (*why, cause if len(unit) == 1 else f"in lanes with clients {', '.join(map(str, unit))}: {cause}")
    if len(unit) > 1 and short:
        return [attempt for part in halves(unit) for attempt in attempted(part, train, retries, why)]
    if retries:
        return attempted(unit, train, retries - 1, why)
    if len(unit) > 1:
        return [attempt for client in unit for attempt in attempted((client,), train, 0, why)]
    return [Attempted(unit[0], None, why)]


def out_of_memory(error: BaseException) -> bool:
    """Whether a process, or a GPU, had too little memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
