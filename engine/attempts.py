"""What is tried where clients raise, or have too little memory: once more, in smaller packs, and each alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from engine.lost import last_line
from engine.pulling import Unit, halves

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

    A pack that fails for lack of memory is halved, another is taken apart; a client alone is tried `retries` times
    more.
    """
    try:
        return [Attempted(client, one, why) for client, one in zip(pack, train(pack), strict=True)]
    except Exception as error:  # whatever a client's rows, or a rule of somebody's own, may raise
        short = out_of_memory(error)
        said = f"{type(error).__name__}: {last_line(error)}"
    # Only here does nothing refer to the error's frames any more, and to the tensors in them.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(pack) > 1:
        why = (*why, f"in a pack with clients {', '.join(map(str, pack))}: {said}")
        parts = halves(pack) if short else [(client,) for client in pack]
        return [one for part in parts for one in attempted(part, train, retries, why)]
    why = (*why, said)
    return attempted(pack, train, retries - 1, why) if retries else [Attempted(pack[0], None, why)]


def out_of_memory(error: BaseException) -> bool:
    """Whether a process, or a GPU, had too little memory for what was asked of it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
