"""Is the new model the average of the clients' models? Legend: R rank, I inputs and O outputs of a layer, P parameters.

Clients take real steps on the adapters of two layers: with a gradient G (O, I) of the weights, that of B is s G A' and
that of A is s B' G. The model that is wanted is the dense average of W0 + residual + s_k B_k A_k, in float64.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.aggregation.exact_sum import ExactSum, merge
from strategies.averaging.fedavg import FedAvg
from strategies.core.layout import Layout
from strategies.core.protocol import GLOBAL, Broadcast, ClientState, ServerState, Update
from strategies.lora.frozen_half import FedSb, FedSvd, FfaLora, RoLora
from strategies.lora.hetlora import HetLora
from strategies.lora.products import FedExLora, FlexLora, Flora

SHAPES = ((6, 5), (4, 7))
ROUNDS, STEPS, RATE = 5, 3, 0.15


def layout_of(rank: int) -> Layout:
    names, shapes = [], []
    for name, (outputs, inputs) in zip("qv", SHAPES, strict=True):
        names += [f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"]
        shapes += [(rank, inputs), (outputs, rank)]
    return Layout(tuple(names), tuple(shapes), scale=2.0)


def initial(layout: Layout, draw: np.random.Generator) -> torch.Tensor:
    """As PEFT starts: B is zero."""
    params = torch.from_numpy(draw.uniform(-0.4, 0.4, layout.size).astype(np.float32))
    for pair in layout.lora_pairs(params):
        pair.b_OR.zero_()
    return params


def dense(vector: torch.Tensor, residual: torch.Tensor | None, layout: Layout, scale: float) -> torch.Tensor:
    """residual + scale * B A of all layers, in float64."""
    pairs = layout.lora_pairs(vector.double())
    product = torch.cat([(scale * pair.b_OR @ pair.a_RI).flatten() for pair in pairs])
    return product if residual is None else product + residual.double()


def trained(strategy: Any, broadcast: Broadcast, draw: np.random.Generator) -> torch.Tensor:
    """Where local gradient descent ends."""
    layout = broadcast.layout
    scale = layout.scale if broadcast.lora_rank is None else layout.scale_at(broadcast.lora_rank)
    params = strategy.starts(broadcast, {})[GLOBAL].clone()
    for _ in range(STEPS):
        grad = torch.zeros_like(params)
        for pair, slope, shape in zip(layout.lora_pairs(params), layout.lora_pairs(grad), SHAPES, strict=True):
            g_OI = torch.from_numpy(draw.standard_normal(shape).astype(np.float32))
            slope.b_OR.copy_(scale * g_OI @ pair.a_RI.T)
            slope.a_RI.copy_(scale * pair.b_OR.T @ g_OI)
        strategy.correct(grad[None], params[None], broadcast, {})
        params -= RATE / scale**2 * grad  # so that the weights move alike whatever the scale
    return params


def a_round(
    strategy: Any, state: ServerState, draw: np.random.Generator, ranks: list[int]
) -> tuple[ServerState, float]:
    """The next state, and the largest difference between its weights and the average of the clients'."""
    running, wanted, weights = ExactSum(), torch.zeros(1, dtype=torch.float64), 0.0
    for client in range(4):
        broadcast = strategy.broadcast(state)
        if ranks:
            broadcast = replace(broadcast, lora_rank=ranks[client % len(ranks)])
        end, weight = trained(strategy, broadcast, draw), float(draw.uniform(0.1, 1.0))
        scale = state.layout.scale if broadcast.lora_rank is None else state.layout.scale_at(broadcast.lora_rank)
        wanted = wanted + weight * dense(end, state.merged_delta, state.layout, scale)
        weights += weight
        running.add(strategy.finish(Update(client, weight, end - broadcast.params), broadcast, ClientState())[0])
    after = strategy.apply(state, merge([running.take()]))
    after_OI = dense(after.params, after.merged_delta, after.layout, after.layout.scale)
    return after, float((after_OI - wanted / weights).abs().max())


def errors(strategy: Any, seed: int, rank: int, ranks: list[int]) -> list[float]:
    """The largest difference of each round."""
    draw, layout = np.random.default_rng(seed), layout_of(rank)
    state, errors = replace(strategy.init(initial(layout, draw), layout), seed=seed), []
    for _ in range(ROUNDS):
        state, error = a_round(strategy, state, draw, ranks)
        errors.append(error)
    moved = dense(state.params, state.merged_delta, layout, layout.scale)
    assert float(moved.abs().max()) > 0.05  # or it would be easy to be exact
    return errors


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("strategy", "rank", "ranks"),
    [
        (FfaLora(), 3, []),
        (RoLora(), 3, []),
        (FedExLora(), 3, []),
        (Flora(), 3, []),
        (Flora(), 3, [1, 3, 2]),
        (FedSvd(), 3, []),
        (FedSb(), 3, []),
        (FlexLora(), 5, []),
        (FlexLora(), 5, [1, 5, 3]),
        (FlexLora(sketch=2), 5, []),
        (FlexLora(sketch=2), 5, [1, 5, 3]),
    ],
    ids=lambda value: value.kind if isinstance(value, FedAvg) else str(value),
)
def test_the_new_model_is_the_average_of_the_clients(strategy: Any, rank: int, ranks: list[int], seed: int) -> None:
    assert max(errors(strategy, seed, rank, ranks)) < 1e-5


@pytest.mark.parametrize("seed", range(5))
def test_fedit_is_biased(seed: int) -> None:
    assert max(errors(FedAvg(), seed, 3, [])) > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_padding_with_zeros_is_biased(seed: int) -> None:
    assert max(errors(HetLora(weighting="examples", gamma=1.0), seed, 3, [1, 3, 2])) > 1e-3


@pytest.mark.parametrize("strategy", [FlexLora(), FlexLora(sketch=2)], ids=["dense", "sketch"])
def test_flexlora_loses_what_lies_beyond_its_rank(strategy: FlexLora) -> None:
    assert max(errors(strategy, 0, 2, [])) > 1e-3


def test_half_a_step_of_the_server_goes_half_the_way() -> None:
    """With lr = 0.5 the weights end in the middle between the round's start and the clients' average."""
    for kind, rank in ((FfaLora, 3), (RoLora, 3), (FedExLora, 3), (Flora, 3), (FedSvd, 3), (FedSb, 3), (FlexLora, 5)):
        layout = layout_of(rank)
        state = replace(kind().init(initial(layout, np.random.default_rng(1)), layout), seed=1)
        for round_ in range(3):
            draws = [np.random.default_rng(round_) for _ in range(2)]
            whole, _ = a_round(kind(), state, draws[0], [])
            half, _ = a_round(kind(lr=0.5), state, draws[1], [])
            start, end, middle = (dense(s.params, s.merged_delta, layout, layout.scale) for s in (state, whole, half))
            torch.testing.assert_close(middle, (start + end) / 2, rtol=0, atol=1e-5)
            state = whole
