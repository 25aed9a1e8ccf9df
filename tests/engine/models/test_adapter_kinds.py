"""Every kind of adapter against plain PEFT on a plain model: loss, gradients, and the folder that is exported."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from engine.config.adapters import IA3, Adapters, LNTuning, Lora, Oft, Vera
from engine.config.sections import Model
from engine.messages.errors import RunError
from engine.models.adapters import peft_config
from engine.models.export import export_files, sharded_files
from engine.models.start import adapter_start
from engine.models.trainable import Trainable
from engine.objectives.sft import Sft
from engine.objectives.token_batch import token_losses

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False", "ignore:Setting fan_in_fan_out")
MakeTrainable = Callable[..., Trainable]
LORA = Lora(r=4, alpha=8)
KINDS: dict[str, tuple[str, Adapters]] = {
    "rslora": ("tied", replace(LORA, use_rslora=True)),
    "dora": ("untied", replace(LORA, use_dora=True)),
    "dora of transposed weights": ("gpt2", replace(LORA, use_dora=True)),
    "patterns": ("tied", replace(LORA, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3})),
    "one layer": ("tied", replace(LORA, targets=("q_proj", "up_proj"), layers_to_transform=(1,))),
    "expression": ("tied", replace(LORA, targets=r".*\.(q_proj|up_proj)")),
    "gaussian": ("tied", replace(LORA, init_lora_weights="gaussian")),
    "biases": ("gpt2", replace(LORA, bias="all")),
    "biases of adapted layers": ("gpt2", replace(LORA, bias="lora_only", targets=("c_attn",))),
    "a saved head": ("untied", replace(LORA, modules_to_save=("lm_head",))),
    "ia3": ("tied", IA3()),
    "ia3 by name": ("gpt2", IA3(targets=("c_attn", "c_fc"), feedforward_modules=("c_fc",))),
    "vera": ("tied", Vera(r=4)),
    "vera without its matrices": ("tied", Vera(r=4, save_projection=False)),
    "ln_tuning": ("tied", LNTuning()),
    "oft": ("tied", Oft(oft_block_size=4)),
}


def moved(make_trainable: MakeTrainable, base: Path, peft: Adapters) -> Trainable:
    """An adapter that is away from its start, where half of most gradients is zero."""
    trainable = make_trainable(base, peft)
    with torch.no_grad():
        trainable.flat.add_(0.05 * torch.randn(trainable.layout.size, generator=torch.Generator().manual_seed(1)))
    return trainable


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_are_those_of_plain_peft(
    bases: dict[str, Path], make_trainable: MakeTrainable, rows: pa.RecordBatch, name: str
) -> None:
    base, peft = KINDS[name]
    trainable, batch = moved(make_trainable, bases[base], peft), Sft().collate(rows, 0)
    network: Any = AutoModelForCausalLM.from_pretrained(bases[base])
    network = get_peft_model(network, peft_config(Model(base=str(bases[base]), peft=peft)))
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert tuple(trained) == trainable.layout.names
    for parameter, values in zip(
        trained.values(), trainable.layout.views(trainable.flat.detach()).values(), strict=True
    ):
        parameter.data.copy_(values)
    losses = []
    for each in (trainable.network, network):
        loss = token_losses(each.eval(), batch).sum()
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    grads = trainable.layout.views(trainable.grad)
    assert all(grad.abs().max() > 0 for grad in grads.values())
    for key, parameter in trained.items():
        torch.testing.assert_close(grads[key], parameter.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_shards", [False, True], ids=["whole", "in shards"])
@pytest.mark.parametrize("name", KINDS)
def test_plain_peft_loads_what_is_exported(
    bases: dict[str, Path],
    make_trainable: MakeTrainable,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    name: str,
    in_shards: bool,
) -> None:
    base, peft = KINDS[name]
    trainable, model = moved(make_trainable, bases[base], peft), Model(base=str(bases[base]), peft=peft)
    flat = trainable.flat.detach()
    read = lambda first, last: flat[first:last].clone()  # noqa: E731
    if in_shards:
        files = dict(sharded_files(trainable.network, trainable.layout, read, model, tokenizer, "card"))
    else:
        files = export_files(trainable, model, tokenizer, "card")
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    start = adapter_start(replace(model, start=str(tmp_path)), trainable.layout)
    assert start is not None and torch.equal(start, flat.cpu())
    names = json.loads((tmp_path / "adapter_config.json").read_text()).get("target_modules") or []
    assert isinstance(names, str) or names == sorted(names)  # the same bytes from any process
    plain: Any = AutoModelForCausalLM.from_pretrained(bases[base])
    ids_BT = torch.arange(24).view(2, 12)
    with torch.no_grad():
        before = plain.eval()(input_ids=ids_BT).logits
        loaded = PeftModel.from_pretrained(plain, tmp_path).eval()(input_ids=ids_BT).logits
        expected = trainable.network.eval()(input_ids=ids_BT).logits
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-5)
    assert (loaded - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("peft", "sentence"),
    [
        (Lora(targets=("q_proj", "qkv_proj")), r"targets: 'qkv_proj' matches no layer .* are down_proj, gate_proj"),
        (Lora(targets=("nothing",)), r"targets \['nothing'\] matches no layer of .*all-linear"),
        (Lora(targets="q_proj"), r'is text, and so a regular expression .* write a list, such as \["q_proj"\]'),
        (Lora(targets="*_proj"), r"'\*_proj' is no regular expression \(nothing to repeat"),
        (Lora(targets="["), r"is no regular expression \(unterminated"),
        (Lora(targets=("q_proj",), layers_to_transform=(7,)), r"in the layers \[7\] \(layers_to_transform\)"),
        (Lora(rank_pattern={"nothing": 2}), r"rank_pattern: 'nothing' matches no layer"),
        (Lora(alpha_pattern={"nothing": 2}), r"alpha_pattern: 'nothing' matches no layer"),
        (Lora(modules_to_save=("nothing",)), r"modules_to_save: 'nothing' matches no layer"),
        (Lora(target_parameters=("experts.nothing",)), r"target_parameters: 'experts.nothing' matches no parameter"),
        (IA3(targets=("q_proj",), feedforward_modules=("up_proj",)), r"of kind 'ia3' cannot be added to .*subset"),
    ],
)
def test_what_matches_nothing_is_a_sentence(
    bases: dict[str, Path], make_trainable: MakeTrainable, peft: Adapters, sentence: str
) -> None:
    with pytest.raises(RunError, match=sentence) as raised:
        make_trainable(bases["untied"], peft)
    assert "\n" not in str(raised.value)
