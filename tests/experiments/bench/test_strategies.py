"""The comparison of the rules: which cells there are; finished ones are kept, killed ones resumed."""

import shutil
from pathlib import Path
from typing import get_args

import pyarrow.parquet as pq
import pytest

from experiments.bench.harness import Bench
from experiments.bench.scenarios import strategies as bench
from experiments.bench.scenarios.strategies import RULES
from experiments.runs.resuming import mark_finished
from strategies import Strategies


def test_every_strategy_is_compared_and_every_rule_says_why():
    kinds = {trial.recipe.strategy.kind for trial in bench.trials()}
    # Rules that tune a kind of model.peft of their own are compared by `fedpost access`.
    assert kinds == {member().kind for member in get_args(Strategies) if not member.tunes}
    assert all(rule.why for rule in RULES)
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_the_cells_are_those_of_the_plan():
    cells = bench.trials()
    assert len({cell.name for cell in cells}) == len(cells)
    for rule in RULES:
        seeds = {cell.recipe.seed for cell in cells if cell.rule is rule and cell.partition == "topics"}
        assert seeds == (set(bench.SEEDS) if rule.main else {bench.SEEDS[0]})
    assert sum(rule.main for rule in RULES) == 8
    assert {cell.name for cell in cells[:8]} == {f"natural/{rule.name}-seed7" for rule in RULES if rule.main}


def test_cells_differ_in_what_they_say_alone():
    baseline = bench.trials()[0].recipe
    for cell in bench.trials():
        same = (
            cell.recipe.model,
            cell.recipe.cohort,
            cell.recipe.evaluate,
            cell.recipe.rounds,
            cell.recipe.train.steps,
        )
        assert same == (baseline.model, baseline.cohort, baseline.evaluate, 15, baseline.train.steps)
        if cell.recipe.strategy.kind not in ("local", "hetlora"):
            assert cell.recipe.strategy.weighting == "uniform", cell.name


@pytest.fixture
def tiny_cells(monkeypatch, tiny_base, rows_file, tmp_path_factory):
    """Lets the small benchmark run on the tests' base and rows."""
    changes = [f'model.base="{tiny_base}"', f'data.source={{kind="jsonl", path="{rows_file}"}}']
    changes.append(f'data.cache="{tmp_path_factory.getbasetemp() / "stores"}"')
    monkeypatch.setattr(bench, "SMALL_CHANGES", (*bench.SMALL_CHANGES, *changes))


@pytest.mark.slow
def test_cells_are_run_kept_and_resumed(ray_session, tiny_cells, tmp_path, monkeypatch, full):
    if not full:
        pytest.skip("most of a minute")
    out = tmp_path / "bench"
    bench.strategies(first := Bench(tmp_path, small=True), out)
    figures = first.figures
    assert list(figures) == ["natural fedavg seed 7", "natural ditto seed 7"]
    cells = pq.read_table(out / "cells.parquet").to_pylist()
    assert [cell["heldout"] for cell in cells] == [figure.value for figure in figures.values()]
    assert "<td>ditto</td>" in (out / "report.html").read_text()
    assert "| ditto | 1 |" in (out / "table.md").read_text()

    # One cell as a kill leaves it: its last round is lost, its model was not written.
    killed = out / "natural" / "ditto-seed7"
    (killed / "finished.json").unlink()
    shutil.rmtree(killed / "model")
    shutil.rmtree(killed / "checkpoints" / "00002")
    began = []
    run = bench.experiments.run
    monkeypatch.setattr(bench.experiments, "run", lambda *args, **keys: began.append(keys) or run(*args, **keys))
    bench.strategies(again := Bench(tmp_path, small=True), out)
    assert again.figures == figures
    assert began == [{"out": killed, "resume": True}]


def test_a_cell_of_another_recipe_is_refused(ray_session, tiny_cells, tmp_path):
    folder = tmp_path / "natural" / "fedavg-seed7"
    folder.mkdir(parents=True)
    mark_finished(folder, 2)
    (folder / "recipe.toml").write_text('name = "other"')
    with pytest.raises(ValueError, match="was run with another recipe"):
        bench.strategies(Bench(tmp_path, small=True), tmp_path)


def test_a_cell_that_fails_is_named_and_left_out(ray_session, tiny_cells, tmp_path, monkeypatch, capsys):
    def fails(recipe, *, out: Path, resume: bool):
        raise ValueError("it diverged")

    monkeypatch.setattr(bench.experiments, "run", fails)
    bench.strategies(failed := Bench(tmp_path, small=True), tmp_path)
    assert failed.figures == {}
    assert "natural/ditto-seed7 is left out: it diverged" in capsys.readouterr().err
