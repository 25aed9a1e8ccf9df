"""The error that a user of a strategy causes and can correct."""


class StrategyError(ValueError):
    """Says in one sentence what is wrong with a strategy's settings and what works instead."""

    exit_code = 2  # of the command, as for wrong usage


def require(condition: bool, sentence: str) -> None:
    """Raises StrategyError with the sentence unless the condition holds."""
    if not condition:
        raise StrategyError(sentence)
