"""What Ray's object store says of itself: the engine's own books are not asked."""

from importlib.util import find_spec

import ray


def stored_bytes() -> int:
    """The bytes of all objects that the stores of all nodes have taken in since they started.

    Small ones, which Ray sends inside its messages, are not among them. ValueError without the extra `bench`.
    """
    if find_spec("grpc") is None:
        raise ValueError('this benchmark asks Ray by grpcio: pip install "fedpost[bench]"')
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.cumulative_created_bytes)
