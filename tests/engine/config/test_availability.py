"""Who is away, by a trace of hand and by the seed."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.config.availability import AWAY, Availability, Leaving, Trace

ROWS = "client,first,last\nb,2,3\nb,7,7\na,4,9\n"
THERE = {"a": {4, 5, 6, 7, 8, 9}, "b": {2, 3, 7}, "c": set(range(1, 11))}


@pytest.fixture(params=["csv", "parquet"])
def path(request, tmp_path: Path) -> Path:
    path = tmp_path / f"trace.{request.param}"
    if request.param == "csv":
        path.write_text(ROWS)
    else:
        rows = [line.split(",") for line in ROWS.splitlines()[1:]]
        table = {"client": [r[0] for r in rows], "first": [int(r[1]) for r in rows], "last": [int(r[2]) for r in rows]}
        pq.write_table(pa.table(table), path)
    return path


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


def opened(tmp_path: Path, *rows: str, names: list[str]) -> Trace:
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(["client,first,last", *rows, ""]))
    return Trace.open(path, names)


def test_names_are_text(tmp_path: Path) -> None:
    trace = opened(tmp_path, "007,2,2", "NA,2,2", "true,2,2", "1e3,2,2", names=["7", "007", "NA", "true", "1e3"])
    assert [trace.away(client, 1) for client in range(5)] == [False, True, True, True, True]
    pq.write_table(pa.table({"client": [7], "first": [2], "last": [2]}), tmp_path / "trace.parquet")
    with pytest.raises(ValueError, match="holds numbers, and names are text"):
        Trace.open(tmp_path / "trace.parquet", ["7", "007"])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("x,1,2", r"row 2 of the trace .* names no client of the data, whose clients are 'a', 'b' and so on"),
        ("a,3,", r"row 2 .* has an empty value: correct it \(client = 'a', first = 3, last = None\)"),
        ("a,,3", "row 2 .* has an empty value"),
        (",1,3", "row 2 .* names no client of the data"),
        ("a,4,3", "row 2 .* ends before it begins"),
        ("a,0,3", "row 2 .* begins before round 1, which is the first"),
    ],
)
def test_a_row_that_is_no_span_of_a_client_is_refused(tmp_path: Path, row: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        opened(tmp_path, "a,4,9", row, names=["a", "b"])


def test_a_null_in_parquet_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"client": ["a", None], "first": [1, 1], "last": [2, 2]}), tmp_path / "trace.parquet")
    with pytest.raises(ValueError, match=r"row 2 .* has an empty value"):
        Trace.open(tmp_path / "trace.parquet", ["a"])


def test_time_is_simulated_from_steps_and_the_seed() -> None:
    alike = Availability(deadline_s=5.0, step_s=2.0)
    assert [alike.late_by_seed(4, steps, 7) for steps in (1, 2, 3, 4)] == [0.0, 0.0, 1.0, 3.0]
    # A late client's seconds are 10 * 2 * slowness: at sigma 1 exp(z), at sigma 2 exp(2 z), of the same z.
    narrow, wide = (Availability(deadline_s=1e-9, step_s=2.0, slowness=sigma) for sigma in (1.0, 2.0))
    for client in range(5):
        assert wide.late_by_seed(client, 10, 7) / 20 == pytest.approx((narrow.late_by_seed(client, 10, 7) / 20) ** 2)
    assert len({narrow.late_by_seed(0, 10, seed) for seed in range(5)}) == 5


def test_half_of_the_clients_are_slower_than_the_median_and_few_much_slower() -> None:
    pace = {"step_s": 2.0, "slowness": 0.8}
    late = {
        deadline_s: sum(Availability(deadline_s=deadline_s, **pace).late_by_seed(c, 3, 1) > 0 for c in range(4000))
        for deadline_s in (6.0, 6.0 * 2.788)  # exp(0.8 * 1.2816): the upper tenth
    }
    assert late[6.0] == pytest.approx(2000, abs=130) and late[6.0 * 2.788] == pytest.approx(400, abs=80)


def test_the_clock_counts_where_no_time_is_simulated() -> None:
    clock, simulated = Availability(deadline_s=5.0), Availability(deadline_s=5.0, step_s=1.0)
    assert (clock.late_by_clock(4.9), clock.late_by_clock(7.0), simulated.late_by_clock(7.0)) == (0.0, 2.0, 0.0)
    assert clock.late_by_seed(0, 10**6, 0) == Availability().late_by_clock(1e9) == 0.0
    assert clock.by_clock and not simulated.by_clock and not Availability().by_clock


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"step_s": 0.0, "deadline_s": 1.0}, "step_s must be above 0, not 0.0"),
        ({"step_s": float("nan"), "deadline_s": 1.0}, "step_s must be above 0, not nan"),
        ({"slowness": -0.1, "step_s": 1.0, "deadline_s": 1.0}, "slowness is a sigma, and must be at least 0, not -0.1"),
        ({"step_s": 1.0}, "which only a deadline uses: set deadline_s too"),
        ({"slowness": 1.0, "deadline_s": 1.0}, "the spread of clients around step_s: set step_s too"),
    ],
)
def test_a_pace_that_means_nothing_is_refused(keys: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Availability(**keys)
