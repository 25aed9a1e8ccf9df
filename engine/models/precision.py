"""Lets a network compute in another number format than that of its weights."""

from functools import wraps
from typing import Any

import torch


def compute_in(network: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Makes the network's forward and backward passes, and its generation, compute in `dtype` by torch's autocast.

    What loses by it, such as sums and softmaxes, stays as it is, and so do weights and gradients.
    """
    from peft import PeftModel

    inner = network.get_base_model() if isinstance(network, PeftModel) else network  # which generates past PeftModel
    forward = inner.forward

    @wraps(forward)
    def cast(*arguments: Any, **options: Any) -> Any:
        with torch.autocast(device.type, dtype):
            return forward(*arguments, **options)

    inner.forward = cast
