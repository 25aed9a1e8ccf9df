"""`fedpost bench slots`: strong and weak scaling over slots, here and on a simulated cluster of nodes with GPUs."""

import statistics
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import experiments
from experiments.bench.bare import PROCESSES, compare
from experiments.bench.bases import bench_recipe, write_rows
from experiments.bench.results import Figure, Steps
from experiments.bench.scenarios.lora import recipe
from experiments.bench.scenarios.scale import as_figures, study
from experiments.config.recipe import Recipe
from experiments.preflight.processes import environment, hidden_gpus
from experiments.runs.api import ray_session
from strategies.core.cohort import UniformCohort
from strategies.core.seeds import rng

CLIENTS, COHORT = 200, 40
PER_SLOT = 5  # clients of a cohort that grows with the slots
NODES, GPUS, SHARE = 3, 2, 0.5  # logical ones: Ray places by them, and the slots compute on the CPU


def measure(small: bool) -> dict[str, Figure]:
    """Tokens per second and efficiency with one and two slots; ValueError when the bits, or the bare loop's, differ."""
    with TemporaryDirectory(prefix="fedpost-bench-") as name:
        folder = Path(name)
        rounds = 3 if small else 8
        work = recipe(folder, 2, *(1, 32) if small else ())
        with ray_session(None):
            found = compare(work, folder / "gate")
            figures = {"apart": Figure(found.apart, "largest difference to the bare loop")}
            figures |= as_figures(study(work, [1, 2], rounds=rounds), "strong_")
            if not small:
                figures |= as_figures(study(work, [1, 2], weak=True, rounds=rounds), "weak_")
            figures |= _uneven(folder / "uneven", work, rounds)
        Steps().say(f"a simulated cluster of {NODES} nodes with {GPUS} logical GPUs each")
        return figures | _simulated(work, folder, rounds, small=small)


def _uneven(folder: Path, even: Recipe, rounds: int) -> dict[str, Figure]:
    """How evenly two slots work on clients whose numbers of rows are lognormal, all of which they train on."""
    folder.mkdir()
    counts = np.ceil(rng(0, 0, -1, "sample").lognormal(1.5, 1.0, CLIENTS)).astype(int)
    write_rows(folder / "rows.parquet", CLIENTS, counts, 64)
    work = bench_recipe(
        folder,
        Path(even.model.base),
        f"""
        rounds = {rounds}
        clients = {{ slots = {PROCESSES} }}
        cohort = {{ size = {COHORT} }}
        train = {{ epochs = 1, batch = 2, max_length = 64 }}
        """,
    )
    run = experiments.run(work, out=folder / "run")
    found = [row["value"] for row in run.metrics.to_pylist() if row["name"] == "balance"]
    return {
        "balance_lognormal": Figure(statistics.median(found), "mean over longest work of a slot"),
        "balance_lognormal_worst": Figure(min(found), "mean over longest work of a slot"),
    }


def _simulated(work: Recipe, folder: Path, rounds: int, *, small: bool) -> dict[str, Figure]:
    """Slots on shares of logical GPUs over several Ray nodes: the bits of the gate's run on one, and how they scale.

    All slots share this machine's cores: what is measured is what it costs to have more of them, on more nodes.
    """
    from ray.cluster_utils import Cluster

    share, scaling = 1.0 if small else SHARE, dict[str, Figure]()
    slots = round(NODES * GPUS / share)
    clients = replace(work.clients, slots=slots, num_cpus=0.0, num_gpus=share)
    head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False}
    with environment(**hidden_gpus(GPUS)):
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(NODES):
                cluster.add_node(num_cpus=1, num_gpus=GPUS)
            over = replace(work, clients=clients)
            many = experiments.run(over, out=folder / "nodes", address=cluster.address)
            for weak in () if small else (True, False):
                scaled = replace(over, cohort=UniformCohort(size=PER_SLOT)) if weak else over
                found = study(scaled, [NODES, 2 * NODES], cluster.address, weak=weak, rounds=rounds)
                scaling |= as_figures(found, "cluster_weak_" if weak else "cluster_strong_")
        finally:
            cluster.shutdown()
    same = all(
        (folder / "gate" / "model" / path.name).read_bytes() == path.read_bytes()
        for path in many.model.glob("adapter_model*")
    )
    if not same:
        raise ValueError("slots on several nodes lead to other bits than on one")
    seconds = [row["value"] for row in many.metrics.to_pylist() if row["name"] == "round_s"]
    return scaling | {
        "cluster_slots": Figure(slots, f"slots on {NODES} simulated nodes, the same bits as on one"),
        "cluster_round_s": Figure(seconds[-1], "s, all on this machine's cores"),
    }
