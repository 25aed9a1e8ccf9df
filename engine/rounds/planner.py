"""Who trains in a round, and how much work that is."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from datasets_partition.store.tokens import Tokens
from engine.config.federation import Federation, excludes_lanes
from engine.messages.broadcast import share
from engine.messages.reports import Report
from engine.messages.shards import ShardedState
from engine.messages.tasks import Work
from engine.rounds.server import Server
from engine.training.step_loop import steps_of

TOKEN_S = 1e-3  # a guess
FORGET = 0.9  # what is left of a round's weight after the next: other work comes and goes on a machine


@dataclass
class Costs:
    """Models seconds as linear in optimizer steps and tokens; it keeps the sums of its least squares over all rounds.

    Until there are any, each token is a millisecond. Only the order of work rests on it, and no result.
    """

    sums: np.ndarray = field(default_factory=lambda: np.zeros(6))  # squares (2, 2), then products (2,)

    def learn(self, steps: np.ndarray, tokens: np.ndarray, seconds: np.ndarray) -> None:
        """Takes in a round: what its clients (N,) did, and how long they took."""
        work_N2 = np.stack([steps, tokens], 1)
        self.sums = FORGET * self.sums + np.append(work_N2.T @ work_N2, work_N2.T @ seconds)

    def seconds(self, steps: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Predicts how long clients (N,) will take."""
        squares, products = self.sums[:4].reshape(2, 2), self.sums[4:]
        line = np.linalg.lstsq(squares, products, rcond=1e-9)[0] if squares.any() else np.zeros(2)
        if (line < 0).any() or not line.any():  # steps and tokens are too much alike to tell apart
            line = np.array([0.0, products[1] / squares[1, 1] if squares[1, 1] else TOKEN_S])
        seconds: np.ndarray = np.stack([steps, tokens], 1) @ line
        return seconds


@dataclass
class Planner:
    """Plans the rounds of a federation of `population` clients. `costs` is what is known of how long clients take."""

    federation: Federation
    tokens: Tokens
    population: int
    costs: Costs = field(default_factory=Costs)

    def work(self, round_: int) -> Work:
        """Returns the cohort that starts from the model after `round_`, with each client's steps and seconds."""
        cohort = self.federation.cohort.sample(self.population, self.federation.seed, round_)
        steps = self.steps(cohort)
        return Work(cohort, steps, self.costs.seconds(steps, self._tokens(cohort, steps)))

    def learn(self, work: Work, reports: list[Report]) -> None:
        """Improves the costs by how long clients took."""
        seconds = {report.client: report.seconds for report in reports if report.good}
        good = work.of(np.isin(work.clients, list(seconds)))
        took = np.array([seconds[client] for client in good.clients.tolist()])
        self.costs.learn(good.steps, self._tokens(good.clients, good.steps), took)

    def steps(self, clients: np.ndarray) -> np.ndarray:
        """Returns how many steps each of the clients (N,) takes in a round."""
        return np.array([steps_of(int(rows), self.federation.train) for rows in self.tokens.counts("train")[clients]])

    def full_rows(self, cohort: np.ndarray) -> float:
        """Returns the number of rows that has the weight 1 in a cohort (N,)."""
        rows = self.tokens.counts("train")
        return self.federation.privacy.full_rows(rows[cohort], int(rows.max()))

    def total_steps(self) -> int:
        """Returns how many steps all cohorts of the run take together."""
        cohort, seed, rounds = self.federation.cohort, self.federation.seed, range(self.federation.rounds)
        return int(sum(self.steps(cohort.sample(self.population, seed, round_)).sum() for round_ in rounds))

    def most_steps(self) -> int:
        """Returns how many steps a client takes at most in a round."""
        return steps_of(int(self.tokens.counts("train")[: self.population].max()), self.federation.train)

    def oldest(self, round_: int) -> int:
        """Returns the round of the oldest checkpoint from which a run could be resumed after this one."""
        every, keep = self.federation.checkpoint.every, self.federation.checkpoint.keep
        return max(0, (round_ // every - keep) * every)

    def _tokens(self, clients: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """About how many tokens each of the clients (N,) trains on in its steps (N,)."""
        train = self.federation.train
        passes = -(-self.tokens.counts("train")[clients] // (train.batch * train.accumulate))
        tokens: np.ndarray = self.tokens.lengths()[clients] * steps / passes
        if (sampling := train.objective.sampling) is not None:  # of prompts, each read and completed several times
            rows = self.tokens.counts("train")[clients] * steps / passes
            tokens = sampling.samples * (tokens + rows * sampling.tokens)
        return tokens


def choose_lanes(federation: Federation, server: Server, initial: ShardedState, population: int) -> int:
    """Returns how many clients a slot trains at once; measured in the first slot if the recipe says "auto"."""
    asked, cohort = federation.clients.lanes, federation.cohort
    if asked != "auto":
        return min(asked, max(1, cohort.largest(population)))
    # Nothing is measured beside gangs. No number of lanes may leave slots without clients.
    most = int(cohort.expected(population)) // server.pool.size
    if excludes_lanes(federation) or federation.clients.zero or most < 2:
        return 1
    message = share(server.model_message(initial))
    neighbors = max(Counter(server.pool.nodes.values()).values())
    lanes: int = server.pool.ask(lambda actor: actor.best_lanes.remote(message, most, population, neighbors))
    return lanes
