"""The command line. Each command imports what it needs, so that `fedpost --help` answers at once."""

import errno
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.runs.driving import RunStopped

app = typer.Typer(
    help="Federated post-training of open language models, simulated on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Each is the module of experiments/bench that has its name; its `measure(small=...)` gives the figures.
SCENARIOS = {
    "lora": "tokens/s against a bare PyTorch loop, packed and not",
    "gpu": "LoRA clients of a base of 0.5 billion parameters on one GPU, in packs, against the bare loop",
    "tiny": "clients/s of a model of ten thousand parameters, against the bare loop",
    "big_update": "time and memory of updates of 25 million parameters, against the bare loop",
    "overhead": "what a client that does nothing costs, by the size of its update",
    "population": "the driver's memory and start-up, up to a million clients",
    "cohort": "the time of a round by its cohort's size",
    "memory": "what n slots on one base hold",
    "slots": "strong and weak scaling, here and on a simulated cluster",
    "scale": "strong scaling of a RECIPE of your own, over --slots, also at an --address",
    "partition": "stores of up to a million clients, and partitions against flwr-datasets",
    "secagg": "what secure aggregation costs clients, the server and a round",
    "plan": "what fedpost plan says over what a run held",
    "zero": "gangs of DeepSpeed ranks: resets, tokens/s against a bare loop, bytes and memory",
    "strategies": "the demo's model under every rule, resumable, about two hours on two cores",
}
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in TOML.")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a key; may be repeated.")]
Out = Annotated[
    str | None, typer.Option(help="The run folder, or its URI, such as s3://...; runs/NAME-TIME by default.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
Server = Annotated[str, typer.Option("--address", help="Ray's job server, such as http://127.0.0.1:8265.")]
Job = Annotated[str, typer.Argument(metavar="JOB", help="The name that `fedpost submit` printed.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def run(
    recipe: RecipePath,
    changes: Changes = None,
    out: Out = None,
    resume: Resume = False,
    baselines: Annotated[bool, typer.Option("--baselines", help="Also train local-only and centralised.")] = False,
    address: Annotated[str | None, typer.Option(help="A Ray cluster to join, such as 127.0.0.1:6379.")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Try its whole path here in a minute, with all shrunk.")] = False,
    debug: Debug = False,
) -> None:
    """Train a recipe across its clients and leave a run folder."""

    def work() -> None:
        if dry:
            _dry(recipe, changes, {"--out": out, "--resume": resume, "--baselines": baselines, "--address": address})
            return
        from experiments.cli.screen import Screen
        from experiments.config.recipe import load_recipe
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
            )

    _guarded(work, debug)


def _dry(recipe: Path, changes: list[str] | None, others: dict[str, Any]) -> None:
    given = ", ".join(name for name, value in others.items() if value)
    if given:
        raise ValueError(f"--dry runs on this machine alone and leaves nothing behind: leave {given} out")
    from experiments.config.recipe import load_recipe
    from experiments.preflight.dry import show_dry

    if not show_dry(load_recipe(recipe, changes)):
        raise SystemExit(1)


@app.command()
def submit(
    recipe: RecipePath,
    address: Server,
    changes: Changes = None,
    out: Out = None,
    resume: Resume = False,
    detach: Annotated[bool, typer.Option("--detach", help="End at once; the run goes on.")] = False,
    runtime_env: Annotated[
        Path | None, typer.Option(help="What Ray is to set up beside, such as pip, in YAML.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run a recipe as a Ray job, with the present folder, and follow it to its end and exit code."""

    def work() -> None:
        from experiments.runs.submit import submit as submit_job

        code = submit_job(recipe, changes or [], address, out, runtime_env, resume=resume, detach=detach)
        raise SystemExit(code)

    _guarded(work, debug)


@app.command()
def status(job: Job, address: Server, debug: Debug = False) -> None:
    """Tell how far a submitted run is."""

    def work() -> None:
        from experiments.runs.submit import show_status

        show_status(job, address)

    _guarded(work, debug)


@app.command()
def stop(job: Job, address: Server, debug: Debug = False) -> None:
    """End a submitted run; --resume goes on with it."""

    def work() -> None:
        from experiments.runs.submit import stop as stop_job

        stop_job(job, address)

    _guarded(work, debug)


@app.command()
def partition(recipe: RecipePath, changes: Changes = None, debug: Debug = False) -> None:
    """Give a recipe's rows to clients and show how uneven that is."""

    def work() -> None:
        from experiments.cli.partition import show_partition
        from experiments.config.recipe import load_recipe

        show_partition(load_recipe(recipe, changes))

    _guarded(work, debug)


@app.command()
def plan(
    recipe: RecipePath,
    changes: Changes = None,
    device_gib: Annotated[float | None, typer.Option(help="Memory of a device; of this machine by default.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many such devices there are.")] = 1,
    debug: Debug = False,
) -> None:
    """Tell what a recipe takes of memory, and which gangs would fit; exit code 1 if it does not fit."""

    def work() -> None:
        from experiments.config.recipe import load_recipe, located
        from experiments.preflight.plan import show_plan

        if not show_plan(located(load_recipe(recipe, changes)), device_gib, devices):
            raise SystemExit(1)

    _guarded(work, debug)


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders of runs, or of benchmarks; several are compared.")
    ],
    out: Annotated[Path | None, typer.Option(help="The page; DIR/report.html by default.")] = None,
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page about one or several runs."""

    def work() -> None:
        from experiments.bench.page import is_results, write_page
        from experiments.report.page import write_report

        if all(is_results(folder) for folder in folders):
            print(write_page(folders, out or folders[0] / "report.html"))
            return
        print(write_report(folders, out or folders[0] / "report.html"))

    _guarded(work, debug)


@app.command()
def strategies(
    check: Annotated[
        str | None, typer.Option(metavar="MODULE:CLASS", help="Hold a strategy of your own to the contract.")
    ] = None,
    debug: Debug = False,
) -> None:
    """List the strategies: what each reads, needs and allows, its paper and its keys; or check one of your own."""

    def work() -> None:
        if check is None:
            from experiments.cli.listing import show_strategies

            show_strategies()
            return
        from experiments.cli.contract import show_check

        if not show_check(check):
            raise SystemExit(1)

    _guarded(work, debug)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe."""
    import json

    from experiments.config.recipe import schema as recipe_schema

    print(json.dumps(recipe_schema(), indent=1))


@app.command()
def bench(
    scenario: Annotated[
        str,
        typer.Argument(metavar="SCENARIO", help="; ".join(f"{name}: {what}" for name, what in SCENARIOS.items()) + "."),
    ],
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="Of scale: the recipe.")] = None,
    slots: Annotated[str, typer.Option(metavar="N,N,...", help="Of scale: the numbers of slots.")] = "1,2,4,8",
    address: Annotated[str | None, typer.Option(help="Of scale: the Ray cluster; started here without it.")] = None,
    weak: Annotated[bool, typer.Option("--weak", help="Of scale: the cohort grows with the slots.")] = False,
    small: Annotated[bool, typer.Option("--small", help="A quick run: shows that it works, and not how fast.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object of all figures.")] = False,
    debug: Debug = False,
) -> None:
    """Run a scripted benchmark on this machine; its figures are kept in runs/bench-SCENARIO-TIME."""

    def work() -> None:
        from importlib import import_module

        if scenario not in SCENARIOS:
            raise ValueError(f"there is no benchmark {scenario!r}; there is {', '.join(SCENARIOS)}")
        from experiments.bench.results import show_results

        if (scenario == "scale") != (recipe is not None):
            raise ValueError("fedpost bench scale takes a recipe, and no other benchmark does")
        if recipe is not None:
            from experiments.bench.scenarios.scale import scale

            scale(recipe, slots, address, weak, as_json)
            return
        figures = import_module(f"experiments.bench.scenarios.{scenario}").measure(small=small)
        show_results(scenario, figures, as_json)

    _guarded(work, debug)


def _guarded(work: Callable[[], Any], debug: bool) -> None:
    """Turns errors into a sentence on stderr and an exit code: 2 for what the user can mend, 1 for a fault of ours."""
    try:
        work()
    except RunStopped as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        print("stopped; what was written before is whole (a run goes on with --resume)", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        mendable = isinstance(error, ValueError | OSError)
        fault = f"{type(error).__name__}: {error}\nThis is a fault of fedpost; --debug shows where."
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; free some space and try again (with --resume, if a run had begun)" if full else ""
        print(f"error: {error if mendable else fault}{hint}", file=sys.stderr)
        raise SystemExit(2 if mendable else 1) from None


def main() -> None:
    """The command `fedpost`. Being asked to end (SIGTERM) cleans up as an error does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    app()


if __name__ == "__main__":
    main()
