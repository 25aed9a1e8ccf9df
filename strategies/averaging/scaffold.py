"""SCAFFOLD: control variates against client drift (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from strategies.core.base import AveragingRule, Ends, Finished, NeedsSgd, Vectors
from strategies.core.layout import Layout
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, ClientState, ServerState, Update


@dataclass(frozen=True)
class Scaffold(AveragingRule):
    """Local gradient g - c_k + c; then c_k+ = c_k - c - delta_k / (K eta), theta += lr mean delta_k.

    c += sum_k (c_k+ - c_k) / N over the N clients of the population. This is the paper's option II, with the sum of the
    local learning rates for K eta, so that schedules may change them. Reads the sum, of two vectors: delta_k and
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
    paper: ClassVar[str] = "arXiv 1910.06378"

    @property
    def needs_optimizer(self) -> NeedsSgd:
        """SGD without momentum, whose learning rate is divided by."""
        return NeedsSgd("counts on what plain SGD does", momentum=0.0, divides=True)

    def correct(
        self, grad_KP: Vectors, params_KP: Vectors, broadcast: Broadcast, client_state: ClientState, run: str = GLOBAL
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
