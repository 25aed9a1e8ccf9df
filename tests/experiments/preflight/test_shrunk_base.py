"""Every known family, shrunk: the architecture that it was, and a model that trains."""

import json

import pytest
import torch

from engine.config.adapters import Lora
from engine.config.sections import Model
from engine.models.adapters import with_adapters
from experiments.config.recipe import RECIPES, load_recipe
from experiments.preflight.shrunk_base import FAMILIES, base_config, family_keys, stand_in_tokenizer, write_base
from experiments.preflight.shrunk_config import shrunk

NAMES = {
    "meta-llama/Llama-2-70b-hf": "llama2",
    "meta-llama/Llama-3.3-70B-Instruct": "llama3",
    "Qwen/Qwen2.5-0.5B": "qwen2",
    "Qwen/Qwen3-32B": "qwen3",
    "Qwen/Qwen3-30B-A3B": "qwen3_moe",
    "mistralai/Mistral-7B-v0.1": "mistral",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral",
    "google/gemma-2b": "gemma",
    "google/gemma-2-9b-it": "gemma2",
    "google/gemma-3-1b-it": "gemma3",
    "microsoft/phi-2": "phi",
    "microsoft/Phi-4-mini-instruct": "phi3",
    "openai-community/gpt2-xl": "gpt2",
    "EleutherAI/pythia-6.9b-deduped": "gpt_neox",
    "allenai/OLMo-2-1124-7B": "olmo2",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2",
    "HuggingFaceTB/SmolLM3-3B": "smollm3",
    "tiiuae/falcon-40b": "falcon",
    "tiiuae/Falcon3-7B-Base": "falcon3",
}


@pytest.fixture(scope="module")
def tokenizer():
    return stand_in_tokenizer()


def test_each_family_has_a_name_here_and_is_found_by_it_alone():
    assert sorted(NAMES.values()) == sorted(file.stem for file in FAMILIES.glob("*.json"))
    for name, family in NAMES.items():
        kept = json.loads((FAMILIES / f"{family}.json").read_text())["config"]
        assert family_keys(name)["model_type"] == kept["model_type"]
        assert family_keys(name).keys() >= kept.keys()
    for name in ("Qwen/Qwen2.5-VL-7B-Instruct", "google/gemma-3-27b-it", "microsoft/phi-4-multimodal", "my/model"):
        assert family_keys(name) is None


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("name", NAMES)
def test_a_shrunk_family_is_small_and_trains_a_step(tokenizer, name):
    from transformers import AutoModelForCausalLM

    model = Model(base=name, peft=Lora(r=2))
    small = shrunk(base_config(model), tokenizer)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    assert [type(network).__name__] == small.architectures
    assert network.num_parameters() < 8e6
    network.name_or_path = name  # peft warns of others
    network = with_adapters(network, model)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(48).view(2, 24)
    before = network(input_ids=ids, labels=ids).loss
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = network(input_ids=ids, labels=ids).loss
    assert after < before


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("meta-llama/Llama-3.1-70B", {"heads": 8, "tied": False, "ff": 3.5, "wide": 1.0}),
        ("meta-llama/Llama-3.2-1B", {"heads": 4, "tied": True, "ff": 4.0, "wide": 1.0}),
        ("Qwen/Qwen2.5-0.5B", {"heads": 7, "tied": True, "ff": 4864 / 896, "wide": 1.0}),
        ("Qwen/Qwen3-32B", {"heads": 8, "tied": False, "ff": 5.0, "wide": 0.625}),
        ("google/gemma-2b", {"heads": 8, "tied": True, "ff": 8.0, "wide": 1.0}),
    ],
)
def test_ratios_are_kept(tokenizer, name, kept):
    small = shrunk(base_config(Model(base=name)), tokenizer)
    head = small.to_dict().get("head_dim") or small.hidden_size // small.num_attention_heads
    ratios = {
        "heads": small.num_attention_heads // small.num_key_value_heads,
        "tied": small.tie_word_embeddings,
        "ff": small.intermediate_size / small.hidden_size,
        "wide": small.hidden_size / (small.num_attention_heads * head),
    }
    assert ratios == {"heads": kept["heads"], "tied": kept["tied"]} | {
        key: pytest.approx(kept[key], rel=0.05) for key in ("ff", "wide")
    }


def test_each_kind_of_layer_is_kept(tokenizer):
    gemma = shrunk(base_config(Model(base="google/gemma-3-1b-it")), tokenizer)
    assert gemma.layer_types == ["sliding_attention", "full_attention"]
    smol = shrunk(base_config(Model(base="HuggingFaceTB/SmolLM3-3B")), tokenizer)
    assert smol.no_rope_layers == [1, 0]


def test_a_folder_is_read_for_its_configuration_alone(tokenizer, tmp_path):
    config = base_config(Model(base="mistralai/Mixtral-8x22B-v0.1"))
    config.save_pretrained(tmp_path / "large")
    config = base_config(Model(base=str(tmp_path / "large")))
    assert (config.num_hidden_layers, config.hidden_size, config.num_local_experts) == (56, 6144, 8)
    write_base(shrunk(config, tokenizer), tokenizer, tmp_path / "small")
    again = base_config(Model(base=str(tmp_path / "small")))
    assert (again.num_hidden_layers, again.num_local_experts, again.vocab_size) == (2, 4, len(tokenizer))
    assert sum(file.stat().st_size for file in (tmp_path / "small").iterdir()) < 30e6


@pytest.mark.parametrize("name", ["my/own-model", "../models/llama-3-8b", "/models/llama-3-8b"])
def test_a_base_of_which_nothing_is_known_is_refused_with_the_way_out(name):
    with pytest.raises(ValueError, match=r"is not a folder.*save its config.json in a folder"):
        base_config(Model(base=name))


def test_the_shipped_recipes_have_bases_that_can_be_shrunk(tokenizer):
    from experiments.config.recipe import located

    for file in {*RECIPES.glob("*.toml")} - {RECIPES / "access.toml"}:
        assert shrunk(base_config(located(load_recipe(file)).model), tokenizer).num_hidden_layers >= 2
