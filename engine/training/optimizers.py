"""The local optimizer on flat vectors: made once per slot, then reset, or given a client's state.

Legend: K lanes, P parameters.
"""

from collections.abc import Sequence
from typing import Any

import torch

from engine.config.train import AdamW, Sgd, TorchOptimizer
from strategies.core.protocol import ClientState


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter] | Sequence[dict[str, Any]], settings: AdamW | Sgd | TorchOptimizer
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


def reset(optimizer: torch.optim.Optimizer, lane: int | None = None) -> None:
    """Takes all parameters, or those of a lane (a group each), back to their first step.

    Nothing is built anew where zeros are what the optimizer starts from.
    """
    # Not by the groups where all are meant: deepspeed keeps other parameters in them than the optimizer has states of.
    for parameter in list(optimizer.state) if lane is None else optimizer.param_groups[lane]["params"]:
        if _starts_from_zeros(optimizer):
            for tensor in optimizer.state.get(parameter, {}).values():
                if tensor is not None:
                    tensor.zero_()
        else:
            optimizer.state.pop(parameter, None)


def _starts_from_zeros(optimizer: torch.optim.Optimizer) -> bool:
    """Not Rprop, ASGD and others, which set their state at their first step; nor dampening, which skips that step."""
    if isinstance(optimizer, torch.optim.SGD):
        return not optimizer.defaults["dampening"]
    return isinstance(optimizer, torch.optim.AdamW)


def kept(optimizer: torch.optim.Optimizer, lane: int = 0) -> ClientState:
    """The state of a lane's vector as entries of a client's memory."""
    (flat,) = optimizer.param_groups[lane]["params"]
    state = optimizer.state.get(flat, {})
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def restore(optimizer: torch.optim.Optimizer, memory: ClientState, lane: int = 0) -> None:
    """Puts the state that `kept` gave back into the optimizer; without any, the lane is reset."""
    reset(optimizer, lane)
    group = optimizer.param_groups[lane]
    beside = bool(group.get("fused") or group.get("capturable"))
    for name, tensor in memory.items():
        (flat,) = group["params"]
        # Moments lie where the vector lies, a step count there too if a kernel reads it, and else on the CPU.
        optimizer.state[flat][name] = tensor.clone().to(flat.device if tensor.ndim or beside else "cpu")


def clip(grad_KP: torch.Tensor, most: float) -> None:
    """Shortens each gradient (K, P) to the norm `most`, in place, as `clip_grad_norm_` does; 0: none."""
    if most <= 0:
        return
    factor_K = (most / (torch.linalg.vector_norm(grad_KP, dim=1) + 1e-6)).clamp(max=1)
    # A GPU that is asked would be waited for.
    if grad_KP.is_cuda or bool((factor_K < 1).any()):
        grad_KP *= factor_K[:, None]
