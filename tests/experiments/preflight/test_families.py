"""Every family on a tiny random model: as plain transformers and PEFT, in lanes, exported, planned, in the table."""

from importlib.util import find_spec

import pytest
import torch
from peft.tuners.lora import LoraLayer

from engine.config.adapters import FullTuning, Lora
from engine.messages.errors import RunError
from engine.models.adapters import unfit_layers
from experiments.cli.model_table import HEAD, listing
from experiments.preflight import families
from experiments.preflight.families import LORA, check, tiny_base
from experiments.preflight.family_list import FAMILIES, family_names
from experiments.preflight.plan import sizes
from tests.conftest import ROOT

UNPLANNED = ("dbrx", "jetmoe")


@pytest.fixture(scope="module")
def table():
    """The lines of the page's table, by family."""
    _, _, rest = (ROOT / "docs" / "models.md").read_text("utf-8").partition(HEAD + "\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rest.splitlines()[1:]]
    return {family: results for family, *results in cells}


def test_the_page_has_each_family_once(table):
    assert list(table) == list(family_names())


@pytest.mark.parametrize("family", family_names())
def test_a_family_does_what_the_page_says(table, family):
    with tiny_base(family) as base:
        results = list(check(base).values())
        compared = len(results) if find_spec("bitsandbytes") else -1  # the last column is of bases that it quantizes
        assert results[:compared] == table[family][:compared]
        if family in UNPLANNED:
            with pytest.raises(RunError, match="cannot be planned, since its layers read values"):
                sizes(base.model, 16)
        else:
            counts = sizes(base.model, 16)
            whole = list(base.adapted[0].network.parameters())
            assert counts.parameters == sum(parameter.numel() for parameter in whole)
            assert counts.trained == base.adapted[0].layout.size and counts.activations > 0


def test_every_shipped_and_every_kind_of_family_is_among_them():
    wanted = {"mixtral", "qwen3_moe", "mamba", "bamba", "deepseek_v3", "phi3", "gpt2", "gemma2", "gpt_oss", "mpt"}
    assert wanted | {file.stem for file in FAMILIES.glob("*.json")} <= family_names().keys()
    assert sum(line.startswith("qwen2 ") for line in listing()) == 1


@pytest.fixture
def base():
    with tiny_base("llama2") as made:
        yield made


def test_another_loss_or_gradient_is_seen(base):
    trainable, plain = base.trainable(FullTuning()), base.plain()
    plain.lm_head.weight.register_hook(lambda grad: grad * 1.001)
    assert "the gradient of lm_head.weight differs" in families._same_gradients(base, trainable, plain)
    plain = base.plain()
    with torch.no_grad():
        plain.model.norm.weight.mul_(1.01)
    assert "the loss is" in families._same_gradients(base, trainable, plain)


def test_another_exported_adapter_is_seen(base):
    trainable = base.trainable(LORA)
    plain = families.plain_adapters(base, LORA, trainable)
    assert families._same_export(base, trainable, plain) == ""
    plain = families.plain_adapters(base, LORA, trainable)
    for layer in trainable.network.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] *= 2  # the files say otherwise
    assert "other logits" in families._same_export(base, trainable, plain)


def test_an_adapter_without_effect_is_seen(base, monkeypatch):
    trainable = base.trainable(LORA)
    layer = trainable.network.base_model.model.model.layers[0].mlp.down_proj
    monkeypatch.setattr(layer, "forward", layer.base_layer.forward)
    with torch.no_grad():  # the plain base's loss, as no adapter changes anything
        for pair in trainable.layout.lora_pairs(trainable.flat.data):
            pair.b_OR.zero_()
    assert "down_proj.lora_B.default.weight has no effect" in families._same_gradients(
        base, trainable, families.plain_adapters(base, LORA, trainable)
    )


def test_tensors_in_other_pieces_are_seen():
    with tiny_base("olmoe") as base:
        assert families.gangs(base) == "stages 1, 2: stored in other pieces"
        base.plain().save_pretrained(base.model.base, save_original_format=False)
        assert families.gangs(base) == "yes"
        assert families.full_tuning(base) == "yes"


def test_all_linear_leaves_out_what_no_adapter_fits():
    for family, unfit in {
        "mamba": ["dt_proj", "out_proj"],
        "llama4_text": ["router"],
        "bamba": [],
        "llama2": [],
    }.items():
        with tiny_base(family) as base:
            assert unfit_layers(base.plain()) == unfit
    with tiny_base("mamba") as base, pytest.raises(RunError, match=r"targets names out_proj.*leave it out, or write"):
        base.trainable(Lora(targets=("in_proj", "out_proj")))


def test_rows_that_see_each_other_are_refused_in_lanes(base, monkeypatch):
    trainable = base.trainable(LORA)
    decoder = trainable.network.base_model.model.model
    layer = decoder.layers[1]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x, **more: forward(x + x.mean(0, keepdim=True), **more))
    with pytest.raises(RunError, match=r"see all tokens of a batch row by row, which .*layers\.1"):
        families._same_lanes(base, trainable)
