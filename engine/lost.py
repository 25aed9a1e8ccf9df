"""How a slot's end shows."""

import re

from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError


class GangLost(Exception):
    """A rank died or fell silent: its gang has ended, though other ranks may live."""


class ShardLost(GangLost):
    """What a rank needs is gone with its node, and no gang can have it again: only the last checkpoint has it."""


class SlotSilent(Exception):
    """A slot has not answered for longer than the recipe allows, and has been ended for it."""


LOST = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError, GangLost, SlotSilent)


def last_line(error: BaseException) -> str:
    """What Ray says of a death, without its colours and its stack."""
    if isinstance(error, ObjectLostError):
        return "an object is gone from the store, with its node or with who put it there"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return next((line.strip() for line in reversed(plain) if line.strip()), type(error).__name__)
