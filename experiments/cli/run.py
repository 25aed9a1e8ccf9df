"""`fedpost run`."""

from typing import Annotated

import typer

from experiments.cli.command import Accept, Changes, Debug, Out, RecipePath, Resume, guarded


@guarded
def run(
    recipe: RecipePath,
    changes: Changes = None,
    out: Out = None,
    resume: Resume = False,
    accept_changes: Accept = False,
    baselines: Annotated[bool, typer.Option("--baselines", help="Also train local-only and centralized.")] = False,
    address: Annotated[str | None, typer.Option(help="A Ray cluster to join, such as 127.0.0.1:6379.")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Try the whole run here in a minute, shrunk.")] = False,
    debug: Debug = False,
) -> None:
    """Train a recipe across its clients and leave a run folder."""
    from engine.messages.errors import RunError
    from experiments.config.recipe import load_recipe

    if dry:
        options = {"--out": out, "--resume": resume, "--baselines": baselines, "--address": address}
        if refused := ", ".join(name for name, value in options.items() if value):
            raise RunError(f"--dry runs on this machine alone and leaves nothing behind: leave out {refused}")
        from experiments.preflight.dry import show_dry

        if not show_dry(load_recipe(recipe, changes)):
            raise SystemExit(1)
        return
    from experiments.cli.screen import Screen
    from experiments.runs.api import run as run_recipe
    from experiments.runs.driving import stopped_by_interrupt

    loaded = load_recipe(recipe, changes)
    with Screen(loaded.rounds, out) as screen, stopped_by_interrupt(screen.say, screen.begun) as stop:
        run_recipe(
            loaded,
            out=out,
            resume=resume,
            baselines=baselines,
            address=address,
            on_event=screen.show,
            stop=stop,
            accept_changes=accept_changes,
        )
