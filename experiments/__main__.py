"""The command line."""

import io
import signal
import sys

import typer

from experiments.cli.commands import COMMANDS, main_options

SUMMARY = "Federated post-training of open language models, simulated on Ray."
app = typer.Typer(
    help=SUMMARY,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback()(main_options)
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """The command `fedpost`. SIGTERM ends it as an error does, with cleanup."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may hold what the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
