"""Every example of docs/extending.md, taken from the page and run."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

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
from engine.objectives.base import client_figures, figure_metrics
from engine.objectives.sft import Sft
from engine.training.local_training import LocalTrainer
from engine.training.step_loop import Training
from experiments.cli.contract import show_check
from strategies import FedAvg
from strategies.core.protocol import Aggregate, Broadcast, ServerState, Size, Update
from strategies.transforms.chain import bits, decode, encode

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
        "engine/objectives/focal.py",
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


def test_the_objective_is_the_focal_loss_and_sft_without_focus(example, tiny_base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    focal = example("engine/objectives/focal.py").Focal
    network, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    rows = pa.table({"prompt": ["ab is ", "c is "], "completion": ["ba", "c"]})
    columns = focal().encode(rows, tokenizer, 32).combine_chunks().to_batches()[0]
    batch = focal().collate(columns, tokenizer.pad_token_id)
    plain = Sft().terms(network, batch)["nll"].values_N.detach().double().numpy()
    weighted = focal(gamma=2.0).terms(network, batch)["focal"].values_N.detach().double().numpy()
    np.testing.assert_allclose(weighted, plain * (1 - np.exp(-plain)) ** 2, rtol=1e-5)
    np.testing.assert_array_equal(focal(gamma=0.0).terms(network, batch)["focal"].values_N.detach().numpy(), plain)
    assert replace(focal(), gamma=1.0).kind == "focal" and FedAvg().kind == "fedavg"


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "secure"])
def test_both_terms_of_the_objective_arrive_at_the_server(example, tiny_base, secure):
    """Two clients train; the server gets the means over both from sums, in the clear and out of a ring."""
    focal = example("engine/objectives/focal.py").Focal(gamma=1.0)
    model = Model(base=str(tiny_base), peft=Lora(r=2))
    train = Train(steps=1, batch=4, optimizer=Sgd(lr=0.1), objective=focal)
    privacy = Privacy(rows_cap=2, secagg=SecAgg(mode="ideal" if secure else "off"))
    federation = Federation(name="x", seed=1, rounds=1, model=model, train=train, privacy=privacy)
    packed, buffer = read_base(model)
    trainer = LocalTrainer(Trainable(map_base(packed, torch.from_numpy(buffer)), model, 0), 0, train)
    tokenizer, layout, start = load_tokenizer(model), trainer.trainable.layout, trainer.trainable.initial
    texts = [
        pa.table({"prompt": ["ab is ", "c is "], "completion": ["ba", "c"]}),
        pa.table({"prompt": ["x"], "completion": ["abc"]}),
    ]
    rows = [focal.encode(text, tokenizer, 32).combine_chunks().to_batches()[0] for text in texts]
    trained = [trainer.train([Training(part, start, np.random.default_rng(0), 0)], train)[0] for part in rows]
    trainer.become(start)
    sums = [trainer.loss_terms(part, 4) for part in rows]
    expected = {name: sum(s[name][0] for s in sums) / sum(s[name][1] for s in sums) for name in ("focal", "nll")}
    if secure:
        ring = ring_sums(federation, layout, None, 0.0, 2, 100, 0)
        total = RingSum(RingShard(ring, {}), federation, None, 0)
        for client, result in enumerate(trained):
            total.add(Update(client, 1.0, result.end - start, metrics=result.metrics))
        _, figures = ring_aggregate(ring.decode(total.masked([])), federation, layout, None, 0)
    else:
        each = [client_figures(focal, result.metrics) for result in trained]
        figures = {name: each[0][name] + each[1][name] for name in each[0]}
    metrics = figure_metrics(focal, figures)
    assert 0 < expected["focal"] < expected["nll"]
    means = {f"term.{name}": mean for name, mean in expected.items()}
    assert metrics == pytest.approx({"loss": expected["focal"], "tokens": figures["tokens"], **means}, rel=1e-3)


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
    example("engine/objectives/focal.py")
    example("engine/config/fourierft.py")
    script = """
import engine.config.adapters, fourierft
fourierft.FourierFT.__module__ = "engine.config.fourierft"
engine.config.adapters.Adapters |= fourierft.FourierFT  # as its line in the union would
import engine.objectives, focal
focal.Focal.__module__ = "engine.objectives.focal"  # where its file would be
engine.objectives.Objectives = engine.objectives.Sft | focal.Focal  # as its line in the union would
from engine.messages.errors import RunError
from experiments.config.recipe import parse_recipe, to_toml
text = open(REPLACE).read()
recipe = parse_recipe(text, ['train.objective={kind="focal", gamma=1.0}'])
assert recipe.train.objective == focal.Focal(gamma=1.0) and parse_recipe(to_toml(recipe), []) == recipe
recipe = parse_recipe(text, ['model.peft={kind="fourierft", n_frequency=7}'])
assert recipe.model.peft == fourierft.FourierFT(n_frequency=7) and parse_recipe(to_toml(recipe), []) == recipe
assert parse_recipe(text, ["train.objective=sft"]).train.objective == engine.objectives.Sft()
try:
    parse_recipe(text, ["train.objective=foca"])
except RunError as error:
    assert "did you mean 'focal'? There is 'sft', 'focal'" in str(error), error
"""
    script = script.replace("REPLACE", repr(str(ROOT / "experiments" / "recipes" / "demo.toml")))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
