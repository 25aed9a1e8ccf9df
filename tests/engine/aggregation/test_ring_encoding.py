"""What clients send through the ring, judged as an attacker would: does the epsilon that is claimed hold?"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.aggregation.accumulators import RingSum
from engine.aggregation.ring_encoding import ring_aggregate, ring_sums
from engine.aggregation.ring_shard import RingShard
from engine.config.privacy import Privacy, SecAgg
from strategies.averaging.fedavg import FedAvg
from strategies.core.cohort import UniformCohort
from strategies.core.layout import Layout
from strategies.core.protocol import Update
from strategies.privacy.distributed import DistributedDp, DistributedPlan

LENGTH, CLIENTS, MOST_TOKENS, DELTA = 8, 3, 100, 1e-2
LAYOUT = Layout(("w",), ((LENGTH,),))
TOLD = {"loss": 1.0, "learned": 10.0, "tokens": 12.0}


def planned(kind: str, z: float) -> DistributedPlan:
    dp = DistributedDp(noise=kind, noise_multiplier=z, delta=DELTA, survivors=1.0)
    return dp.plan(UniformCohort(size=CLIENTS), 100, 1, LENGTH)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["skellam", "discrete_gaussian"])
def test_an_attack_on_the_ring_stays_below_epsilon_and_would_notice_a_quarter_of_the_noise(
    federation, lower_bound, full, kind
):
    federation = replace(federation, strategy=FedAvg(weighting="uniform"), privacy=Privacy(secagg=SecAgg(mode="ideal")))
    runs = 1000 if full else 300
    canary = torch.zeros(LENGTH)
    canary[2] = 100.0  # clipped to norm 1

    def attacked(z: float) -> float:
        plan = planned(kind, z)
        sums = ring_sums(federation, LAYOUT, plan, 0.0, CLIENTS, MOST_TOKENS, 0)

        def seen(round_: int, delta: torch.Tensor) -> float:
            ring = RingSum(RingShard(sums, {}), federation, plan, round_)
            for client, change in enumerate([delta, *[torch.full((LENGTH,), 0.1)] * (CLIENTS - 1)]):
                ring.add(Update(client, 1.0, change, metrics=TOLD))
            total = sums.decode(ring.masked([]))
            return float(ring_aggregate(total, federation, LAYOUT, plan, round_)[0].total[2])

        present = np.array([seen(round_, canary) for round_ in range(runs)])
        absent = np.array([seen(round_, torch.zeros(LENGTH)) for round_ in range(runs, 2 * runs)])
        return lower_bound(present, absent, DELTA, 1.0)

    claimed = planned(kind, 1.0).spent(1, simulated=False).epsilon
    assert 0 < attacked(1.0) <= claimed < attacked(0.25)
