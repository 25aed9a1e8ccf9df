"""The neighbor graph of a session: the number of neighbors k, the threshold t, and everybody's neighbors.

Bell et al. 2020 (CCS, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead"), sections 3 and 4: clients
stand in a random order on a ring and know the next k/2 on either side (a Harary graph). k and t are the smallest
that keep every client's mask with a probability of 1 - 2^-40 and recover every drop-out with 1 - 2^-20. With k = n - 1
the graph is complete, which is Bonawitz et al. 2017 (CCS, "Practical Secure Aggregation").
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from strategies.core.errors import require

# Half of 2^-40 each: the graph is not connected, or a client has too many corrupt neighbors.
SECURITY = -41 * math.log(2)
FAILURE = -20 * math.log(2)
SMALLEST_RING = 100  # below, shares of the clients are so few clients that probabilities say little
LARGEST_ACTIVE = 200  # every client of a complete graph checks everybody's signature


@dataclass(frozen=True)
class Parameters:
    """n clients are invited, each has `degree` neighbors, and `threshold` shares recover a secret.

    `active`: clients sign their keys and agree on the survivors, which holds against a server that lies. It needs the
    complete graph, since a lying server would also choose the ring, and thresholds above n/2, since two different lists
    of survivors must not both get enough signatures.
    """

    clients: int
    degree: int
    threshold: int
    active: bool = False

    def __post_init__(self) -> None:
        n, k, t = self.clients, self.degree, self.threshold
        require(n >= 2, f"secure aggregation needs a cohort of at least 2 clients, not {n}")
        graph = k == n - 1 or (2 <= k < n and k % 2 == 0)
        require(graph, f"the number of neighbors must be {n - 1} or an even number below, not {k}")
        most = n if self.complete else k
        require(2 <= t <= most, f"the threshold must be 2 to {most}, the number of holders of a share, not {t}")
        needs = f"the complete graph, a cohort of at most {LARGEST_ACTIVE}, and a threshold above half of it"
        holds = not self.active or (self.complete and n <= LARGEST_ACTIVE and 2 * t > n)
        require(holds, f"the active profile needs {needs}, not {k} neighbors, a cohort of {n} and a threshold of {t}")

    @property
    def complete(self) -> bool:
        """Whether all clients are neighbors."""
        return self.degree == self.clients - 1

    @property
    def fewest(self) -> int:
        """The least number of clients whose keys make a graph."""
        return self.threshold if self.complete else self.degree + 1


def neighbors(order: Sequence[int], place: int, parameters: Parameters) -> tuple[int, ...]:
    """The neighbors of the client at `place` if clients stand on the ring in this order."""
    if parameters.complete:
        return tuple(v for i, v in enumerate(order) if i != place)
    half = parameters.degree // 2
    steps = (*range(-half, 0), *range(1, half + 1))
    return tuple(order[(place + step) % len(order)] for step in steps)


def holders(client: int, around: tuple[int, ...], parameters: Parameters) -> tuple[int, ...]:
    """Who holds shares of a client's secrets: its neighbors `around` it, and on the complete graph itself.

    The latter is as in Bonawitz et al. On a ring only neighbors do: `choose` counts corrupt and surviving neighbors,
    and where t1 + k is odd, the client's share of its own secret would complete a lying server's second set.
    """
    return (*around, client) if parameters.complete else around


def choose(
    clients: int, corrupt: float = 0.05, dropout: float = 0.05, semi_malicious: bool = False, active: bool = False
) -> Parameters:
    """The smallest k, and the smallest t for it, that tolerate these shares of corrupt clients and of drop-outs.

    `semi_malicious`: the server sets the graph up honestly and lies afterwards about who dropped out. Small cohorts and
    the active profile get the complete graph. StrategyError where no t tolerates both shares.
    """
    shares = f"shares of corrupt clients and drop-outs must be in [0, 1), not {corrupt} and {dropout}"
    require(0 <= corrupt < 1 and 0 <= dropout < 1, shares)
    most_corrupt = math.floor(clients * corrupt + 1e-9)
    survivors = math.ceil(clients * (1 - dropout) - 1e-9)
    if clients >= SMALLEST_RING and not active:
        most_lost = most_corrupt + math.floor(clients * dropout + 1e-9)
        for k in range(2, clients - 1, 2):
            if k > most_lost or _log_disconnected(clients, k, most_lost) < SECURITY:
                t1 = _most_in_sample(clients, most_corrupt, k, SECURITY - math.log(clients))
                # Survivors are the complement: fewer than x of them means that more than k - x drop out.
                t2 = k - _most_in_sample(clients, clients - survivors, k, FAILURE - math.log(clients))
                if semi_malicious:
                    t1 = math.ceil((t1 + k - 1.25) / 2)
                if t2 > t1:
                    return Parameters(clients, k, max(t1 + 1, 2))
    # The complete graph. t shares of either kind must be out of reach: corrupt clients give both, others only one.
    lies = semi_malicious or active
    least = (clients + most_corrupt) // 2 + 1 if lies else most_corrupt + 1
    # A majority costs nothing where at least a majority survives.
    t = max(2, least, min(survivors, clients // 2 + 1))
    none = f"no threshold tolerates {most_corrupt} corrupt clients and {clients - survivors} drop-outs of {clients}"
    short = f"{least} shares would be needed, and {survivors} clients survive; expect fewer of either"
    require(t <= max(survivors, 2), f"{none}: {short}")
    return Parameters(clients, clients - 1, t, active)


def _log_disconnected(n: int, k: int, lost: int) -> float:
    """Log of a bound on the probability that the ring is disconnected when `lost` random clients are removed."""
    log = math.lgamma
    return math.log(n * (n - k - 1) / 2) + log(lost + 1) + log(n - k + 1) - log(n + 1) - log(lost - k + 1)


def _most_in_sample(n: int, marked: int, drawn: int, log_bound: float) -> int:
    """The least x with P[X > x] <= exp(log_bound), X the marked among `drawn` of n without replacement."""
    tail = 0.0
    for x in range(min(marked, drawn), max(0, drawn - (n - marked)), -1):
        tail += math.exp(_log_choose(marked, x) + _log_choose(n - marked, drawn - x) - _log_choose(n, drawn))
        if tail > math.exp(log_bound):
            return x
    return max(0, drawn - (n - marked))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
