"""The page about benchmarks: all that is read is escaped, and two results stand side by side."""

import json
import re

import pyarrow.parquet as pq
import pytest

from experiments.bench import results
from experiments.bench.harness import Figure
from experiments.bench.results import is_results, write_page, write_results


@pytest.fixture
def two(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RUNS", tmp_path)
    first = write_results("a", {"x_ms": Figure(1.5, "ms"), "gone": Figure(None, "times")}).parent
    second = write_results(
        "b", {"x_ms": Figure(3.0, "ms"), "<b>new</b>": Figure(12345.6, "<i>tokens/s</i>, best")}
    ).parent
    return first, second


def test_each_result_has_a_page_and_a_summary(two):
    folder = two[0]
    assert {path.name for path in folder.iterdir()} == {"results.parquet", "summary.json", "report.html"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["figures"] == {"x_ms": 1.5, "gone": None} and summary["scenario"] == "a" and summary["commit"]
    assert is_results(folder) and not is_results(folder.parent)


def test_results_stand_side_by_side_and_escaped(two, tmp_path):
    page = write_page(two, tmp_path / "page.html").read_text()
    cells = re.findall(r"<tr><td>(.*?)</td></tr>", page)
    assert cells[0] == 'x_ms</td><td style="--bar:50%">1.5</td><td style="--bar:100%">3</td><td>ms'
    assert cells[1].startswith("gone</td><td>not measured</td><td></td>")
    assert "&lt;b&gt;new&lt;/b&gt;" in page and "<b>" not in page and "<i>" not in page
    assert "default-src 'none'" in page and "<script" not in page


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "results.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"results\.parquet cannot be read as a benchmark's results"):
        write_page([tmp_path], tmp_path / "page.html")


def test_the_command_writes_it(two, command, tmp_path):
    ended = command("report", *two, "--out", tmp_path / "é.html", PYTHONIOENCODING="ascii")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "é.html").is_file() and str(tmp_path / "\\xe9.html") in ended.stdout
    assert pq.read_table(two[0] / "results.parquet").num_rows == 2
