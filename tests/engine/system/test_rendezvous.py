"""Ranks that meet, and wait for the first one."""

import os
import socket
import time

import pytest
import ray
from torch.distributed import DistError

from engine.system.rendezvous import meet, wait_for_the_first

TIMEOUT_S = 5.0
ALONE = {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}


def rank(rank: int, port: int) -> tuple[float, float, str]:
    """The first rank is late, and dies before it is there again; the other tells how long it waited, and what then."""
    listening = socket.create_server(("127.0.0.1", port)) if rank == 0 else None
    meet(rank, 2, "127.0.0.1", port, listening, timeout_s=TIMEOUT_S, gpu=False)
    began = time.monotonic()
    if rank == 0:
        time.sleep(1.5 * TIMEOUT_S)
    wait_for_the_first(rank)
    first_s = time.monotonic() - began
    if rank == 0:
        time.sleep(1)
        os._exit(1)
    try:
        wait_for_the_first(rank)
    except DistError as error:
        return first_s, time.monotonic() - began - first_s, str(error)
    return first_s, 0.0, ""


@pytest.mark.slow
def test_the_first_may_take_longer_than_a_collective_but_nobody_waits_when_it_has_died(ray_session, full):
    if not full:
        pytest.skip("seconds of waiting")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    remote = ray.remote(num_cpus=0, max_retries=0, runtime_env={"env_vars": ALONE})(rank)
    _, other = remote.remote(0, port), remote.remote(1, port)
    first_s, second_s, why = ray.get(other, timeout=60)
    assert first_s > TIMEOUT_S and second_s < TIMEOUT_S and why
