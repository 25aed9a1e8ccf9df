"""What a long run holds in memory does not grow with its rounds: everything is in files, one a round."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.aggregation.privacy_account import PrivacyAccount
from engine.config.federation import Federation
from engine.config.privacy import Privacy
from engine.config.sections import Model
from engine.config.train import Train
from engine.messages.events import DROPOUT, Fault
from engine.messages.shards import ShardedState
from engine.records.checkpoint import Saved, save_checkpoint
from engine.records.journal import Journal
from engine.records.logs import Logs
from strategies.averaging.fedavg import FedAvg
from strategies.core.cohort import UniformCohort
from strategies.core.layout import Layout
from strategies.core.protocol import ServerState
from strategies.privacy.central import CentralDp

CLIENTS = 50


class NullRun:
    """All that the driver keeps of records, and null rounds of many clients that pass through it."""

    def __init__(self, folder: Path) -> None:
        sections = {"cohort": UniformCohort(size=CLIENTS), "strategy": FedAvg(weighting="uniform")}
        privacy = Privacy(dp=CentralDp(noise_multiplier=1.0, delta=1e-3))
        run = Federation(name="x", seed=1, rounds=100, model=Model(), train=Train(steps=1), privacy=privacy, **sections)
        self.folder, self.logs, self.journal = folder, Logs.under(folder), Journal(folder)
        self.privacy = PrivacyAccount.open(run, Layout(("w",), ((3,),)), folder, np.full(CLIENTS, 4), 1)

    def play(self, round_: int, *, written: bool) -> None:
        clients = list(range(CLIENTS))
        names = [f"client-{client}" for client in clients]
        self.privacy.charge()
        self.journal.admit(round_, clients, lambda apart: None)
        self.journal.summed(round_)
        self.logs.metrics.add_each(round_, "train", names, [{"loss": 1.0, "rows": 2.0} for _ in clients])
        self.logs.metrics.add(round_, "train", None, loss=1.0)
        self.logs.ledger.received(round_, "server", "update", CLIENTS, 400)
        self.logs.faults.happened(round_, [Fault(DROPOUT, name, "away") for name in names], 1.0)
        if written:
            self.logs.flush(round_)
        else:
            self.logs.clear()
        saved = Saved(ShardedState(round_, (ServerState(round_, torch.zeros(3)),)), 1.0)
        save_checkpoint(self.folder / "checkpoints", saved, keep=2)

    def held(self) -> int:
        """The bytes of it all."""
        self.logs.metrics.started = 0.0  # the digits of a time vary
        return len(pickle.dumps((self.logs, self.journal, self.privacy)))


@pytest.mark.parametrize("written", [True, False], ids=["written", "played beside the run"])
def test_nothing_grows_with_rounds_and_clients(tmp_path: Path, written: bool) -> None:
    run = NullRun(tmp_path)
    held = []
    for round_ in range(1, 21):
        run.play(round_, written=written)
        held.append(run.held())
    assert abs(held[19] - held[9]) < 16  # digits of the epsilon's statement
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
