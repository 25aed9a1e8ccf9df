"""What is read of a cell's run folder, and how cells are shown."""

import math

import pytest

from engine.records.metrics import Metrics
from experiments.bench.scenarios.strategies import Result, compare, markdown, read_result, tables, worst_tenth


@pytest.fixture
def folder(tmp_path):
    metrics = Metrics(tmp_path / "metrics")
    metrics.add(0, "heldout", None, loss=4.0)
    metrics.flush(0)
    for round_ in (1, 2, 3, 4):
        engine = {"clients": 2, "protocol_bytes_up": 100.0 * round_, "protocol_bytes_down": 400, "round_s": round_}
        metrics.add(round_, "engine", None, **engine)
        if round_ == 4:
            metrics.add(4, "heldout", None, loss=3.0)
            metrics.add(4, "unseen", None, loss=3.5)
            for client, loss, tokens in (("a", 2.0, 10), ("b", 4.0, 10), ("c", 3.0, 20)):
                metrics.add(4, "heldout", client, loss=loss, tokens=tokens)
            metrics.add(4, "heldout", "b", loss_personal=1.0, tokens=10)
            metrics.add(4, "heldout", None, loss_personal=1.0)
        metrics.flush(round_)
    return tmp_path


def test_a_cells_figures_are_those_of_its_run(folder, small_recipe):
    cell = read_result(folder, "ditto", "natural", small_recipe("rounds=4"))
    assert (cell.before, cell.heldout, cell.unseen, cell.seed, cell.rounds) == (4.0, 3.0, 3.5, 5, 4)
    assert cell.worst_tenth == 4.0
    # Client b has a model of its own, the others use the global one: (2 * 10 + 1 * 10 + 3 * 20) / 40.
    assert cell.personal == pytest.approx(2.25)
    assert cell.personal_worst_tenth == 3.0
    assert (cell.bytes_up, cell.bytes_down) == (1000 / 8, 1600 / 8)
    assert cell.round_s == 2.5
    assert math.isnan(cell.server_s)


def test_the_worst_tenth_is_of_one_client_at_least():
    assert worst_tenth([1.0, 5.0]) == 5.0
    assert worst_tenth([float(loss) for loss in range(20)]) == 18.5


CELL = Result("natural", "fedavg", 7, 15, 4.5, 3.8, 3.9, 4.4, math.nan, math.nan, 700e3, 700e3, 3.0, math.nan)


def test_the_table_has_means_spreads_and_the_distance_to_fedavg_of_the_same_seed():
    other = CELL._replace(rule="ffa", heldout=3.9, bytes_up=350e3)
    cells = [CELL, CELL._replace(seed=8, heldout=4.0), other, other._replace(seed=8, heldout=4.3)]
    cells.append(CELL._replace(partition="topics", server_s=0.25))
    lines = markdown(tables(cells)).splitlines()
    assert "Partition natural, 15 rounds; held-out loss before training 4.500." in lines
    assert "| fedavg | 2 | 3.900 ± 0.100 |  | 3.900 | 4.400 |  |  | 700 | 700 | 3.0 |  |" in lines
    assert "| ffa | 2 | 4.100 ± 0.200 | +0.200 | 3.900 | 4.400 |  |  | 350 | 700 | 3.0 |  |" in lines
    assert "| fedavg | 1 | 3.800 |  | 3.900 | 4.400 |  |  | 700 | 700 | 3.0 | 250 |" in lines
    heads = [line for line in lines if line.startswith("| rule")]
    assert len(heads) == 2
    assert {line.count("|") for line in lines if line.startswith("|")} == {heads[0].count("|")}


def test_the_page_has_a_table_for_each_partition_also_without_a_baseline(tmp_path):
    half = CELL._replace(rule="ffa", heldout=1.9, personal=3.0)
    for cells, captions in (([CELL], 1), ([half], 1), ([CELL, half, CELL._replace(partition="topics")], 2)):
        compare(cells, tmp_path)
        page = (tmp_path / "report.html").read_text()
        assert page.count("<caption>") == captions
    assert '<td style="--bar:100%">3.800</td>' in page and '<td style="--bar:50%">1.900</td>' in page
