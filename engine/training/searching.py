"""Clients of searching rules: they judge candidates and train nothing. Legend: C candidates, P numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from engine.config.federation import Federation
from engine.objectives.token_batch import flattened, lengths, split
from engine.records.client_state import STRATEGY, owned_as, owned_by
from engine.training.local_training import Job, LocalTrainer
from engine.training.step_loop import batches
from strategies.core.base import Finished
from strategies.core.protocol import Update
from strategies.core.seeds import rng

Judged = tuple[np.ndarray, int]  # losses (C,), float64, summed over rows, and the number of units in each
# Judges candidates (C, P) on a job's rows, given with their numbers; "match" counts the rows that are not written.
Judge = Callable[[Job, np.ndarray, pa.RecordBatch, torch.Tensor], Judged]


@dataclass(frozen=True)
class SearchTrainer:
    """Lets the rule search for each client, with all scores on the same rows: those of the client's steps."""

    judge: Judge

    def updates(self, jobs: list[Job], federation: Federation, *, view: bool = False) -> list[Finished]:
        """Returns finished updates and new states, as `client_updates` does."""
        return [self._update(job, federation) for job in jobs]

    def _update(self, job: Job, federation: Federation) -> Finished:
        strategy, train, broadcast = federation.strategy, federation.train, job.broadcast
        stream = rng(federation.seed, broadcast.round, job.client, "batches")
        numbers = np.unique(np.concatenate([*batches(job.rows.num_rows, train, stream)]))
        rows, means, units = train.objective.step_rows(job.rows, numbers), list[float](), 0

        def score(candidates_CP: torch.Tensor) -> tuple[torch.Tensor, float]:
            nonlocal units
            losses_C, units = self.judge(job, numbers, rows, candidates_CP)
            means.append(float(losses_C.mean()) / max(1, units))
            return torch.from_numpy(losses_C), float(units)

        state = owned_by(job.state, STRATEGY)
        delta, beside = strategy.search(job.client, broadcast, state, score)
        tokens = float(sum(lengths(rows)))
        metrics = {"loss": means[0], "rows": float(job.rows.num_rows), "steps": 0.0, "tokens": tokens}
        metrics |= {"learned": float(units), "rates": 0.0}
        update, after = strategy.finish(Update(job.client, job.weight, delta, beside, metrics), broadcast, state)
        return update, owned_as(after, STRATEGY)


def judge_at_home(trainer: LocalTrainer, batch: int, by: str) -> Judge:
    """Makes the judge of a client that has the base."""

    def judge(job: Job, numbers: np.ndarray, rows: pa.RecordBatch, candidates_CP: torch.Tensor) -> Judged:
        if by == "match":
            return mismatches(rows, candidates_CP, partial(greedy, trainer))
        return losses(trainer, rows, candidates_CP, batch)

    return judge


def losses(trainer: LocalTrainer, rows: pa.RecordBatch, candidates_CP: torch.Tensor, batch: int) -> Judged:
    """Returns the summed loss of each candidate on rows, at most `batch` of them at once."""
    sums, units = list[float](), 0
    for candidate_P in candidates_CP:
        trainer.become(candidate_P.contiguous())
        terms = trainer.loss_terms(rows, batch)
        sums.append(sum(terms[name][0] for name in trainer.objective.losses))
        units = terms[next(iter(terms))][1]
    return np.array(sums), units


Write = Callable[[torch.Tensor, list[np.ndarray], list[int]], list[list[int]]]


def mismatches(rows: pa.RecordBatch, candidates_CP: torch.Tensor, write: Write) -> Judged:
    """Returns the number of rows whose completion is not written behind its prompt, of each candidate.

    `write` gives what is written by a candidate (P,) behind prompts, at most a number of tokens of each.
    """
    prompts, completions = halves_of(rows)
    wrong = [
        sum(
            written != completion.tolist()
            for written, completion in zip(
                write(candidate_P.contiguous(), prompts, [len(each) for each in completions]), completions, strict=True
            )
        )
        for candidate_P in candidates_CP
    ]
    return np.array(wrong, np.float64), rows.num_rows


def halves_of(rows: pa.RecordBatch) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Cuts rows of token ids where the first learned token is: prompts, and what follows."""
    ids, masks = split(rows["input_ids"]), np.split(flattened(rows["mask"]), np.cumsum(lengths(rows))[:-1])
    starts = [int(np.argmax(mask != 0)) for mask in masks]
    prompts = [each[: max(1, start)] for each, start in zip(ids, starts, strict=True)]
    return prompts, [each[max(1, start) :] for each, start in zip(ids, starts, strict=True)]


def greedy(trainer: LocalTrainer, vector: torch.Tensor, prompts: list[np.ndarray], most: list[int]) -> list[list[int]]:
    """Returns the likeliest tokens behind each prompt by a vector (P,), one prompt after another."""
    trainer.become(vector)
    network = trainer.trainable.network.eval()
    written = []
    for prompt, tokens in zip(prompts, most, strict=True):
        ids_BT = torch.from_numpy(prompt.astype(np.int64))[None].to(trainer.device)
        with torch.no_grad():
            out = network.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=trainer.pad,
            )
        written.append(out[0, len(prompt) :].tolist())
    return written
