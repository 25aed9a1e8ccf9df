"""FedDPA: a global and a local adapter beside each other (Yang et al., NeurIPS 2024, arXiv 2403.19211)."""

from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.base import AveragingRule, Ends, Finished, Vectors
from strategies.core.layout import Layout, unpacked
from strategies.core.lora_algebra import all_but
from strategies.core.protocol import GLOBAL, Broadcast, ClientState, Mask, Update, Vector
from strategies.core.ranges import Bounds, Range
from strategies.personalized.ditto import PERSONAL

MIX: Bounds = ("between 0 and 1", lambda x: 0 <= x <= 1)


@dataclass(frozen=True)
class FedDpa(AveragingRule):
    """The iterative form, FedDPA-T: FedAvg on the global adapter, and on each client a local one that stays there.

    An adapter of rank R is two of rank R/2: rows of A and columns of B up to R/2 are the global adapter, the others the
    local one. In a round the global one is trained alone; then the local one, from the client's last, as a part of
    W0 + s ((1 - mix) B A + B_k A_k) with the received B A frozen. That sum is the personal model. Reads the sum.
    Client state: "local", A_k and B_k; the first A_k is everybody's random one, the first B_k zero.

    The paper weighs the two adapters for each prompt by its likeness to training rows; here `mix` is one number for
    all, as in the authors' training code. Traps: clients train twice; the factor that the authors' code has in front of
    the local adapter is a part of B_k here, and so adaptive optimizers move the product 1 / mix times as far.
    """

    kind: Literal["feddpa"] = "feddpa"
    mix: Annotated[float, Range("is what the global adapter loses to the local one", MIX)] = 0.5
    needs_lora: ClassVar[bool] = True
    rank_parts: ClassVar[int] = 2
    keeps_state: ClassVar[bool] = True
    personalizes: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    freezes: ClassVar[bool] = True
    receives_live: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2403.19211"

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The global vector, then the sum of the client's two adapters."""
        return {GLOBAL: broadcast.params, PERSONAL: self._mixed(broadcast, client_state)}

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL
    ) -> None:
        """Freezes the local adapter, in the personal training the global one."""
        frozen = _frozen(broadcast.layout, run)
        for grad_P in grad_KP:
            for pair in broadcast.layout.lora_pairs(grad_P):
                pair.a_RI[frozen] = 0
                pair.b_OR[:, frozen] = 0

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Keeps the local adapter and sends no change of it."""
        assert ends is not None
        update, client_state = super().finish(update, broadcast, client_state, ends)
        delta = update.delta.clone()
        for part in _local(delta, broadcast.layout):
            part.zero_()
        local = torch.cat([part.flatten() for part in _local(ends[PERSONAL], broadcast.layout)])
        return replace(update, delta=delta), client_state | {"local": local}

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """The sum of both adapters, once the client has a local one."""
        return self._mixed(broadcast, client_state) if "local" in client_state else None

    def live(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """All but the local adapter."""
        return {"delta": all_but(layout, _frozen(layout, GLOBAL))}

    def trained(self, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL) -> Mask | None:
        """All but the other training's adapter."""
        return all_but(broadcast.layout, _frozen(broadcast.layout, run))

    def _mixed(self, broadcast: Broadcast, client_state: ClientState) -> Vector:
        mixed, half = broadcast.params.clone(), broadcast.layout.rank // 2
        for pair in broadcast.layout.lora_pairs(mixed):
            pair.b_OR[:, :half] *= 1 - self.mix
        if "local" in client_state:
            parts = _local(mixed, broadcast.layout)
            for part, kept in zip(parts, unpacked(client_state["local"], [part.shape for part in parts]), strict=True):
                part.copy_(kept)
        return mixed


def _frozen(layout: Layout, run: str) -> slice:
    """The rows of A and columns of B that a training leaves alone."""
    half = layout.rank // 2
    return slice(half) if run == PERSONAL else slice(half, None)


def _local(vector: Vector, layout: Layout) -> list[torch.Tensor]:
    """The local adapter's halves of A and B in a vector (P,), as views."""
    half = layout.rank // 2
    return list(chain.from_iterable((pair.a_RI[half:], pair.b_OR[:, half:]) for pair in layout.lora_pairs(vector)))
