"""Lanes: adapters of several clients train over one frozen base in one batch, each as if it trained alone.

A lane is a row of one stacked matrix, with its own gradient, optimizer state and learning rate. Legend: K lanes, B rows
of a lane at once, T tokens, N tokens of a lane, P trained parameters, I inputs and O outputs of a layer, R rank.
"""

import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from datasets_partition.store.tokens import Tokens
from engine.config.train import Train
from engine.messages.errors import RunError
from engine.models.seeded import Seeded
from engine.models.trainable import Trainable
from engine.objectives.base import Term, counted
from engine.objectives.token_batch import Batch
from engine.system import allocator as heap
from engine.training.lane_forms import Form, Lanes, form_of
from engine.training.lane_probe import refuse_dependent_rows
from engine.training.local_training import LocalTrainer, client_updates
from engine.training.optimizers import clip, make_optimizer
from engine.training.step_columns import judging, with_columns
from engine.training.step_loop import Correct, Progress, Trained, Training, batches, optimizer_step, take_steps
from strategies.core.protocol import Vector

KEY = "clients.lanes"
ADAPTER = re.compile(r"\.(?:lora_|ia3_l|modules_to_save)")  # what PEFT adds to a layer's name
ALONE = f"set {KEY} = 1"
SECONDS, STEPS = 6.0, 2  # for all trials together, and steps of each
GAIN = 1.03  # a smaller gain is noise, and more lanes take more memory
SPARE = 0.5  # share of the free memory that the trials leave


class LaneTrainer:
    """Trains up to `lanes` clients at once; RunError for a layer without a form in lanes. A backend, and a Trainer."""

    batches = staticmethod(batches)
    summed = staticmethod(float)  # there is one rank
    updates = client_updates
    step = optimizer_step

    def __init__(self, plain: LocalTrainer, lanes: int, train: Train) -> None:
        self.plain, self.lanes = plain, lanes
        self.trainable, self.device, self.objective = plain.trainable, plain.device, plain.objective
        self.become, self.loss_terms, self.generate = plain.become, plain.loss_terms, plain.generate
        self.step_means, self.answers = plain.step_means, plain.answers
        self.layers = adapted_layers(self.trainable)
        adapted = {name: layer for name, (layer, _) in self.layers.items()}
        refuse_dependent_rows(self.trainable.network, adapted, plain.max_length, KEY, ALONE)
        _refuse_other_dropout(self.trainable.network)
        self.own_scales = {pair.name: pair.scale for pair in self.trainable.layout.lora_pairs(self.trainable.flat.data)}
        # Logits of all positions, if the head has adapters: its inputs must be those of whole lanes.
        head = self.trainable.network.get_output_embeddings()
        self.context = replace(plain.context, every_logit=head in (layer for layer, _ in self.layers.values()))
        self.flat_KP = self.trainable.flat.data.new_zeros(lanes, self.trainable.layout.size)
        self.grad_KP = torch.zeros_like(self.flat_KP)
        self.rows = [nn.Parameter(row) for row in self.flat_KP]
        self.optimizer = make_optimizer([{"params": [row]} for row in self.rows], train.optimizer)
        self.dropout = dropout_of(self.trainable.network)
        self.leaves: dict[int, dict[str, torch.Tensor]] = {}
        self.reference_leaves: dict[str, torch.Tensor] | None = None  # stand in for `leaves`
        self.adapters_off = False
        self.active: list[Progress] = []  # the clients in the lanes, which the step loop changes in place
        self.shapes: dict[int, torch.Size] = {}  # of the pieces now in the model, by lane
        self.together = torch.Size((0, 0))  # of all of them side by side (K * B, T)
        self.generators: dict[int, torch.Generator] = {}  # of dropout, by the client's place

    def train(self, trainings: Sequence[Training], train: Train) -> list[Trained]:
        """Does all trainings; a single one without lanes, which is faster."""
        return take_steps(self.plain if len(trainings) == 1 else self, trainings, train)

    @contextmanager
    def prepared(self, active: list[Progress]) -> Iterator[None]:
        """Makes the adapted layers compute in lanes."""
        self.generators.clear()
        self.active = active
        self.trainable.network.train()
        for name, (layer, form) in self.layers.items():
            layer.forward = self._forward(name, layer, form)

        def note_shape(_: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
            self.together = named["input_ids"].shape

        hook = self.trainable.network.register_forward_pre_hook(note_shape, with_kwargs=True)
        try:
            with warnings.catch_warnings():
                # Gradients are views into one matrix, with other strides than torch would choose.
                warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout", UserWarning)
                yield
        finally:
            hook.remove()
            for layer, _ in self.layers.values():
                del layer.forward
            for row in self.rows:
                row.grad = None
            self.active = []

    def begin(self, lane: int, training: Training) -> None:
        """Puts a client's start into a lane."""
        self.flat_KP[lane].copy_(training.start)

    def gradients(self, active: list[Progress], train: Train) -> None:
        """Computes the gradients of all lanes' next steps, a piece of each at a time."""
        lanes, losses = len(active), self.objective.losses
        self.grad_KP[:lanes].zero_()
        rows_K = self.plain.sampler.next_rows(active, train, every_logit=self.context.every_logit)
        steps = [self.plain.cut(rows, train.batch) for rows in rows_K]
        counts_K = [counted(self.objective, step) for step in steps]
        for client, step, counts in zip(active, steps, counts_K, strict=True):
            client.count(counts, sum(piece.tokens for piece in step))
        share_K = {name: 1 / self._row([max(1, counts[name]) for counts in counts_K]) for name in counts_K[0]}
        turns = [[step[turn] if turn < len(step) else None for step in steps] for turn in range(max(map(len, steps)))]
        batches = [Batch.side_by_side(pieces, self.plain.pad).to(self.device) for pieces in turns]
        averages = partial(self._averages, share_K)
        means = [client.training.means for client in active if client.training.means is not None]
        known = partial(self._known, means) if means else None
        network = self.trainable.network
        batches = with_columns(self.objective, network, batches, self.context, self._as_reference, averages, known)
        for pieces, together in zip(turns, batches, strict=True):
            self.shapes = {lane: piece.ids_BT.shape for lane, piece in enumerate(pieces) if piece is not None}
            terms = self.objective.terms(self.trainable.network, together, self.context)
            totals_K = {name: self._by_lane(term, together) for name, term in terms.items()}
            torch.stack([(totals_K[name] * share_K[name]).sum() for name in losses]).sum().backward()
            for lane, client in enumerate(active):
                client.add({name: total_K[lane] for name, total_K in totals_K.items()})
        for lane, row in enumerate(self.rows):
            row.grad = self.grad_KP[lane] if lane < lanes else None

    def _by_lane(self, term: Term, together: Batch) -> torch.Tensor:
        """Returns the sums (K,) of the lanes' units."""
        total_K: torch.Tensor = term.by_row(len(together.ids_BT)).view(len(self.active), -1).sum(1)
        return total_K

    def _averages(
        self, share_K: dict[str, torch.Tensor], name: str, terms: Sequence[Term], batches: Sequence[Batch]
    ) -> list[torch.Tensor]:
        totals_NK = torch.stack([self._by_lane(*pair) for pair in zip(terms, batches, strict=True)])
        mean_K = totals_NK.sum(0) * share_K[name]
        return [mean_K.repeat_interleave(len(batch.ids_BT) // len(self.active)) for batch in batches]

    def _known(self, means: Sequence[Mapping[str, float]], name: str, batch: Batch) -> torch.Tensor:
        mean_K = self._row([lane[name] for lane in means])
        return mean_K.repeat_interleave(len(batch.ids_BT) // len(means))

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Lets every lane compute as its client's reference, without gradients."""
        references = [client.training.reference for client in self.active]
        with judging(self.trainable.network), ExitStack() as at_end:
            if self.objective.reference != "round":
                at_end.enter_context(self.trainable.unmerged())
            if vectors := [reference for reference in references if reference is not None]:
                self.reference_leaves = self.trainable.layout.views(torch.stack(vectors))
            else:
                self.adapters_off = True
            try:
                yield
            finally:
                self.adapters_off, self.reference_leaves = False, None

    def _row(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=self.flat_KP.dtype, device=self.device)

    def correct(self, lane: int, correct: Correct) -> None:
        """Applies a correction to a lane's gradient."""
        correct(self.grad_KP[lane, None], self.flat_KP[lane, None])

    def clip(self, norm: float) -> None:
        """Clips the gradient of each lane in use."""
        clip(self.grad_KP[: len(self.active)], norm)

    def end(self, lane: int, training: Training) -> Vector:
        """Returns a copy of the lane's vector, or the vector minus `training.origin`."""
        flat_P = self.flat_KP[lane]
        return flat_P.clone() if training.origin is None else flat_P - training.origin

    def _forward(self, name: str, layer: Any, form: Form) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            if self.adapters_off:
                out: torch.Tensor = layer.base_layer(x)
                return out
            if x.numel() % (self.together.numel() * x.shape[-1]):
                raise RunError(f"{KEY} needs layers that see all tokens, which {name} does not: {ALONE}")
            lanes = len(self.active)
            drops = self.dropout > 0 and self.trainable.network.training
            leaves = self.reference_leaves or self._leaves(lanes)
            return form(name, layer, x, Lanes(lanes, leaves, self._dropped if drops else None), self._scale(name))

        return forward

    def _scale(self, name: str) -> float | torch.Tensor:
        """Returns the scale of a layer's products; (K, 1, 1) if lanes have different LoRA ranks."""
        layout, ranks = self.trainable.layout, [client.training.lora_rank for client in self.active]
        scales = [self.own_scales.get(name, 1.0) if rank is None else layout.scale_at(rank) for rank in ranks]
        return scales[0] if len(set(scales)) == 1 else self._row(scales)[:, None, None]

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        """Draws dropout's factor on the inputs, for each lane in the shape that its rows have alone."""
        p, (rows, tokens), lanes = self.dropout, self.together, len(self.active)
        factor_KBTI = x.new_zeros(lanes, rows // lanes, tokens, x.numel() // (rows * tokens))
        for lane, (its_rows, its_tokens) in self.shapes.items():
            client = self.active[lane]
            if client.place not in self.generators:
                self.generators[client.place] = torch.Generator(self.device).manual_seed(client.training.dropout)
            drawn = x.new_empty(its_rows, its_tokens, factor_KBTI.shape[-1])
            drawn.bernoulli_(1 - p, generator=self.generators[client.place])
            factor_KBTI[lane, :its_rows, :its_tokens] = drawn / (1 - p)
        return factor_KBTI

    def _leaves(self, lanes: int) -> dict[str, torch.Tensor]:
        """Returns the trained tensors of the first lanes: leaves of autograd whose gradients lie in `grad_KP`."""
        if lanes not in self.leaves:
            values, grads = (self.trainable.layout.views(x_KP[:lanes]) for x_KP in (self.flat_KP, self.grad_KP))
            for name, value in values.items():
                value.requires_grad_().grad = grads[name]
            self.leaves[lanes] = values
        return self.leaves[lanes]


def dropout_of(network: nn.Module) -> float:
    """Returns the probability of LoRA's dropout, which all layers share; `adapted_layers` refuses any other."""
    drops = (vars(module)["_modules"].get("lora_dropout") for module in network.modules())
    return next((drop["default"].p for drop in drops if drop and isinstance(drop["default"], nn.Dropout)), 0.0)


def _refuse_other_dropout(network: nn.Module) -> None:
    """Raises RunError if layers drop what no form draws, such as another kind of adapter's."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0 and ".lora_dropout." not in name:
            raise RunError(f"{name} drops activations, which {KEY} cannot draw for each client by itself: {ALONE}")


def adapted_layers(trainable: Trainable | Seeded) -> dict[str, tuple[Any, Form]]:
    """Returns the adapted layers by name, each with its form in lanes; RunError if lanes cannot train this model."""
    names: dict[str, list[str]] = {}
    for name in trainable.layout.names:
        layer = ADAPTER.split(name)[0]
        names.setdefault(layer, []).append(name.removeprefix(layer))
    layers = dict[str, tuple[Any, Form]]()
    for name, suffixes in names.items():
        layer = None if "" in suffixes else trainable.network.get_submodule(name)
        form = form_of(layer, suffixes)
        if form is None:
            where = name.removeprefix("base_model.model.")
            raise RunError(
                f"{KEY} works with adapters of linear layers alone, which {where} is not: leave it out of "
                f"model.peft.targets (name the attention layers there), or {ALONE}"
            )
        layers[name] = layer, form
    if trainable.flat.device.type == "cuda" and dropout_of(trainable.network) > 0:
        raise RunError(
            f"{KEY} cannot draw model.peft.dropout for each client by itself on a GPU: set it to 0, or {ALONE}"
        )
    return layers


def best_lanes(
    trainer: LocalTrainer, tokens: Tokens, clients: int, most: int, neighbors: int, start: torch.Tensor, train: Train
) -> int:
    """Returns the number of lanes (1, 2, 4, ...) that trains the most tokens a second, the smallest of about as fast.

    It is 1 if lanes cannot train the model; none is tried that might exceed the memory of all `neighbors`.
    """
    began, short = time.monotonic(), replace(train, steps=STEPS, epochs=None)
    held, free = psutil.Process().memory_info().rss, psutil.virtual_memory().available
    best, best_speed, lanes = 1, _speed(trainer, tokens, clients, 1, start, short), 2
    while lanes <= most and time.monotonic() - began < SECONDS:
        heap.forget_most()
        try:
            speed = _speed(LaneTrainer(trainer, lanes, train), tokens, clients, lanes, start, short)
        except (torch.OutOfMemoryError, RunError):
            break
        if speed > GAIN * best_speed:
            best, best_speed = lanes, speed
        elif lanes >= 4 * best:
            break
        if 2 * neighbors * (heap.most_held() - held) > SPARE * free:
            break
        if trainer.device.type == "cuda":  # twice the memory must fit into this process's share of the GPU
            total = torch.cuda.get_device_properties(trainer.device).total_memory
            share = torch.cuda.get_per_process_memory_fraction(trainer.device) * total
            if 2 * torch.cuda.max_memory_allocated(trainer.device) > share:
                break
        lanes *= 2
    return best


def _speed(
    trainer: LocalTrainer | LaneTrainer, tokens: Tokens, clients: int, lanes: int, start: torch.Tensor, train: Train
) -> float:
    """Returns the tokens a second of `lanes` clients at once, after a first step that warms up."""
    chosen = np.linspace(0, clients - 1, max(2, lanes)).astype(int).tolist()

    def trainings() -> list[Training]:
        return [Training(tokens.rows(client, "train"), start, np.random.default_rng(0), 0) for client in chosen]

    trainer.train(trainings(), replace(train, steps=1))
    began = time.monotonic()
    results = trainer.train(trainings(), train)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return sum(trained.metrics["tokens"] for trained in results) / (time.monotonic() - began)
