"""How many slots the resources of Ray's nodes hold, and which of them may be one gang's."""

import math

from engine.config.sections import Clients


def slots_that_fit(clients: Clients, nodes: list[dict[str, float]]) -> int:
    """How many slots the nodes' resources hold; ValueError, with what was asked and what exists, when not even one."""
    fit = 0
    for node in nodes:
        shares = [node.get("CPU", 0.0) / clients.num_cpus if clients.num_cpus else math.inf]
        gpus = node.get("GPU", 0.0)
        if 0 < clients.num_gpus < 1:  # a fraction lies on one GPU
            shares.append(gpus * math.floor(1 / clients.num_gpus + 1e-6))
        elif clients.num_gpus:
            shares.append(gpus / clients.num_gpus)
        fit += math.floor(min(shares) + 1e-6)
    if fit == 0:
        largest = "no node at all"
        if nodes:
            node = max(nodes, key=lambda node: (node.get("GPU", 0.0), node.get("CPU", 0.0)))
            largest = f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs"
        raise ValueError(
            f"a slot needs {clients.num_cpus:g} CPUs and {clients.num_gpus:g} GPUs on one node, but the largest of "
            f"{len(nodes)} has {largest}: lower clients.num_cpus or clients.num_gpus"
        )
    return fit


def asked_or_fitting(clients: Clients, fit: int) -> int:
    """As many slots as the recipe asks for, and no more than fit."""
    return fit if clients.slots == "auto" else min(clients.slots, fit)


def refuse_shared_gpus(places: list[tuple[str, str | None]]) -> None:
    """ValueError where two ranks of a gang, given by node and GPU (None: on the CPU), are on one GPU.

    NCCL gives each rank a GPU of its own, and refuses with less to go by.
    """
    gpus = [place for place in places if place[1] is not None]
    if len(set(gpus)) < len(gpus):
        raise ValueError(
            f"{len(gpus)} ranks of a gang were given {len(set(gpus))} GPUs, and NCCL lets no two of them share one: "
            f"set clients.num_gpus = 1, or clients.zero.ranks = 1 for a gang on a part of a GPU"
        )
