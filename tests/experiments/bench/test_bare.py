"""The bare loop leads where the engine leads, or there is no figure."""

import numpy as np
import pytest
import torch

from engine.scheduling.dispatcher import units_of
from experiments.bench import bare
from experiments.bench.harness import Bench, largest_difference, measure, write_llama, write_rows
from experiments.bench.sampling import command_mb
from experiments.bench.scenarios import bare_loop


@pytest.fixture
def work(tmp_path):
    """Two rounds of a few clients of a very small model, in lanes."""
    write_llama(tmp_path / "base", bare_loop.TINY, of_bytes=True)
    write_rows(tmp_path, 12, bare_loop.TINY_ROWS, bare_loop.WORDS)
    return bare_loop.tiny_recipe(Bench(tmp_path, small=True), 6, 2, 3)


def test_both_loops_have_one_vector_after_the_first_round(ray_session, work, tmp_path):
    compared = bare.compare(work, tmp_path / "run")
    assert compared.apart <= bare.TOLERANCE and compared.ratio > 0
    assert len(compared.engine_s) == len(compared.bare_s) == 2
    assert compared.tokens == 6 * 8 * 16


@pytest.mark.slow
def test_the_memory_of_all_processes_of_the_command_is_measured(work, tmp_path, full):
    if not full:
        pytest.skip("half a minute")
    rss, pss = command_mb(work, tmp_path / "command")
    assert 4 * 100 < pss < rss  # the command, the driver and two slots
    assert (tmp_path / "command" / "run" / "model").is_dir()


@pytest.mark.parametrize("wrong", [1e-4, float("nan")])
def test_loops_that_disagree_give_no_figure(wrong):
    assert largest_difference("the vectors", torch.ones(3), torch.ones(3), bare.TOLERANCE) == 0
    with pytest.raises(ValueError, match=r"the vectors are .* apart, more than 2e-05: no figure"):
        largest_difference("the vectors", torch.ones(3), torch.tensor([1, 1 + wrong, 1]), bare.TOLERANCE)


PACKED = [(lanes, cohort) for *_, lanes, cohort in bare_loop.CASES if lanes > 1] + [
    (bare_loop.LANES, bare_loop.SIZES["1e3"][1])
]


@pytest.mark.parametrize(("lanes", "cohort"), sorted({*PACKED}))
def test_a_cohort_fills_the_lanes_of_each_slot_equally_often(lanes, cohort):
    units = units_of(np.arange(cohort), np.ones(cohort), lanes)
    assert {len(unit) for unit in units} == {lanes}
    assert len(units) % bare.PROCESSES == 0


@pytest.mark.slow
def test_a_small_run_has_the_promised_keys(ray_session, full):
    if not full:
        pytest.skip("minutes")
    assert {"efficiency", "lanes_speedup", "tree_rss_mb"} < set(measure("lora", small=True))
    assert {"clients_ratio_1e3", "clients_ratio_1e5", "lanes_ratio"} < set(measure("tiny", small=True))
    assert {"time_ratio", "tree_rss_mb"} < set(measure("big_update", small=True))
