"""The chain of transforms, encoded on the client and decoded in reverse on the server, and what lossy ones share.

Legend: P parameters, N blocks of B neighboring coordinates.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from strategies.core.errors import require
from strategies.core.protocol import Aggregate, Broadcast, ClientState, ServerState, Size, Transform, Update, Vector
from strategies.core.seeds import torch_rng

ERROR = "error"  # the name of the residual in a transform's part of the client's state


def encode(
    transforms: Sequence[Transform], update: Update, broadcast: Broadcast, client_state: ClientState
) -> tuple[Update, ClientState]:
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
class Lossy(ABC):
    """A transform that loses a part of the update and, with error feedback, sends it later.

    The client keeps the residual e: it sends C(delta + e) and keeps e <- delta + e - C(delta + e), so that over the
    rounds the sum of what arrived is the sum of the deltas minus the last e. A coordinate that did not move this round
    (frozen by the rule, or beyond the client's rank) sends nothing, and its residual waits: a frozen tensor stays where
    it is. Trap: a residual is sent when the client next takes part, which in a large population is late or never.
    """

    keeps_zeros: ClassVar[bool] = True
    works_on_shards: ClassVar[bool] = False
    picks_coordinates: ClassVar[bool] = False
    error_feedback: bool = True

    @abstractmethod
    def squeeze(self, x_P: Vector, broadcast: Broadcast, rng: torch.Generator) -> tuple[Vector, Vector]:
        """What travels in place of the vector, and what the server makes of that, (P,)."""

    @abstractmethod
    def size(self, size: Size) -> Size:
        """What its output costs if its input costs `size`."""

    @property
    def keeps_state(self) -> bool:
        """The residual, with error feedback."""
        return self.error_feedback

    def encode(
        self, update: Update, broadcast: Broadcast, client_state: ClientState, rng: torch.Generator
    ) -> tuple[Update, ClientState]:
        """The squeezed delta with the residual of earlier rounds in it, and the new residual."""
        if not self.error_feedback:
            return replace(update, delta=self.squeeze(update.delta, broadcast, rng)[0]), {}
        delta_P = update.delta
        error_P = client_state.get(ERROR, torch.zeros_like(delta_P))
        sent, seen_P = self.squeeze(torch.where(delta_P == 0, 0, delta_P + error_P), broadcast, rng)
        return replace(update, delta=sent), {ERROR: delta_P + error_P - seen_P}

    def decode(self, aggregate: Aggregate, state: ServerState, rng: torch.Generator) -> tuple[Aggregate, ServerState]:
        """What travels is what it stands for."""
        return aggregate, state


def share_of(share: float, values: int) -> int:
    """That share of so many values, at least one."""
    return max(1, round(share * values))


def check_share(kind: str, share: float) -> None:
    """Raises StrategyError for a share outside (0, 1]."""
    kept = f"{kind}'s share is what is kept of the update and must be above 0 and at most 1"
    require(0 < share <= 1, f"{kept}, not {share}")


def check_block(kind: str, block: int) -> None:
    """Raises StrategyError for a block without coordinates."""
    coordinates = f"{kind}'s block is the number of coordinates that share a scale and must be at least 1"
    require(block >= 1, f"{coordinates}, not {block}")


def blocks_of(x_P: Vector, length: int) -> torch.Tensor:
    """The vector cut into blocks (N, B), the last one padded with zeros."""
    return F.pad(x_P, (0, -x_P.numel() % length)).view(-1, length)


def with_scales(size: Size, bits: int, block: int) -> Size:
    """The size of values of so many bits, with a float32 scale for each block, or for each value if these are fewer."""
    return replace(size, bits=min(size.bits, bits), extra=size.extra + 32 * min(size.values, -(-size.length // block)))
