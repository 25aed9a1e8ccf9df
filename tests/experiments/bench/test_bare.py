"""The bare loop leads where the engine leads, or there is no figure."""

import numpy as np
import pytest
import torch

from engine.scheduling.dispatcher import units_of
from experiments.bench import bare
from experiments.bench.bases import write_llama, write_rows
from experiments.bench.scenarios import big_update, lora, tiny
from experiments.bench.tree import held_by_command


@pytest.fixture
def work(tmp_path):
    """Two rounds of a few clients of a very small model, in lanes."""
    write_llama(tmp_path / "base", tiny.LLAMA, of_bytes=True)
    write_rows(tmp_path / "rows.parquet", 12, tiny.ROWS, tiny.WORDS)
    return tiny.recipe(tmp_path, tmp_path / "base", 6, 2, 3)


def test_both_loops_have_one_vector_after_the_first_round(ray_session, work, tmp_path):
    found = bare.compare(work, tmp_path / "run")
    assert found.apart <= bare.TOLERANCE and found.ratio > 0
    assert len(found.engine_s) == len(found.bare_s) == 2
    assert found.tokens == 6 * 8 * 16


@pytest.mark.slow
def test_all_processes_of_the_command_are_looked_at(work, tmp_path, full):
    if not full:
        pytest.skip("half a minute")
    held = held_by_command(work, tmp_path / "held")
    assert 4 * 100 < held.pss < held.rss  # the command, the driver and two slots
    assert (tmp_path / "held" / "run" / "model").is_dir()


@pytest.mark.parametrize("wrong", [1e-4, float("nan")])
def test_loops_that_disagree_give_no_figure(wrong):
    assert bare.gate(torch.ones(3), torch.ones(3)) == 0
    with pytest.raises(ValueError, match=r"engine's and the bare loop's vectors are .* apart"):
        bare.gate(torch.ones(3), torch.tensor([1, 1 + wrong, 1]))


PACKED = [(lanes, cohort) for *_, lanes, cohort in lora.CASES if lanes > 1] + [(tiny.LANES, tiny.SIZES["1e3"][1])]


@pytest.mark.parametrize(("lanes", "cohort"), sorted({*PACKED}))
def test_packs_have_as_many_clients_as_is_said_and_each_slot_as_many_packs(lanes, cohort):
    units = units_of(np.arange(cohort), np.ones(cohort), lanes)
    assert {len(pack) for pack in units} == {lanes}
    assert len(units) % bare.PROCESSES == 0


@pytest.mark.slow
def test_a_small_run_has_the_promised_keys(ray_session, full):
    if not full:
        pytest.skip("minutes")
    assert {"efficiency", "packed_speedup", "tree_rss_mb"} < set(lora.measure(small=True))
    assert {"clients_ratio_1e3", "clients_ratio_1e5", "packed_ratio"} < set(tiny.measure(small=True))
    assert {"time_ratio", "tree_rss_mb"} < set(big_update.measure(small=True))
