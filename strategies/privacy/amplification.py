"""Privacy amplification by Poisson sampling, for any noise with known Rényi divergences."""

import math
from collections.abc import Callable

import numpy as np

# Whole numbers, for which all bounds in use are proved.
ORDERS: np.ndarray = np.array([*range(2, 65), *range(68, 129, 4), *range(144, 257, 16)])


def poisson_rdp(rdp: Callable[[np.ndarray], np.ndarray], rate: float) -> np.ndarray:
    """The divergences at ORDERS if each unit is in the sum with probability `rate` = q.

    Zhu and Wang 2019 ("Poisson Subsampled Rényi Differential Privacy", ICML), the bound for any noise: with r the
    divergences of the whole sum, the logarithm, over a - 1, of
    (1-q)^(a-1) (a q - q + 1) + C(a,2) q^2 (1-q)^(a-2) e^r(2) + 3 sum_{l=3..a} C(a,l) (1-q)^(a-l) q^l e^((l-1) r(l)).
    It is never more than r.
    """
    largest = int(ORDERS[-1])
    whole = rdp(np.arange(2, largest + 1))
    plain: np.ndarray = whole[ORDERS - 2]
    if rate == 1:
        return plain
    log_q, log_rest = math.log(rate), math.log1p(-rate)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, largest + 1)))])
    bound = np.empty(len(ORDERS))
    for index, order in enumerate(ORDERS.tolist()):
        l_L = np.arange(2, order + 1)
        logs_L = factorials[order] - factorials[l_L] - factorials[order - l_L]
        logs_L += l_L * log_q + (order - l_L) * log_rest + (l_L - 1) * whole[l_L - 2]
        logs_L[1:] += math.log(3)
        first = (order - 1) * log_rest + math.log1p((order - 1) * rate)
        bound[index] = np.logaddexp.reduce(np.append(logs_L, first)) / (order - 1)
    least: np.ndarray = np.minimum(bound, plain)
    return least


def capped_epsilon(
    epsilon: Callable[[float], float], delta: float, steps: int, population: int, rate: float, cap: int
) -> float:
    """Epsilon at `delta` if Poisson samples above `cap` are cut; `epsilon(delta)` is that of whole samples.

    A run is as without the cap unless a sample exceeds it. With p the probability that one of the steps' does, (e, d)
    becomes (e, d + (1 + e^e) p): half of delta goes to each. Infinite where the cap is hit too often for that.
    """
    whole = epsilon(delta / 2)
    cut = steps * math.exp(log_exceeds(population, rate, cap))
    return whole if whole < 700 and (1 + math.exp(whole)) * cut <= delta / 2 else math.inf


def log_exceeds(population: int, rate: float, cap: int) -> float:
    """The logarithm of a bound on the probability that a Poisson sample is larger than the cap (Chernoff)."""
    share = (cap + 1) / population
    if share > 1:
        return -math.inf
    if share <= rate:
        return 0.0
    rest = (1 - share) * math.log((1 - share) / (1 - rate)) if share < 1 else 0.0
    return -population * (share * math.log(share / rate) + rest)
