"""How an adapted linear layer computes for several lanes in one batch: one form for each kind of adapter.

Legend: K lanes, N tokens of a lane, I inputs and O outputs of a layer, R rank.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from engine.models.adapters import is_linear, is_transposed
from strategies.core.layout import LORA_A, LORA_B

Scale = float | torch.Tensor


class Lanes(NamedTuple):
    """What the lanes of a step bring: their trained tensors (K, ...) by name, and dropout's factors on an input."""

    active: int
    leaves: Mapping[str, torch.Tensor]
    dropped: Callable[[torch.Tensor], torch.Tensor] | None  # None: nothing is dropped


Form = Callable[[str, Any, torch.Tensor, Lanes, Scale], torch.Tensor]


def form_of(layer: Any, names: list[str]) -> Form | None:
    """The form of a layer, given its trained tensors' names after the layer's own; None if there is none."""
    if not is_linear(getattr(layer, "base_layer", getattr(layer, "original_module", None))):
        return None
    suffixes = sorted(name.partition(".default")[0] for name in names)
    forms: dict[tuple[str, ...], Form] = {
        (".lora_A", ".lora_B"): lora,
        (".lora_A", ".lora_B", ".lora_magnitude_vector"): dora,
        (".ia3_l",): ia3,
        (".modules_to_save",): saved,
    }
    return forms.get(tuple(suffixes))


def lora(name: str, layer: Any, x: torch.Tensor, lanes: Lanes, scale: Scale) -> torch.Tensor:
    """The base's output plus s B (A x)."""
    out = layer.base_layer(x)
    a_KRI, b_KOR = _pair(name, lanes)
    x_KNI = _inputs(x, lanes, a_KRI.dtype)
    out_KNO, down_KNR = out.view(lanes.active, -1, out.shape[-1]), torch.bmm(x_KNI, a_KRI.mT)
    if isinstance(scale, float) and out.dtype == down_KNR.dtype:
        return torch.baddbmm(out_KNO, down_KNR, b_KOR.mT, alpha=scale).view(out.shape)
    product_KNO = torch.bmm(down_KNR * scale, b_KOR.mT)
    added: torch.Tensor = (out_KNO + product_KNO).to(out.dtype).view(out.shape)
    return added


def dora(name: str, layer: Any, x: torch.Tensor, lanes: Lanes, scale: Scale) -> torch.Tensor:
    """The base's output plus s B (A x), scaled to the trained magnitude of each output (arXiv 2402.09353, eq. 5).

    The norms of W + s B A are those of its rows, from W A' and A A', so that no lane needs that product. They have no
    gradient (section 4.3).
    """
    base = layer.base_layer
    out = base(x)
    a_KRI, b_KOR = _pair(name, lanes)
    magnitude_KO = lanes.leaves[f"{name}.lora_magnitude_vector.default.weight"]
    x_KNI = _inputs(x, lanes, a_KRI.dtype)
    weight_OI = (base.weight.T if is_transposed(base) else base.weight).to(a_KRI.dtype)
    out_KNO = out.view(lanes.active, -1, out.shape[-1]).to(a_KRI.dtype)
    if lanes.dropped is not None:  # PEFT drops inputs of the scaled base too
        base_KNO = x_KNI @ weight_OI.T
    else:
        base_KNO = out_KNO if base.bias is None else out_KNO - base.bias
    with torch.no_grad():
        cross_KOR, gram_KRR = weight_OI @ a_KRI.mT, a_KRI @ a_KRI.mT
        squares_KO = weight_OI.square().sum(1) + (b_KOR * scale * (2 * cross_KOR + b_KOR * scale @ gram_KRR)).sum(2)
    factor_K1O = (magnitude_KO / squares_KO.sqrt())[:, None]
    product_KNO = torch.bmm(torch.bmm(x_KNI, a_KRI.mT) * scale, b_KOR.mT)
    added: torch.Tensor = out_KNO + (factor_K1O - 1) * base_KNO + factor_K1O * product_KNO
    return added.to(out.dtype).view(out.shape)


def ia3(name: str, layer: Any, x: torch.Tensor, lanes: Lanes, scale: Scale) -> torch.Tensor:
    """The base's output, or in feed-forward layers its input, times the learned factors."""
    factor_K1 = lanes.leaves[f"{name}.ia3_l.default"].flatten(1)[:, None]
    if layer.is_feedforward:
        x_KNI = _inputs(x, lanes, factor_K1.dtype) * factor_K1
        out: torch.Tensor = layer.base_layer(x_KNI.to(x.dtype).view(x.shape))
        return out
    out = layer.base_layer(x)
    return (_inputs(out, lanes, factor_K1.dtype) * factor_K1).to(out.dtype).view(out.shape)


def saved(name: str, layer: Any, x: torch.Tensor, lanes: Lanes, scale: Scale) -> torch.Tensor:
    """A layer that is trained whole, without a bias: W x of each lane."""
    weight_KOI = lanes.leaves[f"{name}.modules_to_save.default.weight"]
    x_KNI = x.reshape(lanes.active, -1, x.shape[-1]).to(weight_KOI.dtype)
    out: torch.Tensor = torch.bmm(x_KNI, weight_KOI.mT).view(*x.shape[:-1], -1)
    return out


def _pair(name: str, lanes: Lanes) -> tuple[torch.Tensor, torch.Tensor]:
    return lanes.leaves[f"{name}{LORA_A}default.weight"], lanes.leaves[f"{name}{LORA_B}default.weight"]


def _inputs(x: torch.Tensor, lanes: Lanes, dtype: torch.dtype) -> torch.Tensor:
    """The inputs (K, N, I) of each lane, with dropout."""
    x_KNI = x.reshape(lanes.active, -1, x.shape[-1]).to(dtype)
    return x_KNI if lanes.dropped is None else x_KNI * lanes.dropped(x.to(dtype)).view_as(x_KNI)
