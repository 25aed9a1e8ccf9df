"""The local optimizer on the flat vector: made once per slot, then reset, or given a client's state. P parameters."""

from collections.abc import Sequence

import torch

from engine.train_settings import AdamW, Sgd, TorchOptimizer
from strategies.types import Memory


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], settings: AdamW | Sgd | TorchOptimizer
) -> torch.optim.Optimizer:
    """The recipe's optimizer; the fused kernels, which are the fast ones on CPU too.

    Raises ValueError where torch refuses an option's value.
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
        raise ValueError(f"torch.optim.{settings.name} refuses its options: {error}") from error
    return made


def reset(optimizer: torch.optim.Optimizer) -> None:
    """Takes the optimizer back to its first step; nothing is built anew where zeros are what it starts from."""
    if isinstance(optimizer, torch.optim.AdamW | torch.optim.SGD):
        for state in optimizer.state.values():
            for tensor in state.values():
                if tensor is not None:
                    tensor.zero_()
    else:  # Rprop, ASGD and others start from something else, which they set at their first step
        optimizer.state.clear()


def kept(optimizer: torch.optim.Optimizer) -> Memory:
    """The optimizer's state as entries of a client's memory."""
    return {
        name: tensor.detach().cpu().clone()
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor)
    }


def restore(optimizer: torch.optim.Optimizer, memory: Memory) -> None:
    """Puts the state that `kept` gave back into the optimizer; without any, the optimizer is reset."""
    reset(optimizer)
    (flat,) = optimizer.param_groups[0]["params"]
    for name, tensor in memory.items():
        # A step count stays a scalar on the CPU, moments lie where the vector lies.
        optimizer.state[flat][name] = tensor.clone().to(flat.device if tensor.ndim else "cpu")
