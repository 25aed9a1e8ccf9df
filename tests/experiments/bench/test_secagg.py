"""What secure aggregation costs: figures come after equality, and say whether they were measured."""

import math
from dataclasses import replace

import numpy as np
import pytest

from experiments.bench.harness import Bench, Figure, measure
from experiments.bench.scenarios import secagg as bench
from experiments.bench.scenarios.secagg import Rounds, add_rounds, play, session_of
from strategies.secagg.client import Client
from strategies.secagg.parameters import choose
from strategies.secagg.protocol import SecAggAbort
from strategies.secagg.server import SecAggServer


@pytest.fixture
def tiny_demo(monkeypatch, tiny_base, rows_file, tmp_path_factory):
    """Lets the small benchmark run on the tests' base and rows."""
    changes = [f'model.base="{tiny_base}"', f'data.source={{kind="jsonl", path="{rows_file}"}}', "cohort.size=5"]
    changes.append(f'data.cache="{tmp_path_factory.getbasetemp() / "stores"}"')
    monkeypatch.setattr(bench, "SMALL", bench.SMALL._replace(changes=(*bench.SMALL.changes, *changes)))


@pytest.mark.slow
def test_a_small_run_gives_its_figures(ray_session, tiny_demo, monkeypatch, full):
    if not full:
        pytest.skip("half a minute")
    monkeypatch.setattr(bench, "in_fresh_process", lambda work, *arguments: work(*arguments))
    figures = measure("secagg", small=True)
    assert figures["full_equals_ideal"].value == 1.0
    assert figures["core_s_1000x5m"].value is None
    missing = {name for name, figure in figures.items() if figure.value is None}
    assert missing == {"core_s_1000x5m", "plain_ratio_n32"}
    assert all(figure.value >= 0 for name, figure in figures.items() if name not in missing)
    assert figures["secured_round_sessions_n32"].value == 1
    assert figures["secured_round_mb_up_n32"].value > figures["plain_round_mb_up_n32"].value > 0
    assert figures["losses_apart_n32"].value < 1e-3

    # 16,384 of 20,002 coordinates were masked.
    assert (
        figures["client_mask_s_32x20k"].unit == figures["core_s_32x20k"].unit.replace("core-", "") == "s, extrapolated"
    )
    assert figures["client_keys_s_32x20k"].unit == figures["server_add_s_32x20k"].unit == "s, measured"
    assert 0 < figures["core_s_extrapolated_32x20k"].value < 1
    seconds = [
        figures[f"client_{step}_s_32x20k"].value for step in ("keys", "shares", "encode", "open", "mask", "unmask")
    ]
    assert figures["client_s_32x20k"].value == pytest.approx(sum(seconds))
    core_s = 32 * figures["client_s_32x20k"].value + figures["server_s_32x20k"].value
    assert figures["core_s_32x20k"].value == pytest.approx(core_s)
    # Two keys each with a number; a commitment and 31 boxes; the vector; 31 shares of seeds, and one key's in place.
    sent = (4 + 64) + (4 + 32 + 31 * (4 + 94)) + (4 + 4 * 20_002) + (4 + 32 * (4 + 33))
    assert figures["client_sent_bytes_32x20k"].value == pytest.approx(sent, abs=(4 + 32 * 37) / 32)


def test_the_full_size_has_the_session_that_is_asked_for():
    assert 1000 in bench.FULL.cohorts and 5_000_000 in bench.FULL.coordinates
    assert choose(1000).degree == 30 == bench.KEYS - 1
    assert "cohort.size=32" in bench.FULL.changes and "cohort.size=32" in bench.SMALL.changes
    assert {*bench.FULL.coordinates, *bench.SMALL.coordinates} <= bench.NAMES.keys()


def test_sampled_masks_are_the_beginning_of_all():
    lost = {1: "masked input", 4: "shares"}
    whole, part = (play(session_of(12, 3000), sampled, lost) for sampled in (3002, 1000))
    assert (whole.scale, whole.extrapolated) == (1.0, 0.0)
    assert len(whole.total_S) == 3002 and len(part.total_S) == 1000
    assert whole.total_S[0] == 10
    assert np.array_equal(whole.total_S, whole.expected_S)
    assert np.array_equal(part.total_S, whole.total_S[:1000])
    assert (part.up, part.down) == (whole.up, whole.down)
    assert part.scale == 3.002 and 0 < part.extrapolated < 1


def test_other_bits_are_refused(monkeypatch):
    bench.refuse_other_bits()
    total = SecAggServer.total

    def wrong(server):
        vector = total(server)
        vector[-1] ^= server.session.mode == "full"
        return vector

    monkeypatch.setattr(SecAggServer, "total", wrong)
    with pytest.raises(ValueError, match="16 clients gives other bits"):
        measure("secagg", small=True)
    with pytest.raises(ValueError, match="4 clients gives another sum"):
        bench.play_session(4, 100, 102)


def test_masks_that_do_not_cancel_end_the_benchmark(monkeypatch):
    masks = Client.masks
    monkeypatch.setattr(Client, "masks", lambda client, inbox: replace(masks(client, inbox), added=()))
    with pytest.raises(SecAggAbort, match="the coordinate that counts clients is wrong"):
        measure("secagg", small=True)


def test_other_losses_are_refused(tmp_path):
    harness = Bench(tmp_path, small=True)
    plain = Rounds([3.0, 2.0], [10.0], 0.0, 1.0, 1.0)
    secured = Rounds([3.0, 2.0005], [11.0], 1.0, 1.1, 1.2)
    add_rounds(harness, [plain, plain._replace(seconds=[12.0])], [secured])
    assert harness.figures["round_ratio_n32"] == Figure(1.0, "ratio")
    assert harness.figures["plain_ratio_n32"].value == 1.2
    for loss in (2.01, math.nan):  # the latter of a round that was aborted
        with pytest.raises(ValueError, match="losses of the plain and the secured run"):
            add_rounds(harness, [plain], [secured._replace(losses=[3.0, loss])])
