import datetime
import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tomli_w

from engine.config.adapters import FullTuning, Lora
from engine.config.sections import Model
from engine.config.train import AdamW, Sgd
from engine.messages.errors import RunError
from engine.messages.frozen import FrozenModel
from experiments.config.recipe import RECIPES, SHIPPED, Recipe, load_recipe, located, parse_recipe, schema, to_toml
from experiments.sweep.variants import load_variants
from strategies.averaging.drift import FedProx
from strategies.averaging.fedavg import FedAvg

ROOT = Path(__file__).resolve().parents[3]
SWEEPS = [path for path in sorted(RECIPES.glob("*.toml")) if "[sweep." in path.read_text()]
SHIPPED_RECIPES = [path for path in sorted(RECIPES.glob("*.toml")) if path not in SWEEPS]
LEAST: dict[str, Any] = {
    "name": "least",
    "seed": 1,
    "rounds": 2,
    "model": {},
    "data": {"source": "python_docs"},
    "train": {"steps": 3},
}


def parsed(*changes: str, **sections: Any) -> Recipe:
    """The least recipe with sections of its tree replaced, and `--set` changes."""
    return parse_recipe(tomli_w.dumps(LEAST | sections), list(changes))


def complaint(*changes: str, **sections: Any) -> str:
    with pytest.raises(RunError) as caught:
        parsed(*changes, **sections)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED_RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_survives_being_resolved(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(to_toml(recipe)) == recipe
    tomllib.loads(to_toml(located(recipe)))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_variant_of_a_shipped_sweep_survives_being_resolved(path: Path) -> None:
    variants = load_variants(path)
    assert len(variants) > 1
    for recipe in variants.values():
        assert parse_recipe(to_toml(recipe)) == recipe


def test_there_are_shipped_recipes() -> None:
    assert RECIPES / "demo.toml" in SHIPPED_RECIPES


def test_defaults_and_their_resolved_form() -> None:
    recipe = parsed()
    assert (recipe.strategy, recipe.train.optimizer, recipe.model.peft) == (FedAvg(), AdamW(), Lora())
    assert (recipe.train.steps, recipe.train.epochs, recipe.clients.slots) == (3, None, "auto")
    resolved = tomllib.loads(to_toml(recipe))
    assert resolved["strategy"] == {"kind": "fedavg", "lr": 1.0, "weighting": "examples"}
    assert "epochs" not in resolved["train"], "an unset key is left out"
    assert parse_recipe(to_toml(recipe)) == recipe


def test_a_section_may_be_given_by_its_kind() -> None:
    recipe = parsed(
        strategy="fedprox",
        cohort="uniform",
        model={"peft": "none"},
        train={"steps": 1, "optimizer": "sgd"},
        data={"source": "python_docs", "partition": "natural"},
    )
    assert (recipe.strategy, recipe.model.peft, recipe.train.optimizer) == (FedProx(), FullTuning(), Sgd())


@pytest.mark.parametrize(
    ("change", "section", "key", "value"),
    [
        ("train.steps=4", "train", "steps", 4),
        ("train.steps = 4", "train", "steps", 4),
        ("train.optimizer=sgd", "train", "optimizer", Sgd()),
        ('train.optimizer={kind="sgd", lr=0.5}', "train", "optimizer", Sgd(lr=0.5)),
        ("train.optimizer.kind=sgd", "train", "optimizer", Sgd()),
        ("model.base=org/some-model", "model", "base", "org/some-model"),
        ('model.base="quoted"', "model", "base", "quoted"),
        ("model.base=", "model", "base", ""),
        ("model.base=a=b", "model", "base", "a=b"),
        ("model.peft=none", "model", "peft", FullTuning()),
        ('model.peft={kind="lora", targets=["q", "v"]}', "model", "peft", Lora(targets=("q", "v"))),
        ("clients.slots=3", "clients", "slots", 3),
        ("clients.slots=auto", "clients", "slots", "auto"),
        ("data.cache=elsewhere", "data", "cache", "elsewhere"),
    ],
)
def test_a_change_of_the_command_line(change: str, section: str, key: str, value: Any) -> None:
    assert getattr(getattr(parsed(change), section), key) == value


def test_changes_go_into_sections_given_by_their_kind_alone() -> None:
    assert parsed("strategy.mu=0.5", strategy="fedprox").strategy == FedProx(mu=0.5)
    assert parsed("strategy=fedprox", "strategy.mu=0.5").strategy == FedProx(mu=0.5)
    assert parsed("train.optimizer=adamw", "train.optimizer.betas=[0.8, 0.9]").train.optimizer == AdamW(
        betas=(0.8, 0.9)
    )


def test_a_later_change_wins_and_whole_sections_are_replaced() -> None:
    assert parsed("seed=5", "seed=6").seed == 6
    assert parsed("strategy=fedavg", strategy={"kind": "fedprox", "mu": 0.5}).strategy == FedAvg()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.steps", "--set takes a.b=value, not 'train.steps'"),
        ("=4", "--set takes a.b=value"),
        ("", "--set takes a.b=value"),
        ("name.first=x", "first"),
        ("seed.first=x", "--set seed.first=x: seed is a value, not a section"),
        ("train..steps=1", "there is no key"),
        (".=1", "there is no key"),
    ],
)
def test_malformed_changes(change: str, said: str) -> None:
    assert said in complaint(change)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"sed": 1}, "there is no key 'sed'; did you mean 'seed'? A recipe takes name, seed, rounds"),
        ({"train": {"steps": 1, "bach": 2}}, "no key 'train.bach'; did you mean 'batch'? [train] takes objective"),
        (
            {"train": {"steps": 1, "optimizer": {"kind": "sgd", "momentun": 0.9}}},
            "no key 'train.optimizer.momentun'; did you mean 'momentum'? [train.optimizer] takes",
        ),
        ({"strategy": {"kind": "fedavg", "mu": 1.0}}, "no key 'strategy.mu'"),
        ({"train": {"steps": 1, "lr": 0.1}}, "no key 'train.lr'; did you mean 'train.optimizer.lr'? [train] takes"),
        ({"lr": 0.1}, "no key 'lr'; did you mean 'train.optimizer.lr' or 'strategy.lr'? A recipe takes"),
        ({"train": {"steps": 1, "heldout": 0.1}}, "did you mean 'data.splits.heldout'? [train] takes"),
        ({"model": {"rank": 4}}, "did you mean 'model.peft.ranks'? [model] takes"),
        ({"train": {"steps": 1, "patience": 4}}, "there is no key 'train.patience'; [train] takes"),
        ({"data": {"source": {"kind": "jsonl", "path": "x", "pth": "y"}}}, "'data.source.pth'; did you mean 'path'?"),
        ({"privacy": {"secagg": {"mod": "off"}}}, "no key 'privacy.secagg.mod'; did you mean 'mode'?"),
        (
            {"privacy": {"secagg": {"neighbours": 4}}},
            "no key 'privacy.secagg.neighbours' any more; the number of neighbors in the graph",
        ),
        (
            {"clients": {"pack": 4}},
            "no key 'clients.pack' any more; how many clients train at once in a slot is clients.lanes now",
        ),
        ({"privacy": {"secagg": {"weight_cap": 0.5}}}, "no key 'privacy.secagg.weight_cap' any more"),
        (
            {"privacy": {"dp": {"kind": "central", "noise_multiplier": 1.0, "weight_cap": 0.5}}},
            "no key 'privacy.dp.weight_cap' any more; a client's weight is min(rows, rows_cap) / rows_cap: "
            "set privacy.rows_cap, a number of rows",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(sections: dict[str, Any], said: str) -> None:
    assert said in complaint(**sections)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"seed": "7"}, "'seed' should be a valid integer, not '7'"),
        ({"seed": 7.0}, "'seed' should be a valid integer"),
        ({"rounds": True}, "'rounds' should be a valid integer"),
        ({"name": 3}, "'name' should be a valid string, not 3"),
        ({"train": 3}, "'train' should be"),
        ({"train": {"steps": 1.5}}, "'train.steps' should be a valid integer"),
        ({"train": {"steps": 1, "optimizer": {"kind": "adamw", "betas": [0.9]}}}, "train.optimizer.betas"),
        ({"clients": {"slots": "many"}}, "'clients.slots' should be a valid integer"),
        ({"model": {"dtype": "int8"}}, "'model.dtype' should be 'float32', 'bfloat16' or 'float16', not 'int8'"),
        ({"cohort": {"size": 2, "kind": "poison"}}, "'cohort' has no kind 'poison'; did you mean 'poisson'?"),
    ],
)
def test_a_value_of_the_wrong_type(sections: dict[str, Any], said: str) -> None:
    assert said in complaint(**sections)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"strategy": "fedagv"},
            "'strategy' has no kind 'fedagv'; did you mean 'fedavg'? There is 'fedavg', 'fedprox'",
        ),
        ({"strategy": {"lr": 1.0}}, "'strategy' needs a kind"),
        ({"data": {"source": "jsonnl"}}, "'data.source' has no kind 'jsonnl'; did you mean 'jsonl'?"),
        ({"train": {"steps": 1, "optimizer": {"kind": 3}}}, "'train.optimizer' has no kind"),
        ({"model": {"peft": 8}}, "'model.peft'"),
        (
            {"model": {"peft": "adalora"}},
            "model.peft has no kind 'adalora', which prunes directions by each client's own",
        ),
        ({"model": {"peft": "eva"}}, "model.peft has no kind 'eva', which is a way to start"),
        ({"model": {"peft": {"kind": "lora", "lora_alpha": 8}}}, "'model.peft.lora_alpha'; did you mean 'alpha'?"),
        ({"model": {"peft": {"kind": "ia3", "target_modules": ["q"]}}}, "did you mean 'targets'?"),
    ],
)
def test_kinds(sections: dict[str, Any], said: str) -> None:
    assert said in complaint(**sections)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"train": {}}, "train needs exactly one of steps and epochs"),
        ({"train": {"steps": 1, "epochs": 1}}, "train needs exactly one of steps and epochs"),
        ({"rounds": 0}, ": rounds must be at least 1, not 0"),
        ({"seed": -1}, ": seed must be at least 0"),
        ({"name": "a/b"}, "name becomes a folder's name"),
        ({"cohort": {"size": 0}}, "cohort.size must be at least 1"),
        ({"strategy": {"kind": "fedprox", "mu": -1.0}}, "strategy.mu"),
        ({"clients": {"num_cpus": 0.0}}, "clients.num_cpus and clients.num_gpus are both 0"),
        ({"data": {"source": "python_docs", "splits": {"unseen": 1.0}}}, "data.splits.unseen"),
    ],
)
def test_values_that_make_no_sense(sections: dict[str, Any], said: str) -> None:
    assert said in complaint(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"strategy": {"kind": "fedprox", "mu": float("nan")}},
        {"strategy": {"kind": "fedavg", "lr": float("inf")}},
        {"model": {"peft": {"kind": "lora", "alpha": float("nan")}}},
        {"train": {"steps": 1, "optimizer": {"kind": "adamw", "lr": float("inf")}}},
        {"train": {"steps": 1, "optimizer": {"kind": "adamw", "betas": [1.5, 0.9]}}},
        {"model": {"peft": {"kind": "lora", "dropout": 1.5}}},
        {"model": {"peft": {"kind": "lora", "targets": []}}},
    ],
    ids=str,
)
def test_values_that_only_training_would_trip_over(sections: dict[str, Any]) -> None:
    complaint(**sections)


@pytest.mark.parametrize("key", ["name", "seed", "rounds", "model", "data", "train"])
def test_a_missing_key(key: str) -> None:
    with pytest.raises(RunError, match=f"my.toml: the key '{key}' is missing"):
        parse_recipe(tomli_w.dumps({k: v for k, v in LEAST.items() if k != key}), origin="my.toml")


def test_a_date_is_no_string() -> None:
    complaint(name=datetime.date(2024, 5, 1))


def test_a_missing_key_of_a_section() -> None:
    assert complaint(data={}) == "the recipe: the key 'data.source' is missing"
    assert "the key 'data.source.path' is missing" in complaint(data={"source": "jsonl"})


def test_every_fault_has_its_sentence() -> None:
    said = complaint(sed=1, rounds="many", strategy="fedagv").splitlines()
    assert len(said) == 3
    assert all(line.startswith("the recipe: ") for line in said)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no recipe .*absent\.toml"):
        load_recipe(tmp_path / "absent.toml")
    with pytest.raises(RunError, match=r"the nearest is demo\.toml"):
        load_recipe(tmp_path / "dmo.toml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'name = "\xff"', "cannot be read"),
        (b"name = ", "is not valid TOML"),
        (b"name = 1\nname = 2", "is not valid TOML"),
        (b"", "the key 'name' is missing"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    with pytest.raises(RunError, match=said) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        load_recipe(tmp_path)


def test_a_file_is_read_with_changes(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(tomli_w.dumps(LEAST))
    assert load_recipe(path, ["rounds=9"]) == parsed("rounds=9")


def test_relative_traces_and_base_folders_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert located(parsed("model.base=base")).model.base == str((tmp_path / "base").resolve())
    assert located(parsed("model.base=org/name")).model.base == "org/name"
    trace = located(parsed("clients.availability.trace=trace.csv")).clients.availability.trace
    assert trace == str((tmp_path / "trace.csv").resolve())


def test_a_recipes_errors_come_without_the_heavy_libraries() -> None:
    heavy = "{'ray', 'transformers', 'peft', 'deepspeed', 'trl'}"
    script = "import sys, experiments.config.recipe as c; c.schema(); "
    script += f"sys.exit(str(sorted({heavy} & set(sys.modules)) or ''))"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.stderr.strip() == ""


def test_the_schema_is_one_and_describes_the_resolved_recipes() -> None:
    json.dumps(schema())
    jsonschema.Draft202012Validator.check_schema(schema())
    validator = jsonschema.Draft202012Validator(schema())
    for path in SHIPPED_RECIPES:
        validator.validate(tomllib.loads(to_toml(load_recipe(path))))
    assert not validator.is_valid(LEAST | {"seed": "seven"})


@pytest.mark.parametrize("base", ["bases/mine/small", "./mine", "../mine", "TMP/mine", "~/mine"])
def test_a_base_that_is_no_folder_and_no_name_on_the_hub_shows_the_path_that_was_tried(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    base = base.replace("TMP", str(tmp_path))
    recipe = replace(load_recipe(RECIPES / "demo.toml"), model=Model(base=base))
    tried = Path(base).expanduser().absolute()
    with pytest.raises(RunError, match=rf"model\.base is '{base}', and there is no folder {tried} \(relative paths"):
        located(recipe)
    tried.mkdir(parents=True)
    assert located(recipe).model.base == str(tried.resolve())


def test_a_teacher_is_a_base_a_run_or_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kind = "train.objective.kind=distill"

    def teacher(*changes: str) -> FrozenModel:
        (model,) = located(parsed(kind, *changes)).train.objective.models
        return model

    tiny = str(SHIPPED["tiny"])
    assert teacher("train.objective.teacher=tiny") == FrozenModel(tiny)
    named = "train.objective.teacher=org/name"
    assert teacher(named, "train.objective.teacher_revision=v1") == FrozenModel("org/name", "v1")

    run, model = tmp_path / "run", tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (run / "recipe.toml").write_text('[model]\nbase = "org/base"\nrevision = "v2"\n')
    assert teacher("train.objective.teacher=run") == FrozenModel(str(model))  # a whole model
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    for name in ("run", "run/model"):
        assert teacher(f"train.objective.teacher={name}") == FrozenModel(str(model), "v2", "org/base")
    at_home = teacher("train.objective.teacher=run", "train.objective.teacher_base=tiny")
    assert at_home == FrozenModel(str(model), None, tiny)
    model.rename(adapter := tmp_path / "adapter")
    assert teacher("train.objective.teacher=adapter") == FrozenModel(str(adapter), None, "base")
    (adapter / "adapter_config.json").write_text("{}")
    for name, why in (("adapter", "names no base"), ("run", "has no model yet"), ("./nowhere", "there is no folder")):
        with pytest.raises(RunError, match=why):
            teacher(f"train.objective.teacher={name}")
