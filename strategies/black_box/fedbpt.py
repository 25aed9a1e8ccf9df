"""FedBPT: each client searches by its own CMA-ES, and the server by one over the clients. Legend: D coordinates."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch

from strategies.black_box.cma_search import STEP, at_least_two, evolution_of, moments_of
from strategies.black_box.evolution import Evolution
from strategies.core.access import Capability
from strategies.core.base import Ends, Finished, Reads, Rule, Searched
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Broadcast, ClientState, Score, ServerState, Update, Vector
from strategies.core.ranges import AT_LEAST_1, Range
from strategies.core.seeds import rng


@dataclass(frozen=True)
class FedBpt(Rule):
    """FedBPT (Sun et al. 2023, arXiv 2310.01467) as its authors published it with NVFlare. Reads each update.

    A client starts CMA-ES at the server's mean with the step size that clients share, and its matrix C; after
    `generations` of `population` candidates on its rows it sends its mean, the loss there, and the sum of its squared
    step sizes. The server takes the clients' means as the candidates of a generation of its own, with sigma^2 =
    sum_k sum_t sigma_kt^2 / (m floor(population / 2)) for m clients, and the clients' step size shrinks or grows as
    the server's does in that generation.

    Differences: each client draws by (seed, round, client), where the published code gives all clients the same
    numbers in every round; its lower bound of 0.5 for the step size never acts, and is not here. Traps: a client
    reads its rows `population` times `generations` times a round; the server reads each update, so that secure
    aggregation does not go with it ("cma" asks for a sum alone).
    """

    kind: Literal["fedbpt"] = "fedbpt"
    population: int = 5
    generations: Annotated[int, Range("is a client's number of generations", AT_LEAST_1)] = 8
    sigma: STEP = 1.0
    reads: ClassVar[Reads] = "each"
    elementwise: ClassVar[bool] = False
    tunes: ClassVar[tuple[str, ...]] = ("projected",)
    paper: ClassVar[str] = "arXiv 2310.01467"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_two(self.population)

    @property
    def access(self) -> frozenset[Capability]:
        """Vectors before the tokens, and log-probabilities behind them."""
        return frozenset({"inject"})

    @property
    def rests_at_zero(self) -> bool:
        """A client's mean moves whatever the candidates' losses are."""
        return False

    @property
    def weighs_alike(self) -> bool:
        """The order of losses counts, and no weights."""
        return True

    def smallest_cohort(self) -> int:
        """Two: there is no order of one."""
        return 2

    def init(self, params: Vector, layout: Layout) -> ServerState:
        """Starts at the vector, with the unit matrix and the same step size for clients and server."""
        moments = moments_of(Evolution.begun(params.numpy(), self.sigma))
        return replace(super().init(params, layout), moments=moments | {"client_sigma": moments["sigma"].clone()})

    def broadcast(self, state: ServerState) -> Broadcast:
        """Sends the mean, C, and the clients' step size."""
        extras = {name: state.moments[name] for name in ("covariance", "client_sigma")}
        return replace(super().broadcast(state), extras=extras)

    def search(self, client: int, broadcast: Broadcast, client_state: ClientState, score: Score) -> Searched:
        """Searches, and sends the change of the mean, the loss there, and the sum of the squared step sizes."""
        start_D, size = broadcast.params.double().numpy(), len(broadcast.params)
        covariance_DD = broadcast.extras["covariance"].double().numpy().reshape(size, size)
        evolution = replace(
            Evolution.begun(start_D, float(broadcast.extras["client_sigma"])), covariance_DD=covariance_DD
        )
        draws, squares = rng(broadcast.seed, broadcast.round, client, "generations"), 0.0
        for _ in range(self.generations):
            candidates_LD = evolution.candidates(draws.standard_normal((self.population, size))).astype(np.float32)
            losses_L, _ = score(torch.from_numpy(candidates_LD))
            evolution = evolution.after(candidates_LD.astype(np.float64), losses_L.numpy())
            squares += evolution.sigma**2
        mean = torch.from_numpy(evolution.mean_D.astype(np.float32))
        loss, units = score(mean[None])
        beside = {"loss": (loss / max(1.0, units)).float(), "squares": torch.tensor([squares], dtype=torch.float32)}
        return mean - broadcast.params, beside

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Sets the weight."""
        return replace(update, weight=1.0), client_state

    def beside(self, layout: Layout) -> dict[str, int]:
        """The loss at the client's mean, and the sum of the squared step sizes."""
        return {"loss": 1, "squares": 1}

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """A generation of CMA-ES whose candidates are the clients' means; one client alone is taken as it is."""
        assert aggregate.each is not None
        updates, before = aggregate.each, evolution_of(state.params, state.moments)
        candidates = torch.stack([state.params + update.delta for update in updates])
        if len(updates) == 1:
            return replace(state, round=state.round + 1, params=candidates[0].contiguous())
        squares = sum(float(update.extras["squares"]) for update in updates)
        sigma = math.sqrt(squares / len(updates) / max(1, self.population // 2))
        losses_L = np.array([float(update.extras["loss"]) for update in updates])
        after = replace(before, sigma=sigma).after(candidates.double().numpy(), losses_L)
        moments = moments_of(after) | {"client_sigma": state.moments["client_sigma"] * (after.sigma / sigma)}
        params = torch.from_numpy(after.mean_D.astype(np.float32))
        return replace(state, round=state.round + 1, params=params, moments=moments)
