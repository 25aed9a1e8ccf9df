"""Networks for the ranks of a gang: the first rank reads the weights; under stage 3 each rank reads its own slices."""

from math import prod
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from engine.config.sections import Model, Zero
from engine.messages.errors import RunError
from engine.models.adapters import drawn_head, with_adapters
from engine.models.base_model import SCORE, causal_config, empty_network, map_base, read_base
from engine.models.deepspeed_config import ds_config
from engine.models.stored_weights import Stored, persistent_buffers, refuse_missing, stored_tensors, weight_files
from engine.system.rendezvous import wait_for_the_first

ROWS = 1024  # rows of two tensors that are compared at a time


def zero_model(model: Model, zero: Zero, seed: int, rank: int, *, scores: bool = False) -> torch.nn.Module:
    """Makes this rank's network with the recipe's adapters; RunError if the base cannot be read. All ranks call it.

    With `scores` it gives one score for each text.
    """
    if zero.stage == 3:
        network = _in_shards(model, zero, seed, scores=scores)
    elif rank == 0:
        packed, buffer = read_base(model, scores=scores)
        network = map_base(packed, torch.from_numpy(buffer))
    else:
        with no_init_weights():
            network = empty_network(model, scores=scores)
    if zero.stage < 3:
        wait_for_the_first(rank)
        _tie_as_first_rank(network)
        for tensor in persistent_buffers(network).values():  # DeepSpeed gives the other ranks parameters alone
            dist.broadcast(tensor, 0)
    torch.manual_seed(seed)
    trained: torch.nn.Module = with_adapters(network, model)
    if zero.checkpointing:
        network.enable_input_require_grads()
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return trained


def _in_shards(model: Model, zero: Zero, seed: int, *, scores: bool) -> PreTrainedModel:
    config = causal_config(model, scores=scores)
    with deepspeed.zero.Init(config_dict_or_path=ds_config(model, zero)), no_init_weights():
        network: PreTrainedModel = empty_network(model, config, scores=scores)
    try:
        stored = stored_tensors(network, weight_files(model.weights))
        for target, source in list(network.all_tied_weights_keys.items()):
            if {target, source} <= stored.keys() and not _equal(stored[target], stored[source], network.dtype):
                del network.all_tied_weights_keys[target]  # the configuration says tied, but the tensors differ
        network.tie_weights(recompute_mapping=False)
        parameters = dict(network.named_parameters())
        new = {name: parameters.pop(name) for name in (f"{SCORE}.weight",) if scores and name not in stored}
        refuse_missing(network, stored, model.base, new)
        for head in new.values():
            torch.manual_seed(seed)
            with deepspeed.zero.GatheredParameters([head], modifier_rank=0):
                head.data.copy_(drawn_head(head.shape[1]))
        for name, parameter in parameters.items():
            file, key = stored[name]
            with safe_open(file, framework="pt") as weights:
                _read_slice(parameter, weights.get_slice(key))
        for name, buffer in persistent_buffers(network).items():
            file, key = stored[name]
            with safe_open(file, framework="pt") as weights:
                buffer.copy_(weights.get_tensor(key))
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
