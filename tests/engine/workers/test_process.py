"""The secured part of a worker, without Ray: a sum that is trained once and masked in each session of its round."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine.aggregation.ring_encoding import ring_aggregate, ring_sums
from engine.aggregation.secure_clients import Opening, SecureClients
from engine.config.privacy import Privacy, SecAgg
from engine.messages.reports import DOWN, UP, Report
from engine.workers.client_runner import ALONE
from engine.workers.process import SecureTraining
from strategies.averaging.fedavg import FedAvg
from strategies.core.layout import Layout
from strategies.core.protocol import Update
from strategies.secagg.protocol import Session
from strategies.secagg.server import SecAggServer

LAYOUT, COHORT = Layout(("w",), ((8,),)), (0, 1, 2)
METRICS = {"loss": 2.0, "learned": 3.0, "tokens": 4.0, DOWN: 1.0, UP: 1.0}


def test_a_void_session_masks_the_same_sum_again_and_a_new_round_begins_at_zero(federation):
    federation = replace(federation, strategy=FedAvg(weighting="uniform"), privacy=Privacy(secagg=SecAgg(mode="ideal")))
    trained = []

    def run(units, message, ring):
        for (client,) in units:
            trained.append(client)
            ring.add(Update(client, 1.0, torch.full((8,), 0.1 * (client + 1)), metrics=METRICS))
        return [Report(client, METRICS) for (client,) in units]

    clients = SecureClients()
    runner = SimpleNamespace(federation=federation, layout=LAYOUT, peers=ALONE, run=run)
    training = SecureTraining(runner, clients)
    sums = ring_sums(federation, LAYOUT, None, 0.0, len(COHORT), 100, 0)
    for round_, attempt in ((0, 0), (0, 1), (1, 0)):
        session = Session(round_, attempt, federation.privacy.secagg.parameters(len(COHORT)), sums, "ideal")
        keys = clients.open(Opening(session, COHORT, tuple((client,) for client in COHORT), {}), None)
        server = SecAggServer(session, COHORT, sums.length, None)
        inboxes = server.inboxes(clients.shares(server.key_list(keys)))
        _, masked = training.masked(inboxes, SimpleNamespace(round=round_, noise_plan=None))
        server.add(masked)
        server.survivors()
        server.unmask(clients.unmask(server.requests([])))
        aggregate, figures = ring_aggregate(sums.decode(server.total()), federation, LAYOUT, None, round_)
        assert aggregate.total.tolist() == pytest.approx([0.6] * 8, rel=1e-5)
        assert figures == pytest.approx({"term.nll": 18, "units.nll": 9, "tokens": 12, "clipped": 0}, rel=1e-5)
    assert trained == [*COHORT, *COHORT]
