"""`fedpost submit`, `status` and `stop`: runs as Ray jobs."""

from pathlib import Path
from typing import Annotated

import typer

from experiments.cli.command import Accept, Changes, Debug, Out, RecipePath, Resume, guarded

Server = Annotated[str, typer.Option("--address", help="Ray's job server, such as http://127.0.0.1:8265.")]
Job = Annotated[str, typer.Argument(metavar="JOB", help="The name that `fedpost submit` printed.")]


@guarded
def submit(
    recipe: RecipePath,
    address: Server,
    changes: Changes = None,
    out: Out = None,
    resume: Resume = False,
    accept_changes: Accept = False,
    detach: Annotated[bool, typer.Option("--detach", help="Return at once; the run continues.")] = False,
    runtime_env: Annotated[
        Path | None, typer.Option(help="A YAML file of what else Ray should set up, such as pip packages.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run a recipe as a Ray job with the current folder, follow it to its end, and exit with its code."""
    from experiments.runs.submit import submit as submit_job

    flags = ["--resume"] * resume + ["--accept-changes"] * accept_changes
    raise SystemExit(submit_job(recipe, changes or [], address, out, runtime_env, flags, detach=detach))


@guarded
def status(job: Job, address: Server, debug: Debug = False) -> None:
    """Show the progress of a submitted run."""
    from experiments.runs.submit import show_status

    show_status(job, address)


@guarded
def stop(job: Job, address: Server, debug: Debug = False) -> None:
    """Stop a submitted run; --resume continues it."""
    from experiments.runs.submit import stop as stop_job

    stop_job(job, address)
