"""`fedpost bench memory`: what n slots hold on one node, which share one base."""

from dataclasses import replace

import numpy as np

from experiments.bench.bare import compare
from experiments.bench.bases import write_llama, write_rows
from experiments.bench.harness import Bench, scenario
from experiments.bench.sampling import pss_mb, workers_mb

LLAMA = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
VOCABULARY = 27_000  # with it 126 million parameters, 482 MB


@scenario()
def measure(bench: Bench) -> None:
    """Measures the PSS of all slots by their number, and what another slot adds; ValueError on the bare loop's gate."""
    sizes = LLAMA | {"num_hidden_layers": 2 if bench.small else 12}
    write_llama(bench.folder / "base", sizes, vocabulary=None if bench.small else VOCABULARY)
    write_rows(bench.folder, 8, 2, 16)
    work = bench.recipe(
        *("rounds=2", "clients={slots=1, num_cpus=0.25}", "cohort.size=8"),
        'train={steps=1, batch=1, max_length=16, optimizer={kind="sgd", lr=0.1}}',
    )
    bench.say("the gate: one slot and a bare loop")
    bench.add("apart", compare(work, bench.folder / "gate").apart, "largest difference to the bare loop")
    most_mb: dict[int, float] = {}
    for slots in (1, 2) if bench.small else (1, 2, 4):
        bench.say(f"{slots} slots")
        more = replace(work, clients=replace(work.clients, slots=slots))
        _, at_rounds = bench.run(more, f"run-{slots}", lambda: sum(workers_mb(("ClientActor",), pss_mb)))
        most_mb[slots] = max(at_rounds)
        bench.add(f"slots_pss_mb_{slots}", most_mb[slots], "MB, all slots, shared pages counted once")
    slope = float(np.polyfit(list(most_mb), list(most_mb.values()), 1)[0])
    bench.add("mb_per_slot", slope, "MB that one more slot adds")
