import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from engine.config.adapters import FullTuning, Lora
from engine.config.sections import Model
from engine.models.export import export_files
from engine.models.trainable import Trainable
from engine.system.atomic import write_folder

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT sets it right for GPT-2
IDS_BT = torch.arange(24).view(2, 12)


@torch.no_grad()
def logits(network: torch.nn.Module) -> torch.Tensor:
    out: torch.Tensor = network.eval()(input_ids=IDS_BT, use_cache=False).logits
    return out


def exported(trainable: Trainable, model: Model, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    with torch.no_grad():
        trainable.flat.add_(0.05 * torch.randn(trainable.layout.size, generator=torch.Generator().manual_seed(1)))
    folder.mkdir()
    for name, content in export_files(trainable, model, tokenizer, "# a card").items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("tied", "all-linear"),
        ("tied", ("q_proj", "v_proj")),
        ("untied", "all-linear"),
        ("gpt2", "all-linear"),
        ("gpt2", ("c_attn",)),
        ("tied", ("embed_tokens", "q_proj")),
        ("gpt2", ("wte", "c_attn")),
    ],
)
def test_an_adapter_is_what_peft_loads(
    bases: dict[str, Path],
    make_trainable: Callable[..., Trainable],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    name: str,
    targets: str | tuple[str, ...],
) -> None:
    peft = Lora(r=4, alpha=8, targets=targets)
    trainable, model = make_trainable(bases[name], peft), Model(base=str(bases[name]), peft=peft)
    base = AutoModelForCausalLM.from_pretrained(bases[name])
    folder = exported(trainable, model, tokenizer, tmp_path / "model")
    plain = logits(base)
    loaded = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(logits(loaded), logits(trainable.network), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(loaded), plain, atol=1e-3), "the adapter has changed something"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["inference_mode"], config["r"]) == (bases[name].name, True, 4)
    assert (folder / "README.md").read_text() == "# a card"
    assert AutoTokenizer.from_pretrained(folder)("the end")["input_ids"] == tokenizer("the end")["input_ids"]


def test_a_tokenizer_with_several_chat_templates_is_written_whole(
    bases: dict[str, Path], make_trainable: Callable[..., Trainable], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    several = deepcopy(tokenizer)
    several.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    model = Model(base=str(bases["tied"]), peft=Lora(r=4, alpha=8))
    files = export_files(make_trainable(bases["tied"]), model, several, "card")
    write_folder(tmp_path / "model", files.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == several.chat_template


@pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])
def test_a_fully_tuned_model_is_what_transformers_loads(
    bases: dict[str, Path],
    make_trainable: Callable[..., Trainable],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    name: str,
) -> None:
    trainable = make_trainable(bases[name], FullTuning())
    model = Model(base=str(bases[name]), peft=FullTuning())
    folder = exported(trainable, model, tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(trainable.network), rtol=0, atol=1e-6)
    tied = loaded.get_input_embeddings().weight.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()
    assert tied == (name != "untied")
    assert not list(folder.glob("adapter*"))


def test_exporting_changes_nothing(
    bases: dict[str, Path], make_trainable: Callable[..., Trainable], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = Model(base=str(bases["tied"]), peft=Lora(r=4, alpha=8))
    trainable = make_trainable(bases["tied"])
    before = logits(trainable.network)
    first = export_files(trainable, model, tokenizer, "card")
    assert (
        first["adapter_model.safetensors"]
        == export_files(trainable, model, tokenizer, "card")["adapter_model.safetensors"]
    )
    assert torch.equal(logits(trainable.network), before)
    assert trainable.flat.data_ptr() == next(iter(trainable.layout.views(trainable.flat.data).values())).data_ptr()
