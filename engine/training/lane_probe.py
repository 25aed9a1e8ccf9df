"""Whether a network computes the rows of a batch as if each were alone, which lanes rely on. Legend: I inputs."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from engine.messages.errors import RunError

TOKENS = 7  # of a row of the probe: not the number of rows, so that the two dimensions cannot be mixed up
APART = 0.1  # relative distance of inputs above which they are those of other tokens, and no rounding
ROPE = ("dynamic", "longrope")  # rotary embeddings that depend on the longest row of a batch
RANDOM = re.compile(r"(?!classifier|summary).*(drop|jitter)")  # keys of what a model draws in training
Inputs = dict[str, list[torch.Tensor]]  # of each call of a layer, by name


def refuse_dependent_rows(
    network: nn.Module, layers: Mapping[str, nn.Module], max_length: int, key: str, alone: str
) -> None:
    """Runs three tiny forward passes; RunError if rows depend on each other, or the base draws random numbers.

    `layers` are the adapted ones: each must see the rows of a batch one after another. `key` is that of lanes, and
    `alone` says how to do without.
    """
    keys = network.config.to_dict()  # type: ignore[operator, union-attr]
    for name, value in random_sizes(keys):
        raise RunError(
            f"the base draws random numbers in training ({name} = {value:g} in its config.json), which {key} cannot "
            f"draw for each client by itself: set that to 0 there, or {alone}"
        )
    trained = keys.get("original_max_position_embeddings") or keys.get("max_position_embeddings") or max_length
    if max_length > trained and any(f'"{kind}"' in json.dumps(keys.get("rope_parameters")) for kind in ROPE):
        raise RunError(
            f"the base's rotary embeddings depend on the longest row of a batch above {trained} tokens, under {key} "
            f"that of any client: set train.max_length to at most {trained}, or {alone}"
        )
    with _training_without_dropout(network) as drew:
        together, *each = (_inputs(network, layers, rows) for rows in (slice(0, 2), slice(0, 1), slice(1, 2)))
        random = drew()
    if random:
        raise RunError(
            f"the base draws random numbers in training, which {key} cannot draw for each client by itself: {alone}"
        )
    for name in layers:
        if not _one_after_another(together[name], [inputs[name] for inputs in each]):
            raise RunError(
                f"{key} needs layers that see all tokens of a batch row by row, which "
                f"{name.removeprefix('base_model.model.')} does not: leave it out of model.peft.targets (name the "
                f"attention layers there), or {alone}"
            )


def random_sizes(keys: Mapping[Any, Any]) -> Iterator[tuple[str, float]]:
    """The keys of a configuration and its sections that make a model draw in training, such as dropout, above 0."""
    for name, value in keys.items():
        if isinstance(value, dict):
            yield from random_sizes(value)
        elif isinstance(value, float) and value > 0 and RANDOM.match(name):
            yield name, value


@contextmanager
def _training_without_dropout(network: nn.Module) -> Iterator[Callable[[], bool]]:
    """Training mode, but for the adapters' dropout; yields whether random numbers were drawn. Leaves no trace."""
    was_training, cuda = network.training, torch.cuda.is_available() and next(network.parameters()).is_cuda
    states = torch.cuda.get_rng_state, torch.get_rng_state
    before = [state() for state in states[not cuda :]]
    network.train()
    for name, module in network.named_modules():
        if name.rpartition(".")[2] == "lora_dropout":
            module.eval()
    try:
        with torch.no_grad():
            yield lambda: any(not torch.equal(a, state()) for a, state in zip(before, states[not cuda :], strict=True))
    finally:
        network.train(was_training)
        for restore, state in zip((torch.cuda.set_rng_state, torch.set_rng_state)[not cuda :], before, strict=True):
            restore(state)


def _inputs(network: nn.Module, layers: Mapping[str, nn.Module], rows: slice) -> Inputs:
    """The inputs of each call of each layer, in a forward pass of some of two rows."""
    seen: Inputs = {name: [] for name in layers}

    def note(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[name].append(inputs[0].detach())

    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    ids = torch.arange(2 * TOKENS, device=next(network.parameters()).device).view(2, TOKENS)
    try:
        network(input_ids=ids[rows] + 3, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _one_after_another(together: list[torch.Tensor], each: list[list[torch.Tensor]]) -> bool:
    """Whether each call had all tokens of the first row, and then all of the second."""
    if any(len(calls) != len(together) for calls in each):
        return False
    for both, *alone in zip(together, *each, strict=True):
        if both.numel() % (2 * TOKENS * both.shape[-1]):
            return False
        for row, single in zip(both.reshape(2, -1), alone, strict=True):
            wide = row.float(), single.reshape(-1).float()
            if wide[0].shape != wide[1].shape or (wide[0] - wide[1]).norm() > APART * wide[1].norm():
                return False
    return True
