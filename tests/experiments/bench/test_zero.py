"""What gangs cost: figures come after equality."""

import numpy as np
import pytest
import torch

from engine.config.sections import Zero
from engine.messages.shards import ShardedState
from engine.records.checkpoint import Saved, save_checkpoint
from experiments.bench.harness import measure
from experiments.bench.scenarios import zero as bench
from strategies.core.protocol import ServerState


@pytest.mark.slow
def test_a_small_run_gives_its_figures(ray_session, full):
    if not full:
        pytest.skip("a minute for each stage")
    figures = measure("zero", small=True)
    assert figures["apart_s3"].value <= bench.TOLERANCE
    assert figures["reset_speedup_s3"].value > 1 > figures["reset_share_s3"].value > 0
    assert figures["loop_efficiency_s3"].value > 0
    assert figures["bytes_over_bound_s3"].value == pytest.approx(1, abs=0.01)
    assert {"rss_slope_mb_per_client_s3", "bare_tokens_per_s_s3"} < set(figures)


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_first_round_that_leads_elsewhere_gives_no_figure(tmp_path, wrong):
    shards = [np.ones(3, np.float32), np.ones(2, np.float32)]
    state = ShardedState(1, tuple(ServerState(1, torch.from_numpy(shard)) for shard in shards))
    save_checkpoint(tmp_path / "checkpoints", Saved(state, 1.0), keep=1)
    zero = Zero(stage=3, ranks=2)
    assert bench.gate(tmp_path, zero, shards) == 0
    shards[1] = torch.tensor([1, 1 + wrong]).numpy()
    with pytest.raises(ValueError, match=r"stage 3: after the first round the gang and bare loops are .* apart"):
        bench.gate(tmp_path, zero, shards)
