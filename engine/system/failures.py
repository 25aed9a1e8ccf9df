"""How a slot's end shows."""

import re
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)


class GangLost(Exception):
    """A rank died or fell silent: its gang has ended, though other ranks may live."""


class ShardLost(GangLost):
    """What a rank needs is gone with its node, and no gang can have it again: only the last checkpoint has it."""


class SlotSilent(Exception):
    """A slot has not answered for longer than the recipe allows, and has been ended for it."""


LOST = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError, GangLost, SlotSilent)


def within(seconds: float | None, given: Any) -> Any:
    """What slots answer to `given` references; SlotSilent when that takes longer than `seconds`, if not None."""
    try:
        return ray.get(given, timeout=seconds)
    except GetTimeoutError:
        raise SlotSilent(f"no answer for {seconds:g} s") from None


def cause_of(error: BaseException) -> BaseException:
    """What a task raised, without Ray's wrappings, of which there is one for each process that it has crossed."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def last_line(error: BaseException) -> str:
    """What Ray says of a death, without its colours and its stack."""
    if isinstance(error, ObjectLostError):
        return "an object is gone from the store, with its node or with who put it there"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).partition(" Some common causes include")[0].strip().splitlines()
    return next((line.strip() for line in reversed(plain) if line.strip()), type(error).__name__)
