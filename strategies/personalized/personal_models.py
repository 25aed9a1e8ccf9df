"""Rules that give each client a model of its own: whole vectors, or parts of the adapters.

Ditto (Li et al. 2021, arXiv 2012.04221); FedSA-LoRA (Guo et al., ICLR 2025, arXiv 2410.01463); FedDPA (Yang et al.,
NeurIPS 2024, arXiv 2403.19211); local training alone.
"""

from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.base import AveragingRule, Ends, Finished, Rule, Vectors
from strategies.core.layout import LORA_B, Layout, unpacked
from strategies.core.lora_algebra import all_but, unmarked, without, zeroed
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, ClientState, Mask, ServerState, Update, Vector
from strategies.core.ranges import Bounds, Range

PERSONAL = "personal"  # the name of the second training, and of its result in the client's state
MIX: Bounds = ("between 0 and 1", lambda x: 0 <= x <= 1)


@dataclass(frozen=True)
class Ditto(AveragingRule):
    """FedAvg on theta; beside it each client minimizes F_k(v_k) + (lam / 2) |v_k - theta_t|^2 for its own v_k.

    Algorithm 1. The global training is plain; the personal one, from the client's last v_k, has the gradient
    g + lam (v_k - theta_t). Reads the sum, of the global changes. Client state: "personal", the client's v_k; a client
    that takes part for the first time starts from theta_t. Traps: clients train twice; `lam` pulls to the global model
    that was received, not to the one of the round before; with lam = 0 it is local training alone.
    """

    kind: Literal["ditto"] = "ditto"
    lam: Annotated[float, Range("pulls personal models to the global one")] = 0.1
    keeps_state: ClassVar[bool] = True
    personalizes: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2012.04221"

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The global vector, then the client's own."""
        return {GLOBAL: broadcast.params, PERSONAL: client_state.get(PERSONAL, broadcast.params)}

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, model: str = GLOBAL
    ) -> None:
        """grad += lam (v_k - theta_t) in the personal training."""
        if model == PERSONAL:
            grad_KP.add_(params_KP - broadcast.params, alpha=self.lam)

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Keeps the end of the personal training."""
        assert ends is not None
        update, client_state = super().finish(update, broadcast, client_state, ends)
        return update, client_state | {PERSONAL: ends[PERSONAL]}

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """v_k, once there is one."""
        return client_state.get(PERSONAL)


@dataclass(frozen=True)
class LocalOnly(Rule):
    """theta_k += delta_k on its client; theta stays: local training, the baseline. Nothing is received or sent.

    Client state: "own", the client's theta_k; at first the initial vector. Traps: evaluated as "global" it is the
    initial model in every round, look at "personal"; clients that are sampled more often have trained more.
    """

    kind: Literal["local"] = "local"
    sends_update: ClassVar[bool] = False
    trains_what_it_sends: ClassVar[bool] = False
    receives_what_it_sends: ClassVar[bool] = True  # nothing: every client had the initial vector before the first round
    keeps_state: ClassVar[bool] = True
    personalizes: ClassVar[bool] = True
    paper: ClassVar[str] = "baseline"

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The client's own vector."""
        return {GLOBAL: client_state.get("own", broadcast.params)}

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Keeps the client's vector and sends no change."""
        kept = client_state | {"own": broadcast.params + update.delta}
        return replace(update, delta=torch.zeros_like(update.delta)), kept

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """The client's own vector, once it has one."""
        return client_state.get("own")

    def sent_masks(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """Nothing of the delta."""
        return {"delta": torch.zeros(layout.size, dtype=torch.bool)}

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """theta stays."""
        return replace(state, round=state.round + 1)


@dataclass(frozen=True)
class FedSaLora(AveragingRule):
    """Both are trained; A += lr * sum_k p_k delta_k A, while B_k stays with its client. Reads the sum.

    Client state: "b", the client's B_k; a client's first one is the initial B, which is zero. Trap: there is no global
    model. The global vector keeps the initial B, so evaluated as "global" it is the base; look at "personal".
    """

    kind: Literal["fedsa"] = "fedsa"
    needs_lora: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True
    personalizes: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    freezes: ClassVar[bool] = True
    trains_what_it_sends: ClassVar[bool] = False
    receives_what_it_sends: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2410.01463"

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The global A with the client's own B."""
        personal = self.personal(broadcast, client_state)
        return {GLOBAL: broadcast.params if personal is None else personal}

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Keeps B and sends no change of it."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        end, delta = broadcast.params + update.delta, zeroed(update.delta.clone(), broadcast.layout, LORA_B)
        b = torch.cat([pair.b_OR.flatten() for pair in broadcast.layout.lora_pairs(end)])
        return replace(update, delta=delta), client_state | {"b": b}

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """The global A with the client's own B, once it has one."""
        if "b" not in client_state:
            return None
        vector = broadcast.params.clone()
        matrices = [pair.b_OR for pair in broadcast.layout.lora_pairs(vector)]
        for global_OR, b_OR in zip(matrices, unpacked(client_state["b"], [b.shape for b in matrices]), strict=True):
            global_OR.copy_(b_OR)
        return vector

    def sent_masks(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """All but B."""
        return {"delta": unmarked(layout, LORA_B)}


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
    lora_rank_multiple: ClassVar[int] = 2
    keeps_state: ClassVar[bool] = True
    personalizes: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    freezes: ClassVar[bool] = True
    receives_what_it_sends: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2403.19211"

    def starts(self, broadcast: Broadcast, client_state: ClientState) -> dict[str, Vector]:
        """The global vector, then the sum of the client's two adapters."""
        return {GLOBAL: broadcast.params, PERSONAL: self._mixed(broadcast, client_state)}

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, model: str = GLOBAL
    ) -> None:
        """Freezes the local adapter, in the personal training the global one."""
        without(grad_KP, broadcast.layout, _frozen(broadcast.layout, model))

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Keeps the local adapter and sends no change of it."""
        assert ends is not None
        update, client_state = super().finish(update, broadcast, client_state, ends)
        delta = without(update.delta.clone(), broadcast.layout, _frozen(broadcast.layout, GLOBAL))
        local = torch.cat([tensor.flatten() for tensor in _local(ends[PERSONAL], broadcast.layout)])
        return replace(update, delta=delta), client_state | {"local": local}

    def personal(self, broadcast: Broadcast, client_state: ClientState) -> Vector | None:
        """The sum of both adapters, once the client has a local one."""
        return self._mixed(broadcast, client_state) if "local" in client_state else None

    def sent_masks(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """All but the local adapter."""
        return {"delta": all_but(layout, _frozen(layout, GLOBAL))}

    def trained_mask(self, broadcast: Broadcast, client_state: ClientState, model: str = GLOBAL) -> Mask | None:
        """All but the other training's adapter."""
        return all_but(broadcast.layout, _frozen(broadcast.layout, model))

    def _mixed(self, broadcast: Broadcast, client_state: ClientState) -> Vector:
        mixed, half = broadcast.params.clone(), broadcast.layout.lora_rank // 2
        for pair in broadcast.layout.lora_pairs(mixed):
            pair.b_OR[:, :half] *= 1 - self.mix
        if "local" in client_state:
            tensors = _local(mixed, broadcast.layout)
            for tensor, kept in zip(tensors, unpacked(client_state["local"], [x.shape for x in tensors]), strict=True):
                tensor.copy_(kept)
        return mixed


def _frozen(layout: Layout, model: str) -> slice:
    """The rows of A and columns of B that a training leaves alone."""
    half = layout.lora_rank // 2
    return slice(half) if model == PERSONAL else slice(half, None)


def _local(vector: Vector, layout: Layout) -> list[torch.Tensor]:
    """The local adapter's halves of A and B in a vector (P,), as views."""
    half = layout.lora_rank // 2
    return list(chain.from_iterable((pair.a_RI[half:], pair.b_OR[:, half:]) for pair in layout.lora_pairs(vector)))
