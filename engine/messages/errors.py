"""The error that a user of the engine causes and can mend."""


class RunError(ValueError):
    """Says in one sentence what is wrong with a recipe, a run folder or a cluster and what works instead."""

    exit_code = 2  # of the command, as for wrong usage


class AccessDenied(RunError):
    """A client asked the base's owner for more than its level grants."""


class BaseRemoved(RunError):
    """The base's owner has taken it away."""
