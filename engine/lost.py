"""How a slot's end shows, and what is written down of it."""

import re
from dataclasses import dataclass

from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError


class GangLost(Exception):
    """A rank died or fell silent: its gang has ended, though other ranks may live."""


class SlotSilent(Exception):
    """A slot has not answered for longer than the recipe allows, and has been ended for it."""


LOST = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError, GangLost, SlotSilent)


@dataclass(frozen=True)
class Fault:
    """Something went wrong and was made good, or was not: a "slot", "client", "pack", "driver"; which one, and why."""

    kind: str
    who: str
    why: str


def last_line(error: BaseException) -> str:
    """What Ray says of a death, without its colours and its stack."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return next((line.strip() for line in reversed(plain) if line.strip()), type(error).__name__)
