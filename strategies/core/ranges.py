"""The numbers that a recipe's field takes, in its annotation: `mu: Annotated[float, Range("pulls to the model")]`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from strategies.core.errors import require

Bounds = tuple[str, Callable[[float], bool]]  # in words, and whether a number is within; NaN never is
AT_LEAST_0: Bounds = ("at least 0", lambda x: 0 <= x < math.inf)
AT_LEAST_1: Bounds = ("at least 1", lambda x: 1 <= x < math.inf)
ABOVE_0: Bounds = ("a number above 0", lambda x: 0 < x < math.inf)
BELOW_1: Bounds = ("at least 0 and below 1", lambda x: 0 <= x < 1)
INSIDE: Bounds = ("above 0 and below 1", lambda x: 0 < x < 1)
SHARE: Bounds = ("above 0 and at most 1", lambda x: 0 < x <= 1)


@dataclass(frozen=True)
class Range:
    """What a field means, and its bounds; None in place of a number is an unset field."""

    meaning: str
    bounds: Bounds = AT_LEAST_0


def check_ranges(section: Any, prefix: str) -> None:
    """Raises StrategyError for the first field of a dataclass whose value is not in its `Range`."""
    hints = get_type_hints(type(section), include_extras=True)
    for name, value in ((field.name, getattr(section, field.name)) for field in fields(section)):
        for entry in getattr(hints[name], "__metadata__", ()):
            if isinstance(entry, Range) and value is not None:
                words, within = entry.bounds
                require(within(value), f"{prefix}{name} {entry.meaning} and must be {words}, not {value}")
