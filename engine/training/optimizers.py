"""The local optimizer on flat vectors: a slot makes it once, and resets it or loads a client's state into it.

A lane's vector is one parameter in a group of its own. Legend: K lanes, P parameters.
"""

from collections.abc import Sequence
from typing import Any

import torch

from engine.config.train import AdamW, Sgd, TorchOptimizer
from engine.messages.errors import RunError
from strategies.core.protocol import ClientState


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter] | Sequence[dict[str, Any]], settings: AdamW | Sgd | TorchOptimizer
) -> torch.optim.Optimizer:
    """Makes the recipe's optimizer, with fused kernels, which are the fastest on a CPU too.

    RunError if torch refuses an option's value.
    """
    if isinstance(settings, AdamW):
        return torch.optim.AdamW(
            parameters,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    if isinstance(settings, Sgd):
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
        )
    try:
        made: torch.optim.Optimizer = vars(torch.optim)[settings.name](parameters, lr=settings.lr, **settings.options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"torch.optim.{settings.name} refuses its options: {error}") from error
    return made


def reset(optimizer: torch.optim.Optimizer, lane: int | None = None) -> None:
    """Resets the state of all parameters, or of one lane.

    If the optimizer starts from zeros, it zeroes the tensors in place instead of freeing them.
    """
    # All means those with a state: deepspeed's parameter groups hold other parameters than the optimizer's states.
    for parameter in list(optimizer.state) if lane is None else optimizer.param_groups[lane]["params"]:
        if _starts_from_zeros(optimizer):
            for tensor in optimizer.state.get(parameter, {}).values():
                if tensor is not None:
                    tensor.zero_()
        else:
            optimizer.state.pop(parameter, None)


def _starts_from_zeros(optimizer: torch.optim.Optimizer) -> bool:
    """False for Rprop, ASGD and others, whose first step sets their state, and SGD with dampening, which skips it."""
    if isinstance(optimizer, torch.optim.SGD):
        return not optimizer.defaults["dampening"]
    return isinstance(optimizer, torch.optim.AdamW)


def kept(optimizer: torch.optim.Optimizer, lane: int = 0) -> ClientState:
    """Returns a copy of a lane's optimizer state, for the client state."""
    (flat,) = optimizer.param_groups[lane]["params"]
    state = optimizer.state.get(flat, {})
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def restore(optimizer: torch.optim.Optimizer, state: ClientState, lane: int = 0) -> None:
    """Loads a state from `kept` into a lane; an empty one resets the lane."""
    reset(optimizer, lane)
    group = optimizer.param_groups[lane]
    step_on_device = bool(group.get("fused") or group.get("capturable"))
    for name, tensor in state.items():
        (flat,) = group["params"]
        optimizer.state[flat][name] = tensor.clone().to(flat.device if tensor.ndim or step_on_device else "cpu")


def move(optimizer: torch.optim.Optimizer, source: int, target: int) -> None:
    """Moves a lane's vector and state to another lane, whose state it gets in exchange."""
    (source_P,), (target_P,) = (optimizer.param_groups[lane]["params"] for lane in (source, target))
    target_P.data.copy_(source_P.data)
    state = optimizer.state
    state[target_P], state[source_P] = state[source_P], state[target_P]


def clip(grad_KP: torch.Tensor, most: float) -> None:
    """Clips each gradient (K, P) to the L2 norm `most`, in place, as `clip_grad_norm_` does; 0 leaves it alone."""
    if most <= 0:
        return
    factor_K = (most / (torch.linalg.vector_norm(grad_KP, dim=1) + 1e-6)).clamp(max=1)
    # Reading the factors from a GPU would wait for it.
    if grad_KP.is_cuda or bool((factor_K < 1).any()):
        grad_KP *= factor_K[:, None]
