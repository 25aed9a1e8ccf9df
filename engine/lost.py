"""How a slot's end shows."""

from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError


class GangLost(Exception):
    """A rank died or fell silent: its gang has ended, though other ranks may live."""


LOST = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError, GangLost)
