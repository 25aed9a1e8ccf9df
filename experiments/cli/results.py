"""`fedpost report` and `bench`: pages about runs, and measurements."""

import os
from pathlib import Path
from typing import Annotated

import typer

from experiments.cli.command import Debug, guarded

# Each is a function of that name in experiments/bench/scenarios.
SCENARIOS = {
    "lora": "tokens/s against a bare PyTorch loop, in lanes and not",
    "gpu": "LoRA clients of a base of 0.5 billion parameters on one GPU, in lanes, against the bare loop",
    "tiny": "clients/s of a model of ten thousand parameters, against the bare loop",
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


@guarded
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders of runs, or of benchmarks; several are compared.")
    ],
    out: Annotated[Path | None, typer.Option(help="The page; DIR/report.html by default.")] = None,
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page about one or several runs."""
    from experiments.bench.results import is_results, write_page
    from experiments.report.page import write_report
    from experiments.report.terminal import say

    write = write_page if all(map(is_results, folders)) else write_report
    say(write(folders, out or folders[0] / "report.html"))


@guarded
def bench(
    scenario: Annotated[
        str,
        typer.Argument(metavar="SCENARIO", help="; ".join(f"{name}: {what}" for name, what in SCENARIOS.items()) + "."),
    ],
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="For scale: the recipe.")] = None,
    slots: Annotated[str, typer.Option(metavar="N,N,...", help="For scale: the numbers of slots.")] = "1,2,4,8",
    address: Annotated[
        str | None, typer.Option(help="For scale: the Ray cluster; without it Ray is started here.")
    ] = None,
    weak: Annotated[bool, typer.Option("--weak", help="For scale: the cohort grows with the slots.")] = False,
    small: Annotated[bool, typer.Option("--small", help="A quick run: shows that it works, not how fast.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object of all figures.")] = False,
    debug: Debug = False,
) -> None:
    """Run a scripted benchmark on this machine; its figures are kept in runs/bench-SCENARIO-TIME."""
    from engine.messages.errors import RunError
    from experiments.bench.harness import measure
    from experiments.bench.results import show_results
    from experiments.runs.api import settle_ray

    if scenario not in SCENARIOS:
        raise RunError(f"there is no benchmark {scenario!r}; there is {', '.join(SCENARIOS)}")
    if (scenario == "scale") != (recipe is not None):
        raise RunError("fedpost bench scale takes a recipe, and no other benchmark does")
    settle_ray(address or os.environ.get("RAY_ADDRESS"))  # the scenarios import ray
    if recipe is not None:
        from experiments.bench.scenarios.slots import scale

        scale(recipe, slots, address, weak, as_json)
        return
    show_results(scenario, measure(scenario, small), as_json)
