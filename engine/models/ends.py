"""Emulators of a base: its first and last layers, and a few in place of the rest."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engine.config.sections import Model
from engine.messages.errors import RunError
from engine.models.base_model import causal_config, empty_network
from engine.objectives.token_batch import Batch, token_losses

KD = 30.0  # the weight of the emulator's output beside that of next tokens


def decoder_layers(network: Any) -> tuple[str, nn.ModuleList]:
    """Returns the decoder's layers and their name in the network; RunError where it has no such list."""
    count = network.config.get_text_config().num_hidden_layers
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise RunError(
        f'model.peft = "ends" needs a list of {count} layers, which a {type(network).__name__} does not have: take '
        f'another kind, such as "lora"'
    )


def kept_layers(model: Model, layers: int) -> list[int]:
    """Returns which layers an emulator has: the ends, and evenly spaced ones between; RunError if there are too few."""
    options = model.peft.options()
    first, last, middle = options["first"], options["last"], options["middle"]
    between = layers - first - last
    if middle == "all":
        return list(range(layers))
    if between < middle:
        raise RunError(
            f"model.peft.first + middle + last is {first + middle + last}, and {model.base!r} has {layers} layers: "
            f'lower them, or set model.peft.middle = "all"'
        )
    inner = [first + round(place * (between - 1) / (middle - 1)) for place in range(middle)]
    return [*range(first), *inner, *range(layers - last, layers)]


def emulator_config(config: Any, kept: Sequence[int]) -> Any:
    """Returns the configuration of the network with these layers alone."""
    small = deepcopy(config)
    text = small.get_text_config()
    layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:  # such as each layer's kind of attention
            setattr(text, name, [value[number] for number in kept])
    text.num_hidden_layers = len(kept)
    return small


def emulator_skeleton(model: Model) -> Any:
    """Makes the emulator's network without its weights."""
    config = causal_config(model)
    kept = kept_layers(model, config.get_text_config().num_hidden_layers)
    return empty_network(model, emulator_config(config, kept))


def emulator_of(network: Any, model: Model) -> Any:
    """Makes the network with the kept layers, whose weights are copies."""
    name, layers = decoder_layers(network)
    kept = kept_layers(model, len(layers))
    small = type(network)(emulator_config(network.config, kept)).to(network.dtype)
    small.config._attn_implementation = network.config._attn_implementation
    state = network.state_dict()
    prefix = f"{name}."
    chosen = {key: value for key, value in state.items() if not key.startswith(prefix)}
    for place, number in enumerate(kept):
        old, new = f"{prefix}{number}.", f"{prefix}{place}."
        chosen |= {new + key.removeprefix(old): value for key, value in state.items() if key.startswith(old)}
    small.load_state_dict(chosen)
    return small.requires_grad_(False).eval()


def train_ends(network: Any, model: Model) -> Any:
    """Freezes all but the first and last layers of a base or its emulator."""
    _, layers = decoder_layers(network.requires_grad_(False))
    options = model.peft.options()
    for layer in (*layers[: options["first"]], *layers[len(layers) - options["last"] :]):
        layer.requires_grad_(True)
    return network


def align(small: Any, network: Any, model: Model, batches: Callable[[int], Batch]) -> None:
    """Trains the emulator's middle so that it gives what the base's middle gives, on the batch of each step."""
    options = model.peft.options()
    first, last = options["first"], options["last"]
    inner = decoder_layers(small)[1]
    middle = inner[first : len(inner) - last]
    parameters = [parameter for layer in middle for parameter in layer.parameters()]
    if options["middle"] == "all" or not options["align_steps"]:
        return
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=options["align_lr"])
    for step in range(options["align_steps"]):
        batch = batches(step)
        with torch.no_grad(), _Output(network, last) as wanted:
            network(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, use_cache=False)
        with _Output(small, last) as output:
            loss = token_losses(small, batch, every_logit=True).mean()
        error = F.mse_loss(output.hidden, wanted.hidden) / wanted.hidden.square().mean()
        optimizer.zero_grad()
        (loss + KD * error).backward()
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


class _Output:
    """The hidden states that go into the last layers, seen by a hook."""

    def __init__(self, network: Any, last: int) -> None:
        _, layers = decoder_layers(network)
        self.layer = layers[len(layers) - last]
        self.hidden: Any = None

    def __enter__(self) -> "_Output":
        def see(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            self.hidden = inputs[0] if inputs else options["hidden_states"]

        self.hook = self.layer.register_forward_pre_hook(see, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()
