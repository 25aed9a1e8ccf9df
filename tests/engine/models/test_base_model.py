import os
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3nTextConfig,
    GPTJConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    Phi4MultimodalConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5Config,
    RwkvConfig,
)

from engine.config.adapters import FullTuning, Lora
from engine.config.sections import Model
from engine.models.base_model import causal_config, map_base, read_base
from engine.models.trainable import Trainable

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT sets it right for GPT-2
NAMES = ["tied", "untied", "gpt2"]
IDS_BT = torch.arange(24).view(2, 12)


@torch.no_grad()
def logits(network: torch.nn.Module) -> torch.Tensor:
    network.eval()
    out: torch.Tensor = network(input_ids=IDS_BT, use_cache=False).logits
    return out


def plain(base: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_mapped_model_is_the_loaded_one_bit_for_bit(bases: dict[str, Path], name: str, dtype: str) -> None:
    packed, buffer = read_base(Model(base=str(bases[name]), dtype=dtype))
    network = map_base(packed, torch.from_numpy(buffer))
    ours, theirs = logits(network), logits(plain(bases[name], getattr(torch, dtype)))
    assert ours.dtype == theirs.dtype == getattr(torch, dtype)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_views_into_the_buffer(bases: dict[str, Path], name: str) -> None:
    packed, buffer = read_base(Model(base=str(bases[name])))
    network = map_base(packed, torch.from_numpy(buffer))
    assert packed.nbytes == buffer.nbytes
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    for tensor_name, tensor in tensors.items():
        inside = tensor.data_ptr() - buffer.ctypes.data
        assert inside >= 0 and inside + tensor.nbytes <= buffer.nbytes, tensor_name
        assert inside % 64 == 0
        assert not tensor.requires_grad
    # Attributes that are no parameters either: nothing may be left without memory.
    for module in network.modules():
        assert not [key for key, value in vars(module).items() if isinstance(value, torch.Tensor) and value.is_meta]


@pytest.mark.parametrize("name", NAMES)
def test_tied_weights_take_their_bytes_once(bases: dict[str, Path], name: str) -> None:
    packed, buffer = read_base(Model(base=str(bases[name])))
    network = map_base(packed, torch.from_numpy(buffer))
    output, embedded = network.get_output_embeddings().weight, network.get_input_embeddings().weight
    assert (output.data_ptr() == embedded.data_ptr()) == (name != "untied")
    unique = [*dict(network.named_parameters()).values(), *dict(network.named_buffers()).values()]
    needed = sum(tensor.nbytes for tensor in unique)
    assert needed <= packed.nbytes < needed + 64 * len(unique)


def test_weights_that_a_configuration_calls_tied_and_that_are_two_stay_two(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = copytree(bases["tied"], tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    packed, buffer = read_base(Model(base=str(folder)))
    assert torch.equal(logits(map_base(packed, torch.from_numpy(buffer))), logits(plain(folder)))
    assert not torch.equal(logits(plain(folder)), logits(plain(bases["tied"])))


TINY = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
WITHOUT_SDPA: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "gemma2": (Gemma2Config, {"head_dim": 8, "num_key_value_heads": 1, "intermediate_size": 24}),
    "gpt_oss": (
        GptOssConfig,
        {"head_dim": 8, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "bloom": (BloomConfig, {}),
    "gptj": (GPTJConfig, {"n_positions": 32, "rotary_dim": 8, "intermediate_size": 24}),
}


@pytest.mark.parametrize("name", WITHOUT_SDPA)
def test_the_default_attention_is_one_that_the_model_has(name: str, tmp_path: Path) -> None:
    kind, keys = WITHOUT_SDPA[name]
    AutoModelForCausalLM.from_config(kind(num_hidden_layers=2, **TINY, **keys)).save_pretrained(tmp_path)
    packed, buffer = read_base(Model(base=str(tmp_path)))
    network = map_base(packed, torch.from_numpy(buffer))
    assert network.config._attn_implementation == "eager"
    assert torch.equal(logits(network), logits(plain(tmp_path)))
    for attention in ("sdpa", "flash_attention_2")[: 1 + (name == "bloom")]:
        refused = (
            rf'model\.attention is "{attention}", which \w+ForCausalLM does not have: leave it out, or take one of'
        )
        with pytest.raises(ValueError, match=refused):
            read_base(Model(base=str(tmp_path), attention=attention))


def test_where_the_model_has_sdpa_the_default_is_that(bases: dict[str, Path]) -> None:
    packed, buffer = read_base(Model(base=str(bases["tied"])))
    assert map_base(packed, torch.from_numpy(buffer)).config._attn_implementation == "sdpa"


def test_two_models_share_one_buffer(bases: dict[str, Path]) -> None:
    packed, buffer = read_base(Model(base=str(bases["tied"])))
    shared = torch.from_numpy(buffer)
    first, second = map_base(packed, shared), map_base(packed, shared)
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()


def test_no_folder_and_no_name_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent' is neither a folder with a config\.json nor"):
        read_base(Model(base=str(tmp_path / "absent")))
    with pytest.raises(ValueError, match="is neither a folder"):
        read_base(Model(base=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is neither a folder"):
        read_base(Model(base=str(tmp_path)))


def test_an_adapter_or_a_run_as_base_says_where_it_belongs(
    bases: dict[str, Path], make_trainable: Callable[..., Trainable], tmp_path: Path
) -> None:
    make_trainable(bases["tied"]).network.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "recipe.toml").touch()
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        refused = f"model.base '{folder}' is an adapter for the base '{bases['tied']}': set model.base to where that "
        with pytest.raises(ValueError, match=f"{refused}base is, and model.start to '{folder}'$"):
            read_base(Model(base=str(folder)))
    (tmp_path / "run" / "model" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"run' is the folder of a run: set model.base to its model, .*/run/model$"):
        read_base(Model(base=str(tmp_path / "run")))


def test_other_kinds_of_models_are_refused(tmp_path: Path) -> None:
    small = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(intermediate_size=8, **small)).save_pretrained(tmp_path / "bert")
    classifier = LlamaForSequenceClassification(LlamaConfig(intermediate_size=8, pad_token_id=0, **small))
    classifier.save_pretrained(tmp_path / "classifier")
    for folder, kind in (("bert", "BertForMaskedLM"), ("classifier", "LlamaForSequenceClassification")):
        with pytest.raises(ValueError, match=f"is a {kind}, not a causal language model"):
            read_base(Model(base=str(tmp_path / folder)))


def test_a_language_model_beside_a_vision_tower_is_refused(tmp_path: Path) -> None:
    Gemma3Config(architectures=["Gemma3ForConditionalGeneration"]).save_pretrained(tmp_path)
    refused = "is a Gemma3ForConditionalGeneration, which has a language model beside other parts: choose one whose"
    with pytest.raises(ValueError, match=refused):
        read_base(Model(base=str(tmp_path)))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            Gemma3Config(),
            "has vision_config beside the language model: choose a base of text alone",
        ),  # no architectures
        (Qwen3_5Config(architectures=["Qwen3_5ForCausalLM"]), "has vision_config beside"),
        (Phi4MultimodalConfig(architectures=["Phi4MultimodalForCausalLM"]), "has vision_config and audio_config"),
        (RwkvConfig(), r"writes to its own weights \(rescale_every in its config.json\).*: set it to 0 there"),
        (Gemma3nTextConfig(), "writes to its own weights .*: choose another base"),
    ],
    ids=["gemma3", "qwen3.5", "phi4", "rwkv", "gemma3n"],
)
def test_models_with_a_tower_or_that_write_to_their_weights_are_refused(
    tmp_path: Path, config: PreTrainedConfig, said: str
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        causal_config(Model(base=str(tmp_path)))


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"], ids=["absent", "empty", "other"])
def test_weights_that_cannot_be_read(bases: dict[str, Path], tmp_path: Path, content: bytes | None) -> None:
    folder = copytree(bases["tied"], tmp_path / "broken")
    path = folder / "model.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"the weights of model\.base .*broken' cannot be loaded"):
        read_base(Model(base=str(folder)))


class Runs:
    """Makes a folder as soon as it is read from a pickle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_pickled_base_is_read_as_weights_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = copytree(bases["untied"], tmp_path / "pickled")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    packed, buffer = read_base(Model(base=str(folder)))
    assert torch.equal(logits(map_base(packed, torch.from_numpy(buffer))), logits(plain(bases["untied"])))

    torch.save(weights | {"other": Runs(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"the weights of model\.base .*pickled' cannot be loaded"):
        read_base(Model(base=str(folder)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_a_base_in_several_files_in_a_folder_with_a_space(
    bases: dict[str, Path], tmp_path: Path, pickled: bool
) -> None:
    folder = copytree(bases["untied"], tmp_path / "my base", ignore=lambda *_: ["model.safetensors"])
    plain(bases["untied"]).save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    if pickled:
        index = folder / "model.safetensors.index.json"
        (folder / "pytorch_model.bin.index.json").write_text(index.read_text().replace(".safetensors", ".bin"))
        for shard in shards:
            torch.save(load_file(shard), shard.with_suffix(".bin"))
        for path in (index, *shards):
            path.unlink()
    packed, buffer = read_base(Model(base=str(folder)))
    assert torch.equal(logits(map_base(packed, torch.from_numpy(buffer))), logits(plain(bases["untied"])))


def test_weights_that_lack_a_tensor_are_not_drawn_at_random(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = copytree(bases["tied"], tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="q_proj"):
        read_base(Model(base=str(folder)))


def test_weights_of_another_shape(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = copytree(bases["tied"], tmp_path / "shapes")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"intermediate_size": 48', '"intermediate_size": 40'))
    with pytest.raises(ValueError, match="cannot be loaded"):
        read_base(Model(base=str(folder)))


@pytest.mark.parametrize(
    ("peft", "dtype"),
    [(Lora(r=4, alpha=8), "float32"), (Lora(r=4, alpha=8), "bfloat16"), (FullTuning(), "float32")],
    ids=["lora", "lora-on-bfloat16", "full"],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_lies_in_the_flat_vector(
    bases: dict[str, Path],
    make_trainable: Callable[..., Trainable],
    name: str,
    peft: Lora | FullTuning,
    dtype: str,
) -> None:
    trainable = make_trainable(bases[name], peft, dtype=dtype)
    trained = {n: p for n, p in trainable.network.named_parameters() if p.requires_grad}
    assert tuple(trained) == trainable.layout.names
    assert trainable.flat.dtype == torch.float32
    values, grads = trainable.layout.views(trainable.flat.data), trainable.layout.views(trainable.grad)
    trainable.network(input_ids=IDS_BT).logits.float().logsumexp(-1).sum().backward()
    for tensor_name, parameter in trained.items():
        assert parameter.data_ptr() == values[tensor_name].data_ptr()
        assert parameter.grad is not None and parameter.grad.data_ptr() == grads[tensor_name].data_ptr()
    assert trainable.flat.grad is trainable.grad
    # A LoRA's A learns nothing as long as its B is zero; all else does.
    for tensor_name, grad in grads.items():
        assert bool(grad.any()) != (".lora_A." in tensor_name), tensor_name


def test_full_tuning_starts_as_the_base_and_holds_tied_weights_once(
    bases: dict[str, Path], make_trainable: Callable[..., Trainable]
) -> None:
    for name in NAMES:
        trainable, base = make_trainable(bases[name], FullTuning()), plain(bases[name])
        assert trainable.layout.size == base.num_parameters()
        assert torch.equal(logits(trainable.network), logits(base))
    sizes = {name: make_trainable(bases[name], FullTuning()).layout.size for name in ("tied", "untied")}
    assert sizes["untied"] - sizes["tied"] == 300 * 32
    trainable = make_trainable(bases["tied"], FullTuning())
    with torch.no_grad():
        trainable.layout.views(trainable.flat.data)["model.embed_tokens.weight"].zero_()
    assert not logits(trainable.network).any(), "the output layer is the same matrix"


@pytest.mark.parametrize("name", NAMES)
def test_adapters_change_nothing_at_first(
    bases: dict[str, Path], make_trainable: Callable[..., Trainable], name: str
) -> None:
    trainable = make_trainable(bases[name])
    pairs = list(trainable.layout.lora_pairs(trainable.flat.data))
    assert len(pairs) == len(trainable.layout.names) // 2 >= 8
    assert all(pair.a_RI.any() and not (pair.b_OR @ pair.a_RI).any() for pair in pairs)
    assert {pair.scale for pair in pairs} == {2.0}
    assert torch.equal(logits(trainable.network), logits(plain(bases[name])))


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_is_the_change_of_its_layer(
    bases: dict[str, Path], make_trainable: Callable[..., Trainable], name: str
) -> None:
    trainable = make_trainable(bases[name])
    with torch.no_grad():
        trainable.flat.normal_(generator=torch.Generator().manual_seed(1))
    pairs = list(trainable.layout.lora_pairs(trainable.flat.data))
    changes = {pair.name: pair.scale * pair.b_OR @ pair.a_RI for pair in pairs}
    assert isinstance(trainable.network, PeftModel)
    for layer, change_OI in changes.items():
        module = trainable.network.get_submodule(layer)
        torch.testing.assert_close(module.get_delta_weight("default"), change_OI.T if name == "gpt2" else change_OI)


def test_the_initial_vector_depends_on_the_seed_alone(
    bases: dict[str, Path], make_trainable: Callable[..., Trainable]
) -> None:
    torch.manual_seed(1)
    first = make_trainable(bases["tied"], seed=3)
    torch.manual_seed(2)
    same, other = make_trainable(bases["tied"], seed=3), make_trainable(bases["tied"], seed=4)
    assert torch.equal(first.initial, same.initial)
    assert not torch.equal(first.initial, other.initial)
    with torch.no_grad():
        first.flat.zero_()
    assert first.initial.any(), "the initial vector is a copy"


def test_targets_may_be_named(bases: dict[str, Path], make_trainable: Callable[..., Trainable]) -> None:
    trainable = make_trainable(bases["tied"], Lora(targets=("q_proj",)))
    assert [pair.name.rsplit(".")[-1] for pair in trainable.layout.lora_pairs(trainable.flat.data)] == ["q_proj"] * 2


def test_targets_that_match_nothing(bases: dict[str, Path], make_trainable: Callable[..., Trainable]) -> None:
    with pytest.raises(ValueError, match=r"model\.peft\.targets .*'query'.* matches no layer .*down_proj, .*q_proj"):
        make_trainable(bases["tied"], Lora(targets=("query",)))
    with pytest.raises(ValueError, match=r"linear layers are .*c_attn"):
        make_trainable(bases["gpt2"], Lora(targets=("query",)))


def test_a_fault_elsewhere_in_peft_is_not_blamed_on_the_targets(
    bases: dict[str, Path], make_trainable: Callable[..., Trainable]
) -> None:
    with pytest.raises(ValueError, match="dropout"):
        make_trainable(bases["tied"], Lora(dropout=1.5))
