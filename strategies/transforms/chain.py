"""The chain of transforms, encoded on the client and decoded in reverse on the server, and the lossless one, Clip."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.base import Finished
from strategies.core.protocol import Aggregate, Broadcast, ClientState, ServerState, Size, Update
from strategies.core.ranges import ABOVE_0, Range, check_ranges
from strategies.core.seeds import torch_rng


@dataclass(frozen=True)
class Transform(ABC):
    """What happens to an update on its way: pure functions whose fields are a section of the recipe.

    Several form a chain: clients encode in its order, the server decodes in reverse. An encoded update is a vector that
    may be summed with others; its weight and extras stay as they are.
    """

    kind: str
    keeps_zeros: ClassVar[bool] = True  # zeros of the update arrive as zeros, in a vector of the same length
    works_on_shards: ClassVar[bool] = False  # each rank of a gang may encode its own shard
    picks_coordinates: ClassVar[bool] = False  # each client chooses by its data which coordinates it sends

    def __post_init__(self) -> None:
        check_ranges(self, f"{self.kind}'s ")

    @property
    def keeps_state(self) -> bool:
        """Whether it keeps a part of the client's state."""
        return False

    @abstractmethod
    def encode(self, update: Update, broadcast: Broadcast, client_state: ClientState, rng: torch.Generator) -> Finished:
        """The update as it travels, and this transform's own part of the client's next state."""

    def decode(self, aggregate: Aggregate, state: ServerState, rng: torch.Generator) -> tuple[Aggregate, ServerState]:
        """The aggregate of plain updates from that of encoded ones; `state` is that of the round's broadcast."""
        return aggregate, state

    def size(self, size: Size) -> Size:
        """What its output costs if its input costs `size`."""
        return size


Chain = Sequence[Transform]


def encode(transforms: Chain, update: Update, broadcast: Broadcast, client_state: ClientState) -> Finished:
    """The update as it leaves the client, and the transforms' part alone of the client's next state.

    `client_state` is the whole state from before the round; the next one is that of the strategy's `finish` and this.
    """
    if not transforms:
        return update, {}
    rng = torch_rng(broadcast.seed, broadcast.round, update.client, "encode")
    kept: ClientState = {}
    for index, transform in enumerate(transforms):
        prefix = f"transform{index}.{transform.kind}."
        before = {name.removeprefix(prefix): tensor for name, tensor in client_state.items() if name.startswith(prefix)}
        update, after = transform.encode(update, broadcast, before, rng)
        kept |= {prefix + name: tensor for name, tensor in after.items()}
    return update, kept


def decode(transforms: Chain, aggregate: Aggregate, state: ServerState) -> tuple[Aggregate, ServerState]:
    """The aggregate that the strategy applies, before it does; `state` is that of the round's broadcast."""
    rng = torch_rng(state.seed, state.round, -1, "decode")
    for transform in reversed(transforms):
        aggregate, state = transform.decode(aggregate, state, rng)
    return aggregate, state


def bits(transforms: Chain, floats: int) -> int:
    """The number of bits that a client sends for an update of `floats` float32 numbers; 32 each without transforms."""
    size = Size(floats, floats)
    for transform in transforms:
        size = transform.size(size)
    return size.values * size.bits + size.extra


@dataclass(frozen=True)
class Clip(Transform):
    """delta <- delta * min(1, bound / |delta|), the L2 norm of the whole vector.

    It bounds what one client can do to a sum, so it goes with rules that read the sum alone. Extras are left as they
    are. Traps: the clients themselves clip, so against those that lie it helps only if somebody checks. Transforms
    after it in the chain may lengthen the update again (error feedback, projection); as the last one it always holds.
    """

    kind: Literal["clip"] = "clip"
    bound: Annotated[float, Range("is the largest L2 norm", ABOVE_0)] = 1.0
    works_on_shards: ClassVar[bool] = True

    def encode(self, update: Update, broadcast: Broadcast, client_state: ClientState, rng: torch.Generator) -> Finished:
        """The delta, shortened if it is too long."""
        norm = broadcast.whole_norm(float(torch.linalg.vector_norm(update.delta, dtype=torch.float64)))
        return (update if norm <= self.bound else replace(update, delta=update.delta * (self.bound / norm))), {}
