"""The error that a user of a strategy causes and can mend."""


class StrategyError(ValueError):
    """Says in one sentence what is wrong with a strategy's settings and what works instead."""

    exit_code = 2  # of the command, as for wrong usage
