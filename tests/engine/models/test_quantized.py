"""Quantized bases against plain transformers and PEFT: loss, gradients, the shared buffer, and the exported folder."""

import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from engine.config.adapters import IA3, Adapters, FullTuning, LNTuning, Lora, Oft, Vera
from engine.config.federation import Federation
from engine.config.quantize import BitsAndBytes, Quantize, TorchAo
from engine.config.sections import Clients, Model, Zero
from engine.config.train import AdamW, Train
from engine.messages.errors import RunError
from engine.models.adapters import peft_config
from engine.models.base_model import PackedBase, map_base, read_base
from engine.models.export import export_files
from engine.models.quantized import quantization_config
from engine.models.trainable import Trainable
from engine.objectives.sft import Sft
from engine.objectives.token_batch import token_losses
from engine.system.page_protection import protect, release
from engine.training.lanes import LaneTrainer
from engine.training.local_training import Job, LocalTrainer
from experiments.runs.api import run
from strategies.lora.products import Flora

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False", "ignore:Setting fan_in_fan_out")
LORA, NF4 = Lora(r=4, alpha=8), BitsAndBytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")
DOUBLE, EIGHT, TORCHAO = replace(NF4, bnb_4bit_use_double_quant=True), BitsAndBytes(load_in_8bit=True), TorchAo()
KINDS: dict[str, tuple[str, Quantize, Adapters]] = {
    "nf4": ("untied", NF4, LORA),
    "nf4 with quantized scales": ("tied", DOUBLE, LORA),
    "fp4 in bfloat16": ("tied", BitsAndBytes(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16"), LORA),
    "nf4 of transposed weights": ("gpt2", NF4, LORA),
    "8 bits": ("tied", EIGHT, LORA),
    "torchao": ("tied", TORCHAO, LORA),
    "torchao in float8": ("untied", TorchAo(quant_type="Float8WeightOnlyConfig"), LORA),
    "dora": ("tied", NF4, replace(LORA, use_dora=True)),
    "ia3": ("tied", NF4, IA3()),
    "vera": ("tied", NF4, Vera(r=4)),
    "oft": ("tied", NF4, Oft(oft_block_size=4)),
    "norms": ("tied", NF4, LNTuning()),
    "dora on torchao": ("tied", TORCHAO, replace(LORA, use_dora=True)),
    "ia3 on 8 bits": ("tied", EIGHT, IA3()),
    "vera on torchao": ("tied", TORCHAO, Vera(r=4)),
    "oft on 8 bits": ("tied", EIGHT, Oft(oft_block_size=4)),
    "a saved head": ("untied", NF4, replace(LORA, modules_to_save=("lm_head",))),
}
IDS_BT = torch.arange(24).view(2, 12)


def need(quantize: Quantize) -> None:
    """Skips a test whose library is not installed."""
    pytest.importorskip(quantize.kind)


def mapped(model: Model) -> tuple[Any, PackedBase, np.ndarray]:
    """The network as another process maps it."""
    packed, buffer = read_base(model)
    return map_base(pickle.loads(pickle.dumps(packed)), torch.from_numpy(buffer)), packed, buffer


def moved(network: Any, model: Model) -> Trainable:
    """An adapter that is away from its start, where half of most gradients is zero."""
    trainable = Trainable(network, model, 3)
    with torch.no_grad():
        trainable.flat.add_(0.05 * torch.randn(trainable.layout.size, generator=torch.Generator().manual_seed(1)))
    return trainable


def plain_quantized(model: Model) -> Any:
    """The base as transformers quantizes it, in the order of its own weights also where no gradient is asked for."""
    config = quantization_config(model.quantize)
    network = AutoModelForCausalLM.from_pretrained(model.base, quantization_config=config, device_map={"": "cpu"})
    for layer in network.modules():
        if "support_avx512bf16_for_cpu" in vars(layer):
            layer.support_avx512bf16_for_cpu = False
    return network.requires_grad_(False)


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_are_those_of_plain_peft(bases: dict[str, Path], rows: pa.RecordBatch, name: str) -> None:
    base, quantize, peft = KINDS[name]
    need(quantize)
    model, batch = Model(base=str(bases[base]), quantize=quantize, peft=peft), Sft().collate(rows, 0)
    trainable = moved(mapped(model)[0], model)
    network = get_peft_model(plain_quantized(model), peft_config(model))
    trained = {key: p for key, p in network.named_parameters() if p.requires_grad}
    assert tuple(trained) == trainable.layout.names
    values = trainable.layout.views(trainable.flat.detach())
    for key, parameter in trained.items():
        parameter.data.copy_(values[key])
    losses = []
    for each in (trainable.network, network):
        loss = token_losses(each.eval() if base == "gpt2" else each.train(), batch).sum()  # GPT-2 drops activations
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    grads = trainable.layout.views(trainable.grad)
    assert all(grad.abs().max() > 0 for grad in grads.values())
    for key, parameter in trained.items():
        torch.testing.assert_close(grads[key], parameter.grad, rtol=1e-5, atol=1e-5)


def tensors_of(network: Any) -> dict[str, torch.Tensor]:
    """All tensors of a network, also those inside quantized weights."""
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    for name, tensor in list(tensors.items()):
        if (state := vars(tensor).get("quant_state")) is not None:
            tensors |= {f"{name}.absmax": state.absmax, f"{name}.code": state.code}
            tensors |= {} if state.state2 is None else {f"{name}.nested": state.state2.absmax}
        if (scale := vars(tensor).get("SCB")) is not None:
            tensors[f"{name}.SCB"] = scale
        if hasattr(tensor, "__tensor_flatten__"):
            parts, _ = tensors.pop(name).__tensor_flatten__()
            tensors |= {f"{name}.{part}": getattr(tensor, part) for part in parts}
    return tensors


@pytest.mark.parametrize(("quantize", "inside"), [(NF4, 2), (DOUBLE, 3), (EIGHT, 1), (TORCHAO, 2)])
def test_processes_share_the_quantized_weights_and_write_none(
    bases: dict[str, Path], rows: pa.RecordBatch, quantize: Quantize, inside: int
) -> None:
    """Evaluation is what bitsandbytes has an order of its own for, on processors with bfloat16."""
    need(quantize)
    model, batch = Model(base=str(bases["untied"]), quantize=quantize, peft=LORA), Sft().collate(rows, 0)
    network, packed, buffer = mapped(model)
    tensors = tensors_of(network)
    assert len(tensors) == len(dict(network.named_parameters()) | dict(network.named_buffers())) + 14 * inside
    trainable, frozen = moved(network, model), buffer.copy()
    protect(buffer)  # a write would end this process
    try:
        token_losses(trainable.network.train(), batch).sum().backward()
        with torch.no_grad():
            losses = [token_losses(trainable.network.eval(), batch).sum() for _ in range(2)]
        for name, tensor in (tensors | tensors_of(map_base(packed, torch.from_numpy(buffer)))).items():
            assert 0 <= tensor.data_ptr() - buffer.ctypes.data <= buffer.nbytes - tensor.nbytes, name
        ours = {key: value for key, value in tensors_of(network).items() if ".lora_" not in key}
        for name, tensor in ours.items():
            assert 0 <= tensor.data_ptr() - buffer.ctypes.data <= buffer.nbytes - tensor.nbytes, name
    finally:
        release(buffer)
    assert torch.equal(*losses) and (buffer == frozen).all()


def test_a_layer_takes_half_a_byte_a_weight_and_its_scales(bases: dict[str, Path]) -> None:
    need(NF4)
    _, packed, _ = mapped(Model(base=str(bases["untied"]), quantize=NF4))
    name = "model.layers.0.mlp.up_proj.weight"  # 48 times 32
    assert packed.index[name].shape == (768, 1) and packed.index[name].dtype == "uint8"
    assert packed.index[f"{name}.absmax"].shape == (24,)  # blocks of 64 weights
    assert packed.index["lm_head.weight"].dtype == "float32"
    _, other, _ = mapped(Model(base=str(bases["untied"]), quantize=replace(NF4, llm_int8_skip_modules=("up_proj",))))
    assert other.index[name].shape == (48, 32) and other.index["lm_head.weight"].dtype == "uint8"


@pytest.mark.parametrize("quantize", [NF4, EIGHT, TORCHAO])
@pytest.mark.parametrize("peft", [LORA, IA3()])
def test_a_client_in_lanes_is_the_client_alone(
    federation: Federation, rows: pa.RecordBatch, quantize: Quantize, peft: Adapters
) -> None:
    """LLM.int8() too, on a CPU; recipes leave it out of lanes, since on a GPU its columns are those of all lanes."""
    need(quantize)
    model = replace(federation.model, quantize=quantize, peft=peft)
    federation = replace(federation, model=model, train=Train(steps=3, batch=2, optimizer=AdamW(lr=1e-2, eps=1e-4)))
    trainable = moved(mapped(model)[0], model)
    alone = LocalTrainer(trainable, 0, federation.train)
    lanes = LaneTrainer(alone, 3, federation.train)
    state = federation.strategy.init(trainable.flat.detach().clone(), trainable.layout)
    broadcast = replace(federation.strategy.broadcast(state), layout=trainable.layout)
    jobs = [Job(client, rows.slice(client, 2 + client % 2), 0.5, broadcast, {}) for client in range(3)]
    expected = [alone.updates([job], federation)[0][0] for job in jobs]
    for (update, _), single in zip(lanes.updates(jobs, federation), expected, strict=True):
        assert single.delta.abs().max() > 1e-2
        torch.testing.assert_close(update.delta, single.delta, rtol=0, atol=1e-5)


def test_the_exported_adapter_loads_on_the_base_quantized_or_not(
    bases: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    need(NF4)
    model = Model(base=str(bases["tied"]), quantize=NF4, peft=LORA)
    trainable = moved(mapped(model)[0], model)
    for name, content in export_files(trainable, model, tokenizer, "card").items():
        (tmp_path / name).write_bytes(content)
    whole = moved(mapped(replace(model, quantize=None))[0], replace(model, quantize=None))
    whole.flat.data.copy_(trainable.flat.data)
    plain = AutoModelForCausalLM.from_pretrained(model.base)
    for ours, base in ((trainable, plain_quantized(model)), (whole, plain)):
        theirs = PeftModel.from_pretrained(base, tmp_path)
        logits = [each.eval()(input_ids=IDS_BT, use_cache=False).logits for each in (ours.network, theirs)]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft": FullTuning()}, "trains all weights, which model.quantize holds in few bits: train adapters"),
        ({"peft": replace(LORA, bias="all")}, "leave it, or model.quantize, out"),
        ({"strategy": Flora()}, 'adds to the base\'s weights, .* leaves the base as it is, such as "ffa"'),
        ({"clients": Clients(zero=Zero())}, "model.quantize does not work with gangs"),
        ({"clients": Clients(lanes=2), "quantize": EIGHT}, "load_in_8bit does not work with several lanes"),
        ({"clients": Clients(lanes=2), "peft": replace(LORA, use_dora=True)}, "use_dora with model.quantize does not"),
    ],
)
def test_what_needs_whole_weights_is_refused(federation: Federation, changes: dict[str, Any], said: str) -> None:
    of_model = {key: changes[key] for key in ("peft", "quantize") if key in changes}
    others = {key: value for key, value in changes.items() if key not in of_model}
    with pytest.raises(RunError, match=said):
        replace(federation, model=replace(federation.model, **({"quantize": NF4} | of_model)), **others)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (BitsAndBytes, "set one of load_in_4bit and load_in_8bit to true"),
        (lambda: replace(NF4, load_in_8bit=True), "set one of load_in_4bit and load_in_8bit to true"),
        (lambda: replace(EIGHT, bnb_4bit_quant_type="nf4"), "bnb_4bit_quant_type means nothing with load_in_8bit"),
        (lambda: replace(NF4, llm_int8_threshold=3.0), "llm_int8_threshold means nothing with load_in_4bit"),
        (lambda: TorchAo(quant_type="Int4WeightOnlyConfig"), 'for 4 bits kind = "bitsandbytes"'),
    ],
)
def test_keys_that_do_not_go_together_are_refused(make: Callable[[], Quantize], said: str) -> None:
    with pytest.raises(RunError, match=said):
        make()


@pytest.mark.parametrize("quantize", [NF4, TORCHAO])
def test_a_missing_library_is_named_with_the_extra(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, quantize: Quantize
) -> None:
    monkeypatch.setitem(sys.modules, quantize.kind, None)
    with pytest.raises(RunError, match=rf'not installed: pip install "fedpost\[{quantize.kind}\]"'):
        read_base(Model(base=str(bases["tied"]), quantize=quantize))


def test_a_base_that_is_quantized_already_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    need(NF4)
    plain_quantized(Model(base=str(bases["untied"]), quantize=NF4)).save_pretrained(tmp_path)
    for quantize in (None, NF4):
        with pytest.raises(RunError, match=r"are quantized already: set model\.base to the model that they were made"):
            read_base(Model(base=str(tmp_path), quantize=quantize))


def test_a_head_that_is_the_embeddings_too_is_not_quantized(bases: dict[str, Path]) -> None:
    need(NF4)
    with pytest.raises(RunError, match="cannot quantize lm_head, whose weight is the embeddings' too"):
        read_base(Model(base=str(bases["tied"]), quantize=replace(NF4, llm_int8_skip_modules=("up_proj",))))


@pytest.mark.parametrize(
    ("peft", "key"),
    [
        (replace(LORA, modules_to_save=("mlp",)), "modules_to_save: the weights of 'mlp'"),
        (replace(LORA, target_parameters=("q_proj.weight",)), r"target_parameters: the weights of 'q_proj\.weight'"),
    ],
)
@pytest.mark.parametrize("quantize", [NF4, TORCHAO])
def test_quantized_weights_are_not_trained_themselves(
    bases: dict[str, Path], quantize: Quantize, peft: Adapters, key: str
) -> None:
    need(quantize)
    model = Model(base=str(bases["tied"]), quantize=quantize, peft=peft)
    with pytest.raises(RunError, match=f"{key} are quantized .*: leave it out, or name it among"):
        Trainable(mapped(model)[0], model, 3)


@pytest.mark.slow
def test_a_run_on_a_quantized_base(request: Any, small_recipe: Any, tmp_path: Path, full: bool) -> None:
    """Of two slots one reads and quantizes; one slot alone gives the same bits. The manifest has the version."""
    need(NF4)
    if not full:
        pytest.skip("runs twice: run with --full")
    request.getfixturevalue("ray_session")
    recipe = small_recipe('model.quantize={kind="bitsandbytes", load_in_4bit=true}', "clients.slots=2", "rounds=2")
    first = run(recipe, out=tmp_path / "run")
    manifest = json.loads((first.folder / "manifest.json").read_text())
    assert manifest["versions"]["bitsandbytes"] and (first.model / "adapter_config.json").exists()
    other = run(small_recipe('model.quantize={kind="bitsandbytes", load_in_4bit=true}', "rounds=2"), out=tmp_path / "b")
    weights = [(each.model / "adapter_model.safetensors").read_bytes() for each in (first, other)]
    assert weights[0] == weights[1]


def test_layers_whose_weights_are_read_past_them_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"hidden_size": 64, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 64}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(tmp_path)
    model = Model(base=str(tmp_path), quantize=BitsAndBytes(load_in_4bit=True), attention="eager")
    with pytest.raises(RunError, match=r"cannot quantize dt_proj, whose weight the model reads past"):
        read_base(model)
    skipped = BitsAndBytes(load_in_4bit=True, llm_int8_skip_modules=("dt_proj", "lm_head"))
    read_base(replace(model, quantize=skipped))
