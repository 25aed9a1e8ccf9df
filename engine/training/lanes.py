"""Packed clients: adapters of several train over one frozen base in one batch, each as if it were alone.

A lane is a row of one stacked vector, with its own gradient, optimizer state and learning rate. A client that has taken
all of its steps leaves its lane to the next; without a next one, the last lane moves up. Legend: K lanes, B rows of
a lane at once, T tokens, N tokens of a lane, P trained parameters, I inputs and O outputs of a layer, R rank.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.config.train import Train
from engine.models.base_model import Trainable, is_linear
from engine.objectives.sft import IGNORED, Batch
from engine.training.batching import batches, steps_of
from engine.training.local_training import LocalTrainer, Trained, Training
from engine.training.optimizers import clip, kept, make_optimizer, restore
from strategies.core.layout import LoraPair

KEY = "clients.lanes"
ALONE = f"set {KEY} = 1"


@dataclass
class Lane:
    """One client on its way through its steps."""

    place: int  # in the list of trainings
    training: Training
    steps: Iterator[np.ndarray]
    total: int
    scale: float
    dropout: torch.Generator
    step: list[Batch]
    nll: torch.Tensor
    taken: int = 0
    tokens: int = 0
    learnt: int = 0
    rates: float = 0.0


class PackTrainer(LocalTrainer):
    """A LocalTrainer that takes up to `lanes` clients at once, which must all have LoRA on linear layers."""

    def __init__(self, alone: LocalTrainer, lanes: int, train: Train) -> None:
        super().__init__(alone.trainable, alone.objective, alone.pad, alone.optimizer)
        network, layout = self.trainable.network, self.trainable.layout
        self.layers = packable(self.trainable)
        self.together = replace(alone.objective, every_logit=network.get_output_embeddings() in self.layers)
        self.flat_KP = self.trainable.flat.data.new_zeros(lanes, layout.size)
        self.grad_KP = torch.zeros_like(self.flat_KP)
        self.rows = [nn.Parameter(row) for row in self.flat_KP]
        self.lanes_optimizer = make_optimizer([{"params": [row]} for row in self.rows], train.optimizer)
        self.dropout = self.layers[0].lora_dropout["default"]
        self.leaves: dict[int, list[LoraPair]] = {}
        self.shapes: dict[int, torch.Size] = {}  # of the pieces that are in the model, by lane

    def train(self, trainings: list[Training], train: Train) -> list[Trained]:
        """Does all trainings, several at once; one alone is done as without packs."""
        if len(trainings) == 1:
            return super().train(trainings, train)
        waiting = iter(enumerate(trainings))
        done: list[Trained | None] = [None] * len(trainings)
        active = [self._enter(lane, *one, train) for lane, one in enumerate(islice(waiting, len(self.rows)))]
        self.trainable.network.train()
        with self._packed(active), warnings.catch_warnings():
            # Gradients are views into one matrix, and so not as dense as torch would make them.
            warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract", UserWarning)
            while active:
                self._step(active, train)
                for lane in reversed(range(len(active))):
                    if active[lane].taken == active[lane].total:
                        one = active[lane]
                        done[one.place] = self._left(lane, one)
                        following = next(waiting, None)
                        if following is not None:
                            active[lane] = self._enter(lane, *following, train)
                        else:
                            self._close(lane, active)
        return [trained for trained in done if trained is not None]

    def _enter(self, lane: int, place: int, training: Training, train: Train) -> Lane:
        """A client takes a lane."""
        self.flat_KP[lane].copy_(training.start)
        restore(self.lanes_optimizer, training.moments or {}, lane)
        layout = self.trainable.layout
        return Lane(
            place,
            training,
            batches(training.rows.num_rows, train, training.stream),
            steps_of(training.rows.num_rows, train),
            layout.scale if training.rank is None else layout.scale_at(training.rank),
            torch.Generator(self.device).manual_seed(training.dropout),
            [],
            torch.zeros((), dtype=torch.float64, device=self.device),
        )

    def _left(self, lane: int, one: Lane) -> Trained:
        """What a client leaves with."""
        metrics = {
            "loss": one.nll.item() / one.learnt,
            "rows": float(one.training.rows.num_rows),
            "steps": float(one.taken),
            "tokens": float(one.tokens),
            "learnt": float(one.learnt),
            "rates": one.rates,
        }
        moments = {} if one.training.moments is None else kept(self.lanes_optimizer, lane)
        flat_P, less = self.flat_KP[lane], one.training.less
        return Trained(flat_P.clone() if less is None else flat_P - less, metrics, moments)

    def _close(self, lane: int, active: list[Lane]) -> None:
        """The last lane moves to `lane`, so that those in use stay side by side."""
        last = active.pop()
        if lane == len(active):
            return
        active[lane] = last
        self.flat_KP[lane].copy_(self.flat_KP[len(active)])
        state, (here, there) = self.lanes_optimizer.state, (self.rows[lane], self.rows[len(active)])
        state[here], state[there] = state[there], state[here]

    def _step(self, active: list[Lane], train: Train) -> None:
        """One optimizer step of all lanes in use."""
        lanes = len(active)
        grad_KP = self.grad_KP[:lanes].zero_()
        for one in active:
            one.step = self.cut(one.training.rows.take(next(one.steps)), train.batch)
        learnt = [sum(piece.learnt for piece in one.step) for one in active]
        share_K = 1 / torch.tensor(learnt, dtype=self.flat_KP.dtype, device=self.device)
        for turn in range(max(len(one.step) for one in active)):
            nll_B = self.together.losses(self.trainable.network, self._side_by_side(active, turn))
            nll_K = nll_B.view(lanes, -1).sum(1)
            (nll_K * share_K).sum().backward()
            for one, nll in zip(active, nll_K.detach(), strict=True):
                one.nll += nll
        for lane, one in enumerate(active):
            if one.training.correct is not None:
                one.training.correct(grad_KP[lane, None], self.flat_KP[lane, None])
        clip(grad_KP, train.clip)
        for lane, row in enumerate(self.rows):
            row.grad = self.grad_KP[lane] if lane < lanes else None
        for lane, one in enumerate(active):
            lr = train.optimizer.lr * one.training.rate * train.over_steps.factor(one.taken, one.total)
            self.lanes_optimizer.param_groups[lane]["lr"] = lr
            one.taken, one.rates, one.learnt = one.taken + 1, one.rates + lr, one.learnt + learnt[lane]
            one.tokens += sum(piece.tokens for piece in one.step)
        self.lanes_optimizer.step()

    def _side_by_side(self, active: list[Lane], turn: int) -> Batch:
        """The lanes' pieces of this turn as one batch (K * B, T); what a lane lacks is padding that teaches nothing.

        Put together on the CPU: a GPU gets all lanes at once.
        """
        found = [(lane, one.step[turn]) for lane, one in enumerate(active) if turn < len(one.step)]
        rows, longest = np.max([piece.ids_BT.shape for _, piece in found], 0)
        shape = (len(active), rows, longest)
        ids_KBT = torch.full(shape, self.pad)
        attention_KBT, labels_KBT = torch.zeros_like(ids_KBT), torch.full_like(ids_KBT, IGNORED)
        attention_KBT[:, :, 0] = 1  # a row that attends to nothing would be NaN
        for lane, piece in found:
            there = (lane, slice(len(piece.ids_BT)), slice(piece.ids_BT.shape[1]))
            ids_KBT[there], attention_KBT[there], labels_KBT[there] = piece.ids_BT, piece.attention_BT, piece.labels_BT
        flat = [vectors.view(-1, int(longest)) for vectors in (ids_KBT, attention_KBT, labels_KBT)]
        self.shapes = {lane: piece.ids_BT.shape for lane, piece in found}
        return Batch.of(flat[0], flat[1], flat[2], sum(piece.tokens for _, piece in found)).to(self.device)

    @contextmanager
    def _packed(self, active: list[Lane]) -> Iterator[None]:
        """Lets the adapted layers work on lanes."""
        for number, layer in enumerate(self.layers):
            layer.forward = self._forward(number, layer, active)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward
            for row in self.rows:
                row.grad = None

    def _forward(self, number: int, layer: Any, active: list[Lane]) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            out = layer.base_layer(x)
            pair = self._leaves(len(active))[number]
            x_KNI = x.reshape(len(active), -1, x.shape[-1]).to(pair.a_RI.dtype)
            if isinstance(self.dropout, nn.Dropout) and self.dropout.p > 0:
                x_KNI = x_KNI * self._kept(active, x.to(x_KNI.dtype), self.dropout.p).view_as(x_KNI)
            out_KNO, down_KNR = out.view(len(active), -1, out.shape[-1]), torch.bmm(x_KNI, pair.a_RI.mT)
            scale, *others = {one.scale for one in active}
            if others:
                scale_K = torch.tensor([one.scale for one in active], dtype=down_KNR.dtype, device=out.device)
                product_KNO = torch.bmm(down_KNR * scale_K[:, None, None], pair.b_OR.mT)
            elif out.dtype == down_KNR.dtype:
                return torch.baddbmm(out_KNO, down_KNR, pair.b_OR.mT, alpha=scale).view(out.shape)
            else:
                product_KNO = torch.bmm(down_KNR * scale, pair.b_OR.mT)
            added: torch.Tensor = (out_KNO + product_KNO).to(out.dtype).view(out.shape)
            return added

        return forward

    def _kept(self, active: list[Lane], x: torch.Tensor, p: float) -> torch.Tensor:
        """What dropout leaves of the inputs, drawn for each lane in the shape that its rows have alone."""
        factor_KBTI = x.new_zeros(len(active), len(x) // len(active), *x.shape[1:])
        for lane, (rows, tokens) in self.shapes.items():
            drawn = x.new_empty(rows, tokens, x.shape[-1]).bernoulli_(1 - p, generator=active[lane].dropout)
            factor_KBTI[lane, :rows, :tokens] = drawn / (1 - p)
        return factor_KBTI

    def _leaves(self, lanes: int) -> list[LoraPair]:
        """Each layer's matrices in the first lanes: leaves of autograd whose gradients lie in `grad_KP`."""
        if lanes not in self.leaves:
            layout, leaves = self.trainable.layout, []
            grads = layout.lora_pairs(self.grad_KP[:lanes])
            for pair, grad in zip(layout.lora_pairs(self.flat_KP[:lanes]), grads, strict=True):
                a_KRI, b_KOR = pair.a_RI.requires_grad_(), pair.b_OR.requires_grad_()
                a_KRI.grad, b_KOR.grad = grad.a_RI, grad.b_OR
                leaves.append(LoraPair(pair.name, a_KRI, b_KOR, pair.scale))
            self.leaves[lanes] = leaves
        return self.leaves[lanes]


def packable(trainable: Trainable) -> list[Any]:
    """The adapted layers; ValueError where something besides the adapters of linear layers is a client's own."""
    pairs = list(trainable.layout.lora_pairs(trainable.flat.data))
    layers = [trainable.network.get_submodule(pair.name) for pair in pairs]
    size = sum(pair.a_RI.numel() + pair.b_OR.numel() for pair in pairs)
    if size != trainable.layout.size or not all(is_linear(one.base_layer) for one in layers):
        raise ValueError(f"{KEY} works with adapters of linear layers alone: name such layers in targets, or {ALONE}")
    for name, value in trainable.network.config.to_dict().items():
        draws = "drop" in name and not name.startswith(("classifier", "summary"))
        if draws and isinstance(value, float) and value > 0:
            raise ValueError(
                f"the base drops activations by itself ({name} = {value:g} in its config.json), which {KEY} cannot "
                f"draw for each client by itself: set that to 0 there, or {ALONE}"
            )
    dropout = layers[0].lora_dropout["default"]
    if trainable.flat.device.type == "cuda" and isinstance(dropout, nn.Dropout) and dropout.p > 0:
        raise ValueError(f"model.peft.dropout is not each client's own in packs on a GPU: set it to 0, or {ALONE}")
    return layers
