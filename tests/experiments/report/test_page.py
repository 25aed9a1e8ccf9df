"""The page against small run folders whose numbers are worked out by hand."""

import json
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.records.metrics import FAULTS, LEDGER, METRICS
from experiments.report import charts
from experiments.report.page import write_report
from experiments.report.run_folder import read_run

RECIPE = 'name = "{}"\nseed = 7\nrounds = 2\n[model]\nbase = "tiny"\n[strategy]\nkind = "fedavg"\n'
Row = tuple[int, str, str | None, str, float]


def write_metrics(run: Path, rows: list[Row]) -> None:
    (run / "metrics").mkdir(exist_ok=True)
    for at in sorted({row[0] for row in rows}):
        columns = list(zip(*[row for row in rows if row[0] == at], strict=True))
        columns.append([float(at)] * len(columns[0]))
        arrays = [pa.array(values, kind) for values, kind in zip(columns, METRICS.types, strict=True)]
        pq.write_table(pa.table(arrays, schema=METRICS), run / "metrics" / f"round-{at:05d}.parquet")


def write_ledger(run: Path, at: int, rows: list[tuple[str, str, int, int]]) -> None:
    (run / "ledger").mkdir(exist_ok=True)
    dicts = [{"round": at, **dict(zip(("party", "kind", "count", "bytes"), row, strict=True))} for row in rows]
    pq.write_table(pa.Table.from_pylist(dicts, LEDGER), run / "ledger" / f"round-{at:05d}.parquet")


def make_run(folder: Path, name: str = "small") -> Path:
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE.format(name))
    (folder / "manifest.json").write_text(json.dumps({"seed": 7, "store": {"clients": 3, "files": ["a", "b"]}}))
    rows: list[Row] = [
        (0, "heldout", None, "loss", 4.0),
        (2, "heldout", None, "loss", 3.0),
        (0, "unseen", None, "loss", 5.0),
        (2, "unseen", None, "loss", 5.5),
        (2, "heldout", None, "loss_local_only", 3.456),
        (2, "unseen", None, "loss_centralized", 2.987),
        (0, "heldout", "<script>alert(1)</script>", "loss", 2.0),
        (2, "heldout", "<script>alert(1)</script>", "loss", 2.5),
        (0, "heldout", "b", "loss", 6.0),
        (2, "heldout", "b", "loss", 3.0),
        (0, "heldout", "gone", "loss", 1.0),
    ]
    for at in (1, 2):
        rows += [
            (at, "train", None, "loss", 4.5 - at),
            (at, "train", "b", "rows", 10.0),
            (at, "train", "<script>alert(1)</script>", "rows", 40.0),
            (at, "engine", None, "round_s", 30.0 * at),
            (at, "engine", None, "evaluate_s", 2.0),
            (at, "engine", None, "clients", 3.0),
            (at, "engine", None, "failed", at - 1.0),
            (at, "engine", None, "protocol_bytes_up", 1.5e6),
            (at, "engine", None, "protocol_bytes_down", 1e3),
            (at, "engine", None, "store_bytes", 4e6),
            (at, "engine", None, "tokens_per_s", 1000.0),
        ]
        write_ledger(folder, at, [("server", "update", 3, 750_000), ("client", "rows", 50, 0)])
    write_metrics(folder, rows)
    return folder


def page_of(tmp_path: Path, *runs: Path) -> str:
    return write_report(list(runs), tmp_path / "out" / "report.html").read_text("utf-8")


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S)).split())


def test_numbers_of_one_run(tmp_path: Path) -> None:
    text = text_of(page_of(tmp_path, make_run(tmp_path / "a")))
    assert "held-out 4.000 round 0 3.000 round 2 \N{MINUS SIGN}25.0 % 3.456 no data" in text
    assert "unseen clients 5.000 round 0 5.500 round 2 +10.0 % no data 2.987" in text
    assert "1 of 2 clients got worse; the median change is \N{MINUS SIGN}1.250." in text  # +0.5, -3
    assert "2 clients trained, with a median of 25 rows." in text
    assert "last round 2 of 2" in text and "training 1.5 min" in text and "median round 45 s" in text
    assert "protocol up 3 MB" in text and "protocol down 2 kB" in text
    assert "1 left out, in 1 of 2 rounds" in text
    nothing = "other clients &#183; &#183; server &#183; 1.5 MB 6 base-model owner &#183; &#183;"
    assert f"party rows update client 0 B 100 &#183; {nothing}" in text
    assert "store.clients 3" in text


def test_everything_read_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = make_run(tmp_path / "a")
    (run / "recipe.toml").write_text(f"name = '{evil}\"'\n[model]\nbase = '{evil}'\n[train]\nobjective = '{evil}'\n")
    (run / "manifest.json").write_text(json.dumps({evil: {evil: [evil, "\ud800"]}, "lone": "\ud800"}))
    write_ledger(run, 2, [(evil, evil, 1, 1)])
    page = page_of(tmp_path, run, run)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;: 2 to 2.5" in page  # the tip of the client's mark
    assert not re.search(r'aria-label="[^"]*<', page)


def test_what_went_wrong_is_told_and_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "What went wrong" not in page_of(tmp_path, run)
    (run / "faults").mkdir()
    rows = [{"round": 2, "kind": "slot", "who": "1", "why": "it was <killed>"}]
    rows += [{"round": 3, "kind": "client", "who": f"c{n}", "why": None} for n in range(60)]
    table = pa.Table.from_pylist(rows, FAULTS)
    pq.write_table(table, run / "faults" / "round-00002.parquet")
    page = page_of(tmp_path, run)
    assert "What went wrong" in page and "it was &lt;killed&gt;" in page and "And 21 more." in page


def test_nothing_is_fetched(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_run(tmp_path / "a"), make_run(tmp_path / "b", "other"))
    assert "http://" not in page and "https://" not in page
    assert all(link.startswith("#run-") for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "url(" not in page and "@import" not in page and "default-src 'none'" in page


def test_a_run_without_metrics_says_so(tmp_path: Path) -> None:
    run = tmp_path / "bare"
    run.mkdir()
    (run / "recipe.toml").write_text("rounds = 3\n")
    text = text_of(page_of(tmp_path, run))
    assert text.count("no data") == 20  # 10 table cells, 6 charts, clients, failures, ledger, manifest
    assert "bare" in text and "last round none of 3" in text


def test_without_per_client_rows(tmp_path: Path) -> None:
    run = tmp_path / "a"
    run.mkdir()
    (run / "recipe.toml").write_text(RECIPE.format("masked") + '[privacy]\nsecagg = { mode = "full" }\n')
    write_metrics(run, [(0, "heldout", None, "loss", float("nan")), (1, "heldout", None, "loss", 2.0)])
    text = text_of(page_of(tmp_path, run))
    assert (
        "held-out nan round 0 2.000 round 1 no data" in text and "Held-out loss of each client no data Secure" in text
    )


def test_hostile_numbers_do_not_stop_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    rows: list[Row] = []
    for i, value in enumerate([1e308, -1e308, 5e-324, float("inf"), float("-inf"), float("nan"), 0.0]):
        for split, name in (
            ("heldout", "loss"),
            ("engine", "round_s"),
            ("engine", "store_bytes"),
            ("engine", "failed"),
        ):
            rows.append((i, split, None, name, value))
        rows += [(i, "heldout", f"c{j}", "loss", value * (1 - 2 * j)) for j in range(2)]
        rows.append((i, "train", f"c{i}", "rows", value))
    write_metrics(run, rows)
    write_ledger(run, 1, [("server", "update", -1, 2**63 - 1)])
    assert "Held-out loss of each client" in text_of(page_of(tmp_path, run, run))


def test_several_runs(tmp_path: Path) -> None:
    a, b, c = make_run(tmp_path / "a"), make_run(tmp_path / "b", "other"), make_run(tmp_path / "c")
    page = page_of(tmp_path, a, b, c)
    text = text_of(page)
    assert "3 runs compared" in text
    assert "small (a)" in text and "small (c)" in text  # the same name twice: told apart by folder
    assert text.count("\N{MINUS SIGN}25.0 %") == 3
    assert [f'id="run-{i}"' in page for i in (1, 2, 3, 4)] == [True, True, True, False]


def test_runs_that_were_judged_on_other_rows_are_marked(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", "other")
    assert "cannot be compared" not in page_of(tmp_path, a, b)
    (b / "recipe.toml").write_text((b / "recipe.toml").read_text() + "[evaluate]\nrows = 3\n")
    assert "These runs differ in evaluate.rows: their losses may be of different rows" in page_of(tmp_path, a, b)
    (b / "manifest.json").write_text(json.dumps({"data": {"key": "others"}}))
    assert "These runs differ in data, evaluate.rows: " in page_of(tmp_path, a, b)
    assert "cannot be compared" not in page_of(tmp_path, b)


def test_accepted_changes_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    assert "in spite of" not in page_of(tmp_path, run)
    (run / "manifest.json").write_text(json.dumps({"accepted_changes": ["model.base"]}))
    assert "in spite of changes since the run was begun: [&#34;model.base&#34;]" in page_of(tmp_path, run)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    first, second = (write_report([run], tmp_path / name).read_bytes() for name in ("1.html", "2.html"))
    assert first == second and str(tmp_path).encode() not in first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.html", "2.html", "a"]  # no temporary file stays


def test_errors_name_the_folder_or_the_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is not a run folder.*recipe.toml"):
        write_report([tmp_path / "empty"], tmp_path / "r.html")
    with pytest.raises(ValueError, match="at least one"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(ValueError, match="is a folder"):
        write_report([make_run(tmp_path / "a")], tmp_path)
    for name in ("metrics/round-00002.parquet", "ledger/round-00001.parquet"):
        whole = (tmp_path / "a" / name).read_bytes()
        for broken in (whole[: len(whole) // 2], b""):
            (tmp_path / "a" / name).write_bytes(broken)
            with pytest.raises(ValueError, match=f"{name} cannot be read"):
                read_run(tmp_path / "a")
        (tmp_path / "a" / name).write_bytes(whole)
    pq.write_table(pa.table({"round": [1]}), tmp_path / "a" / "metrics" / "round-00003.parquet")
    with pytest.raises(ValueError, match=r"round-00003.parquet cannot be read"):
        read_run(tmp_path / "a")
    (tmp_path / "a" / "recipe.toml").write_text("name = ")
    with pytest.raises(ValueError, match=r"recipe.toml is not valid TOML"):
        read_run(tmp_path / "a")
    (tmp_path / "a" / "recipe.toml").write_text("name = 'a'")
    (tmp_path / "a" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is not valid JSON"):
        read_run(tmp_path / "a")
    assert not (tmp_path / "r.html").exists()


def test_large_runs_stay_small(tmp_path: Path) -> None:
    after = [3.0 + (i - 5000) / 10_000 for i in range(10_001)]
    clients = pa.table({"client": [f"c{i}" for i in range(10_001)], "before": [3.0] * 10_001, "after": after})
    chart = charts.pairs("t", clients, "x", "y", "n.")
    assert chart.count("<title>") == charts.MAX_POINTS and "c10000: 3 to 3.5" in chart and "c0: 3 to 2.5" in chart
    series = charts.Series("train", [(r, 1.0) for r in range(1000)], 1)
    assert charts.stacked("t", [series], "round", "s").count('<rect class="f c1"') == charts.MAX_BARS
    assert "A bar is the mean of 10 rounds." in charts.stacked("t", [series], "round", "s")


def test_many_clients_do_not_become_python_objects(tmp_path: Path) -> None:
    run, clients = make_run(tmp_path / "a"), 100_000
    for at in range(3):
        names = pa.array(range(clients)).cast(pa.string())
        each = [(at, split, names, name) for split, name in (("heldout", "loss"), ("train", "rows"))]
        tables = [
            pa.table([pa.repeat(at, clients), pa.repeat(split, clients), names, pa.repeat(name, clients),
                      pa.array(range(clients), pa.float64()), pa.repeat(1.0, clients)], names=METRICS.names)
            for at, split, names, name in each
        ]  # fmt: skip
        pq.write_table(pa.concat_tables(tables).cast(METRICS), run / "metrics" / f"round-{at:05d}.parquet")
    table = pa.table({"round": [1], "kind": ["dropout"], "who": ["c"], "why": ["late"], "wall_s": [1.0]})
    (run / "faults").mkdir()
    pq.write_table(pa.concat_tables([table.cast(FAULTS)] * clients), run / "faults" / "round-00001.parquet")
    write_report([run], tmp_path / "warm.html")
    tracemalloc.start()
    write_report([run], tmp_path / "r.html")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    text = text_of((tmp_path / "r.html").read_text("utf-8"))
    assert "1,500 of 100,000 clients are drawn" in text and "99,999 clients trained" in text and "99,960 more" in text
    assert most < 8 * 2**20  # numbers in numpy; 100,000 names alone would be 6 MiB


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (999.7, "1 kB"), (1_234_567, "1.23 MB"), (5e15, "5 PB"), (2e19, "20,000 PB")],
)
def test_size(value: float, text: str) -> None:
    assert charts.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.1234, "0.123 s"), (90, "1.5 min"), (7260, "2 h 01 min"), (3599, "60 min")]
)
def test_duration(value: float, text: str) -> None:
    assert charts.duration(value) == text


@pytest.mark.parametrize("values", [[1.0], [0.0], [-3.0, 2.0], [1e-9, 2e-9], [1e12, 1e12 + 1], [1e300, -1e300]])
def test_axes_hold_every_value(values: list[float]) -> None:
    series = charts.Series("s", [(float(i), v) for i, v in enumerate(values)], 1)
    chart = charts.lines("t", [series], "round", "y")
    for y in re.findall(r'cy="([^"]*)"', chart):
        assert charts.TOP <= float(y) <= charts.HEIGHT - charts.BOTTOM
