"""A network whose weights are the base's plus amounts of random directions. Legend: K directions, W weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from engine.config.sections import Model
from strategies.core.layout import Layout
from strategies.core.protocol import Vector
from strategies.core.seeds import torch_seed

AMOUNTS = "amounts"  # the name of the trained vector


class Seeded:
    """A network with weights of its own, w = w_0 + sum_j c_j z_j for the amounts c (K,), float32.

    Its vector `flat` is c. `begun_W` are the weights of the vector that it last became, made from the base in ascending
    order of j, and so always to the same bits; `weights_W` are those that a client has reached, and the network's own
    are these or lie `eps` beside them. So a client's steps do not drift by adding and subtracting.
    """

    def __init__(self, network: Any, model: Model, seed: int) -> None:
        self.network, self.seed, options = network.requires_grad_(False), seed, model.peft.options()
        self.eps: float = options["eps"]
        parameters = list(network.parameters())  # tied ones once
        self.base = [parameter.data for parameter in parameters]
        sizes = [parameter.numel() for parameter in parameters]
        device = self.base[0].device
        self.network_W = torch.empty(sum(sizes), device=device)
        for parameter, part in zip(parameters, self.network_W.split(sizes), strict=True):
            parameter.data = part.view(parameter.shape)
        self.begun_W, self.weights_W = torch.empty_like(self.network_W), torch.empty_like(self.network_W)
        self.flat = nn.Parameter(torch.zeros(options["candidates"], device=device))
        self.grad = self.flat.grad = torch.zeros_like(self.flat)
        self.layout = Layout((AMOUNTS,), (tuple(self.flat.shape),))
        self.initial = self.flat.detach().cpu().clone()
        self.lora_rank, self.merged, self.originals = None, False, list[Any]()
        self.begun: Vector | None = None  # the vector of `begun_W`
        self.become(self.flat.detach())

    def become(self, vector: Vector) -> None:
        """Makes the weights of a vector (K,), unless they are there."""
        self.flat.data.copy_(vector)
        if self.begun is None or not torch.equal(self.begun, self.flat.data):
            self.begun = self.flat.data.clone()
            torch.cat([tensor.reshape(-1).float() for tensor in self.base], out=self.begun_W)
            for number in self.begun.nonzero()[:, 0].tolist():
                self.begun_W.add_(self.direction(number), alpha=float(self.begun[number]))
        self.weights_W.copy_(self.begun_W)
        self.network_W.copy_(self.begun_W)

    def direction(self, number: int) -> torch.Tensor:
        """Draws a direction (W,), N(0, 1), the same on each machine."""
        draws = torch.Generator().manual_seed(torch_seed(self.seed, 0, number, "directions"))
        return torch.randn(len(self.network_W), generator=draws).to(self.network_W.device)

    def look(self, direction_W: torch.Tensor, amount: float) -> None:
        """Lets the network have the weights that lie an amount of a direction beside those that are reached."""
        torch.add(self.weights_W, direction_W, alpha=amount, out=self.network_W)

    def move(self, number: int, direction_W: torch.Tensor, amount: float) -> None:
        """Goes an amount along a direction, and lets the network have these weights."""
        self.flat.data[number] += amount
        self.weights_W.add_(direction_W, alpha=amount)
        self.network_W.copy_(self.weights_W)

    def replay(self) -> dict[str, Any]:
        """Returns what makes the weights again from the base: the seed, and the amounts that are not zero."""
        amounts = {number: float(self.flat.data[number]) for number in self.flat.nonzero()[:, 0].tolist()}
        return {"seed": self.seed, "candidates": len(self.flat), "amounts": amounts}

    def adapted_layers(self) -> list[Any]:
        """Returns none."""
        return []

    def set_lora_rank(self, lora_rank: int | None) -> None:
        """Does nothing: there are no adapters."""

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """Changes nothing: no rule merges into such a base."""
        yield

    def use_merged(self, merged: torch.Tensor | None) -> None:
        """Takes nothing."""
        assert merged is None
