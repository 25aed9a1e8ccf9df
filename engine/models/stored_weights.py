"""The safetensors files of a base: which of their tensors is which of the network's, for ranks that read slices.

Functions import transformers, which the driver never needs.
"""

from collections.abc import Collection
from typing import Any

import torch
from safetensors import safe_open

from engine.config.sections import Model
from engine.messages.errors import RunError

Stored = tuple[str, str]  # the file of a tensor, and its key there


def stored_tensors(network: Any, files: list[str]) -> dict[str, Stored]:
    """Maps each tensor's name in the network to its place in the files, whose keys may have older spellings."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    prefix = network.base_model_prefix
    renamings = [step for step in get_model_conversion_mapping(network) if isinstance(step, WeightRenaming)]
    names, stored = network.state_dict().keys(), dict[str, Stored]()
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                renamed = apply_renamings(key, renamings)
                spellings = (key, renamed, f"{prefix}.{renamed}", renamed.removeprefix(f"{prefix}."))
                stored[next((name for name in spellings if name in names), key)] = (file, key)
    return stored


def refuse_missing(network: Any, stored: dict[str, Stored], base: str, new: Collection[str] = ()) -> None:
    """Raises RunError if a tensor of the network is not in the files, and is no `new` one."""
    needed = ({name for name, _ in network.named_parameters()} | persistent_buffers(network).keys()) - {*new}
    if missing := sorted(needed - stored.keys()):
        if unused := sorted(stored.keys() - network.state_dict().keys()):
            raise RunError(
                f"a gang of stage 3 reads tensors by their names, and model.base {base!r} stores {missing[0]} in other "
                f"pieces, such as {unused[0]}: set clients.zero.stage = 2, or save the base in the form that it has in "
                f"memory (save_pretrained with save_original_format=False)"
            )
        raise RunError(f"the weights of model.base {base!r} are not whole: {', '.join(missing[:3])} are missing")


def persistent_buffers(network: Any) -> dict[str, torch.Tensor]:
    """The buffers that belong to the weights, such as biases of experts' scores."""
    kept = network.state_dict().keys()
    return {name: buffer for name, buffer in network.named_buffers() if name in kept}


def weight_files(model: Model) -> list[str]:
    """Finds the base's safetensors files in its folder or on the hub."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    options = {"revision": model.revision, "_raise_exceptions_for_missing_entries": False}
    if file := cached_file(model.base, SAFE_WEIGHTS_NAME, **options):
        return [file]
    index = cached_file(model.base, SAFE_WEIGHTS_INDEX_NAME, **options)
    if index is None:
        raise RunError(f"model.base {model.base!r} has no safetensors, which a gang of stage 3 reads: convert it")
    return list(get_checkpoint_shard_files(model.base, index, revision=model.revision)[0])
