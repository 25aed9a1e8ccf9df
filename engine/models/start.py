"""Reads the vector that rounds begin from out of an adapter's folder. Legend: P trained parameters, S of a shard."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.config.adapters import CHANGES_BASE
from engine.config.sections import Model
from engine.messages.errors import RunError
from engine.models.adapters import HEAD
from strategies.core.layout import Layout
from strategies.core.protocol import Vector

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SHARED = "base_model.vera_"  # VeRA's random matrices, which follow from their key
# Options that change what the same numbers mean.
MEANING = {"use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "projection_prng_key", "block_share"}


def adapter_start(
    model: Model, layout: Layout, intervals: Sequence[tuple[int, int]] | None = None
) -> torch.Tensor | None:
    """Reads the start's vector (P,), or these intervals of it, one after another; None where weights are the start.

    Float32, on the CPU; NaN where the start has no head, which is new then. RunError if the recipe names no start that
    fits what is trained.
    """
    if model.start is None or model.peft.peft_class is None:
        return None
    folder = Path(model.start)
    _check_options(folder, model, layout)
    try:
        with safe_open(folder / TENSORS, framework="pt") as tensors:
            keys = [key for key in tensors.keys() if not key.startswith(SHARED)]  # noqa: SIM118
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in keys}
            _check_shapes(shapes, model, layout)
            parts = []
            for first, last in intervals or [(0, layout.size)]:
                for name, _, start, end in layout.places():
                    if (low := max(first, start)) >= (high := min(last, end)):
                        continue
                    if stored_name(name) not in shapes:
                        parts.append(torch.full((high - low,), math.nan))
                        continue
                    flat = tensors.get_tensor(stored_name(name)).reshape(-1)
                    parts.append(_finite(flat[low - start : high - start].float(), folder))
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder / TENSORS} (model.start) cannot be read: {error}") from error
    return torch.cat(parts) if parts else torch.zeros(0)


def begun(start: Vector | None, weights: Vector) -> Vector:
    """Returns the start, with the model's own `weights` where it has none."""
    return weights if start is None else torch.where(start.isnan(), weights, start)


def _finite(part: torch.Tensor, folder: Path) -> torch.Tensor:
    if not torch.isfinite(part).all():
        raise RunError(f"{folder / TENSORS} (model.start) holds numbers that are not finite: choose another start")
    return part


def stored_name(name: str) -> str:
    """Returns the name under which PEFT stores a trained tensor."""
    name = name.replace(".modules_to_save.default.", ".").replace(".default", "")
    return name.removesuffix(".weight") if ".lora_magnitude_vector" in name else name


def _check_options(folder: Path, model: Model, layout: Layout) -> None:
    """Raises RunError if the adapter is of another kind than the recipe's, or its numbers mean something else."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config["peft_type"].lower()
        if kind == "lora" and min(config["r"], config["lora_alpha"]) <= 0:
            raise ValueError("r and lora_alpha must be above 0")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{folder / CONFIG} (model.start) is not that of an adapter ({type(error).__name__}: {error})"
        raise RunError(f"{what}: name a folder that PEFT or fedpost has written") from error
    if kind != (model.peft.peft_type or model.peft.kind):
        what = f"the adapter {folder} (model.start) is of kind {kind!r}, and the recipe's of {model.peft.kind!r}"
        raise RunError(f"{what}: set model.peft.kind to the adapter's")
    initialization = config.get("init_lora_weights")
    if isinstance(initialization, str) and initialization.lower().startswith(CHANGES_BASE):
        raise RunError(
            f"the adapter {folder} (model.start) was begun with init_lora_weights = {initialization!r}, which changes "
            f"the base's weights too: convert it to a plain one as PEFT's save_pretrained does "
            f"(path_initial_model_for_weight_conversion)"
        )
    options = model.peft.options()
    for key in sorted(MEANING & options.keys()):
        theirs, ours = (each.get(key) or None for each in (config, options))
        if key.endswith("_pattern"):  # without those that PEFT derives for experts' weights
            theirs = {k: v for k, v in (theirs or {}).items() if not k.startswith(".*\\.") or k in (ours or {})} or None
        if theirs != ours:
            what = f"the adapter {folder} (model.start) was made with {key} = {theirs!r}, and the recipe's has {ours!r}"
            raise RunError(f"{what}: set model.peft.{key} to the adapter's")
    if model.peft.lora_rank is None:
        return
    rank, alpha = config["r"], config["lora_alpha"]
    root = math.sqrt if options["use_rslora"] else float
    if not math.isclose(scale := alpha / root(rank), options["lora_alpha"] / root(options["r"])):
        raise RunError(
            f"the adapter {folder} (model.start) scales its product by {scale:g} (alpha = {alpha:g} at rank {rank}), "
            f"and the recipe's by {layout.scale:g}: set model.peft.r and alpha to what the adapter was made with"
        )


def _check_shapes(shapes: dict[str, tuple[int, ...]], model: Model, layout: Layout) -> None:
    """Raises RunError unless the adapter has exactly the recipe's tensors."""
    wanted = {stored_name(name): shape for name, shape in zip(layout.names, layout.shapes, strict=True)}
    if shapes == wanted:
        return
    where = f"the adapter {model.start} (model.start) does not fit the recipe"
    if missing := sorted(wanted.keys() - shapes.keys() - {stored_name(HEAD)}):
        raise RunError(f"{where}: it has no {missing[0]}; set model.peft.targets to the layers that it adapts")
    if stored_name(HEAD) in shapes.keys() - wanted.keys():
        what = f"the adapter {model.start} (model.start) is that of a reward model, which scores texts"
        raise RunError(f'{what}: set train.objective = "reward", or choose another start')
    if more := sorted(shapes.keys() - wanted.keys()):
        raise RunError(f"{where}, which does not train its {more[0]}: set model.peft.targets to the layers it adapts")
    differ = (name for name, shape in wanted.items() if shapes.get(name, shape) != shape)
    if (name := next(differ, None)) is None:
        return
    what = f"{where}: its {name} has the shape {list(shapes[name])}, and the recipe's {list(wanted[name])}"
    raise RunError(f"{what}; set model.peft.r to the adapter's rank, and model.base to the base it was made for")
