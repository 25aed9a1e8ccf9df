"""How many slots the resources of Ray's nodes hold, and which places may be one gang's."""

import math

from engine.config.sections import Clients
from engine.messages.errors import RunError


def slots_that_fit(clients: Clients, nodes: list[dict[str, float]]) -> int:
    """Returns how many slots the nodes' resources hold; RunError, with what was asked and what exists, if none."""
    fit, sizes = 0, [(node.get("GPU", 0.0), node.get("CPU", 0.0)) for node in nodes]
    for gpus, cpus in sizes:
        shares = [cpus / clients.num_cpus if clients.num_cpus else math.inf]
        if 0 < clients.num_gpus < 1:  # a fraction lies on one GPU
            shares.append(gpus * math.floor(1 / clients.num_gpus + 1e-6))
        elif clients.num_gpus:
            shares.append(gpus / clients.num_gpus)
        fit += math.floor(min(shares) + 1e-6)
    if fit == 0:
        gpus, cpus = max(sizes, default=(0.0, 0.0))
        largest = f"{cpus:g} CPUs and {gpus:g} GPUs" if nodes else "no node at all"
        raise RunError(
            f"a slot needs {clients.num_cpus:g} CPUs and {clients.num_gpus:g} GPUs on one node, but the largest of "
            f"{len(nodes)} has {largest}: lower clients.num_cpus or clients.num_gpus"
        )
    return fit


def asked_or_fitting(clients: Clients, fit: int) -> int:
    """Returns as many slots as the recipe asks for, and no more than fit."""
    return fit if clients.slots == "auto" else min(clients.slots, fit)


def slot_counts(clients: Clients, nodes: list[dict[str, float]]) -> tuple[int, int]:
    """Returns how many gangs and how many slots of one process to start; RunError if one kind has no room."""
    fit, zero = slots_that_fit(clients, nodes), clients.zero
    if zero is None:
        return 0, asked_or_fitting(clients, fit)
    if zero.from_rows:
        taken = zero.gangs * zero.ranks
        if fit <= taken:
            raise RunError(
                f"{zero.gangs} gangs of {zero.ranks} ranks and one plain slot need {taken + 1} times "
                f"{clients.num_cpus:g} CPUs and {clients.num_gpus:g} GPUs, and there is room for {fit} of "
                f"them: lower clients.zero.gangs or clients.zero.ranks"
            )
        return zero.gangs, asked_or_fitting(clients, fit - taken)
    if fit < zero.ranks:
        cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
        raise RunError(
            f"a gang needs {zero.ranks} ranks of {clients.num_cpus:g} CPUs and {clients.num_gpus:g} GPUs each, but all "
            f"nodes together have {cpus:g} CPUs and {gpus:g} GPUs: lower clients.zero.ranks, "
            f"clients.num_cpus or clients.num_gpus"
        )
    return asked_or_fitting(clients, fit // zero.ranks), 0


def refuse_shared_gpus(places: list[tuple[str, str | None]]) -> None:
    """RunError where two ranks of a gang, given by node and GPU (None: CPU), share a GPU, which NCCL cannot use."""
    gpus = [place for place in places if place[1] is not None]
    if len(set(gpus)) < len(gpus):
        raise RunError(
            f"{len(gpus)} ranks of a gang were given {len(set(gpus))} GPUs, and NCCL lets no two of them share one: "
            f"set clients.num_gpus = 1, or clients.zero.ranks = 1 for a gang on a part of a GPU"
        )
