"""Exports the trained model as files that transformers and PEFT load: an adapter folder or a whole model."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from copy import copy, deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save, save_file

from engine.config.federation import Federation
from engine.config.sections import Model
from engine.messages.exposure import PromptSizes
from engine.models.adapters import is_transposed, peft_config
from engine.models.prefixed import STORED, Prefixed
from engine.models.seeded import Seeded
from engine.models.stored_weights import persistent_buffers
from engine.models.trainable import Trainable
from engine.objectives.base import Tokenizer
from engine.objectives.figures import shown_units
from engine.objectives.templates import undated
from engine.records.metrics import LossTable, with_unit
from strategies.core.layout import Layout

FILE_BYTES = 2**30
Read = Callable[[int, int], torch.Tensor]  # returns any part of the vector (P,), from one element to another
Place = tuple[str, tuple[int, ...], int, int]
CARD_SPLITS = {
    "heldout": "held-out rows of training clients",
    "unseen": "clients that never trained",
    "server": "rows of the server",
}


def export_files(
    trainable: Trainable | Seeded, model: Model, tokenizer: Tokenizer, card: str, *, merged: bool = False
) -> dict[str, bytes]:
    """Returns the model folder's files, name to content, for the vector now in `trainable`.

    LoRA gives PEFT's adapter folder. Full tuning, and LoRA with a delta merged into the base (`merged`), give a Hugging
    Face model. Both come with the tokenizer and the model card `card`.
    """
    from peft import PeftModel

    network = trainable.network

    def save(folder: Path) -> None:
        if isinstance(network, Prefixed):
            save_prompt(folder, trainable.flat.detach().cpu(), network.vectors(), network.sizes, model, tokenizer)
        elif isinstance(network, PeftModel) and not merged:
            flat = trainable.flat.detach().cpu()
            _save_adapter(folder, trainable.layout, lambda first, last: flat[first:last].clone(), network, model)
        else:
            base = network.get_base_model() if isinstance(network, PeftModel) else network
            base.save_pretrained(folder, state_dict=_full_state_dict(trainable, base))
            if isinstance(trainable, Seeded):
                (folder / "seeds.json").write_text(json.dumps(trainable.replay()), encoding="utf-8")

    return dict(_folder_files(save, tokenizer, card))


def sharded_files(
    network: Any, layout: Layout, read: Read, model: Model, tokenizer: Tokenizer, card: str
) -> Iterator[tuple[str, bytes]]:
    """Yields the files of `export_files` for weights in shards, one of at most FILE_BYTES (or one tensor) at a time."""
    from peft import PeftModel

    def save(folder: Path) -> None:
        if isinstance(network, PeftModel):
            _save_adapter(folder, layout, read, network, model)
            return
        network.config.save_pretrained(folder)
        if getattr(network, "generation_config", None) is not None:
            network.generation_config.save_pretrained(folder)

    yield from _folder_files(save, tokenizer, card)
    if not isinstance(network, PeftModel):
        yield from _weight_files(layout, read, getattr(torch, model.dtype), persistent_buffers(network))


def _folder_files(save: Callable[[Path], None], tokenizer: Tokenizer, card: str) -> Iterator[tuple[str, bytes]]:
    """Yields the name and content of all files, also of those in subfolders, which some tokenizers write."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        save(folder)
        published = deepcopy(tokenizer)
        published.chat_template = undated(tokenizer.chat_template)
        published.save_pretrained(name)
        (folder / "README.md").write_text(card, encoding="utf-8")
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                yield path.relative_to(folder).as_posix(), path.read_bytes()


def _weight_files(
    layout: Layout, read: Read, dtype: torch.dtype, buffers: dict[str, torch.Tensor]
) -> Iterator[tuple[str, bytes]]:
    """Yields safetensors files of the tensors, the buffers in the first, then their index."""
    groups, filled = [list[Place]()], 0
    for place in layout.places():
        nbytes = (place[3] - place[2]) * dtype.itemsize
        if groups[-1] and filled + nbytes > FILE_BYTES:
            groups, filled = [*groups, []], 0
        groups[-1].append(place)
        filled += nbytes
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    for file, group in zip(names, groups, strict=True):
        tensors = {name: read(first, last).view(shape).to(dtype) for name, shape, first, last in group}
        tensors |= {name: buffer.cpu() for name, buffer in buffers.items()} if file == names[0] else {}
        yield file, save(tensors, metadata={"format": "pt"})
    files = {name: file for file, group in zip(names, groups, strict=True) for name, *_ in group}
    files |= dict.fromkeys(buffers, names[0])
    index = {"metadata": {"total_size": layout.size * dtype.itemsize}, "weight_map": files}
    yield "model.safetensors.index.json", json.dumps(index, indent=1).encode()


def _save_adapter(folder: Path, layout: Layout, read: Read, network: Any, model: Model) -> None:
    from peft import get_peft_model_state_dict

    trained = {name: read(first, last).view(shape) for name, shape, first, last in layout.places()}
    shared = {name: matrix for name, matrix in network.named_buffers(remove_duplicate=False) if ".vera_" in name}
    # "auto" would ask the hub whether the vocabulary has grown.
    state = get_peft_model_state_dict(network, shared | trained, save_embedding_layers=False)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = copy(network.peft_config["default"])
    for key, value in list(vars(config).items()):
        if isinstance(value, set):  # which each process would write in another order
            setattr(config, key, sorted(value))
    config.inference_mode = True
    config.base_model_name_or_path = model.public_base
    config.save_pretrained(str(folder))


def ends_files(trainable: Any, tokenizer: Tokenizer, card: str) -> dict[str, bytes]:
    """Returns the files of trained ends by their names in the base, without anything else of that."""
    flat = trainable.flat.detach().cpu()
    views = {name: view.clone() for name, view in trainable.layout.views(flat).items()}
    how = "\n`load_state_dict(ends, strict=False)` puts the trained layers of `ends.safetensors` into the base.\n"

    def save(folder: Path) -> None:
        save_file(views, folder / "ends.safetensors", metadata={"format": "pt"})

    return dict(_folder_files(save, tokenizer, card + how))


def prompt_files(
    vector: torch.Tensor, places: torch.Tensor | None, sizes: PromptSizes, model: Model, tokenizer: Tokenizer, card: str
) -> dict[str, bytes]:
    """Returns the files of `export_files` for a prompt, from what a client without the base has of it.

    `vector` (P,) is what was searched or trained, and `places` the vectors that it stands for; None: it is in words,
    whose embeddings the base's owner has.
    """
    return dict(
        _folder_files(lambda folder: save_prompt(folder, vector, places, sizes, model, tokenizer), tokenizer, card)
    )


def save_prompt(
    folder: Path,
    vector: torch.Tensor,
    places: torch.Tensor | None,
    sizes: PromptSizes,
    model: Model,
    tokenizer: Tokenizer,
) -> None:
    """Writes the adapter of PEFT, and a prompt in words as text beside it."""
    if sizes.tokens:
        ids = vector.long().tolist()
        words = {"text": tokenizer.decode(ids), "ids": ids}
        (folder / "prompt.json").write_text(json.dumps(words, indent=1), encoding="utf-8")
    if places is None:
        return
    learned = places.detach().float().cpu().contiguous()
    save_file({STORED: learned}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = peft_config(model)
    config.num_layers, config.num_transformer_submodules = sizes.layers, 1
    config.num_attention_heads = sizes.heads if sizes.is_prefix else sizes.attention_heads
    config.token_dim = sizes.heads * sizes.head_width if sizes.is_prefix else sizes.width
    config.inference_mode, config.base_model_name_or_path = True, model.public_base
    config.save_pretrained(str(folder))


def _full_state_dict(trainable: Trainable | Seeded, base: Any) -> dict[str, torch.Tensor]:
    """Returns the state dict of the model without adapters, with their products added to the adapted weights."""
    # Parameters are views into the flat vector, but safetensors saves only tensors that own their memory.
    beside = ("lora_", ".original_module.")
    weights = {name: tensor for name, tensor in base.state_dict().items() if not any(part in name for part in beside)}
    state = {_plain(name): tensor.detach().cpu().clone() for name, tensor in weights.items()}
    pairs = trainable.layout.lora_pairs(trainable.flat.detach())
    for pair, layer in zip(pairs, trainable.adapted_layers(), strict=True):
        weight = state[f"{pair.name.removeprefix('base_model.model.')}.weight"]
        product_OI = (pair.scale * pair.b_OR @ pair.a_RI).cpu()
        weight.copy_(weight.float() + (product_OI.T if is_transposed(layer) else product_OI))
    return state


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")


def model_card(
    federation: Federation,
    tables: Mapping[str, LossTable],
    store: dict[str, Any],
    *,
    merged: bool,
    spent: str | None = None,
) -> str:
    """Writes the model folder's README.md; with `merged` that is a whole model, `spent` is the privacy budget.

    `tables` are those of "loss" and of the figures that the objective shows.
    """
    model, train = federation.model, federation.train
    adapter = model.peft.peft_class is not None and not merged
    training = store["clients"] - store["unseen_clients"]
    revision = f" at revision `{model.revision}`" if model.revision else ""
    quantized = f"- Trained on the base as `{model.quantize!r}` holds it.\n" if model.quantize else ""
    begun = "- Begun from an earlier model (`model.start`).\n" if model.start else ""
    amount = f"{train.steps} steps" if train.steps is not None else f"{train.epochs} epochs"
    units = shown_units(train.objective)
    means = "".join(_card_table(with_unit(name, units[name]), table) for name, table in tables.items())
    kind = "AutoModelForSequenceClassification" if federation.scores else "AutoModelForCausalLM"
    trust = ", trust_remote_code=True" if model.trust_remote_code else ""
    labels = ", num_labels=1" if federation.scores else ""
    pad = "base.config.pad_token_id = tokenizer.pad_token_id  # by which it finds a text's last token\n"
    pad = f'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")\n{pad}' if federation.scores else ""
    load = (
        "from peft import PeftModel\n"
        f"from transformers import {kind}{', AutoTokenizer' if pad else ''}\n\n"
        f'base = {kind}.from_pretrained("{model.public_base}"{labels}{trust})\n{pad}'
        'model = PeftModel.from_pretrained(base, "path/of/this/folder")  # .merge_and_unload() folds it into the base'
        if adapter
        else f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("path/of/this/folder"{trust})'
    )
    privacy = f"- Differential privacy: {spent}. The losses above are outside of it.\n" if spent else ""
    source = re.sub(r"(?<=['\"])(file://)?/([^'\"]*/)?", "", store["source"])  # no folders of absolute paths
    what = (
        f"{model.peft.title} for"
        if adapter
        else "A whole model: merged products and adapters on"
        if merged
        else "All of"
    )
    return f"""---
base_model: {model.public_base}
library_name: {"peft" if adapter else "transformers"}
pipeline_tag: {"text-classification" if federation.scores else "text-generation"}
tags: [fedpost, federated]
---
# {federation.name}

{what} `{model.public_base}`{revision}, trained by federated learning (objective `{train.objective.kind}`).

- Strategy `{federation.strategy!r}`, {federation.rounds} rounds, seed {federation.seed}.
- {federation.cohort.expected(training):g} of {training} clients a round, {amount} of batch {train.batch} each.
- Data: {source}.
{quantized}{begun}{privacy}
{means}```python
{load}
```

The base model's license holds for what is derived from it.
"""


def _card_table(title: str, table: LossTable) -> str:
    """A table of splits by columns; nothing without rows."""
    lines = [
        f"| {text} | " + " | ".join(f"{column[s]:.4f}" if s in column else "" for column in table.values()) + " |"
        for s, text in CARD_SPLITS.items()
        if any(s in column for column in table.values())
    ]
    header = f"| {title} | {' | '.join(table)} |\n|---{'|---' * len(table)}|\n"
    return f"{header}{chr(10).join(lines)}\n\n" if lines else ""
