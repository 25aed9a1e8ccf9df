"""The errors by which the driver notices that a slot has ended."""

import re
from typing import Any

import ray
from ray import exceptions
from ray.exceptions import GetTimeoutError, ObjectLostError, RayTaskError


class GangLost(Exception):
    """A rank died or fell silent, and so its gang has ended, though other ranks may live."""


class ShardLost(GangLost):
    """A shard that a rank needs was lost with its node: only the last checkpoint has it."""


class SlotSilent(Exception):
    """A slot has not answered for longer than the recipe allows."""


ENDED = (exceptions.RayActorError, exceptions.OutOfMemoryError, exceptions.NodeDiedError, ObjectLostError)
LOST = (*ENDED, GangLost, SlotSilent)


def within(seconds: float | None, references: Any) -> Any:
    """Returns what references stand for; SlotSilent if that takes longer than `seconds` (None: no limit)."""
    try:
        return ray.get(references, timeout=seconds)
    except GetTimeoutError:
        raise SlotSilent(f"no answer for {seconds:g} s") from None


def cause_of(error: BaseException) -> BaseException:
    """Returns what a task raised, without Ray's wrappers, of which there is one for each process that it crossed."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def last_line(error: BaseException) -> str:
    """Returns the last line of what Ray says of a death, without colors and stack."""
    if isinstance(error, ObjectLostError):
        return "an object is gone from the store, with its node or with who put it there"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).partition(" Some common causes include")[0].strip().splitlines()
    return next((line.strip() for line in reversed(plain) if line.strip()), type(error).__name__)
