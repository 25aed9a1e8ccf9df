"""Range checks of the recipe's numbers."""

import math

from engine.messages.errors import RunError


def at_least(section: str, lowest: float, **values: float | None) -> None:
    """Raises RunError for the first named value of a section ("": the recipe) below `lowest`; None is no value.

    Counts are below 2^31, since rows are counted in 32 bits.
    """
    for name, value in values.items():
        key = f"{section}.{name}" if section else name
        if isinstance(value, int) and value >= 2**31:
            raise RunError(f"{key} must be below 2^31")
        if value is not None and not lowest <= value < math.inf:
            raise RunError(f"{key} must be at least {lowest:g}, not {value:g}")


def above(section: str, lowest: float, **values: float) -> None:
    """Raises RunError for the first named value of a section that is not a number above `lowest`."""
    for name, value in values.items():
        if not lowest < value < math.inf:
            raise RunError(f"{section}.{name} must be above {lowest:g}, not {value:g}")


def below_one(section: str, **values: float) -> None:
    """Raises RunError for the first named value of a section outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise RunError(f"{section}.{name} must be at least 0 and below 1, not {value:g}")
