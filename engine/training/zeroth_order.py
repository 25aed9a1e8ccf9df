"""Steps by losses alone: clients of the kind `seeds`. Legend: K directions, T steps."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from engine.config.federation import Federation
from engine.config.train import Train
from engine.models.seeded import Seeded
from engine.objectives.base import counted, step_loss
from engine.objectives.token_batch import Batch
from engine.training.local_training import Job, LocalTrainer, client_updates
from engine.training.step_loop import Progress, Trained, Training, batches, steps_of
from strategies.core.base import Finished

Walk = Callable[[int], np.ndarray]  # gives the directions (T,) of a number of steps


class ZerothTrainer:
    """Trains one client at a time along directions, each step by two forward passes. A Trainer."""

    def __init__(self, plain: LocalTrainer, seeded: Seeded) -> None:
        self.plain, self.seeded = plain, seeded
        self.device, self.objective, self.trainable = plain.device, plain.objective, seeded
        self.become, self.loss_terms, self.generate = plain.become, plain.loss_terms, plain.generate
        self.answers, self.step_means, self.pad = plain.answers, plain.step_means, plain.pad
        self.walk: Walk | None = None

    def updates(self, jobs: list[Job], federation: Federation, *, view: bool = False) -> list[Finished]:
        """Trains clients one after another along the directions that the rule gives them."""
        finished = []
        for job in jobs:
            self.walk = partial(federation.strategy.walk, job.client, job.broadcast)
            finished += client_updates(self, [job], federation)
            self.walk = None
        return finished

    def train(self, trainings: Sequence[Training], train: Train) -> list[Trained]:
        """Does all trainings; without a rule's walk each draws its directions itself."""
        return [self._train(training, train) for training in trainings]

    def _train(self, training: Training, train: Train) -> Trained:
        seeded, rows = self.seeded, training.rows.num_rows
        self.become(training.start)
        steps = steps_of(rows, train)
        client = Progress(0, training, batches(rows, train, training.stream), steps)
        drawn = training.stream.integers(len(seeded.flat), size=steps) if self.walk is None else self.walk(steps)
        step_factor = training.step_factor or train.over_steps.factor
        self.seeded.network.eval()
        for number in drawn.tolist():
            direction_W = seeded.direction(number)
            pieces = self.plain.cut(client.next_rows(self.objective), train.batch)
            counts, losses, totals = counted(self.objective, pieces), [], []
            for amount in (seeded.eps, -seeded.eps):
                seeded.look(direction_W, amount)
                sums = self._sums(pieces)
                losses.append(float(step_loss(self.objective, sums, counts)))
                totals.append(sums)
            slope = (losses[0] - losses[1]) / (2 * seeded.eps)
            if train.clip > 0:
                slope = min(max(slope, -train.clip), train.clip)
            lr = train.optimizer.lr * training.round_factor * step_factor(client.taken, steps)
            seeded.move(number, direction_W, -lr * slope)
            client.count(counts, sum(piece.tokens for piece in pieces))
            client.add({name: (totals[0][name] + totals[1][name]) / 2 for name in totals[0]})
            client.taken, client.lr_sum = client.taken + 1, client.lr_sum + lr
        end = seeded.flat.detach().clone()
        if training.origin is not None:
            end = end.sub_(training.origin)
        return Trained(end, client.metrics(self.objective, float), {})

    @torch.no_grad()
    def _sums(self, pieces: list[Batch]) -> Mapping[str, torch.Tensor]:
        """Returns each term's sum over a step, float64."""
        plain, sums = self.plain, dict[str, torch.Tensor]()
        for piece in plain.with_columns(pieces, None):
            terms = self.objective.terms(self.seeded.network, piece.to(self.device), plain.context)
            for name, term in terms.items():
                total = term.total().double()
                sums[name] = sums[name] + total if name in sums else total
        return sums
