"""Rules against client drift: FedProx (Li et al. 2020), FedDyn (Acar et al. 2021), SCAFFOLD (arXiv 1910.06378)."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from strategies.core.base import AveragingRule, Ends, Finished, NeedsSgd, Vectors
from strategies.core.layout import Layout
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, ClientState, ServerState, Update
from strategies.core.ranges import ABOVE_0, Range


@dataclass(frozen=True)
class FedProx(AveragingRule):
    """Each client minimizes F_k(theta) + (mu/2) |theta - theta_t|^2; the server averages as FedAvg. Reads the sum.

    Algorithm 2. The client's gradient is g + mu (theta - theta_t). A mu on the server alone would do nothing.
    """

    kind: Literal["fedprox"] = "fedprox"
    mu: Annotated[float, Range("pulls clients to the global model")] = 0.01
    paper: ClassVar[str] = "arXiv 1812.06127"

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, model: str = GLOBAL
    ) -> None:
        """grad += mu (theta - theta_t)."""
        grad_KP.add_(params_KP - broadcast.params, alpha=self.mu)


@dataclass(frozen=True)
class FedDyn(AveragingRule):
    """Local gradient g - h_k + alpha (theta - theta_t); then h_k -= alpha delta_k: algorithm 1.

    The server: h -= alpha sum_k delta_k / N over the N clients of the population, theta = mean theta_k - h / alpha;
    with lr, theta_t moves by that share of the way. Reads the sum. Client state: "h", the client's h_k, zero at first.

    Traps: h is a plain mean, so all clients weigh the same. h_k is the local gradient only where local training comes
    near its optimum. If cohorts are a small share of a large population, h keeps growing. A larger alpha helps against
    both. The authors' code divides alpha by each client's share of the rows; here it is the same for all, as in the
    paper. Where differential privacy clips, clients keep their whole changes and the server's h holds the clipped
    ones: training then settles away from the optimum, the further the more is clipped.
    """

    kind: Literal["feddyn"] = "feddyn"
    weighting: Literal["uniform"] = "uniform"
    alpha: Annotated[float, Range("pulls clients to the global model", ABOVE_0)] = 0.01
    keeps_state: ClassVar[bool] = True
    zero_moments: ClassVar[tuple[str, ...]] = ("h",)
    paper: ClassVar[str] = "arXiv 2111.04263"

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, model: str = GLOBAL
    ) -> None:
        """grad += alpha (theta - theta_t) - h_k."""
        grad_KP.add_(params_KP - broadcast.params, alpha=self.alpha)
        if "h" in client_state:
            grad_KP.sub_(client_state["h"])

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Keeps h_k - alpha delta."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        h = -self.alpha * update.delta
        return update, client_state | {"h": client_state["h"] + h if "h" in client_state else h}

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """h -= alpha sum delta / N, theta += lr (mean delta - h / alpha)."""
        assert state.population >= aggregate.count
        mean = aggregate.total / aggregate.weight
        h = state.moments["h"] - mean * (self.alpha * aggregate.count / state.population)
        params = state.params + self.lr * (mean - h / self.alpha)
        return replace(state, round=state.round + 1, params=params, moments={"h": h})


@dataclass(frozen=True)
class Scaffold(AveragingRule):
    """Local gradient g - c_k + c; then c_k+ = c_k - c - delta_k / (K eta), theta += lr mean delta_k.

    c += sum_k (c_k+ - c_k) / N over the N clients of the population. This is algorithm 1, option II, with the sum of
    the local learning rates for K eta, so that schedules may change them. Reads the sum, of two vectors: delta_k and
    c_k+ - c_k. Client state: "c", the client's c_k, zero at first.

    Traps: delta_k / (K eta) is a mean gradient for plain SGD only, without momentum; clipping of the corrected gradient
    enters c_k too. c is the plain mean of all c_k, so all clients weigh the same. In a large population a client's c_k
    belongs to an old model by the time the client is sampled again.
    """

    kind: Literal["scaffold"] = "scaffold"
    weighting: Literal["uniform"] = "uniform"
    keeps_state: ClassVar[bool] = True
    zero_moments: ClassVar[tuple[str, ...]] = ("c",)
    sends_moments: ClassVar[bool] = True
    needs_optimizer: ClassVar[NeedsSgd] = NeedsSgd("counts on what plain SGD does", momentum=0.0, divides=True)
    paper: ClassVar[str] = "arXiv 1910.06378"

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, model: str = GLOBAL
    ) -> None:
        """grad += c - c_k."""
        grad_KP.add_(broadcast.extras["c"])
        if "c" in client_state:
            grad_KP.sub_(client_state["c"])

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Sends c_k+ - c_k = -c - delta / (K eta) beside delta, and keeps c_k+."""
        update, client_state = super().finish(update, broadcast, client_state, ends)
        change = -broadcast.extras["c"] - update.delta / update.metrics["rates"]
        c = client_state["c"] + change if "c" in client_state else change
        return replace(update, extras={"c": change}), client_state | {"c": c}

    def beside(self, layout: Layout) -> dict[str, int]:
        """The changes of c_k."""
        return {"c": layout.size}

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """theta += lr mean delta, c += sum (c_k+ - c_k) / N."""
        assert state.population >= aggregate.count
        c = state.moments["c"] + aggregate.extras["c"] / state.population
        return replace(super().apply(state, aggregate), moments={"c": c})
