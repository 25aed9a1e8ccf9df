"""`fedpost bench slots`: strong and weak scaling over slots, here and on a simulated cluster of nodes with GPUs."""

import statistics
from dataclasses import replace

import numpy as np

import experiments
from experiments.bench.bare import PROCESSES, compare
from experiments.bench.bases import write_rows
from experiments.bench.harness import Bench, metric, scenario
from experiments.bench.scenarios.lora import recipe, write_inputs
from experiments.bench.scenarios.scale import as_figures, study
from experiments.config.recipe import Recipe
from experiments.preflight.processes import environment, hidden_gpus
from experiments.runs.api import ray_session
from strategies.core.cohort import UniformCohort
from strategies.core.seeds import rng

CLIENTS, COHORT = 200, 40
PER_SLOT = 5  # clients of a cohort that grows with the slots
NODES, GPUS, SHARE = 3, 2, 0.5  # logical GPUs: Ray places by them, and the slots compute on the CPU


@scenario(ray=False)
def measure(bench: Bench) -> None:
    """Measures tokens per second and efficiency with one and two slots; ValueError when bits or loops differ."""
    rounds = 3 if bench.small else 8
    write_inputs(bench)
    work = recipe(bench, 2, *((1, 32) if bench.small else (4, 128)))
    with ray_session(None):
        bench.add("apart", compare(work, bench.folder / "gate").apart, "largest difference to the bare loop")
        bench.figures |= as_figures(study(work, [1, 2], rounds=rounds), "strong_")
        if not bench.small:
            bench.figures |= as_figures(study(work, [1, 2], weak=True, rounds=rounds), "weak_")
        _measure_uneven(bench, rounds)
    bench.say(f"a simulated cluster of {NODES} nodes with {GPUS} logical GPUs each")
    _measure_cluster(bench, work, rounds)


def _measure_uneven(bench: Bench, rounds: int) -> None:
    """Measures how evenly two slots work on clients with lognormal numbers of rows, all of which are trained on."""
    counts = np.ceil(rng(0, 0, -1, "sample").lognormal(1.5, 1.0, CLIENTS)).astype(int)
    write_rows(rows := bench.folder / "uneven", CLIENTS, counts, 64)
    work = bench.recipe(
        *(f"rounds={rounds}", f"clients.slots={PROCESSES}", f"cohort.size={COHORT}"),
        "train={epochs=1, batch=2, max_length=64}",
        rows=rows,
    )
    balance = metric(bench.run(work, "uneven/run")[0], "balance")
    bench.add("balance_lognormal", statistics.median(balance), "mean over longest work of a slot")
    bench.add("balance_lognormal_worst", min(balance), "mean over longest work of a slot")


def _measure_cluster(bench: Bench, work: Recipe, rounds: int) -> None:
    """Compares slots on several Ray nodes with the gate's run on one node, bit for bit, and measures how they scale.

    All slots share this machine's cores: the figures say what more slots on more nodes cost by themselves.
    """
    from ray.cluster_utils import Cluster

    share = 1.0 if bench.small else SHARE
    slots = round(NODES * GPUS / share)
    head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False}
    with environment(**hidden_gpus(GPUS)):
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(NODES):
                cluster.add_node(num_cpus=1, num_gpus=GPUS)
            wide = replace(work, clients=replace(work.clients, slots=slots, num_cpus=0.0, num_gpus=share))
            run = experiments.run(wide, out=bench.folder / "nodes", address=cluster.address)
            for weak in () if bench.small else (True, False):
                scaled = replace(wide, cohort=UniformCohort(size=PER_SLOT)) if weak else wide
                results = study(scaled, [NODES, 2 * NODES], cluster.address, weak=weak, rounds=rounds)
                bench.figures |= as_figures(results, "cluster_weak_" if weak else "cluster_strong_")
        finally:
            cluster.shutdown()
    for file in run.model.glob("adapter_model*"):
        if file.read_bytes() != (bench.folder / "gate" / "model" / file.name).read_bytes():
            raise ValueError("slots on several nodes lead to other bits than on one")
    bench.add("cluster_slots", slots, f"slots on {NODES} simulated nodes, the same bits as on one")
    bench.add("cluster_round_s", metric(run, "round_s")[-1], "s, all on this machine's cores")
