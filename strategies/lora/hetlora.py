"""HetLoRA: clients have and prune ranks of their own, the norm is the weight (Cho et al. 2024, arXiv 2401.06432)."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.base import Ends, Finished, Rule, ServerLr, Vectors, step
from strategies.core.layout import Layout, LoraPair
from strategies.core.lora_algebra import all_but, floats_at, folded, start_at, without
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, ClientState, Mask, ServerState, Update, Vector
from strategies.core.ranges import SHARE, Range

TINY = 1e-12  # below this a norm has no direction


@dataclass(frozen=True)
class HetLora(Rule):
    """A += lr * sum_k p_k delta_k A and B alike, zero-padded to the largest rank, p_k = |s_k B_k A_k|_F / sum of all.

    A client gets the first r_k rows of A and columns of B. Its rank's tail is what lies beyond gamma r_k: `penalty` *
    |B_tail| |A_tail| is added to its loss, layer by layer, and if that product is smaller after training than before,
    the tail is cut off for good (gamma = 1: never). The norm itself is the weight, over all layers, so that numerator
    and denominator are sums and no norm is reported; `weighting` may be FedAvg's instead. Reads the sum.

    Client state: "rank", the client's present one. Its scale stays alpha over the rank that it was given, or cutting
    would change the model. s_k is folded into B before averaging. Traps: biased as FedAvg on LoRA is; rows that few
    clients have shrink, since the others' zeros count; a client that has learned nothing yet (B = 0) has no weight.
    """

    kind: Literal["hetlora"] = "hetlora"
    lr: ServerLr = 1.0
    weighting: Literal["norm", "examples", "uniform"] = "norm"
    gamma: Annotated[float, Range("is the part of its rank that a client keeps when it prunes", SHARE)] = 0.99
    penalty: Annotated[float, Range("shrinks a rank's tail")] = 1e-3
    needs_lora: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2401.06432"

    @property
    def bounded_weights(self) -> bool:
        """Whether the norm, which has no bound, is not the weight."""
        return self.weighting != "norm"

    @property
    def picks_coordinates(self) -> bool:
        """Whether clients prune: a pruned row is a known number in the sum, and the other clients' changes the rest."""
        return self.gamma < 1

    @property
    def rests_at_zero(self) -> bool:
        """Whether nothing is pruned: otherwise a client that has not trained sends the pruned rows as a change."""
        return self.gamma == 1

    @property
    def weighs_alike(self) -> bool:
        """Whether the recipe asks for it."""
        return self.weighting == "uniform"

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The global vector cut to the client's rank."""
        (lora_rank,) = lora_ranks(broadcast, client_state)
        return {GLOBAL: start_at(broadcast, lora_rank)}

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, model: str = GLOBAL
    ) -> None:
        """Adds the gradient of penalty * |B_tail| |A_tail|."""
        present = lora_ranks(broadcast, client_state)
        for client, (grad_P, params_P) in enumerate(zip(grad_KP, params_KP, strict=True)):
            lora_rank = present[client % len(present)]
            tail = self._tail(lora_rank)
            grads = broadcast.layout.lora_pairs(grad_P)
            for grad, pair in zip(grads, broadcast.layout.lora_pairs(params_P), strict=True):
                a_norm, b_norm = tail_norms(pair, tail)
                grad.a_RI[tail] += self.penalty * b_norm / a_norm.clamp(min=TINY) * pair.a_RI[tail]
                grad.b_OR[:, tail] += self.penalty * a_norm / b_norm.clamp(min=TINY) * pair.b_OR[:, tail]

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Prunes, folds the client's scale into B, and sets the weight."""
        (lora_rank,) = lora_ranks(broadcast, client_state)
        start, end, tail = start_at(broadcast, lora_rank), broadcast.params + update.delta, self._tail(lora_rank)
        if tail_product(end, broadcast.layout, tail) < tail_product(start, broadcast.layout, tail):
            lora_rank = tail.start
            without(end, broadcast.layout, tail)
        end = folded(end, broadcast)
        weights = {"norm": norm_of_products(end, broadcast.layout), "examples": update.weight, "uniform": 1.0}
        update = replace(update, delta=end - broadcast.params, weight=weights[self.weighting])
        return update, client_state | {"rank": torch.tensor([float(lora_rank)])}

    def trained_mask(self, broadcast: Broadcast, client_state: ClientState, model: str = GLOBAL) -> Mask | None:
        """The rank that the client has kept."""
        (lora_rank,) = lora_ranks(broadcast, client_state)
        return all_but(broadcast.layout, slice(lora_rank, None))

    def floats(self, broadcast: Broadcast) -> tuple[int, int]:
        """A vector of the client's rank both ways, as given: only the client knows what it has pruned since."""
        return (floats_at(broadcast.layout, broadcast.lora_rank),) * 2

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """FedAvg's step; none while all products are zero."""
        if aggregate.weight == 0:
            return replace(state, round=state.round + 1)
        return step(state, aggregate, self.lr)

    def _tail(self, lora_rank: int) -> slice:
        return slice(max(1, math.floor(self.gamma * lora_rank)), lora_rank)


def lora_ranks(broadcast: Broadcast, client_state: ClientState) -> list[int]:
    """The rank of the client, or of each client that trains in a lane, if their states say it."""
    if "rank" in client_state:
        return [int(lora_rank) for lora_rank in client_state["rank"].flatten()]
    return [broadcast.layout.lora_rank if broadcast.lora_rank is None else broadcast.lora_rank]


def tail_norms(pair: LoraPair, tail: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """|A_tail| and |B_tail|."""
    return pair.a_RI[tail].norm(), pair.b_OR[:, tail].norm()


def tail_product(vector: Vector, layout: Layout, tail: slice) -> float:
    """|A_tail| |B_tail|, summed over the layers."""
    norms = (tail_norms(pair, tail) for pair in layout.lora_pairs(vector))
    return sum(float(a_norm * b_norm) for a_norm, b_norm in norms)


def norm_of_products(vector: Vector, layout: Layout) -> float:
    """The Frobenius norm of all s B A together, by |B A|^2 = sum of (B' B) * (A A'), without any product."""
    pairs = layout.lora_pairs(vector)
    squares = (x.scale**2 * float(((x.b_OR.T @ x.b_OR) * (x.a_RI @ x.a_RI.T)).sum()) for x in pairs)
    return math.sqrt(max(0.0, sum(squares)))
