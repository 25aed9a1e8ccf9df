"""`fedpost bench plan`: what `fedpost plan` says that slots and ranks take, over the most that they held in a run.

The gate is the number of parameters, which both must count alike.
"""

from dataclasses import replace
from pathlib import Path

import psutil

import experiments
from engine.config.sections import Zero
from engine.messages.events import Event, Started
from experiments.bench.bases import write_llama, write_rows
from experiments.bench.harness import DEMO, Bench, scenario
from experiments.bench.sampling import sampled, workers_mb
from experiments.bench.scenarios.zero import LARGE, RANKS
from experiments.config.recipe import Recipe, located, parse_recipe
from experiments.preflight.plan import Need, process_bytes, rank_need, sizes, slot_need

MIB, EVERY_S = 2**20, 0.05
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}


@scenario()
def measure(bench: Bench) -> None:
    """Measures estimate over peak for the demo's slots and for two ranks of stage 3; ValueError on the gate."""
    plain, gang = process_bytes()
    bench.say("the demo's slots")
    demo = parse_recipe(DEMO, ["evaluate.every=0", f"rounds={1 if bench.small else 2}"])
    if bench.small:
        demo = replace(demo, train=replace(demo.train, steps=1, epochs=None))
    shape = sizes(located(demo).model, demo.train.max_length)
    _compare(bench, demo, "demo", "ClientActor", slot_need(shape, demo, plain))
    bench.say("two ranks of stage 3, all weights trained")
    write_llama(bench.folder / "base", SMALL if bench.small else LARGE, vocabulary=None if bench.small else 8192)
    write_rows(bench.folder, 4, 8, 3 * 64)
    work = bench.recipe(
        *("rounds=2", "cohort.size=2", "train={steps=2, batch=4, max_length=64}", "model.peft=none"),
        f"clients={{slots=1, zero={{stage=3, ranks={RANKS}}}}}",
    )
    shape = sizes(work.model, work.train.max_length)
    _compare(bench, work, "stage_3", "Rank", rank_need(shape, work, Zero(stage=3, ranks=RANKS), gang))


def _compare(bench: Bench, work: Recipe, name: str, title: str, need: Need) -> None:
    counted: list[int] = []

    def note(event: Event) -> None:
        if isinstance(event, Started):
            counted.append(event.parameters)

    with sampled(lambda: max(workers_mb((title,), _private_mb), default=0.0), EVERY_S) as peaks:
        experiments.run(work, out=bench.folder / name, on_event=note)
    trained = sizes(located(work).model, 8).trained
    if counted != [trained]:
        raise ValueError(f"the run counts {counted} trained parameters, and the plan {trained}")
    if not (peak := max(peaks)):
        return bench.add(f"{name}_plan_over_peak", None, "not on this system")
    bench.add(f"{name}_plan_over_peak", need.total / MIB / peak, "estimate / most that was held")
    bench.add(f"{name}_peak_mb", peak, "MB, the largest process")
    bench.add(f"{name}_plan_mb", need.total / MIB, "MB")


def _private_mb(process: psutil.Process) -> float:
    """The private memory of a process and the files that it maps, without the object store's pages."""
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in status if line.startswith(("RssAnon:", "RssFile:"))) / 1024
