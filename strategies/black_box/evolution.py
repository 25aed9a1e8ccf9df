"""CMA-ES as pure functions on float64 arrays. Legend: D coordinates, L candidates.

Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772, with the constants of his package `cma` 4.5 for
positive weights alone.
"""

import math
from dataclasses import dataclass

import numpy as np

SMALLEST = 1e-20  # an eigenvalue below is rounding


@dataclass(frozen=True)
class Constants:
    """The learning rates for D coordinates and L candidates, of which the better half has positive weights."""

    weights_L: np.ndarray
    mass: float  # mu_eff, the variance-effective number of candidates
    sigma_rate: float  # c_sigma
    damping: float  # d_sigma
    path_rate: float  # c_c
    one_rate: float  # c_1
    many_rate: float  # c_mu
    length: float  # of a standard normal vector, on average

    @classmethod
    def of(cls, dimension: int, candidates: int) -> "Constants":
        """The defaults (section 3 and appendix A of the tutorial)."""
        raw_L = np.maximum(0.0, math.log((candidates + 1) / 2) - np.log(np.arange(1, candidates + 1)))
        weights_L = raw_L / raw_L.sum()
        mass, d = float(1 / (weights_L**2).sum()), float(dimension)
        sigma_rate = min(0.5, (mass + 2) / (d + mass + 3))
        one_rate = min(1.0, candidates / 6) * 2 / ((d + 1.3) ** 2 + mass)
        return cls(
            weights_L,
            mass,
            sigma_rate,
            1 + 2 * max(0.0, math.sqrt((mass - 1) / (d + 1)) - 1) + sigma_rate,
            (4 + mass / d) / (d + 4 + 2 * mass / d),
            one_rate,
            min(1 - one_rate, 2 * (0.25 + mass - 2 + 1 / mass) / ((d + 2) ** 2 + mass)),
            math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2)),
        )


@dataclass(frozen=True)
class Evolution:
    """The search distribution N(mean, sigma^2 C), its two paths, and the number of generations."""

    mean_D: np.ndarray
    sigma: float
    covariance_DD: np.ndarray
    sigma_path_D: np.ndarray
    path_D: np.ndarray
    generation: int = 0

    @classmethod
    def begun(cls, mean_D: np.ndarray, sigma: float) -> "Evolution":
        """The state before the first generation: C is the identity."""
        zeros_D = np.zeros(len(mean_D))
        return cls(mean_D.astype(np.float64), sigma, np.eye(len(mean_D)), zeros_D, zeros_D)

    def candidates(self, normals_LD: np.ndarray) -> np.ndarray:
        """Candidates (L, D): mean + sigma C^(1/2) n for each standard normal vector n."""
        candidates_LD: np.ndarray = self.mean_D + self.sigma * normals_LD @ _power(self.covariance_DD, 0.5)
        return candidates_LD

    def after(self, candidates_LD: np.ndarray, losses_L: np.ndarray) -> "Evolution":
        """The state after a generation, by the order of the candidates' losses alone; of equal ones the first wins."""
        rates = Constants.of(len(self.mean_D), len(losses_L))
        order_L, generation = np.argsort(losses_L, kind="stable"), self.generation + 1
        steps_LD = (candidates_LD[order_L] - self.mean_D) / self.sigma
        step_D = rates.weights_L @ steps_LD
        shift_D = math.sqrt(rates.mass) * _power(self.covariance_DD, -0.5) @ step_D
        kept = 1 - rates.sigma_rate
        sigma_path_D = kept * self.sigma_path_D + math.sqrt(rates.sigma_rate * (1 + kept)) * shift_D
        # A long path stalls the other one, so that C does not grow while sigma is too small.
        mean_square = (sigma_path_D**2).sum() / (1 - kept ** (2 * generation)) / len(step_D)
        moves = float(mean_square < 2 + 4 / (len(step_D) + 1))
        fresh = rates.path_rate * (2 - rates.path_rate)
        path_D = (1 - rates.path_rate) * self.path_D + moves * math.sqrt(fresh * rates.mass) * step_D
        one_rate = rates.one_rate * (1 - (1 - moves) * fresh)  # what a stalled path does not add, C keeps
        covariance_DD = (
            (1 - one_rate - rates.many_rate) * self.covariance_DD
            + rates.one_rate * np.outer(path_D, path_D)
            + rates.many_rate * (rates.weights_L[:, None] * steps_LD).T @ steps_LD
        )
        growth = rates.sigma_rate / rates.damping * (float(np.linalg.norm(sigma_path_D)) / rates.length - 1)
        return Evolution(
            self.mean_D + self.sigma * step_D,
            self.sigma * math.exp(min(1.0, growth)),
            covariance_DD,
            sigma_path_D,
            path_D,
            generation,
        )


def _power(covariance_DD: np.ndarray, exponent: float) -> np.ndarray:
    """The symmetric power of a covariance matrix."""
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    power_DD: np.ndarray = (vectors_DD * np.maximum(values_D, SMALLEST) ** exponent) @ vectors_DD.T
    return power_DD
