"""Completes the prompts of clients' next steps, and of held-out rows, by the network as it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from engine.config.train import Train
from engine.objectives.base import Context, Objective, Tokenizer
from engine.objectives.sampling import Completion, Sampling
from engine.training.rollouts import Key, cached_forward, complete
from engine.training.step_columns import judging
from engine.training.step_loop import Progress

RowKeys = Callable[[int, int], Key]  # of a row and a sample, by their numbers


@dataclass(frozen=True)
class Prompts:
    """What a lane completes: token ids of prompts, and the keys of their samples one after another."""

    ids: Sequence[np.ndarray] = ()
    keys: Sequence[Key] = ()

    def part(self, first: int, last: int, samples: int) -> "Prompts":
        """Returns the prompts of these numbers."""
        return Prompts(self.ids[first:last], self.keys[first * samples : last * samples])

    def filled(self, width: int, samples: int) -> "Prompts":
        """Adds empty prompts, which have no completion, up to a number."""
        lacking = width - len(self.ids)
        return Prompts([*self.ids, *[np.empty(0, np.int64)] * lacking], [*self.keys, *[None] * lacking * samples])


def joined(parts: Sequence[Prompts]) -> Prompts:
    """Returns prompts one after another."""
    return Prompts([ids for part in parts for ids in part.ids], [key for part in parts for key in part.keys])


@dataclass(frozen=True)
class Sampler:
    """Samples by `network` for an objective; `pad` pads prompts, on the network's device."""

    objective: Objective
    network: Any
    context: Context
    pad: int
    device: torch.device

    def next_rows(self, active: Sequence[Progress], train: Train, *, every_logit: bool = False) -> list[pa.RecordBatch]:
        """Returns the rows of each lane's next step, completed where the objective samples.

        Lanes whose completed steps have run out get the next ones together, so that what is in a batch follows from the
        clients in the lanes. At most `train.batch` prompts of a lane are completed at once.
        """
        sampling = self.objective.sampling
        if sampling is None:
            return [client.next_rows(self.objective) for client in active]
        steps = [[] if client.ahead else self._next_steps(client, sampling) for client in active]
        if any(steps):
            lanes = [joined([prompts for _, prompts in its]) for its in steps]
            completions = self._completions(lanes, sampling, train.batch, every_logit=every_logit)
            for client, its, of_lane in zip(active, steps, completions, strict=True):
                begin = 0
                for rows, prompts in its:
                    end = begin + len(prompts.keys)
                    # A private sample may be empty.
                    completed = (
                        self.objective.completed(rows, of_lane[begin:end], self.context) if end > begin else rows
                    )
                    client.ahead.append(completed)
                    begin = end
        return [client.ahead.popleft() for client in active]

    def completed(self, rows: pa.RecordBatch, keys: RowKeys, samples: int, batch: int) -> pa.RecordBatch:
        """Returns held-out rows with `samples` completions of each prompt, at most `batch` prompts at once."""
        assert self.objective.sampling is not None
        sampling = replace(self.objective.sampling, samples=samples)
        all_keys = [keys(row, sample) for row in range(rows.num_rows) for sample in range(samples)]
        (completions,) = self._completions([Prompts(self.objective.prompt_ids(rows), all_keys)], sampling, batch)
        return self.objective.completed(rows, completions, replace(self.context, training=False))

    def _next_steps(self, client: Progress, sampling: Sampling) -> list[tuple[pa.RecordBatch, Prompts]]:
        """Returns the rows and prompts of a client's next steps."""
        steps, keys, samples = list[tuple[pa.RecordBatch, Prompts]](), client.training.keys, range(sampling.samples)
        for step, numbers in enumerate(islice(client.batches, sampling.steps), client.taken):
            rows = self.objective.step_rows(client.training.rows, numbers)
            its_keys = [keys(step, row, sample) for row in numbers.tolist() for sample in samples]
            ids = self.objective.prompt_ids(rows)
            if sampling.share < 1:
                firsts = its_keys[:: sampling.samples]
                ids = [
                    each if _drawn(key) < sampling.share else each[:0] for each, key in zip(ids, firsts, strict=True)
                ]
            steps.append((rows, Prompts(ids, its_keys)))
        return steps

    def _completions(
        self, lanes: Sequence[Prompts], sampling: Sampling, batch: int, *, every_logit: bool = False
    ) -> list[list[Completion]]:
        """Completes the prompts of lanes side by side, at most `batch` of each at once."""
        samples, completions = sampling.samples, [list[Completion]() for _ in lanes]
        forward = cached_forward(self.network, every_logit=every_logit)
        ends = _ends(self.network, self.context.tokenizer)
        with judging(self.network):
            for first in range(0, max(len(lane.ids) for lane in lanes), batch):
                turn = [lane.part(first, first + batch, samples) for lane in lanes]
                width = max(len(part.ids) for part in turn)
                whole = joined([part.filled(width, samples) for part in turn])
                sampled = complete(
                    forward, whole.ids, whole.keys, sampling, ends=ends, pad=self.pad, device=self.device
                )
                together = sampled.completions()
                for place, (part, of_lane) in enumerate(zip(turn, completions, strict=True)):
                    begin = place * width * samples
                    of_lane += together[begin : begin + len(part.keys)]
        return completions


def _drawn(key: bytes) -> float:
    """Returns a number from 0 to below 1 for the sample of this key, apart from the draws of its tokens."""
    return int.from_bytes(sha256(b"share" + key).digest()[:8], "big") / 2**64


def _ends(network: Any, tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the tokens that end a text, by the tokenizer and by the base's own settings of generation."""
    named = network.generation_config.eos_token_id if hasattr(network, "generation_config") else None
    return frozenset({tokenizer.eos_token_id, *([named] if isinstance(named, int) else named or ())})
