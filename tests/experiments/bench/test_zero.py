"""What gangs cost: figures come after equality."""

import pytest

from experiments.bench import zero as bench
from experiments.bench.zero_ranks import Bare


@pytest.mark.slow
def test_a_small_run_gives_its_figures(ray_session, full):
    if not full:
        pytest.skip("a minute for each stage")
    figures = bench.measure(small=True)
    assert figures["apart_s3"].value <= bench.TOLERANCE
    assert figures["reset_speedup_s3"].value > 1 > figures["reset_share_s3"].value > 0
    assert figures["loop_efficiency_s3"].value > 0 and figures["bytes_over_bound_s3"].value == pytest.approx(
        1, abs=0.01
    )
    assert {"rss_slope_mb_per_client_s3", "bare_tokens_per_s_s3"} < set(figures)


def test_loops_that_disagree_give_no_figure(monkeypatch, small_recipe):
    apart = Bare(fresh_s=1.0, reset_s=0.1, client_s=1.0, tokens_per_s=1.0, apart=1e-3)
    monkeypatch.setattr(bench, "in_ranks", lambda *_: [apart, apart])
    with pytest.raises(ValueError, match=r"stage 3: the gang's trainer and the bare loop are 0\.001 apart"):
        bench._bare_figures(small_recipe(), bench.Zero(stage=3), 1)
