import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets_partition.partitioners.by_label import Dirichlet
from datasets_partition.partitioners.natural import Natural
from datasets_partition.sources.files import ParquetFiles
from datasets_partition.store.build import build, rng
from datasets_partition.store.splits import Splits
from datasets_partition.store.store import Store
from datasets_partition.store.tokens import tokenize
from experiments.bench import results
from experiments.bench.harness import Bench, Figure, power, scenario_of
from experiments.bench.results import write_results
from experiments.bench.scenarios import partition
from experiments.cli.commands import SCENARIOS

flwr_is_there = pytest.mark.skipif(not partition.has_flwr(), reason="flwr-datasets is not installed")


@flwr_is_there
@pytest.mark.slow
def test_a_small_run_gives_its_figures_and_leaves_only_them(command, tmp_path, full):
    if not full:
        pytest.skip("half a minute")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    ended = command("bench", "partition", "--small", "--json", cwd=tmp_path, TMPDIR=str(temporary))
    assert ended.returncode == 0, ended.stderr
    assert "10,000 clients: building the store" in ended.stderr
    figures = json.loads(ended.stdout.splitlines()[-1])
    assert {"open_ms_1e4", "cohort_ms_1e4", "build_rows_per_s", "speedup_natural", "speedup_dirichlet"} <= set(figures)
    assert "slot_rss_growth_mb" in figures and "cohort_ms_1e2" not in figures
    assert all(figures[name] > 0 for name in figures if not name.startswith("slot_"))
    (kept,) = (tmp_path / "runs").rglob("*.parquet")
    table = pq.read_table(kept)
    assert dict(zip(table["figure"].to_pylist(), table["value"].to_pylist(), strict=True)) == figures
    assert {"unit", "scenario", "time", "cpu", "cores", "python", "packages"} <= set(table.column_names)
    assert f"pyarrow {pa.__version__}" in table["packages"][0].as_py()
    assert list(temporary.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "temporary"]


def test_the_full_size_has_the_figures_that_are_asked_for():
    assert partition.FULL.populations[-1] == 10**6 and partition.FULL.cohort == 10_000
    assert [power(number) for number in (1, 10**5, 10**6)] == ["1e0", "1e5", "1e6"]


def test_a_scenario_that_there_is_not_names_those_that_there_are(command):
    ended = command("bench", "x")
    assert ended.returncode == 2
    assert ended.stderr == f"error: there is no benchmark 'x'; there is {', '.join(SCENARIOS)}\n"
    for name in SCENARIOS.keys() - {"scale"}:  # which takes a recipe
        assert callable(scenario_of(name))


def test_a_store_of_other_rows_is_refused(tmp_path):
    source, other = tmp_path / "rows.parquet", tmp_path / "other.parquet"
    partition.write_rows(source, 50)
    store = Store.open(build(ParquetFiles(path=str(source)), Natural(), Splits(), 1, str(tmp_path / "stores")))
    tokens = tokenize(store, "bytes", partition.to_bytes)
    partition.refuse_another_store(source, 50, store, tokens)
    rows = pq.read_table(source)
    clients = rows["client"].to_pylist()
    pq.write_table(rows.set_column(0, "client", pa.array(clients[1:] + clients[:1])), other)
    with pytest.raises(ValueError, match="50 clients does not hold the rows that were put in"):
        partition.refuse_another_store(other, 50, store, tokens)
    with pytest.raises(ValueError, match="51 clients does not hold"):
        partition.refuse_another_store(source, 51, store, tokens)
    upper = tokenize(store, "upper", lambda some: partition.to_bytes(pa.table({"completion": ["X"] * some.num_rows})))
    with pytest.raises(ValueError, match="does not hold"):
        partition.refuse_another_store(source, 50, store, upper)


def test_other_rows_than_theirs_are_refused():
    rows = [np.array([0, 2]), np.array([1])]
    partition.refuse_other_rows(rows, [np.array([0, 2]), np.array([1])])
    for theirs in (rows[:1], [np.array([0, 1]), np.array([2])]):
        with pytest.raises(ValueError, match="its time says nothing"):
            partition.refuse_other_rows(rows, theirs)


def test_another_law_than_theirs_is_refused():
    table = partition.labeled(20_000)
    labels = table["label"].to_numpy().astype(np.int64)

    def drawn(alpha, seeds):
        partitioner = Dirichlet(label="label", clients=100, alpha=alpha)
        owners = [partitioner.assign(table, rng(seed, "test")).clients for seed in seeds]
        return [np.stack([np.bincount(labels[each == i], minlength=10) for i in range(100)]) for each in owners]

    ours = drawn(0.5, range(5))
    partition.refuse_another_law(ours, drawn(0.5, range(5, 8)))
    for alpha in (0.3, 1.0):
        with pytest.raises(ValueError, match="another law"):
            partition.refuse_another_law(ours, drawn(alpha, range(5, 8)))


def test_without_flwr_datasets_there_are_no_speedups(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(partition, "has_flwr", lambda: False)
    bench = Bench(tmp_path, small=True)
    partition.compare_with_flwr(bench, (10**5,))
    assert bench.figures == {"speedup_natural": Figure(None, "times"), "speedup_dirichlet": Figure(None, "times")}
    assert "flwr-datasets is not installed: no speedups" in capsys.readouterr().err


def test_flwr_datasets_draws_no_progress_bar_in_the_time_that_is_measured(monkeypatch, tmp_path):
    """Its libraries read the environment when they are imported, which the fresh process does first of all."""
    names, settings = ("TQDM_DISABLE", "FLWR_TELEMETRY_ENABLED"), []
    monkeypatch.setattr(partition, "has_flwr", lambda: True)
    monkeypatch.setattr(
        partition, "in_fresh_process", lambda *_: settings.append([*map(os.environ.get, names)]) or (0.002, 0.06)
    )
    partition.compare_with_flwr(bench := Bench(tmp_path, small=True), (10**5,))
    assert settings == [["1", "0"]] * 2 and os.environ.get("TQDM_DISABLE") is None
    assert bench.figures["speedup_natural"].value == bench.figures["speedup_dirichlet_1e5"].value == 30


def test_what_was_not_measured_is_kept_as_null(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RUNS", tmp_path)
    table = pq.read_table(write_results("x", {"a": Figure(1.5, "ms"), "b": Figure(None, "times")}))
    assert table["value"].to_pylist() == [1.5, None]
    assert table["cores"].to_pylist() == [results.machine()["cores"]] * 2
