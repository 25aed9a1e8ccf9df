"""Who is away, by a trace of hand and by the seed."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.availability import AWAY, Availability, Leaving, Trace

ROWS = "client,first,last\nb,2,3\nb,7,7\nsomebody else,1,1\na,4,9\n"
THERE = {"a": {4, 5, 6, 7, 8, 9}, "b": {2, 3, 7}, "c": set(range(1, 11))}


@pytest.fixture(params=["csv", "parquet"])
def path(request, tmp_path: Path) -> Path:
    found = tmp_path / f"trace.{request.param}"
    if request.param == "csv":
        found.write_text(ROWS)
    else:
        rows = [line.split(",") for line in ROWS.splitlines()[1:]]
        table = {"client": [r[0] for r in rows], "first": [int(r[1]) for r in rows], "last": [int(r[2]) for r in rows]}
        pq.write_table(pa.table(table), found)
    return found


def test_clients_are_there_in_their_spans_and_who_is_not_named_always(path: Path) -> None:
    trace = Trace.open(path, ["a", "b", "c"])
    there = {
        name: {r for r in range(1, 11) if not trace.away(number, r)} for number, name in enumerate(["a", "b", "c"])
    }
    assert there == THERE


def test_who_is_away_leaves_before_anything_is_sent(path: Path) -> None:
    trace, availability = Trace.open(path, ["a", "b", "c"]), Availability()
    assert availability.gone([0, 1, 2], 5, 0, trace) == dict.fromkeys((0, 1), Leaving("keys", AWAY))  # round 1
    assert availability.gone([0, 1, 2], 5, 6, trace) == {}
    half = Availability(dropout=0.5)
    assert half.gone(range(3), 5, 6, trace) == half.gone(range(3), 5, 6)  # all are there: the seed alone
    assert half.gone(range(3), 5, 0, trace).keys() >= {0, 1}


@pytest.mark.parametrize("content", [None, "", "client;first\n", "client,first,last\na,x,3\n"])
def test_what_is_no_trace_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "trace.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"the trace .*trace\.csv .* cannot be read as Parquet or CSV"):
        Trace.open(path, ["a"])


def test_a_trace_of_other_clients_is_named(path: Path) -> None:
    with pytest.raises(ValueError, match="names none of the training clients, which are called 'x', 'y' and so on"):
        Trace.open(path, ["x", "y"])
