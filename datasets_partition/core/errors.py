"""The error that a user's rows or data settings cause."""


class DataError(ValueError):
    """Says in one sentence what is wrong with rows, a source or a partition and what works instead."""

    exit_code = 2  # of the command, as for wrong usage
