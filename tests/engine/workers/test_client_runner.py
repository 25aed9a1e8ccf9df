"""One runner for a single process and for each rank of a group: what it refuses, counts and reports, without Ray."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.aggregation.accumulators import SingleUpdates
from engine.aggregation.exact_sum import ExactSum
from engine.config.availability import Availability
from engine.messages.broadcast import BroadcastMessage
from engine.messages.reports import DOWN, UP
from engine.records.client_state import ClientStates
from engine.workers.client_runner import ALONE, ClientRunner, Peers
from strategies.core.layout import Layout
from strategies.core.protocol import Broadcast, Update

LAYOUT = Layout(("w",), ((4,),))
MESSAGE = replace(BroadcastMessage.of(Broadcast(0, torch.zeros(4))), full_rows=2)
METRICS = {"loss": 1.0, "learned": 2.0, "tokens": 3.0}


class Tokens:
    """Two rows for each of three clients."""

    def counts(self, split):
        return torch.tensor([2, 2, 2]).numpy()

    def rows(self, client, split):
        return SimpleNamespace(num_rows=2)

    def in_advance(self, units):
        return iter(units)


@dataclass
class Trainer:
    """Gives every client the same delta, and notes whom it has trained."""

    delta: torch.Tensor
    clients: list[int]

    def updates(self, jobs, federation, *, view=False):
        self.clients += [job.client for job in jobs]
        return [(Update(job.client, job.weight, self.delta, metrics=dict(METRICS)), {}) for job in jobs]


@pytest.fixture
def runner(federation, tmp_path: Path):
    """Makes a runner whose clients all have the same delta."""

    def make(delta, peers=ALONE, **clients):
        trainer = Trainer(torch.tensor(delta), [])
        changed = replace(federation, clients=replace(federation.clients, **clients))
        return ClientRunner(changed, Tokens(), ClientStates(tmp_path), lambda unit, message: trainer, LAYOUT, peers)

    return make


def test_updates_reach_the_accumulator_with_their_traffic(runner):
    total = ExactSum()
    reports = runner([0.5, 0.0, 0.0, 0.25]).run([(0, 1), (2,)], MESSAGE, total)
    assert [report.client for report in reports] == [0, 1, 2] and all(report.good for report in reports)
    assert {(report.metrics[DOWN], report.metrics[UP]) for report in reports} == {(16.0, 16.0)}
    closed = total.take()
    assert closed.count == 3 and (closed.vectors["delta"] / 2**40).tolist() == [1.5, 0.0, 0.0, 0.75]


def test_a_useless_update_is_reported_and_taken_by_no_accumulator(runner):
    for accumulator in (ExactSum(), SingleUpdates()):
        (report,) = runner([float("nan"), 0.0, 0.0, 0.0]).run([(1,)], MESSAGE, accumulator)
        assert report.failed == "its update holds NaN or infinity" and not report.good
    assert accumulator.updates == {}


def test_figures_of_a_group_are_sums_over_its_ranks(runner):
    group = Peers(0, summed=lambda value: 2 * value)
    (report,) = runner([1.0] * 4, group).run([(0,)], MESSAGE, ExactSum())
    assert (report.metrics[DOWN], report.metrics[UP]) == (32.0, 32.0)
    assert group.whole_norm(3.0) == pytest.approx(18**0.5) and ALONE.whole_norm(3.0) == 3.0


@pytest.mark.parametrize(
    ("bound", "why"), [(float("nan"), "NaN or infinity"), (2.0**25, "beyond the exact sum's range of 4.19e+06")]
)
def test_a_rank_refuses_what_another_rank_must_refuse(runner, bound, why):
    total = ExactSum()
    (report,) = runner([1.0] * 4, Peers(0, largest=lambda mine: bound)).run([(0,)], MESSAGE, total)
    assert report.failed is not None and why in report.failed and total.count == 0
    assert "3.36e+07" not in report.failed  # also secured clients say this, and nothing of their updates' size


def test_a_rank_tries_nothing_again(runner):
    def raises(unit, message):
        raise KeyError("a row without a completion")

    single, rank = runner([1.0] * 4, retries=1), runner([1.0] * 4, Peers(0), retries=1)
    single.trainer_of = rank.trainer_of = raises
    (report,) = single.run([(0,)], MESSAGE, ExactSum())
    assert len(report.tried) == 2
    with pytest.raises(KeyError):
        rank.run([(0,)], MESSAGE, ExactSum())


def test_a_client_that_is_late_by_the_seed_is_not_trained(runner):
    late = runner([1.0] * 4, availability=Availability(deadline_s=1.0, step_s=100.0))
    trainer, total = late.trainer_of((0,), MESSAGE), ExactSum()
    (report,) = late.run([(0,)], MESSAGE, total)
    assert report.late > 0 and (report.metrics[DOWN], report.metrics[UP]) == (16.0, 0.0)
    assert trainer.clients == [] and total.count == 0
