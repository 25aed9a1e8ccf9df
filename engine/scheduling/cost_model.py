"""How long clients take, learnt from the run's own rounds: what the longest work is, and how large a chunk."""

from dataclasses import dataclass, field

import numpy as np

TOKEN_S = 1e-3  # a guess
FORGET = 0.9  # what is left of a round's weight after the next: other work comes and goes on a machine


@dataclass
class Costs:
    """Seconds as a line through optimizer steps and tokens: the sums that its least squares need, over all rounds.

    Until there are any, each token is a millisecond. Only the order of work rests on it, and no result.
    """

    squares: np.ndarray = field(default_factory=lambda: np.zeros((2, 2)))
    products: np.ndarray = field(default_factory=lambda: np.zeros(2))

    @classmethod
    def of(cls, sums: list[float]) -> "Costs":
        """What `sums` has told of another."""
        return cls(np.array(sums[:4]).reshape(2, 2), np.array(sums[4:])) if sums else cls()

    @property
    def sums(self) -> list[float]:
        """All that is known, as a checkpoint keeps it."""
        return [*self.squares.ravel().tolist(), *self.products.tolist()]

    def learn(self, steps: np.ndarray, tokens: np.ndarray, seconds: np.ndarray) -> None:
        """Takes in a round: what its clients (N,) did, and how long they took."""
        work_N2 = np.stack([steps, tokens], 1)
        self.squares = FORGET * self.squares + work_N2.T @ work_N2
        self.products = FORGET * self.products + work_N2.T @ seconds

    def seconds(self, steps: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """How long clients (N,) will take."""
        work_N2 = np.stack([steps, tokens], 1)
        line = np.linalg.lstsq(self.squares, self.products, rcond=1e-9)[0] if self.squares.any() else np.zeros(2)
        if (line < 0).any() or not line.any():  # too much alike to tell one from the other
            line = np.array([0.0, self.products[1] / self.squares[1, 1] if self.squares[1, 1] else TOKEN_S])
        found: np.ndarray = work_N2 @ line
        return found
