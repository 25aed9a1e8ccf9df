"""What all commands share: their common options, and how an error ends them."""

import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from experiments.report.terminal import say

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in TOML.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a key of the recipe; may be repeated.")
]
Out = Annotated[
    str | None, typer.Option(help="The run folder, or its URI, such as s3://...; runs/NAME-TIME by default.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")]
Accept = Annotated[
    bool, typer.Option("--accept-changes", help="Resume although versions, base or code changed; the report says so.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

P = ParamSpec("P")


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """The command, with errors turned into a message on stderr and an exit code; `debug` adds the traceback.

    2 stands for what the user can fix, 1 for a bug of ours, 130 for Ctrl-C.
    """

    @wraps(command)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            say("stopped; all files written so far are complete (--resume continues a run)", error=True)
            raise SystemExit(130) from None
        except Exception as error:
            from experiments.runs.driving import RunStopped, explanation, origin

            if isinstance(error, RunStopped):
                say(error, error=True)
                raise SystemExit(130) from None
            if options.get("debug"):
                say(traceback.format_exc(), error=True)
            if (text := explanation(error)) is not None:
                say(f"error: {text}", error=True)
                raise SystemExit(2) from None
            cause = origin(error)
            say(
                f"error: {type(cause).__name__}: {cause}\n"
                f"This is a bug in fedpost. Please report it in the issue tracker of the project, with the recipe, the "
                f"command, and the traceback that --debug shows.",
                error=True,
            )
            raise SystemExit(1) from None

    return run
