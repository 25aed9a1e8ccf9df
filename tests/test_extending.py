"""Every example of docs/extending.md, taken from the page and run."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine.aggregation.accumulators import RingSum
from engine.aggregation.ring_encoding import ring_aggregate, ring_sums
from engine.aggregation.ring_shard import RingShard
from engine.config.adapters import Lora
from engine.config.federation import Federation
from engine.config.privacy import Privacy, SecAgg
from engine.config.sections import Clients, Model
from engine.config.train import Sgd, Train
from engine.messages.errors import RunError
from engine.models.base_model import map_base, read_base
from engine.models.export import export_files
from engine.models.tokenizer import load_tokenizer
from engine.models.trainable import Trainable
from engine.objectives.base import Context, Objective, require_format
from engine.objectives.figures import client_figures, figure_metrics
from engine.objectives.sft import Sft
from engine.training.lanes import LaneTrainer
from engine.training.local_training import LocalTrainer
from engine.training.per_example import PrivateTrainer
from engine.training.step_loop import Training
from experiments.cli.contract import show_check
from strategies.core.protocol import Aggregate, Broadcast, ServerState, Size, Update
from strategies.privacy.accounting import Scheme
from strategies.privacy.budget import ExamplePlan
from strategies.privacy.noise import seeded_words
from strategies.transforms.chain import bits, decode, encode
from tests.test_imports import circles, graph_of, module_of, tree, upward

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "extending.md"
EXAMPLES = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Imports an example of the page from a folder that is the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def load(file):
        path = tmp_path / Path(file).name
        path.write_text(EXAMPLES[file])
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_the_page_has_the_doors_that_there_are():
    assert set(EXAMPLES) == {
        "my_rules.py",
        "my_data.py",
        "strategies/transforms/half.py",
        "engine/objectives/unlikelihood.py",
        "engine/config/fourierft.py",
    }


def test_the_strategy_keeps_the_contract_and_takes_half_a_step(example):
    rule = example("my_rules.py").Halved(strength=0.5)
    assert show_check("my_rules:Halved")
    state = ServerState(3, torch.tensor([1.0, 2.0]))
    after = rule.apply(state, Aggregate(2.0, torch.tensor([4.0, -8.0]), {}, 2))
    assert after.round == 4 and after.params.tolist() == [2.0, 0.0]


def test_the_source_and_the_partition_make_a_store(example, small_recipe):
    from datasets_partition.store.store import Store
    from experiments.runs.api import build_store

    example("my_data.py")
    kinds = (
        'data.source={kind="my_data:Spelling", letters="abcd"}',
        'data.partition={kind="my_data:InTurns", clients=6}',
    )
    store = Store.open(build_store(small_recipe(*kinds, "data.splits.unseen=0", "cohort.size=2")))
    assert store.num_clients == 6
    rows = store.read_rows(0, "train").to_pylist() + store.read_rows(0, "heldout").to_pylist()
    assert len(rows) == 8 and all(row["prompt"].split()[0][::-1] == row["completion"] for row in rows)


def test_the_transform_sends_sixteen_bits_and_the_rest_later(example):
    half = example("strategies/transforms/half.py").Half()
    delta, broadcast = torch.tensor([1 + 2**-12, 0.0]), Broadcast(0, torch.zeros(2))
    update, state = encode((half,), Update(0, 1.0, delta), broadcast, {})
    assert update.delta.tolist() == [1.0, 0.0]
    assert next(iter(state.values())).tolist() == [2**-12, 0.0]
    total = Aggregate(1.0, update.delta, {}, 1)
    assert decode((half,), total, ServerState(0, torch.zeros(2)))[0].total.tolist() == [1.0, 0.0]
    assert bits((half,), 10) == 160 and half.size(Size(10, 10)).bits == 16


LABELED = {"prompt": ["ab is ", "c is ", "xyz"], "completion": ["ba", "c", "no"], "label": [True, False, False]}


def test_the_objective_learns_good_completions_and_unlearns_bad_ones(example, tiny_base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    objective = example("engine/objectives/unlikelihood.py").Unlikelihood()
    network, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    columns = objective.encode(pa.table(LABELED), tokenizer, 32).combine_chunks().to_batches()[0]
    batch = objective.collate(columns, tokenizer.pad_token_id)
    nll = Sft().terms(network, batch, Context())["nll"]
    is_good, values = (nll.row_N == 0).numpy(), nll.values_N.detach().double().numpy()
    terms = objective.terms(network, batch, Context())
    np.testing.assert_array_equal(terms["good"].values_N.detach().numpy(), values[is_good])
    np.testing.assert_allclose(terms["bad"].values_N.detach().numpy(), -np.log1p(-np.exp(-values[~is_good])), 1e-5)
    assert objective.counts(batch) == {"good": is_good.sum(), "bad": (~is_good).sum()}
    assert objective.sample(pa.table(LABELED).to_pylist()[0]) == ("ab is ", "ba")
    with pytest.raises(RunError, match=r"learns from unpaired preferences, but the rows are texts"):
        require_format(objective, pa.table({"prompt": ["a"], "completion": ["b"]}))


@pytest.mark.parametrize("kind", ["pieces", "lanes", "private"])
def test_the_column_of_the_objective_follows_its_rows(example, tiny_base, kind):
    """Row by row, in lanes with rows to fill, and as private rows: the same step as of whole batches of a client."""
    objective = example("engine/objectives/unlikelihood.py").Unlikelihood()
    model = Model(base=str(tiny_base), peft=Lora(r=2))
    train = Train(steps=1, batch=3, optimizer=Sgd(lr=0.1), objective=objective, clip=0)
    packed, buffer = read_base(model)
    trainer = LocalTrainer(Trainable(map_base(packed, torch.from_numpy(buffer)), model, 0), 0, train)
    start = trainer.trainable.initial + 0.02
    rows = objective.encode(pa.table(LABELED), load_tokenizer(model), 32).combine_chunks().to_batches()[0]
    # A private row's loss has means over the row alone, so that only a client of one row is the same.
    parts = [rows.slice(1, 1)] if kind == "private" else [rows, rows.slice(1, 1)]

    def ends(trainer, train):
        trainings = [Training(part, start, np.random.default_rng(0), 0) for part in parts]
        return [trained.end for trained in trainer.train(trainings, train)]

    expected = ends(trainer, train)
    if kind == "pieces":
        train = replace(train, batch=1, accumulate=3)
    elif kind == "lanes":
        trainer = LaneTrainer(trainer, 2, train)
    else:
        plan = ExamplePlan(0.0, 1e6, Scheme("poisson", 1.0), 1e-5)
        trainer = PrivateTrainer(trainer, plan, seeded_words(np.random.default_rng(0)))
    for end, whole in zip(ends(trainer, train), expected, strict=True):
        assert not torch.equal(whole, start)
        torch.testing.assert_close(end, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "secure"])
def test_both_terms_of_the_objective_arrive_at_the_server(example, tiny_base, secure):
    """Two clients train; the server gets the means over both from sums, in the clear and out of a ring."""
    objective = example("engine/objectives/unlikelihood.py").Unlikelihood()
    model = Model(base=str(tiny_base), peft=Lora(r=2))
    train = Train(steps=1, batch=4, optimizer=Sgd(lr=0.1), objective=objective)
    privacy = Privacy(rows_cap=2, secagg=SecAgg(mode="ideal" if secure else "off"))
    federation = Federation(name="x", seed=1, rounds=1, model=model, train=train, privacy=privacy)
    packed, buffer = read_base(model)
    trainer = LocalTrainer(Trainable(map_base(packed, torch.from_numpy(buffer)), model, 0), 0, train)
    tokenizer, layout, start = load_tokenizer(model), trainer.trainable.layout, trainer.trainable.initial
    encoded = objective.encode(pa.table(LABELED), tokenizer, 32).combine_chunks().to_batches()[0]
    rows = [encoded.slice(0, 2), encoded.slice(2, 1)]
    trained = [trainer.train([Training(part, start, np.random.default_rng(0), 0)], train)[0] for part in rows]
    trainer.become(start)
    sums = [trainer.loss_terms(part, 4) for part in rows]
    expected = {name: sum(s[name][0] for s in sums) / sum(s[name][1] for s in sums) for name in ("good", "bad")}
    if secure:
        ring = ring_sums(federation, layout, None, 0.0, 2, 100, 0)
        total = RingSum(RingShard(ring, {}), federation, None, 0)
        for client, result in enumerate(trained):
            total.add(Update(client, 1.0, result.end - start, metrics=result.metrics))
        _, figures = ring_aggregate(ring.decode(total.masked([])), federation, layout, None, 0)
    else:
        each = [client_figures(objective, result.metrics) for result in trained]
        figures = {name: each[0][name] + each[1][name] for name in each[0]}
    metrics = figure_metrics(objective, figures)
    means = {f"term.{name}": mean for name, mean in expected.items()}
    assert metrics == pytest.approx({"loss": sum(expected.values()), "tokens": figures["tokens"], **means}, rel=1e-3)


def test_the_adapter_trains_and_plain_peft_loads_it(example, tiny_base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    fourier = example("engine/config/fourierft.py").FourierFT(n_frequency=50)
    model, train = Model(base=str(tiny_base), peft=fourier), Train(steps=2, batch=2, optimizer=Sgd(lr=10.0))
    federation = Federation(name="x", seed=1, rounds=1, model=model, train=train)
    with pytest.raises(RunError, match=r'model.peft.kind = "fourierft" does not work with several lanes'):
        replace(federation, clients=Clients(lanes=2))
    packed, buffer = read_base(model)
    trainable = Trainable(map_base(packed, torch.from_numpy(buffer)), model, 0)
    trainer, tokenizer = LocalTrainer(trainable, 0, train), load_tokenizer(model)
    texts = pa.table({"prompt": ["ab is ", "c is "], "completion": ["ba", "c"]})
    rows = Sft().encode(texts, tokenizer, 32).combine_chunks().to_batches()[0]
    trained = trainer.train([Training(rows, trainable.initial, np.random.default_rng(0), 0)], train)[0]
    assert not torch.equal(trained.end, trainable.initial)
    trainer.become(trained.end)
    for file, content in export_files(trainable, model, tokenizer, "card").items():
        (tmp_path / file).write_bytes(content)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, trainable.network.eval()(ids).logits)


def test_an_objective_or_an_adapter_in_its_union_is_a_kind_of_the_recipe(example, tmp_path):
    example("engine/objectives/unlikelihood.py")
    example("engine/config/fourierft.py")
    script = """
import engine.config.adapters, fourierft
fourierft.FourierFT.__module__ = "engine.config.fourierft"
engine.config.adapters.Adapters |= fourierft.FourierFT  # as its line in the union would
import engine.objectives, unlikelihood
unlikelihood.Unlikelihood.__module__ = "engine.objectives.unlikelihood"  # where its file would be
engine.objectives.Objectives = engine.objectives.Sft | unlikelihood.Unlikelihood  # as its line in the union would
from engine.messages.errors import RunError
from experiments.config.recipe import parse_recipe, to_toml
text = open(REPLACE).read()
recipe = parse_recipe(text, ['train.objective="unlikelihood"'])
assert recipe.train.objective == unlikelihood.Unlikelihood() and parse_recipe(to_toml(recipe), []) == recipe
recipe = parse_recipe(text, ['model.peft={kind="fourierft", n_frequency=7}'])
assert recipe.model.peft == fourierft.FourierFT(n_frequency=7) and parse_recipe(to_toml(recipe), []) == recipe
assert parse_recipe(text, ["train.objective=sft"]).train.objective == engine.objectives.Sft()
try:
    parse_recipe(text, ["train.objective=unlikely"])
except RunError as error:
    assert "did you mean 'unlikelihood'? There is 'sft', 'unlikelihood'" in str(error), error
"""
    script = script.replace("REPLACE", repr(str(ROOT / "experiments" / "recipes" / "demo.toml")))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_files_in_the_package_import_in_one_direction():
    """With each example and its import beside its union, no modules import one another, nor a room to their left."""
    texts, unions = (
        tree(),
        {
            "strategies/transforms/half.py": "strategies/__init__.py",
            "engine/objectives/unlikelihood.py": "engine/objectives/__init__.py",
            "engine/config/fourierft.py": "engine/config/adapters.py",
        },
    )
    for file, union in unions.items():
        path = PurePosixPath(file)
        assert union in PAGE.read_text("utf-8")
        texts[path] = EXAMPLES[file]
        texts[PurePosixPath(union)] += f"\nimport {module_of(path)}\n"
    graph = graph_of(texts)
    assert circles(graph) == [] and upward(graph) == []


def test_the_page_says_what_an_objective_may_declare():
    """Every part of the protocol is on the page, and every name in the tables' first columns is a part of it."""
    section = PAGE.read_text("utf-8").split("\n## ")
    text = next(part for part in section if part.startswith("An objective"))
    parts = {name for name in (*vars(Objective), *Objective.__annotations__) if not name.startswith("_")}
    named = {name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert parts <= set(re.findall(r"\w+", text))
    assert named <= parts | {"group"}
