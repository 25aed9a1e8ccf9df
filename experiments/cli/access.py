"""`fedpost access`: shows each level's run as a run is shown, and then the comparison."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from engine.messages.events import Event, RunDone, Started
from experiments.access.compare import compare
from experiments.cli.screen import Screen
from experiments.config.recipe import Recipe
from experiments.report.terminal import console, plain
from experiments.runs.driving import stopped_by_interrupt


class Screens:
    """A screen for each run of several, one after another; `started` is whether the present one has."""

    def __init__(self, at_end: ExitStack) -> None:
        self.at_end, self.started = at_end, False
        self.screen: Screen | None = None

    def listener(self, name: str, recipe: Recipe) -> Callable[[Event], None]:
        """Begins a run's part of the screen; returns what takes its events."""
        self.at_end.close()  # the progress bar of the run before
        console().print(plain(name, "bold"))
        screen = self.screen = self.at_end.enter_context(Screen(recipe.rounds))

        def show(event: Event) -> None:
            self.started = self.started or isinstance(event, Started)
            if not isinstance(event, RunDone):  # its samples and tables are in its report
                screen.show(event)

        return show

    def say(self, what: str) -> None:
        """Shows a sentence that stands out."""
        if self.screen is not None:
            self.screen.say(what)


def show_access(
    path: Path, changes: list[str] | None, only: str | None, out: Path | None, other: str | None = None
) -> None:
    """Compares the levels of a recipe, and shows what happens meanwhile."""
    with ExitStack() as at_end:
        screens = Screens(at_end)
        with stopped_by_interrupt(screens.say, lambda: screens.started) as stop:
            compare(path, changes, _names(only), out, screens.listener, stop, other, at_end.close)


def _names(only: str | None) -> list[str]:
    return [name.strip() for name in only.split(",")] if only else []
