"""Models for the ranks of a gang: read once, by the first rank, or under stage 3 by each rank its own slices alone."""

from math import prod
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from engine.config.sections import Lora, Model, Zero
from engine.models.base_model import causal_config, map_base, read_base, with_adapters
from engine.models.zero_limits import BUCKET, LIVE
from engine.system.rendezvous import wait_for_the_first
from strategies.core.layout import Layout

ROWS = 1024  # of two tensors that are compared at once
Stored = tuple[str, str]  # the file that a tensor lies in, and its key there


def ds_config(model: Model, zero: Zero) -> dict[str, Any]:
    """Deepspeed's configuration; steps, rates and clipping are this project's own."""
    optimization: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "overlap_comm": False,
        # One group, so that the optimizer steps once, when all gradients are there.
        "sub_group_size": 10**15,
        "stage3_max_live_parameters": LIVE,
        "stage3_prefetch_bucket_size": LIVE,
        "stage3_max_reuse_distance": 0,
    }
    if zero.offload == "cpu":
        optimization["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # deepspeed only counts by it
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step ends where the optimizer is called
        "zero_optimization": optimization,
        "gradient_clipping": 0.0,  # by default it is 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": model.dtype == "bfloat16"},
    }


def zero_model(model: Model, zero: Zero, seed: int, rank: int) -> torch.nn.Module:
    """The network with what is trained on it; ValueError where the base cannot be had.

    Stages 1 and 2: the first rank reads the weights, and deepspeed sends them to the others when its engine is made.
    """
    if zero.stage == 3:
        network = _in_shards(model, zero)
    elif rank == 0:
        packed, buffer = read_base(model)
        network = map_base(packed, torch.from_numpy(buffer))
    else:
        with no_init_weights():
            network = AutoModelForCausalLM.from_config(
                causal_config(model), dtype=getattr(torch, model.dtype), attn_implementation=model.attention
            )
    if zero.stage < 3:
        wait_for_the_first(rank)
        _tie_as_the_first(network)
    network.requires_grad_(not isinstance(model.peft, Lora))
    torch.manual_seed(seed)
    found: torch.nn.Module = with_adapters(network, model) if isinstance(model.peft, Lora) else network
    if zero.checkpointing:
        network.enable_input_require_grads()
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return found


def trained_layout(network: torch.nn.Module, model: Model) -> Layout:
    """What lies where in the flat vector, also of parameters that are cut over the ranks."""
    scale = model.peft.alpha / model.peft.r if isinstance(model.peft, Lora) else 1.0
    trained = [(name, shape_of(p)) for name, p in network.named_parameters() if p.requires_grad]
    return Layout(tuple(name for name, _ in trained), tuple(shape for _, shape in trained), scale)


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The whole parameter's shape, also where it is cut over the ranks."""
    return tuple(parameter.ds_shape) if _is_cut(parameter) else tuple(parameter.shape)


def _is_cut(parameter: torch.nn.Parameter) -> bool:
    return "ds_shape" in vars(parameter)


def _in_shards(model: Model, zero: Zero) -> PreTrainedModel:
    config = causal_config(model)
    with (
        deepspeed.zero.Init(config_dict_or_path=ds_config(model, zero)),
        no_init_weights(),
    ):
        network: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, model.dtype), attn_implementation=model.attention
        )
    try:
        stored = _stored(network, _weight_files(model))
        for target, source in list(network.all_tied_weights_keys.items()):
            if {target, source} <= stored.keys() and not _alike(stored[target], stored[source], network.dtype):
                del network.all_tied_weights_keys[target]  # a configuration says tied, and the weights are two
        network.tie_weights(recompute_mapping=False)
        parameters = dict(network.named_parameters())
        if missing := parameters.keys() - stored.keys():
            raise ValueError(
                f"the weights of model.base {model.base!r} are not whole: {', '.join(sorted(missing)[:3])} are missing"
            )
        for name, parameter in parameters.items():
            file, key = stored[name]
            with safe_open(file, framework="pt") as weights:
                _read_own(parameter, weights.get_slice(key))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights of model.base {model.base!r} cannot be read: {error}") from error
    return network


def _tie_as_the_first(network: PreTrainedModel) -> None:
    """Ties a network's weights where the first rank's are, which alone has seen them; all ranks call it."""
    names = [[name for name, _ in network.named_parameters()]]
    own = len(names[0])
    dist.broadcast_object_list(names)
    if len(names[0]) < own:
        network.tie_weights()


def _stored(network: PreTrainedModel, files: list[str]) -> dict[str, Stored]:
    """Where the tensors of these files lie, by their names in the network."""
    names, found = {name for name, _ in network.named_parameters()}, {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                found[key if key in names else f"{network.base_model_prefix}.{key}"] = (file, key)
    return found


def _alike(one: Stored, other: Stored, dtype: torch.dtype) -> bool:
    """Whether two tensors are the same as `dtype`; neither is in memory as a whole."""
    with safe_open(one[0], framework="pt") as its, safe_open(other[0], framework="pt") as others:
        left, right = its.get_slice(one[1]), others.get_slice(other[1])
        shape = left.get_shape()
        return shape == right.get_shape() and all(
            torch.equal(left[first : first + ROWS].to(dtype), right[first : first + ROWS].to(dtype))
            for first in range(0, shape[0], ROWS)
        )


def _read_own(parameter: Any, weight: Any) -> None:
    """Copies this rank's elements of a tensor from its file, and no more than the rows they lie in."""
    own, shape = parameter.ds_tensor, tuple(weight.get_shape())
    first = parameter.ds_tensor.numel() * deepspeed.comm.get_rank()
    last = min(first + own.numel(), parameter.ds_numel)
    if shape != tuple(parameter.ds_shape):
        raise ValueError(f"a weight has the shape {shape} in its file and {tuple(parameter.ds_shape)} in the model")
    if first >= last:
        return
    across = prod(shape[1:])  # elements of a row
    top = first // across
    rows = weight[top : -(-last // across)]
    own.data[: last - first].copy_(rows.reshape(-1)[first - top * across : last - top * across])


def _weight_files(model: Model) -> list[str]:
    """The base's safetensors files, from its folder or the hub."""
    where = {"revision": model.revision}
    found = cached_file(model.base, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **where)
    if found is not None:
        return [found]
    index = cached_file(model.base, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **where)
    if index is None:
        raise ValueError(f"model.base {model.base!r} has no safetensors, which a gang of stage 3 reads: convert it")
    return list(get_checkpoint_shard_files(model.base, index, **where)[0])
