"""`fedpost bench memory` and `plan`: what slots and ranks hold in a run, and what `fedpost plan` estimates."""

from dataclasses import replace

import numpy as np

import experiments
from engine.config.sections import Zero
from engine.messages.events import Event, Started
from experiments.bench.bare import compare
from experiments.bench.harness import DEMO, Bench, write_llama, write_rows
from experiments.bench.sampling import sampled, workers_mb
from experiments.config.recipe import Recipe, located, parse_recipe
from experiments.preflight.plan import Need, process_bytes, rank_need, sizes, slot_need

MIB = 2**20


def memory(bench: Bench) -> None:
    """Measures the PSS of slots on one node, which share one base, by their number, and what another slot adds."""
    llama, vocabulary = ((768, 2048, 2, 12), None) if bench.small else ((768, 2048, 12, 12), 27_000)  # 482 MB
    write_llama(bench.folder / "base", llama, vocabulary=vocabulary)
    write_rows(bench.folder, 8, 2, 16)
    train = 'train={steps=1, batch=1, max_length=16, optimizer={kind="sgd", lr=0.1}}'
    work = bench.recipe("rounds=2", "clients={slots=1, num_cpus=0.25}", "cohort.size=8", train)
    bench.say("the gate: one slot and a bare loop")
    bench.add("apart", compare(work, bench.folder / "gate").apart, "largest difference to the bare loop")
    counts, most_mb = (1, 2) if bench.small else (1, 2, 4), list[float]()
    for slots in counts:
        bench.say(f"{slots} slots")
        more = replace(work, clients=replace(work.clients, slots=slots))
        most_mb.append(max(bench.run(more, f"run-{slots}", lambda: sum(workers_mb(("ClientActor",), "Pss")))[1]))
        bench.add(f"slots_pss_mb_{slots}", most_mb[-1], "MB, all slots, shared pages counted once")
    bench.add("mb_per_slot", float(np.polyfit(counts, most_mb, 1)[0]), "MB that one more slot adds")


def plan(bench: Bench) -> None:
    """Measures estimate over peak for the demo's slots and two ranks; ValueError if plan and run count differently."""
    plain, gang = process_bytes()
    bench.say("the demo's slots")
    few = ("rounds=1", "train.steps=1") if bench.small else ("rounds=2",)
    demo = parse_recipe(DEMO, ["evaluate.every=0", *few])
    shape = sizes(located(demo).model, demo.train.max_length)
    _compare(bench, demo, "demo", "ClientActor", slot_need(shape, demo, plain))
    bench.say("two ranks of stage 3, all weights trained")
    llama, vocabulary = ((256, 512, 4, 4), None) if bench.small else ((1024, 2816, 12, 8), 8192)
    write_llama(bench.folder / "base", llama, vocabulary=vocabulary)
    write_rows(bench.folder, 4, 8, 3 * 64)
    train, gangs = "train={steps=2, batch=4, max_length=64}", "clients={slots=1, zero={stage=3, ranks=2}}"
    work = bench.recipe("rounds=2", "cohort.size=2", train, gangs, "model.peft=none")
    shape = sizes(work.model, work.train.max_length)
    _compare(bench, work, "stage_3", "Rank", rank_need(shape, work, Zero(stage=3, ranks=2), gang))


def _compare(bench: Bench, work: Recipe, name: str, title: str, need: Need) -> None:
    events: list[Event] = []
    # The object store's pages are neither private nor of a file.
    with sampled(lambda: max(workers_mb((title,), "RssAnon", "RssFile"), default=0.0), 0.05) as peaks:
        experiments.run(work, out=bench.folder / name, on_event=events.append)
    counted = [event.parameters for event in events if isinstance(event, Started)]
    if counted != [trained := sizes(located(work).model, 8).trained]:
        raise ValueError(f"the run counts {counted} trained parameters, and the plan {trained}")
    if not (peak := max(peaks)):
        return bench.add(f"{name}_plan_over_peak", None, "not on this system")
    bench.add(f"{name}_plan_over_peak", need.total / MIB / peak, "estimate / most that was held")
    bench.add(f"{name}_peak_mb", peak, "MB, the largest process")
    bench.add(f"{name}_plan_mb", need.total / MIB, "MB")
