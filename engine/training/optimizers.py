"""The local optimizer, with a group for each lane's vector, for a slot's life. Legend: K lanes, P parameters."""

from collections.abc import Sequence
from typing import Any

import torch

from engine.config.train import AdamW, Sgd, TorchOptimizer
from engine.messages.errors import RunError
from strategies.core.protocol import ClientState


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter] | Sequence[dict[str, Any]], settings: AdamW | Sgd | TorchOptimizer
) -> torch.optim.Optimizer:
    """Makes the recipe's optimizer, with the fast fused kernels; RunError if torch refuses an option."""
    if not isinstance(settings, TorchOptimizer):
        options = {name: value for name, value in vars(settings).items() if name != "kind"}
        fused = torch.optim.AdamW if isinstance(settings, AdamW) else torch.optim.SGD
        return fused(parameters, **options, fused=True)
    try:
        made: torch.optim.Optimizer = vars(torch.optim)[settings.name](parameters, lr=settings.lr, **settings.options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"torch.optim.{settings.name} refuses its options: {error}") from error
    return made


def state_vectors(settings: AdamW | Sgd | TorchOptimizer) -> int:
    """Returns how many vectors of the parameters' length the optimizer's state has, counted after a small step."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    optimizer = make_optimizer([parameter], settings)
    optimizer.step()
    state = optimizer.state[parameter].values()
    return sum(isinstance(value, torch.Tensor) and value.shape == parameter.shape for value in state)


def reset(optimizer: torch.optim.Optimizer, lane: int | None = None) -> None:
    """Resets the state of all parameters, or of one lane: in place if the optimizer starts from zeros."""
    # Rprop, ASGD and others set their state in the first step, which SGD with dampening skips.
    sgd = isinstance(optimizer, torch.optim.SGD) and not optimizer.defaults["dampening"]
    zeros = sgd or isinstance(optimizer, torch.optim.AdamW)
    # All means those with a state: deepspeed's parameter groups hold other parameters than the optimizer's states.
    for parameter in list(optimizer.state) if lane is None else optimizer.param_groups[lane]["params"]:
        if zeros:
            for tensor in optimizer.state.get(parameter, {}).values():
                if tensor is not None:
                    tensor.zero_()
        else:
            optimizer.state.pop(parameter, None)


def kept(optimizer: torch.optim.Optimizer, lane: int = 0) -> ClientState:
    """Returns a copy of a lane's optimizer state, for the client state."""
    (flat,) = optimizer.param_groups[lane]["params"]
    state = optimizer.state.get(flat, {}).items()
    return {name: tensor.detach().cpu().clone() for name, tensor in state if isinstance(tensor, torch.Tensor)}


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
