"""Which families of models work: each is checked on a tiny random model, against plain transformers and PEFT.

The same checks make the table of `fedpost models --table` and are the tests of the families.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open

from engine.config.adapters import FullTuning, Lora
from engine.config.quantize import BitsAndBytes
from engine.config.sections import Model
from engine.config.train import Sgd, Train
from engine.messages.errors import RunError
from engine.models.adapters import is_linear
from engine.models.base_model import PackedBase, empty_network, map_base, read_base
from engine.models.export import export_files
from engine.models.quantized import loading_options
from engine.models.stored_weights import refuse_missing, stored_tensors, weight_files
from engine.models.trainable import Trainable
from engine.objectives.base import Context
from engine.objectives.sft import Sft
from engine.training.lane_probe import random_sizes
from engine.training.lanes import LaneTrainer
from engine.training.local_training import LocalTrainer
from engine.training.step_loop import Training
from experiments.preflight.family_list import COLUMNS, family_config
from experiments.preflight.shrunk_config import shrunk

YES = "yes"
CLOSE = 1e-5  # of two computations of the same, in float32
LORA = Lora(r=2, alpha=4)
NF4 = BitsAndBytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")
STEPS = Train(steps=2, batch=2, optimizer=Sgd(lr=0.1), max_length=16)


class Vocabulary:
    """A tokenizer's tokens, without the tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0
    chat_template = None

    def __len__(self) -> int:
        return 64

    def save_pretrained(self, folder: str) -> None:
        """Saves nothing."""


@contextmanager
def tiny_base(family: str) -> Iterator["TinyBase"]:
    """A tiny random model of a family, in a folder that is there meanwhile."""
    with TemporaryDirectory(prefix="fedpost-family-") as name, _quiet():
        yield TinyBase(shrunk(family_config(family), Vocabulary()), Path(name))


def check(base: "TinyBase") -> dict[str, str]:
    """The result of each check, by column: yes, with what is left out, or why not."""
    before = base.buffer.copy()
    results = {column: _result(run, base) for column, run in CHECKS.items()}
    if not np.array_equal(before, base.buffer):
        results["full"] = "no: the model changes its weights in place"
    return results


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _result(run: Callable[["TinyBase"], str], base: "TinyBase") -> str:
    try:
        return run(base)
    except Exception as error:  # whatever a library of another version raises
        return f"no: {type(error).__name__}: {str(error).strip().splitlines()[0]}".replace(base.model.base, "the base")


class TinyBase:
    """A saved tiny model of random weights, as fedpost reads it, and two rows of tokens."""

    def __init__(self, config: Any, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.zeroed = sorted({name for name, _ in random_sizes(config.to_dict())})
        _set_zero(config, self.zeroed)
        torch.manual_seed(0)
        network: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in network.parameters():  # many start at zero, or as copies of each other
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        network.save_pretrained(folder)
        self.model = Model(base=str(folder), attention="eager", peft=LORA)
        self.packed, self.buffer = read_base(self.model)
        vocabulary = len(Vocabulary())
        rows = [
            [(7 * row + 5 * place + place * place) % (vocabulary - 3) + 3 for place in range(6 + 2 * row)]
            for row in range(4)
        ]
        masks = [[int(place > row) for place in range(len(tokens))] for row, tokens in enumerate(rows)]
        self.rows = pa.record_batch(
            {"input_ids": pa.array(rows, pa.list_(pa.int32())), "mask": pa.array(masks, pa.list_(pa.int8()))}
        )

    def plain(self) -> Any:
        """The model as transformers loads it."""
        from transformers import AutoModelForCausalLM

        options = {"attn_implementation": "eager", "dtype": torch.float32, **loading_options(self.model)}
        return AutoModelForCausalLM.from_pretrained(self.model.base, **options)

    def layers(self) -> list[str]:
        """The names of the linear layers, the head's not among them."""
        with torch.device("meta"):
            network = empty_network(self.model, self.packed.config)
        head = network.get_output_embeddings()
        return [name for name, layer in network.named_modules() if is_linear(layer) and layer is not head]

    @cached_property
    def adapted(self) -> tuple[Trainable, str]:
        """The model with adapters of all linear layers, and a note on those that are left out."""
        trainable = self.trainable(LORA)
        excluded = trainable.network.peft_config["default"].exclude_modules
        return trainable, f", without {' and '.join(excluded)}" if excluded else ""

    def experts(self) -> list[Lora]:
        """The adapter of experts' weights that are no layers, if there are any."""
        with torch.device("meta"):
            network = empty_network(self.model, self.packed.config)
        names = {
            ".".join(name.split(".")[-2:])
            for name, p in network.named_parameters()
            if p.ndim == 3 and "experts" in name
        }
        return [replace(LORA, targets=(), target_parameters=tuple(sorted(names)))] if names else []

    def trainable(self, peft: Lora | FullTuning) -> Trainable:
        """The model as fedpost trains it; adapters start with products that are not zero."""
        packed: PackedBase = self.packed
        trainable = Trainable(map_base(packed, torch.from_numpy(self.buffer)), replace(self.model, peft=peft), 3)
        if peft.peft_class is not None:
            noise = torch.randn(trainable.layout.size, generator=torch.Generator().manual_seed(1))
            trainable.flat.data.add_(noise, alpha=0.05)
            trainable.initial = trainable.flat.detach().clone()
        return trainable


def full_tuning(base: TinyBase) -> str:
    """Loss and gradients of all parameters are those of plain transformers."""
    return _same_gradients(base, base.trainable(FullTuning()), base.plain()) or YES


def adapters(base: TinyBase) -> str:
    """Loss, gradients and the exported adapter are those of plain transformers and PEFT: all layers, then experts."""
    linear, beside = base.adapted
    for tried, trainable in [(LORA, linear), *((experts, base.trainable(experts)) for experts in base.experts())]:
        plain = plain_adapters(base, tried, trainable)
        if different := _same_gradients(base, trainable, plain) or _same_export(base, trainable, plain):
            return different
    return YES + beside


def lanes(base: TinyBase) -> str:
    """Clients in lanes end where each ends alone; otherwise without the base's dropout, or on attention alone."""
    trainable, beside = base.adapted
    beside += f", with {', '.join(base.zeroed)} = 0" if base.zeroed else ""
    try:
        return _same_lanes(base, trainable) or YES + beside
    except RunError as error:
        refused = next((reason for said, reason in REFUSALS.items() if said in str(error)), str(error))
        # PEFT takes some names of feed-forward layers for those of experts' weights.
        names = {name.rpartition(".")[2] for name in base.layers() if "att" in name}
        names -= {"gate_proj", "up_proj", "down_proj"}
        if refused in SOME_LAYERS and names:
            attention = base.trainable(replace(LORA, targets=tuple(sorted(names))))
            return _same_lanes(base, attention) or f"attention alone: {refused}"
        return f"no: {refused}"


def gangs(base: TinyBase) -> str:
    """The names and shapes of all tensors in the files are those in memory, as ranks that read slices need it."""
    with torch.device("meta"):
        network = empty_network(base.model, base.packed.config)
    network.tie_weights()
    try:
        stored = stored_tensors(network, weight_files(base.model))
        refuse_missing(network, stored, base.model.base)
    except RunError as error:
        if "other pieces" not in str(error):
            raise
        return "stages 1, 2: stored in other pieces"
    for name, parameter in network.named_parameters():
        file, key = stored[name]
        with safe_open(file, framework="pt") as weights:
            if tuple(weights.get_slice(key).get_shape()) != tuple(parameter.shape):
                return f"no: {name} has another shape in its file"
    return YES


def quantized(base: TinyBase) -> str:
    """Loss and gradients of adapters on a base in 4 bits are those of plain transformers, bitsandbytes and PEFT."""
    model, beside = replace(base.model, quantize=NF4), ""
    try:
        packed, buffer = read_base(model)
    except RunError as error:
        if not (refused := re.search(r"cannot quantize (\w+), whose weight the model reads past", str(error))):
            raise
        skipped, beside = (refused[1], "lm_head"), f", without {refused[1]}"
        model = replace(model, quantize=replace(NF4, llm_int8_skip_modules=skipped))
        packed, buffer = read_base(model)
    held = copy(base)
    held.model, held.packed, held.buffer = model, packed, buffer
    plain = plain_adapters(held, LORA, trainable := held.trainable(LORA))
    if not any(type(layer).__name__ == "Linear4bit" for layer in trainable.network.modules()):
        return "no: it has no plain linear layers"
    return _same_gradients(held, trainable, plain) or YES + beside


CHECKS = dict(zip(COLUMNS, (adapters, full_tuning, lanes, gangs, quantized), strict=True))
# What the refusals of lanes say, shortly.
SOME_LAYERS = ("experts' weights are no layers", "some layers do not see all tokens in order")
REFUSALS = {"linear layers alone": SOME_LAYERS[0], "row by row": SOME_LAYERS[1], "random": "random numbers in training"}


def _set_zero(config: Any, names: list[str]) -> None:
    for name, value in list(vars(config).items()):
        if name in names:
            setattr(config, name, 0.0)
        elif hasattr(value, "to_dict"):  # a section
            _set_zero(value, names)


def plain_adapters(base: TinyBase, peft: Lora, trainable: Trainable) -> Any:
    """Plain PEFT's model on the plain base, with the adapter's weights."""
    from peft import LoraConfig, get_peft_model

    layers = peft.targets if isinstance(peft.targets, str) else list(peft.targets)
    parameters = list(peft.target_parameters) if peft.target_parameters else None
    options: dict[str, Any] = {"target_modules": layers, "target_parameters": parameters, "task_type": "CAUSAL_LM"}
    options["exclude_modules"] = trainable.network.peft_config["default"].exclude_modules
    config = LoraConfig(r=LORA.r, lora_alpha=LORA.alpha, **options)
    adapted: Any = get_peft_model(base.plain(), config)
    values = trainable.layout.views(trainable.flat.detach())
    named = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    if named.keys() != values.keys():
        raise RunError(f"plain PEFT trains other tensors, such as {min(named.keys() ^ values.keys())}")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(values[name])
    return adapted


def _same_gradients(base: TinyBase, trainable: Trainable, plain: Any) -> str:
    """What differs between fedpost's loss and gradients and those of a plain model with the same weights; or ""."""
    objective = Sft()
    batch = objective.collate(base.rows, 0)
    trainable.network.train()
    torch.manual_seed(0)  # some routers draw
    term = objective.terms(trainable.network, batch, Context())["nll"]
    loss = term.total() / batch.learned
    trainable.grad.zero_()
    loss.backward()
    plain.train()
    torch.manual_seed(0)
    expected = plain(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, labels=batch.labels_BT).loss
    expected.backward()
    if not _close(loss, expected):
        return f"no: the loss is {loss:.6f} and not {expected:.6f}"
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    for name, grad in trainable.layout.views(trainable.grad).items():
        if "lora_B" in name and not grad.any():
            return f"no: the adapter {name} has no effect"
        if not _close(grad, torch.zeros_like(grad) if wanted[name] is None else wanted[name]):
            return f"no: the gradient of {name} differs"
    return ""


def _same_export(base: TinyBase, trainable: Trainable, adapted: Any) -> str:
    """What differs between the model in memory and the exported adapter on the plain base; or ""."""
    from peft import PeftModel

    ids = torch.arange(12).view(2, 6) + 3
    trainable.network.eval()
    with TemporaryDirectory() as name, torch.no_grad():
        for file, content in export_files(trainable, base.model, Vocabulary(), "card").items():
            (Path(name) / file).write_bytes(content)
        loaded: Any = PeftModel.from_pretrained(adapted.unload(), name).eval()
        if not _close(trainable.network(input_ids=ids).logits, loaded(input_ids=ids).logits):
            return "no: the exported adapter gives other logits"
    return ""


def _same_lanes(base: TinyBase, trainable: Trainable) -> str:
    """What differs between three clients in lanes and each alone; or ""."""
    alone = LocalTrainer(trainable, 0, STEPS)
    trainer, start = LaneTrainer(alone, 3, STEPS), trainable.initial
    parts = [base.rows.slice(0, 3), base.rows.slice(1, 1), base.rows.slice(2, 2)]

    def trainings() -> list[Training]:
        return [Training(rows, start, np.random.default_rng(number), number) for number, rows in enumerate(parts)]

    together = trainer.train(trainings(), STEPS)
    for result, training in zip(together, trainings(), strict=True):
        (single,) = alone.train([training], STEPS)
        if not _close(result.end - start, single.end - start):
            return f"no: the update differs by {(result.end - single.end).abs().max():.1g}"
    return ""


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether the largest difference is at most CLOSE, of the largest value or of 1."""
    largest = theirs.detach().abs().max().clamp(min=1.0)
    return bool((ours.detach() - theirs.detach()).abs().max() <= CLOSE * largest)
