"""Words: a search over discrete prompts, by log-probabilities alone. Legend: N places, C candidates."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch

from strategies.core.access import Capability
from strategies.core.base import Ends, Finished, Rule, Searched
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Broadcast, ClientState, Mask, Score, ServerState, Update
from strategies.core.ranges import AT_LEAST_1, Range
from strategies.core.seeds import rng


@dataclass(frozen=True)
class Words(Rule):
    """The best of the last prompt and `mutants` others that differ from it in one token, by sum_k nll_k. Reads the sum.

    All clients score the same candidates, each on the rows of its steps; nobody sends a change. Losses are summed over
    tokens, so that a client counts by its tokens. With `score` "match" a candidate's loss is the number of rows whose
    completion the model does not write word for word, greedily, for which a text API will do.

    Traps: a candidate that wins on one cohort's rows may lose on all: take large cohorts or more rows a step. Token ids
    travel as floats, which hold whole numbers up to 2^24.
    """

    kind: Literal["words"] = "words"
    mutants: Annotated[int, Range("is the number of prompts that are tried beside the last one", AT_LEAST_1)] = 16
    score: Literal["logprobs", "match"] = "logprobs"
    elementwise: ClassVar[bool] = False
    trains_what_it_sends: ClassVar[bool] = False
    tunes: ClassVar[tuple[str, ...]] = ("words",)

    @property
    def access(self) -> frozenset[Capability]:
        """Log-probabilities of given completions, or texts."""
        return frozenset({"score"}) if self.score == "logprobs" else frozenset({"generate"})

    @property
    def judges_by(self) -> Literal["loss", "match"]:
        """As `score` says."""
        return "loss" if self.score == "logprobs" else "match"

    @property
    def weighs_alike(self) -> bool:
        """A client counts by its tokens."""
        return True

    def broadcast(self, state: ServerState) -> Broadcast:
        """Sends all candidates, the last prompt first."""
        sent = super().broadcast(state)
        return replace(sent, extras={"candidates": self._candidates(state).reshape(-1)})

    def search(self, client: int, broadcast: Broadcast, client_state: ClientState, score: Score) -> Searched:
        """Sends each candidate's loss and the number of tokens."""
        candidates_CN = broadcast.extras["candidates"].view(1 + self.mutants, -1)
        losses_C, units = score(candidates_CN)
        beside = {"nll": losses_C.float(), "learned": torch.tensor([float(units)])}
        return torch.zeros_like(broadcast.params), beside

    def finish(self, update: Update, broadcast: Broadcast, client_state: ClientState, ends: Ends = None) -> Finished:
        """Sets the weight."""
        return replace(update, weight=1.0), client_state

    def beside(self, layout: Layout) -> dict[str, int]:
        """The candidates' losses, and the number of tokens."""
        return {"nll": 1 + self.mutants, "learned": 1}

    def sent_masks(self, round_: int, layout: Layout) -> dict[str, Mask]:
        """No change is sent."""
        return {"delta": torch.zeros(layout.size, dtype=torch.bool)}

    def apply(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Takes the first of the candidates with the smallest loss."""
        best = int(aggregate.extras["nll"].argmin())
        return replace(state, round=state.round + 1, params=self._candidates(state)[best].contiguous())

    def _candidates(self, state: ServerState) -> torch.Tensor:
        """The prompts (C, N) of the next round: the last one, and copies with one token drawn again."""
        draws, places = rng(state.seed, state.round, -1, "candidates"), len(state.params)
        candidates_CN = state.params.repeat(1 + self.mutants, 1)
        for mutant in range(1, 1 + self.mutants):
            place, token = draws.integers(places), draws.integers(state.layout.choices)
            candidates_CN[mutant, place] = float(token)
        return candidates_CN
