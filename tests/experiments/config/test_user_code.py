"""People's own code in a recipe: found from the working folder, checked, and written back under its name."""

import sys
import tomllib
from dataclasses import replace

import pytest

import experiments
from datasets_partition.store.store import Store
from engine.messages.errors import RunError
from experiments.config.recipe import parse_recipe, to_toml
from experiments.config.user_code import code_of, user_objects
from experiments.runs.api import build_store
from experiments.runs.digests import digests

OWN = '''
from dataclasses import dataclass, replace
import pyarrow as pa
import numpy as np
from datasets_partition.core.types import Assignment, Rows
from strategies.averaging.fedavg import FedAvg

@dataclass(frozen=True)
class Alphabet:
    """Rows to spell, without a file."""
    letters: str = "abcdef"
    def fingerprint(self): return self.letters
    def load(self):
        words = [a + b + c for a in self.letters for b in self.letters for c in "xyz"]
        prompts = [f"{word} backwards is " for word in words]
        return Rows(pa.table({"prompt": prompts, "completion": [w[::-1] for w in words]}), {})

@dataclass(frozen=True)
class InTurns:
    """Rows dealt in turns."""
    clients: int = 4
    def assign(self, table, rng):
        owners = (np.arange(table.num_rows) % self.clients).astype(np.int32)
        return Assignment(owners, pa.array([f"turn-{i}" for i in range(self.clients)]))

@dataclass(frozen=True)
class Halved(FedAvg):
    """Half of FedAvg's step."""
    def apply(self, state, aggregate):
        return replace(super().apply(state, aggregate), params=state.params + aggregate.total / aggregate.weight / 2)

@dataclass(frozen=True)
class Bare:
    def apply(self, state, aggregate): ...

@dataclass(frozen=True)
class Nameless:
    def load(self): ...

class NoDataclass:
    def apply(self): ...
'''


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def changes(**keys):
    return (
        'data.source={kind="own_rules:Alphabet"}',
        'data.partition={kind="own_rules:InTurns", clients=5}',
        'strategy={kind="own_rules:Halved", lr=0.5}',
    )


def test_own_kinds_are_read_and_written_back(own_folder, small_recipe):
    recipe = small_recipe(*changes())
    assert type(recipe.strategy).__name__ == "Halved" and recipe.strategy.lr == 0.5
    assert recipe.data.partition.clients == 5
    tree = tomllib.loads(to_toml(recipe))
    assert tree["data"]["partition"] == {"kind": "own_rules:InTurns", "clients": 5}
    assert tree["data"]["source"] == {"kind": "own_rules:Alphabet", "letters": "abcdef"}
    assert tree["strategy"] == {"kind": "own_rules:Halved", "lr": 0.5, "weighting": "examples"}
    assert parse_recipe(to_toml(recipe)) == recipe


def test_own_kinds_within_a_combined_partition(own_folder, small_recipe):
    in_turns = '{kind="own_rules:InTurns", clients=2}'
    recipe = small_recipe(f'data.partition={{kind="combined", first={in_turns}, then={{kind="size_cap", rows=3}}}}')
    assert recipe.data.partition.first.clients == 2
    tree = tomllib.loads(to_toml(recipe))
    assert tree["data"]["partition"]["first"] == {"kind": "own_rules:InTurns", "clients": 2}
    assert parse_recipe(to_toml(recipe)) == recipe
    recipe = small_recipe(f'data.partition={{kind="combined", first="natural", then={in_turns}}}')
    store = Store.open(build_store(recipe))
    names = store.index["name"].to_pylist()
    assert {name.rpartition("/")[2] for name in names if name} == {"turn-0", "turn-1"}
    assert store.manifest["own_code"] != ""
    with pytest.raises(RunError, match=r"data\.partition\.then\.kind names 'own_rules:Gone'"):
        small_recipe('data.partition={kind="combined", first="natural", then={kind="own_rules:Gone"}}')


def test_own_kinds_at_any_depth_of_combined_partitions(own_folder, small_recipe):
    in_turns = '{kind="own_rules:InTurns", clients=2}'
    below = f'{{kind="combined", first="natural", then={in_turns}}}'
    deep = f'{{kind="combined", first={in_turns}, then={below}}}'
    recipe = small_recipe(f'data.partition={{kind="combined", first={deep}, then={{kind="size_cap", rows=3}}}}')
    assert recipe.data.partition.first.first.clients == recipe.data.partition.first.then.then.clients == 2
    assert parse_recipe(to_toml(recipe)) == recipe


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.source={kind='own_rules:Nameless'}", r"is no dataclass with a method 'fingerprint'"),
        ("strategy={kind='no_such:Rule'}", r"strategy\.kind names 'no_such:Rule', but importing 'no_such' fails"),
        ("strategy={kind='own_rules:NoDataclass'}", r"is no dataclass with a method 'apply'"),
        ("strategy={kind='own_rules:Bare'}", r"has no reads, .*: extend strategies\.core\.base\.Rule"),
        ("strategy={kind='own_rules:Gone'}", r"is no dataclass with a method 'apply'"),
        ("data.partition={kind='own_rules:Halved'}", r"data\.partition\.kind names .* with a method 'assign'"),
        ("data.partition={kind='own_rules:InTurns', client=5}", r"own_rules:InTurns: client: .*; it takes clients$"),
        ("strategy={kind='own_rules:Halved', lr=-1}", r"strategy\.lr is the server's learning rate"),
    ],
)
def test_what_is_wrong_with_own_code_is_said(own_folder, small_recipe, change, said):
    with pytest.raises(RunError, match=said):
        small_recipe(change)


def test_own_code_runs(own_folder, ray_session, small_recipe, tmp_path):
    recipe = small_recipe(*changes(), "rounds=1", "cohort.size=3", "strategy.lr=1.0")
    run = experiments.run(recipe, out=tmp_path / "run")
    assert run.losses["end"]["heldout"] < run.losses["round 0"]["heldout"]
    manifest = (tmp_path / "run" / "manifest.json").read_text()
    assert "InTurns(clients=5)" in manifest
    whole = experiments.run(replace(recipe, strategy=type(recipe.strategy).__base__()), out=tmp_path / "whole")
    assert whole.losses["end"]["heldout"] < run.losses["end"]["heldout"]


REWARD = """
def polite(prompt, completion, row):
    return 1.0 if "please" in completion else 0.0

def narrow(completion):
    return 1.0
"""


@pytest.fixture
def reward_recipe(tmp_path, monkeypatch, small_recipe):
    (tmp_path / "own_rewards.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shipped = '{kind="length", target=3}'
    return lambda *given: small_recipe(f'train.objective={{kind="grpo", rewards=[{shipped}, {", ".join(given)}]}}')


def test_an_own_reward_is_read_written_back_and_sent_with_the_run(reward_recipe):
    import cloudpickle

    recipe = reward_recipe('{kind="own_rewards:polite", weight=0.5}')
    shipped, polite = recipe.train.objective.rewards
    assert shipped.target == 3 and polite.weight == 0.5
    assert polite.score("", "yes, please", {}) == 1 and polite.score("", "no", {}) == 0
    tree = tomllib.loads(to_toml(recipe))["train"]["objective"]
    assert tree["rewards"][1] == {"kind": "own_rewards:polite", "weight": 0.5} and tree["rewards"][0]["target"] == 3
    again = parse_recipe(to_toml(recipe))
    assert again.train.objective.rewards[1].kind == "own_rewards:polite"
    assert "the code of own_rewards" in digests(recipe)
    (place,) = user_objects(recipe)
    assert place == ("train", "objective", "rewards", 1)
    module = code_of(polite).__module__
    cloudpickle.register_pickle_by_value(sys.modules[module])
    sent = cloudpickle.dumps(recipe.train.objective)
    del sys.modules[module]
    assert cloudpickle.loads(sent).rewards[1].score("", "please", {}) == 1


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ('{kind="own_rewards:missing"}', r"rewards\[1\].kind names 'own_rewards:missing', which is no function of"),
        ('{kind="own_rewards:narrow"}', r"is no function of \(prompt, completion, row\)"),
        ('{kind="own_nowhere:f"}', "importing 'own_nowhere' fails"),
        ('{kind="own_rewards:polite", target=3}', "takes weight alone, not target"),
        ('{kind="own_rewards:polite", weight="much"}', "weight should be a number"),
        ('{kind="polite"}', "has no kind 'polite'; did you mean"),
    ],
)
def test_a_wrong_own_reward_is_one_sentence(reward_recipe, given, sentence):
    with pytest.raises(RunError, match=sentence):
        reward_recipe(given)
