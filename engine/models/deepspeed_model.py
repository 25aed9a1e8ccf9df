"""Networks for the ranks of a gang: the first rank reads the weights; under stage 3 each rank reads its own slices."""

from math import prod
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from engine.config.sections import Model, Zero
from engine.messages.errors import RunError
from engine.models.adapters import with_adapters
from engine.models.base_model import causal_config, empty_network, map_base, read_base
from engine.models.deepspeed_config import ds_config
from engine.system.rendezvous import wait_for_the_first

ROWS = 1024  # rows of two tensors that are compared at a time
Stored = tuple[str, str]  # the file of a tensor, and its key there


def zero_model(model: Model, zero: Zero, seed: int, rank: int) -> torch.nn.Module:
    """Makes this rank's network with the recipe's adapters; RunError if the base cannot be read. All ranks call it."""
    if zero.stage == 3:
        network = _in_shards(model, zero)
    elif rank == 0:
        packed, buffer = read_base(model)
        network = map_base(packed, torch.from_numpy(buffer))
    else:
        with no_init_weights():
            network = empty_network(model)
    if zero.stage < 3:
        wait_for_the_first(rank)
        _tie_as_first_rank(network)
    torch.manual_seed(seed)
    trained: torch.nn.Module = with_adapters(network, model)
    if zero.checkpointing:
        network.enable_input_require_grads()
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return trained


def _in_shards(model: Model, zero: Zero) -> PreTrainedModel:
    config = causal_config(model)
    with deepspeed.zero.Init(config_dict_or_path=ds_config(model, zero)), no_init_weights():
        network: PreTrainedModel = empty_network(model, config)
    try:
        stored = _stored(network, _weight_files(model.weights))
        for target, source in list(network.all_tied_weights_keys.items()):
            if {target, source} <= stored.keys() and not _equal(stored[target], stored[source], network.dtype):
                del network.all_tied_weights_keys[target]  # the configuration says tied, but the tensors differ
        network.tie_weights(recompute_mapping=False)
        parameters = dict(network.named_parameters())
        if missing := parameters.keys() - stored.keys():
            raise RunError(
                f"the weights of model.base {model.base!r} are not whole: {', '.join(sorted(missing)[:3])} are missing"
            )
        for name, parameter in parameters.items():
            file, key = stored[name]
            with safe_open(file, framework="pt") as weights:
                _read_slice(parameter, weights.get_slice(key))
    except (OSError, SafetensorError) as error:
        raise RunError(f"the weights of model.base {model.base!r} cannot be read: {error}") from error
    return network


def _tie_as_first_rank(network: PreTrainedModel) -> None:
    """Ties weights if the first rank, which alone has read them, ties them. All ranks call it."""
    names = [[name for name, _ in network.named_parameters()]]
    untied = len(names[0])
    dist.broadcast_object_list(names)
    if len(names[0]) < untied:
        network.tie_weights()


def _stored(network: PreTrainedModel, files: list[str]) -> dict[str, Stored]:
    """Maps each tensor's name in the network to its place in the files."""
    names, stored = {name for name, _ in network.named_parameters()}, {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                stored[key if key in names else f"{network.base_model_prefix}.{key}"] = (file, key)
    return stored


def _equal(a: Stored, b: Stored, dtype: torch.dtype) -> bool:
    """Whether two stored tensors are equal as `dtype`; reads some rows at a time."""
    with safe_open(a[0], framework="pt") as file_a, safe_open(b[0], framework="pt") as file_b:
        left, right = file_a.get_slice(a[1]), file_b.get_slice(b[1])
        shape = left.get_shape()
        blocks = (slice(first, first + ROWS) for first in range(0, shape[0], ROWS))
        return shape == right.get_shape() and all(torch.equal(left[b].to(dtype), right[b].to(dtype)) for b in blocks)


def _read_slice(parameter: Any, weight: Any) -> None:
    """Copies this rank's elements of a tensor from its file; reads only the rows that hold them."""
    target, shape = parameter.ds_tensor, tuple(weight.get_shape())
    first = target.numel() * deepspeed.comm.get_rank()
    last = min(first + target.numel(), parameter.ds_numel)
    if shape != tuple(parameter.ds_shape):
        raise RunError(f"a weight has the shape {shape} in its file and {tuple(parameter.ds_shape)} in the model")
    if first >= last:
        return
    width = prod(shape[1:])  # elements of a row
    top = first // width
    rows = weight[top : -(-last // width)]
    target.data[: last - first].copy_(rows.reshape(-1)[first - top * width : last - top * width])


def _weight_files(model: Model) -> list[str]:
    """Finds the base's safetensors files in its folder or on the hub."""
    options = {"revision": model.revision, "_raise_exceptions_for_missing_entries": False}
    if file := cached_file(model.base, SAFE_WEIGHTS_NAME, **options):
        return [file]
    index = cached_file(model.base, SAFE_WEIGHTS_INDEX_NAME, **options)
    if index is None:
        raise RunError(f"model.base {model.base!r} has no safetensors, which a gang of stage 3 reads: convert it")
    return list(get_checkpoint_shard_files(model.base, index, revision=model.revision)[0])
