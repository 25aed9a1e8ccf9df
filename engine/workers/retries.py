"""What is tried where clients raise, or have too little memory: once more, in smaller packs, and each alone."""

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
    """What came of one client (None: it could not be trained), and why each earlier attempt, or all of them, failed."""

    client: int
    result: Result | None
    why: tuple[str, ...] = ()


def attempted(
    pack: Unit, train: Callable[[Unit], list[Result]], retries: int, why: tuple[str, ...] = ()
) -> list[Attempted[Result]]:
    """What `train` makes of each client of a pack, in their order.

    A pack that fails for lack of memory is halved. Another, and a client alone, is tried `retries` times more; then the
    pack is taken apart, and each of its clients tried once. A process whose GPU is lost to it ends.
    """
    try:
        return [Attempted(client, one, why) for client, one in zip(pack, train(pack), strict=True)]
    except Exception as error:  # whatever a client's rows, or a rule of somebody's own, may raise
        if isinstance(error, torch.AcceleratorError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # no call of CUDA works here any more: another process takes the place of this one
        short = out_of_memory(error)
        said = f"{type(error).__name__}: {last_line(error)}"
    # Only here does nothing refer to the error's frames any more, and to the tensors in them.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    why = (*why, said if len(pack) == 1 else f"in a pack with clients {', '.join(map(str, pack))}: {said}")
    if len(pack) > 1 and short:
        return [one for part in halves(pack) for one in attempted(part, train, retries, why)]
    if retries:
        return attempted(pack, train, retries - 1, why)
    if len(pack) > 1:
        return [one for client in pack for one in attempted((client,), train, 0, why)]
    return [Attempted(pack[0], None, why)]


def out_of_memory(error: BaseException) -> bool:
    """Whether a process, or a GPU, had too little memory for what was asked of it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
