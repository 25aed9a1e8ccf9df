"""The chain of transforms, encoded on the client and decoded in reverse on the server, and what lossy ones share.

Legend: P parameters, N blocks of B neighboring coordinates.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from strategies.core.base import Finished
from strategies.core.protocol import Aggregate, Broadcast, ClientState, ServerState, Size, Update, Vector
from strategies.core.ranges import check_ranges
from strategies.core.seeds import torch_rng

ERROR = "error"  # the name of the residual in a transform's part of the client's state


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


def encode(
    transforms: Sequence[Transform], update: Update, broadcast: Broadcast, client_state: ClientState
) -> Finished:
    """The update as it leaves the client, and the transforms' part alone of the client's next state.

    `client_state` is the whole state from before the round; the next one is that of the strategy's `finish` and this.
    """
    if not transforms:
        return update, {}
    rng = torch_rng(broadcast.seed, broadcast.round, update.client, "encode")
    kept: ClientState = {}
    for index, transform in enumerate(transforms):
        prefix = f"transform{index}.{transform.kind}."
        part = {name.removeprefix(prefix): tensor for name, tensor in client_state.items() if name.startswith(prefix)}
        update, part = transform.encode(update, broadcast, part, rng)
        kept |= {prefix + name: tensor for name, tensor in part.items()}
    return update, kept


def decode(transforms: Sequence[Transform], aggregate: Aggregate, state: ServerState) -> tuple[Aggregate, ServerState]:
    """The aggregate that the strategy applies, before it does; `state` is that of the round's broadcast."""
    rng = torch_rng(state.seed, state.round, -1, "decode")
    for transform in reversed(transforms):
        aggregate, state = transform.decode(aggregate, state, rng)
    return aggregate, state


def bits(transforms: Sequence[Transform], floats: int) -> int:
    """The number of bits that a client sends for an update of `floats` float32 numbers; 32 each without transforms."""
    size = Size(floats, floats)
    for transform in transforms:
        size = transform.size(size)
    return size.values * size.bits + size.extra


@dataclass(frozen=True)
class Lossy(Transform, ABC):
    """A transform that loses a part of the update and, with error feedback, sends it later.

    The client keeps the residual e: it sends C(delta + e) and keeps e <- delta + e - C(delta + e), so that over the
    rounds the sum of what arrived is the sum of the deltas minus the last e. A coordinate that did not move this round
    (frozen by the rule, or beyond the client's rank) sends nothing, and its residual waits: a frozen tensor stays where
    it is. Trap: a residual is sent when the client next takes part, which in a large population is late or never.
    """

    error_feedback: bool = True

    @abstractmethod
    def squeeze(self, x_P: Vector, broadcast: Broadcast, rng: torch.Generator) -> tuple[Vector, Vector]:
        """What travels in place of the vector, and what the server makes of that, (P,)."""

    @property
    def keeps_state(self) -> bool:
        """The residual, with error feedback."""
        return self.error_feedback

    def encode(self, update: Update, broadcast: Broadcast, client_state: ClientState, rng: torch.Generator) -> Finished:
        """The squeezed delta with the residual of earlier rounds in it, and the new residual."""
        if not self.error_feedback:
            return replace(update, delta=self.squeeze(update.delta, broadcast, rng)[0]), {}
        delta_P = update.delta
        error_P = client_state.get(ERROR, torch.zeros_like(delta_P))
        sent, seen_P = self.squeeze(torch.where(delta_P == 0, 0, delta_P + error_P), broadcast, rng)
        return replace(update, delta=sent), {ERROR: delta_P + error_P - seen_P}
