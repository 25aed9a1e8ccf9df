"""The commands. Each imports what it needs when it runs, so that `fedpost --help` answers at once."""

import json
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec

from typer import Argument, Option

from engine.messages.errors import RunError
from experiments.report.terminal import console, say

RecipePath = Annotated[Path, Argument(metavar="RECIPE", help="A recipe in TOML.")]
Changes = Annotated[list[str] | None, Option("--set", metavar="A.B=C", help="Change a key of the recipe (repeatable).")]
Out = Annotated[str | None, Option(help="The run folder, or its URI, such as s3://...; runs/NAME-TIME by default.")]
Resume = Annotated[bool, Option("--resume", help="Continue from the last checkpoint.")]
Accept = Annotated[bool, Option("--accept-changes", help="Resume with changed versions, base, or code.")]
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]
Server = Annotated[str, Option("--address", help="Ray's job server, such as http://127.0.0.1:8265.")]
Job = Annotated[str, Argument(metavar="JOB", help="The name that `fedpost submit` printed.")]
# Each is a function of that name in experiments/bench/scenarios.
SCENARIOS = {
    "lora": "tokens/s against a bare PyTorch loop, in lanes and not",
    "gpu": "LoRA clients of a base of 0.5 billion parameters on one GPU, in lanes, against the bare loop",
    "tiny": "clients/s of a model of ten thousand parameters, against the bare loop",
    "objectives": "DPO and GRPO against bare PyTorch loops, in lanes and not",
    "big_update": "time and memory of updates of 25 million parameters, against the bare loop",
    "overhead": "the cost of a client that does nothing, by the size of its update",
    "population": "the driver's memory and start-up time, up to a million clients",
    "cohort": "the time of a round by the size of its cohort",
    "memory": "the memory of n slots on one base",
    "slots": "strong and weak scaling, here and on a simulated cluster",
    "scale": "strong scaling of a RECIPE of your own, over --slots, also at an --address",
    "partition": "stores of up to a million clients, and partitions against flwr-datasets",
    "secagg": "the cost of secure aggregation for clients, the server and a round",
    "plan": "the estimates of fedpost plan over the memory that a run held",
    "zero": "gangs of DeepSpeed ranks: resets, tokens/s against a bare loop, bytes and memory",
    "strategies": "the demo's model under every strategy, resumable, about two hours on two cores",
}
BUG = "This is a bug in fedpost. Please report it in the issue tracker of the project, with the recipe, the command, "
BUG += "and the traceback that --debug shows."
P = ParamSpec("P")


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """The command with errors as messages and exit codes: 2 if the user can fix it, 1 for a bug, 130 for Ctrl-C."""

    @wraps(command)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt:
            code, text = 130, "stopped; all files written so far are complete (--resume continues a run)"
        except Exception as error:
            from experiments.runs.driving import RunStopped, explanation, origin

            if isinstance(error, RunStopped):
                code, text = 130, str(error)
            elif (reason := explanation(error)) is not None:
                code, text = 2, f"error: {reason}"
            else:
                code, text = 1, f"error: {type(origin(error)).__name__}: {origin(error)}\n{BUG}"
            if options.get("debug") and code != 130:
                say(traceback.format_exc(), error=True)
        say(text, error=True)
        raise SystemExit(code)

    return run


def show_version(wanted: bool) -> None:
    """Prints the version and ends the command if it is `wanted`."""
    if wanted:
        from experiments.runs.api import fedpost_version

        say(f"fedpost {fedpost_version()}")
        raise SystemExit(0)


Version = Annotated[bool, Option("--version", callback=show_version, is_eager=True, help="Show the version.")]


def main_options(version: Version = False) -> None:
    """Takes the options that stand before a command."""


@guarded
def run(
    recipe: RecipePath,
    changes: Changes = None,
    out: Out = None,
    resume: Resume = False,
    accept_changes: Accept = False,
    baselines: Annotated[bool, Option("--baselines", help="Also train local-only and centralized.")] = False,
    address: Annotated[str | None, Option(help="A Ray cluster to join, such as 127.0.0.1:6379.")] = None,
    dry: Annotated[bool, Option("--dry", help="Try the whole run here in a minute, shrunk.")] = False,
    debug: Debug = False,
) -> None:
    """Train a recipe across its clients and leave a run folder."""
    from experiments.config.recipe import load_recipe

    options: dict[str, Any] = {"out": out, "resume": resume, "baselines": baselines, "address": address}
    if dry:
        if refused := ", ".join(f"--{name}" for name, value in options.items() if value):
            raise RunError(f"--dry runs on this machine alone and leaves nothing behind: leave out {refused}")
        from experiments.preflight.dry import show_dry

        raise SystemExit(int(not show_dry(load_recipe(recipe, changes))))
    from experiments.cli.screen import Screen
    from experiments.runs.api import run as run_recipe
    from experiments.runs.driving import stopped_by_interrupt

    loaded = load_recipe(recipe, changes)
    with Screen(loaded.rounds, out) as screen, stopped_by_interrupt(screen.say, lambda: screen.started) as stop:
        run_recipe(loaded, **options, on_event=screen.show, stop=stop, accept_changes=accept_changes)


@guarded
def access(
    recipe: RecipePath,
    changes: Changes = None,
    only: Annotated[str | None, Option(metavar="NAME,...", help="These variants alone.")] = None,
    out: Annotated[Path | None, Option(help="The folder; runs/RECIPE-TIME by default. It is gone on with.")] = None,
    other: Annotated[str | None, Option(metavar="BASE", help="Also: what if the base is replaced by this one.")] = None,
    debug: Debug = False,
) -> None:
    """Compare levels of access to the base: a run for each [sweep.variants.NAME], a table and a page."""
    from experiments.cli.access import show_access

    show_access(recipe, changes, only, out, other)


@guarded
def submit(
    recipe: RecipePath,
    address: Server,
    changes: Changes = None,
    out: Out = None,
    resume: Resume = False,
    accept_changes: Accept = False,
    detach: Annotated[bool, Option("--detach", help="Return at once; the run continues.")] = False,
    runtime_env: Annotated[Path | None, Option(help="YAML of what else Ray sets up, such as pip packages.")] = None,
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


@guarded
def partition(recipe: RecipePath, changes: Changes = None, debug: Debug = False) -> None:
    """Assign a recipe's rows to clients and show how uneven the result is."""
    from experiments.cli.partition import show_partition
    from experiments.config.recipe import load_recipe

    show_partition(load_recipe(recipe, changes))


@guarded
def plan(
    recipe: RecipePath,
    changes: Changes = None,
    device_gib: Annotated[float | None, Option(help="Memory of a device; by default that of this machine.")] = None,
    devices: Annotated[int, Option(min=1, help="How many such devices there are.")] = 1,
    debug: Debug = False,
) -> None:
    """Estimate the memory that a recipe needs, and which gangs would fit; exit code 1 if it does not fit."""
    from experiments.config.recipe import load_recipe, located
    from experiments.preflight.plan import show_plan

    loaded = located(load_recipe(recipe, changes))
    if loaded.gate.policy is not None:
        from datasets_partition.store.store import Store
        from experiments.openness.gate import judged
        from experiments.runs.api import build_store

        say("\n".join(judged(loaded, Store.open(build_store(loaded))).notes() or ("no client refuses the base",)))
    raise SystemExit(int(not show_plan(loaded, device_gib, devices)))


@guarded
def strategies(
    check: Annotated[str | None, Option(metavar="MODULE:CLASS", help="Check a strategy of your own.")] = None,
    debug: Debug = False,
) -> None:
    """List the strategies with what each reads, needs and allows, its paper and its keys; or check one of your own."""
    if check is not None:
        from experiments.cli.contract import show_check

        raise SystemExit(int(not show_check(check)))
    from experiments.cli.listing import listing

    console().print(*listing(), sep="\n")


@guarded
def objectives(
    check: Annotated[str | None, Option(metavar="MODULE:FUNCTION", help="Check a reward of your own.")] = None,
    debug: Debug = False,
) -> None:
    """List the objectives and rewards with what each learns from and its keys; or check a reward of your own."""
    if check is not None:
        from experiments.cli.reward_check import show_reward_check

        raise SystemExit(int(not show_reward_check(check)))
    from experiments.cli.objective_list import objective_listing

    console().print(*objective_listing(), sep="\n")


@guarded
def models(
    table: Annotated[bool, Option("--table", help="Check each family on a tiny model, in a minute or two.")] = False,
    page: Annotated[Path | None, Option("--write", help="With --table: a Markdown page to put the table into.")] = None,
    debug: Debug = False,
) -> None:
    """List the families of base models that are checked; with --table, check them and print what works with each."""
    from experiments.cli.model_table import listing, show_table

    if page is not None and not table:
        raise RunError("--write goes with --table")
    if table:
        show_table(page)
        return
    say("\n".join(listing()))


@guarded
def openness(
    base: Annotated[str, Argument(metavar="BASE", help='A folder with a card.yml, or the shipped "tiny".')],
    policy: Annotated[Path | None, Option(help="A file of clients' policies: who would refuse the base.")] = None,
    write: Annotated[Path | None, Option(help="Write a card to fill in to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Show how open a base is: its class, its licence's clauses, and who would refuse it."""
    from experiments.cli.openness import show_openness

    show_openness(base, policy, write)


@guarded
def schema() -> None:
    """Print the JSON schema of a recipe."""
    from experiments.config.recipe import schema as recipe_schema

    say(json.dumps(recipe_schema(), indent=1))


@guarded
def report(
    folders: Annotated[list[Path], Argument(metavar="DIR...", help="Runs, or benchmarks; several are compared.")],
    out: Annotated[Path | None, Option(help="The page; DIR/report.html by default.")] = None,
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page about one or several runs."""
    from experiments.bench.results import is_results, write_page
    from experiments.report.page import write_report

    write = write_page if all(map(is_results, folders)) else write_report
    say(write(folders, out or folders[0] / "report.html"))


@guarded
def bench(
    scenario: Annotated[str, Argument(metavar="SCENARIO", help="; ".join(map(": ".join, SCENARIOS.items())) + ".")],
    recipe: Annotated[Path | None, Argument(metavar="[RECIPE]", help="For scale: the recipe.")] = None,
    slots: Annotated[str, Option(metavar="N,N,...", help="For scale: the numbers of slots.")] = "1,2,4,8",
    address: Annotated[str | None, Option(help="For scale: the Ray cluster; without it Ray is started here.")] = None,
    weak: Annotated[bool, Option("--weak", help="For scale: the cohort grows with the slots.")] = False,
    small: Annotated[bool, Option("--small", help="A quick run: shows that it works, not how fast.")] = False,
    as_json: Annotated[bool, Option("--json", help="End with one JSON object of all figures.")] = False,
    debug: Debug = False,
) -> None:
    """Run a scripted benchmark on this machine; its figures are kept in runs/bench-SCENARIO-TIME."""
    from experiments.bench.harness import measure
    from experiments.bench.results import show_results
    from experiments.runs.api import settle_ray

    if scenario not in SCENARIOS:
        raise RunError(f"there is no benchmark {scenario!r}; there is {', '.join(SCENARIOS)}")
    if (scenario == "scale") != (recipe is not None):
        raise RunError("fedpost bench scale takes a recipe, and no other benchmark does")
    settle_ray(address)  # the scenarios import ray
    if recipe is not None:
        from experiments.bench.scenarios.slots import scale

        scale(recipe, slots, address, weak, as_json)
        return
    show_results(scenario, measure(scenario, small), as_json)


COMMANDS = (
    run,
    access,
    submit,
    status,
    stop,
    partition,
    plan,
    report,
    strategies,
    objectives,
    models,
    openness,
    schema,
    bench,
)
