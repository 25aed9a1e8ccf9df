"""The log of what clients have shown: rows for the first time, costs, and reading it back."""

import math

from engine.messages.exposure import Exposure, Usage
from engine.records.exposures import Exposures
from engine.records.metrics import read_log


def shown(*rows, times=1, cost=0.25):
    return Exposure("prompt", rows, times, Usage(10, 2, cost), 100)


def test_new_rows_are_counted_once_for_each_client(tmp_path):
    log = Exposures(tmp_path)
    log.shown(1, "ada", [shown(0, 1, times=4), shown(1, 2)])
    log.shown(1, "bob", [shown(0)])
    log.flush(1)
    log.shown(2, "ada", [shown(2, 3)])
    log.flush(2)
    log.flush(3)
    rows = read_log(tmp_path).to_pylist()
    assert [(row["round"], row["client"], row["rows"], row["new_rows"], row["calls"]) for row in rows] == [
        (1, "ada", 4 * 2 + 2, 3, 2),
        (1, "bob", 1, 1, 1),
        (2, "ada", 2, 1, 1),
    ]
    assert rows[0]["tokens"] == 24 and rows[0]["bytes"] == 200 and rows[0]["numbers"] == [0, 1, 2]
    assert {row["party"] for row in rows} == {"base-model owner"} and log.cost == 1.0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["round-00001.parquet", "round-00002.parquet"]


def test_a_resumed_run_knows_what_was_shown_and_paid_before(tmp_path):
    log = Exposures(tmp_path)
    for round_ in (1, 2):
        log.shown(round_, "ada", [shown(round_, cost=0.5)])
        log.flush(round_)
    again = Exposures(tmp_path)
    again.forget_after(1)
    assert again.sent == {"ada": {1}} and again.cost == 0.5
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_price_the_cost_is_not_given(tmp_path):
    log = Exposures(tmp_path)
    log.shown(1, "ada", [shown(0, cost=math.nan)])
    log.flush(1)
    assert read_log(tmp_path)["cost"].to_pylist() == [None] and log.cost == 0.0
