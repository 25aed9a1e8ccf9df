"""How the ranks of a gang find each other: nothing listens on more than the one address of the first rank's node."""

import socket
import sys
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

LOOPBACK = "127."
PATIENCE = timedelta(hours=1)  # with a first rank that reads, or downloads, what the others need not


def meet(
    rank: int, ranks: int, address: str, port: int, listening: socket.socket | None, *, timeout_s: float, gpu: bool
) -> None:
    """Joins the process group; the first rank brings the socket that listens at `address`.

    A silent rank makes the others' collectives fail after `timeout_s`.
    """
    import deepspeed  # takes seconds, and chooses its accelerator then

    timeout = timedelta(seconds=timeout_s)
    # Of its own the store would listen on all addresses.
    own: dict[str, Any] = {} if listening is None else {"master_listen_fd": listening.detach()}
    store = dist.TCPStore(  # type: ignore[attr-defined]  # as torch's documentation names it
        address, port, ranks, is_master=rank == 0, timeout=timeout, **own
    )
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would need a compiler, and is of no use here
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout)


def wait_for_the_first(rank: int) -> None:
    """Lets the other ranks wait until the first one calls this too: for longer than a collective, but not if it dies.

    All ranks call it equally often.
    """
    # Who waits keeps all others from a store, and NCCL's watchdog asks it.
    store = _get_default_store().clone()  # type: ignore[attr-defined]
    reached = f"reached {store.add(f'calls of {rank}', 1)}"
    if rank == 0:
        store.set(reached, "")
    else:
        store.wait([reached], PATIENCE)


def rank_environment(*, gpu: bool) -> dict[str, str]:
    """What a rank's process must find in its environment when it starts."""
    found = {"LOCAL_RANK": "0"}  # Ray shows a rank its own devices alone
    if not gpu:
        found["DS_ACCELERATOR"] = "cpu"
    if ray.util.get_node_ip_address().startswith(LOOPBACK):
        name = "lo0" if sys.platform == "darwin" else "lo"
        found |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return found
