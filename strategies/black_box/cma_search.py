"""CMA-ES over projected prompts, whose losses are an exact sum. Legend: D coordinates, L candidates."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch

from strategies.black_box.evolution import Evolution
from strategies.core.access import Capability
from strategies.core.base import Ends, Finished, Rule, Searched
from strategies.core.errors import require
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Broadcast, ClientState, Mask, Score, ServerState, Update, Vector
from strategies.core.ranges import ABOVE_0, Range
from strategies.core.seeds import rng

STEP = Annotated[float, Range("is the first step size", ABOVE_0)]


@dataclass(frozen=True)
class CmaSearch(Rule):
    """CMA-ES (Hansen, arXiv 1604.00772) on f(z) = sum_k nll_k(z) / sum_k tokens_k. Reads the sum.

    The server draws `population` candidates z_i = m + sigma C^(1/2) n_i, every client scores all of them on the rows of
    its steps, and the server updates m, sigma and C by the order of the sums: as if it had all rows itself.

    Traps: it minimizes what a cohort says, and cohorts differ: large cohorts make the order true. State is rounded to
    float32 after each round, so that a resumed run has the same bits.
    """

    kind: Literal["cma"] = "cma"
    population: int = 16
    sigma: STEP = 1.0
    elementwise: ClassVar[bool] = False
    trains_what_it_sends: ClassVar[bool] = False
    tunes: ClassVar[tuple[str, ...]] = ("projected",)
    paper: ClassVar[str] = "arXiv 1604.00772"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_two(self.population)

    @property
    def access(self) -> frozenset[Capability]:
        """Vectors before the tokens, and log-probabilities behind them."""
        return frozenset({"inject"})

    @property
    def weighs_alike(self) -> bool:
        """A client counts by its tokens."""
        return True

    def init(self, params: Vector, layout: Layout) -> ServerState:
        """Starts at the vector, with the unit matrix."""
        return replace(super().init(params, layout), moments=moments_of(Evolution.begun(params.numpy(), self.sigma)))

    def broadcast(self, state: ServerState) -> Broadcast:
        """Sends all candidates, and nothing of the server's state."""
        candidates_LD = torch.from_numpy(self._candidates(state))
        return replace(super().broadcast(state), extras={"candidates": candidates_LD.reshape(-1)})

    def search(self, client: int, broadcast: Broadcast, client_state: ClientState, score: Score) -> Searched:
        """Sends each candidate's loss and the number of tokens."""
        losses_L, units = score(broadcast.extras["candidates"].view(self.population, -1))
        beside = {"nll": losses_L.float(), "learned": torch.tensor([float(units)])}
        return torch.zeros_like(broadcast.params), beside

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Sets the weight."""
        return replace(update, weight=1.0), client_state

    def beside(self, layout: Layout) -> dict[str, int]:
        """The candidates' losses, and the number of tokens."""
        return {"nll": self.population, "learned": 1}

    def sent_masks(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """No change is sent."""
        return {"delta": torch.zeros(layout.size, dtype=torch.bool)}

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """A generation of CMA-ES."""
        losses_L = aggregate.extras["nll"].double().numpy() / float(aggregate.extras["learned"].clamp(min=1))
        candidates_LD = self._candidates(state).astype(np.float64)
        after = evolution_of(state.params, state.moments).after(candidates_LD, losses_L)
        return replace(state, round=state.round + 1, params=_vector(after.mean_D), moments=moments_of(after))

    def _candidates(self, state: ServerState) -> np.ndarray:
        """The candidates (L, D), float32, of the next round."""
        normals_LD = rng(state.seed, state.round, -1, "candidates").standard_normal(
            (self.population, len(state.params))
        )
        candidates_LD: np.ndarray = evolution_of(state.params, state.moments).candidates(normals_LD)
        return candidates_LD.astype(np.float32)


def at_least_two(population: int) -> None:
    """Raises StrategyError for a population without an order."""
    require(population >= 2, f"strategy.population must be at least 2, not {population}")


def moments_of(evolution: Evolution) -> dict[str, Vector]:
    """A distribution as moments, float32; its mean is the vector itself."""
    return {
        "sigma": torch.tensor([evolution.sigma], dtype=torch.float32),
        "covariance": _vector(evolution.covariance_DD.reshape(-1)),
        "sigma_path": _vector(evolution.sigma_path_D),
        "path": _vector(evolution.path_D),
        "generation": torch.tensor([float(evolution.generation)]),
    }


def evolution_of(mean: Vector, moments: dict[str, Vector]) -> Evolution:
    """The distribution that `moments_of` has written."""
    wide = {name: vector.double().numpy() for name, vector in moments.items()}
    covariance_DD = wide["covariance"].reshape(len(mean), len(mean))
    paths, generation = (wide["sigma_path"], wide["path"]), int(wide["generation"][0])
    return Evolution(mean.double().numpy(), float(wide["sigma"][0]), covariance_DD, *paths, generation)


def _vector(values: np.ndarray) -> Vector:
    return torch.from_numpy(values.astype(np.float32))
