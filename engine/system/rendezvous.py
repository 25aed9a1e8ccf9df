"""How the ranks of a gang find each other: they listen on one address only, that of the first rank's node."""

import socket
import sys
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

LOOPBACK = "127."
PATIENCE = timedelta(hours=1)  # the first rank may read, or download, what the others need not


def meet(
    rank: int, ranks: int, address: str, port: int, listening: socket.socket | None, *, timeout_s: float, gpu: bool
) -> None:
    """Joins the process group, in which collectives fail after `timeout_s`; the first rank listens at `address`."""
    import deepspeed  # takes seconds, and chooses its accelerator then

    timeout = timedelta(seconds=timeout_s)
    # Without a socket the store would listen on all addresses.
    listener: dict[str, Any] = {} if listening is None else {"master_listen_fd": listening.detach()}
    options = {"is_master": rank == 0, "timeout": timeout, **listener}
    store = dist.TCPStore(address, port, ranks, **options)  # type: ignore[attr-defined]  # as torch documents it
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would need a compiler, and is of no use here
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout)


def wait_for_the_first(rank: int) -> None:
    """Blocks other ranks, longer than a collective would, until the first calls this too; all call it as often."""
    # Waiting blocks a store for all other threads, and NCCL's watchdog needs it: wait on a copy.
    store = _get_default_store().clone()  # type: ignore[attr-defined]
    reached = f"reached {store.add(f'calls of {rank}', 1)}"
    if rank == 0:
        store.set(reached, "")
    else:
        store.wait([reached], PATIENCE)


def rank_environment(*, gpu: bool) -> dict[str, str]:
    """Returns the environment variables that a rank's process needs when it starts."""
    variables = {"LOCAL_RANK": "0"} | ({} if gpu else {"DS_ACCELERATOR": "cpu"})  # Ray shows a rank its own devices
    if ray.util.get_node_ip_address().startswith(LOOPBACK):
        name = "lo0" if sys.platform == "darwin" else "lo"
        variables |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return variables
