"""Which runs may go on, told from what lies in their folders."""

import json
import shutil
from dataclasses import replace
from datetime import date

import pytest

from experiments.config.recipe import to_toml
from experiments.runs import resuming
from experiments.runs.digests import digests
from experiments.runs.resuming import alone_in, mark_finished, new_folder, run_folder, second_sums


@pytest.fixture
def left(small_recipe, tmp_path):
    """Makes the folder of a run of so many rounds, which reached some, and says that it has finished after others."""
    recipe = small_recipe()

    def make(rounds, reached, *, finished):
        for name in range(1, reached + 1):
            (tmp_path / "checkpoints" / f"{name:05d}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "report.html").touch()
        (tmp_path / "recipe.toml").write_text(to_toml(replace(recipe, rounds=rounds)))
        if finished is not None:
            mark_finished(tmp_path, finished)
        return lambda rounds: run_folder(replace(recipe, rounds=rounds), tmp_path, True)

    return make


def test_a_finished_run_goes_on_with_more_rounds_alone(left):
    again = left(10, 10, finished=10)
    for rounds in (5, 10):
        with pytest.raises(ValueError, match="has finished; raise rounds"):
            again(rounds)
    assert again(20)[1].rounds == 20


def test_a_run_that_was_to_go_on_and_was_killed_goes_on(left):
    """Its model is that of its first ten rounds."""
    again = left(20, 15, finished=10)
    assert again(20)[1].rounds == 20
    for rounds in (10, 15, 18):
        with pytest.raises(ValueError, match="cannot continue with fewer"):
            again(rounds)


def test_a_finished_run_without_its_checkpoints_is_finished(left):
    with pytest.raises(ValueError, match="has finished"):
        left(10, 0, finished=10)(10)


@pytest.mark.parametrize("damaged", [None, "", "[]", '{"rounds": "10"}'])
def test_a_run_with_a_model_and_a_report_goes_on_unless_it_says_that_it_has_finished(left, tmp_path, damaged):
    again = left(10, 10, finished=None)
    if damaged is not None:
        (tmp_path / "finished.json").write_text(damaged)
    assert again(10)[1].rounds == 10


def test_a_run_does_not_move_between_cpus_and_gpus(left, small_recipe, tmp_path):
    def resumed(before, now):
        left(4, 2, finished=None)
        recipes = [small_recipe(f"clients.num_gpus={share}", "rounds=4") for share in (before, now)]
        (tmp_path / "recipe.toml").write_text(to_toml(recipes[0]))
        return run_folder(recipes[1], tmp_path, True)

    assert resumed(0.5, 0.25)[1].clients.num_gpus == 0.25
    for before, now in ((0.0, 0.5), (0.5, 0.0)):
        with pytest.raises(ValueError, match=r"differs in clients\.num_gpus"):
            resumed(before, now)


def test_what_one_table_compares_is_judged_on_the_same_rows(left, small_recipe, tmp_path):
    begun = left(4, 2, finished=None)
    for key in ("rows", "server_rows"):
        with pytest.raises(ValueError, match=rf"differs in evaluate\.{key}: resume it with the recipe"):
            run_folder(small_recipe(f"evaluate.{key}=3"), tmp_path, True)
    other = small_recipe("evaluate.every=1", "evaluate.batch=2", "evaluate.samples=0", "evaluate.finetune=1")
    assert run_folder(other, tmp_path, True)[1] == other
    assert begun(4)[1].evaluate != other.evaluate


def test_what_was_killed_while_it_wrote_its_first_file_is_no_run(small_recipe, tmp_path):
    (tmp_path / ".recipe.toml.123").touch()
    run_folder(small_recipe(), tmp_path, False)
    (tmp_path / ".notes").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        run_folder(small_recipe(), tmp_path, False)


def test_a_secured_run_names_what_else_gives_sums_of_its_clients(small_recipe, tmp_path):
    def secured(mode, *changes):
        return small_recipe(f"privacy.secagg.mode={mode}", "privacy.rows_cap=4", *changes)

    manifest = {"seed": 5, "data": {"key": "rows"}}
    others = {
        "a": manifest,
        "b": manifest | {"seed": 6},
        "c": manifest | {"data": {"key": "x"}},
        "d": [],
        "e": manifest,
    }
    for name, other in others.items():
        (tmp_path / name / "unmasked").mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text(json.dumps(other))
        if name != "e":  # which has unmasked nothing
            (tmp_path / name / "unmasked" / "round-00001.json").write_text("{}")
    full = secured("full")
    (note,) = second_sums(tmp_path / "new", full, manifest)
    assert note.startswith("'a' had sums of the same clients")
    # A run in the clear unmasks nothing, and its server has had each update.
    for name, recipe in (("f", small_recipe()), ("g", full)):
        (tmp_path / name / "checkpoints" / "1").mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
        (tmp_path / name / "recipe.toml").write_text(to_toml(recipe))
    (note,) = second_sums(tmp_path / "new", full, manifest)
    assert note.startswith("'a', 'f' had sums of the same clients")
    shutil.rmtree(tmp_path / "f")
    assert second_sums(tmp_path / "a", full, manifest) == ()  # a run that is resumed
    (note,) = second_sums(tmp_path / "a", secured("full", "evaluate.without_privacy=true"), manifest)
    assert note.startswith("evaluate.without_privacy plays the same rounds again in the clear")
    assert second_sums(tmp_path / "new", secured("ideal"), manifest) == ()


@pytest.fixture
def clock(monkeypatch):
    """A clock that shows the same second three times, and then the next."""
    seconds = iter(["20261130-120000"] * 3 + ["20261130-120001"])
    monkeypatch.setattr(resuming.time, "strftime", lambda _: next(seconds))


def test_two_runs_of_one_second_have_two_folders(tmp_path, clock):
    folders = [new_folder(tmp_path / "runs", "small") for _ in range(2)]
    assert [folder.name for folder in folders] == ["small-20261130-120000", "small-20261130-120001"]
    assert all(folder.is_dir() for folder in folders)


def test_a_new_folder_that_nothing_is_written_into_is_removed(small_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = run_folder(small_recipe(), None, False)
    with alone_in(folder, new=True):
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_the_newest_run_is_resumed_also_one_that_was_submitted(small_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe()
    for name in ("small-20261130-120000", "small-20261130-120001-0f3a", "small-other-20261130-120002"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.toml").write_text(to_toml(recipe))
    assert run_folder(recipe, None, True)[0].name == "small-20261130-120001-0f3a"


def test_the_date_of_the_first_start_is_kept_if_the_template_writes_one(small_recipe, tmp_path):
    today, template = date.today().isoformat(), tmp_path / "own.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}")
    assert run_folder(small_recipe(), tmp_path / "plain", False)[1].model.template_date is None
    recipe = small_recipe(f"model.chat_template='{template}'")
    assert run_folder(recipe, tmp_path / "new", False)[1].model.template_date == today
    unknown = small_recipe("model.base='nobody/knows'")
    assert run_folder(unknown, tmp_path / "new", False)[1].model.template_date == today, "it is not on this machine"
    begun = replace(recipe, model=replace(recipe.model, template_date="2020-01-02"))
    assert run_folder(begun, tmp_path / "new", False)[1] == begun
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(to_toml(begun))
    assert run_folder(recipe, tmp_path / "run", True)[1] == begun
    with pytest.raises(ValueError, match=r"differs in model\.template_date"):
        run_folder(replace(begun, model=replace(begun.model, template_date=today)), tmp_path / "run", True)


def test_a_template_is_part_of_the_digests(small_recipe, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages }}")
    recipe = small_recipe(f"model.chat_template='{template}'")
    before = digests(recipe)["model.chat_template"]
    template.write_text("{{ messages | length }}")
    assert digests(recipe)["model.chat_template"] != before and "model.chat_template" not in digests(small_recipe())
