"""Exports the trained model as files that transformers and PEFT load: an adapter folder or a whole model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save, save_file

from engine.config.sections import Model
from engine.models.adapters import is_transposed, lora_config
from engine.models.trainable import Trainable
from strategies.core.layout import Layout

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

FILE_BYTES = 2**30


def export_files(
    trainable: Trainable, model: Model, tokenizer: PreTrainedTokenizerBase, card: str, *, merged: bool = False
) -> dict[str, bytes]:
    """Returns the model folder's files, name to content, for the vector now in `trainable`.

    LoRA gives PEFT's adapter folder. Full tuning, and LoRA with a delta merged into the base (`merged`), give a Hugging
    Face model. Both come with the tokenizer and the model card `card`.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import PreTrainedModel

    network = trainable.network
    with TemporaryDirectory() as name:
        folder = Path(name)
        if isinstance(network, PeftModel) and merged:
            network.get_base_model().save_pretrained(name, state_dict=_whole(trainable))
        elif isinstance(network, PeftModel):
            # Parameters are views into the flat vector, but safetensors saves only tensors that own their memory.
            state = {key: tensor.detach().cpu().clone() for key, tensor in get_peft_model_state_dict(network).items()}
            _save_adapter(folder, state, network, model)
        else:
            assert isinstance(network, PreTrainedModel)
            state = {key: tensor.detach().cpu().clone() for key, tensor in network.state_dict().items()}
            network.save_pretrained(name, state_dict=state)
        tokenizer.save_pretrained(name)
        (folder / "README.md").write_text(card, encoding="utf-8")
        return dict(_written(folder))


@dataclass(frozen=True)
class Sharded:
    """A vector (P,) in shards; `read(first, last)` returns any part of it."""

    layout: Layout
    read: Callable[[int, int], torch.Tensor]

    def tensors(self) -> Iterator[tuple[str, int, Callable[[], torch.Tensor]]]:
        """Yields each tensor's name, its number of elements, and a function that reads it."""
        for name, shape, first, last in self.layout.places():
            yield name, last - first, partial(self._tensor, shape, first, last)

    def _tensor(self, shape: tuple[int, ...], first: int, last: int) -> torch.Tensor:
        return self.read(first, last).view(shape)


def sharded_files(
    network: Any, vector: Sharded, model: Model, tokenizer: PreTrainedTokenizerBase, card: str
) -> Iterator[tuple[str, bytes]]:
    """Yields the same files as `export_files` for a network whose weights are in shards.

    A whole model is split into files of FILE_BYTES, or of one larger tensor; one of them is in memory at a time.
    """
    from peft import PeftModel

    with TemporaryDirectory() as name:
        folder = Path(name)
        if isinstance(network, PeftModel):
            state = {name.replace(".default.", "."): read() for name, _, read in vector.tensors()}
            _save_adapter(folder, state, network, model)
        else:
            network.config.save_pretrained(name)
            if network.generation_config is not None:
                network.generation_config.save_pretrained(name)
        tokenizer.save_pretrained(name)
        (folder / "README.md").write_text(card, encoding="utf-8")
        yield from _written(folder)
    if not isinstance(network, PeftModel):
        yield from _weight_files(vector, getattr(torch, model.dtype))


def _written(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yields the name and content of all files, also of those in subfolders, which some tokenizers write."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def _weight_files(vector: Sharded, dtype: torch.dtype) -> Iterator[tuple[str, bytes]]:
    """Yields safetensors files of the tensors, then their index."""
    groups: list[dict[str, Callable[[], torch.Tensor]]] = [{}]
    filled = total = 0
    for key, length, read in vector.tensors():
        nbytes = length * dtype.itemsize
        if groups[-1] and filled + nbytes > FILE_BYTES:
            groups.append({})
            filled = 0
        groups[-1][key] = read
        filled, total = filled + nbytes, total + nbytes
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    for file, group in zip(names, groups, strict=True):
        yield file, save({key: read().to(dtype) for key, read in group.items()}, metadata={"format": "pt"})
    files = {key: file for file, group in zip(names, groups, strict=True) for key in group}
    index = {"metadata": {"total_size": total}, "weight_map": files}
    yield "model.safetensors.index.json", json.dumps(index, indent=1).encode()


def _save_adapter(folder: Path, state: dict[str, torch.Tensor], network: PeftModel, model: Model) -> None:
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = lora_config(model)
    config.target_modules = network.peft_config["default"].target_modules
    config.inference_mode = True
    config.base_model_name_or_path = model.public_base
    config.save_pretrained(str(folder))


def _whole(trainable: Trainable) -> dict[str, torch.Tensor]:
    """Returns the state dict of the model without adapters, with their products added to the adapted weights."""
    base = trainable.network.get_base_model()
    state = {
        name.replace(".base_layer.", "."): tensor.detach().cpu().clone()
        for name, tensor in base.state_dict().items()
        if "lora_" not in name
    }
    pairs = trainable.layout.lora_pairs(trainable.flat.detach())
    for pair, layer in zip(pairs, trainable.adapted_layers(), strict=True):
        weight = state[f"{pair.name.removeprefix('base_model.model.')}.weight"]
        product_OI = (pair.scale * pair.b_OR @ pair.a_RI).cpu()
        weight.copy_(weight.float() + (product_OI.T if is_transposed(layer) else product_OI))
    return state
