"""What the engine runs: a recipe without its data section, whose sections go together."""

from dataclasses import dataclass

from engine.config.compatibility import check_together
from engine.config.sections import Sections
from engine.messages.checks import at_least
from engine.messages.errors import RunError


@dataclass(frozen=True, kw_only=True)
class Federation(Sections):
    """Sections that are valid by themselves and together; RunError or StrategyError where they are not."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise RunError(f"name becomes a folder's name: not empty, no '/', no leading '.', not {self.name!r}")
        check_together(self)
        at_least("recipe", 1, rounds=self.rounds)
        if self.seed < 0:
            raise RunError(f"recipe.seed must be at least 0, not {self.seed}")
