"""How long clients take, learned from the run's own rounds: it decides the order of work and the size of chunks."""

from dataclasses import dataclass, field

import numpy as np

TOKEN_S = 1e-3  # a guess
FORGET = 0.9  # what is left of a round's weight after the next: other work comes and goes on a machine


@dataclass
class Costs:
    """Models seconds as linear in optimizer steps and tokens; it keeps the sums of its least squares over all rounds.

    Until there are any, each token is a millisecond. Only the order of work rests on it, and no result.
    """

    squares: np.ndarray = field(default_factory=lambda: np.zeros((2, 2)))
    products: np.ndarray = field(default_factory=lambda: np.zeros(2))

    @classmethod
    def of(cls, sums: list[float]) -> "Costs":
        """Restores the model whose `sums` a checkpoint has kept."""
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
        """Predicts how long clients (N,) will take."""
        work_N2 = np.stack([steps, tokens], 1)
        line = np.linalg.lstsq(self.squares, self.products, rcond=1e-9)[0] if self.squares.any() else np.zeros(2)
        if (line < 0).any() or not line.any():  # steps and tokens are too much alike to tell apart
            line = np.array([0.0, self.products[1] / self.squares[1, 1] if self.squares[1, 1] else TOKEN_S])
        seconds: np.ndarray = work_N2 @ line
        return seconds
