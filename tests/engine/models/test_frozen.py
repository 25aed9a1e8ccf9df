"""Frozen models: an adapter is merged into its base, weights stay in the buffer, and what cannot serve is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from datasets_partition.core.turns import conversation_of
from engine.config.adapters import FullTuning, Lora
from engine.config.sections import Model
from engine.messages.errors import RunError
from engine.messages.frozen import FrozenModel
from engine.models.base_model import map_base, read_base
from engine.models.export import export_files
from engine.models.frozen import Scorer, map_frozen, read_frozen
from engine.models.trainable import Trainable
from engine.objectives.reward import Reward
from engine.objectives.reward import scores as scores_of

IDS_BT = torch.arange(24).view(2, 12)
PROMPTS, ANSWERS = ["say the", "one and ", ""], ["cat", "two three four", "and the hat"]
TEMPLATE = "{% for turn in messages %}{{ turn.role + ':' + turn.content }}\n{% endfor %}"


@pytest.fixture
def saved(
    bases: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., tuple[Path, Trainable]]:
    """Exports a model with moved weights, as a run does; gives its folder and the model."""

    def made(peft: Lora | FullTuning, *, scores: bool) -> tuple[Path, Trainable]:
        model = Model(base=str(bases["tied"]), peft=peft)
        packed, buffer = read_base(model, scores=scores)
        trainable = Trainable(map_base(packed, torch.from_numpy(buffer)), model, 3)
        if scores:
            trainable.network.config.pad_token_id = 0
        noise = torch.randn(trainable.layout.size, generator=torch.Generator().manual_seed(1))
        trainable.flat.data.add_(noise, alpha=0.1)
        folder = tmp_path / f"{peft.kind} {scores}"
        folder.mkdir()
        for name, content in export_files(trainable, model, tokenizer, "card").items():
            (folder / name).write_bytes(content)
        trainable.network.eval()
        return folder, trainable

    return made


def mapped(frozen: FrozenModel, model: Model) -> tuple[Any, torch.Tensor]:
    packed, buffer = read_frozen(frozen, model)
    shared = torch.from_numpy(buffer)
    return map_frozen(frozen, packed, shared, model), shared


@pytest.mark.parametrize("peft", [Lora(r=4, alpha=8), Lora(r=4, alpha=8, use_dora=True), FullTuning()])
def test_a_runs_model_gives_the_runs_logits_from_one_buffer(
    bases: dict[str, Path], saved: Callable[..., tuple[Path, Trainable]], peft: Lora | FullTuning
) -> None:
    folder, trainable = saved(peft, scores=False)
    base = str(bases["tied"])
    frozen = FrozenModel(str(folder), base=base if peft.peft_class else None)
    network, buffer = mapped(frozen, Model(base=base))
    with torch.no_grad():
        ours, theirs = (each(input_ids=IDS_BT).logits for each in (network, trainable.network))
        untrained = AutoModelForCausalLM.from_pretrained(base)(input_ids=IDS_BT).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (theirs - untrained).abs().max() > 0.01
    for name, parameter in network.named_parameters():
        assert not parameter.requires_grad and not network.training
        assert 0 <= parameter.data_ptr() - buffer.data_ptr() < buffer.nbytes, name


@pytest.mark.parametrize("peft", [Lora(r=4, alpha=8), FullTuning()], ids=["lora", "full"])
def test_a_scorer_scores_as_plain_transformers_do_on_whole_texts(
    bases: dict[str, Path], saved: Callable[..., tuple[Path, Trainable]], peft: Lora | FullTuning
) -> None:
    folder, _ = saved(peft, scores=True)
    base = str(bases["tied"])
    frozen = FrozenModel(str(folder), base=base if peft.peft_class else None, scores=True)
    scorer, _ = mapped(frozen, Model(base=str(bases["untied"])))
    plain: Any = AutoModelForSequenceClassification.from_pretrained(base if peft.peft_class else folder, num_labels=1)
    network = (PeftModel.from_pretrained(plain, folder) if peft.peft_class else plain).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    values = scorer(PROMPTS * 3, ANSWERS * 3)
    for value, prompt, answer in zip(values, PROMPTS * 3, ANSWERS * 3, strict=True):
        ids = torch.tensor([tokenizer(f"{prompt}{answer}<end>")["input_ids"]])
        with torch.no_grad():
            assert value == pytest.approx(network(input_ids=ids).logits.item(), abs=1e-5)
    assert scorer([PROMPTS[0]], [f"{ANSWERS[0]}<end>"]) == pytest.approx(values[:1], abs=1e-5)
    assert scorer([], []) == []


def test_a_scorer_has_the_tokens_of_training(
    bases: dict[str, Path], saved: Callable[..., tuple[Path, Trainable]], tokenizer: PreTrainedTokenizerFast
) -> None:
    _, trainable = saved(Lora(r=4, alpha=8), scores=True)
    spoken = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token="<end>", pad_token="<pad>"
    )
    spoken.chat_template = TEMPLATE
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    chosen = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    rejected = [[{"role": "assistant", "content": "no"}] for _ in ANSWERS]
    tables = [
        pa.table({"prompt": PROMPTS, "chosen": ANSWERS, "rejected": ["no"] * 3}),
        pa.table({"prompt": turns, "chosen": chosen, "rejected": rejected}),
    ]
    for table, prompts in zip(tables, (PROMPTS, [conversation_of(each) for each in turns]), strict=True):
        (rows,) = Reward().encode(table, spoken, 64).combine_chunks().to_batches()
        with torch.no_grad():
            expected = scores_of(trainable.network, Reward().collate(rows, 0)).tolist()
        scorer = Scorer(trainable.network, spoken)
        assert scorer(prompts, ANSWERS) == pytest.approx(expected[::2], abs=1e-5)
        assert scorer(prompts, ["no"] * 3) == pytest.approx(expected[1::2], abs=1e-5)


def test_models_that_cannot_serve_are_refused(
    bases: dict[str, Path], saved: Callable[..., tuple[Path, Trainable]], tmp_path: Path
) -> None:
    base, other = str(bases["tied"]), str(bases["untied"])
    model = Model(base=base)
    reward, language = (saved(Lora(r=4, alpha=8), scores=scores)[0] for scores in (True, False))
    whole = saved(FullTuning(), scores=True)[0]
    for refused in (FrozenModel(str(reward), base=base), FrozenModel(str(whole))):
        with pytest.raises(RunError, match=r"gives texts a score, and tokens no logits|not a causal language model"):
            read_frozen(refused, model)
    for refused in (FrozenModel(str(language), base=base, scores=True), FrozenModel(base, scores=True)):
        with pytest.raises(RunError, match="gives texts no score: name another"):
            read_frozen(refused, model)
    (language / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"adapter_model\.safetensors cannot be read"):
        read_frozen(FrozenModel(str(language), base=base), model)
    renamed = copytree(other, tmp_path / "renamed")
    written = json.loads((renamed / "tokenizer.json").read_text())
    vocabulary = written["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (renamed / "tokenizer.json").write_text(json.dumps(written))
    with pytest.raises(RunError, match=r"another vocabulary than model\.base .* \(2 tokens have other numbers\)"):
        read_frozen(FrozenModel(str(renamed)), model)
    larger = copytree(other, tmp_path / "larger")
    network = AutoModelForCausalLM.from_pretrained(larger)
    network.resize_token_embeddings(320)
    network.save_pretrained(larger)
    with pytest.raises(RunError, match=r"\(320 logits beside 300\), and token by token they cannot be compared"):
        read_frozen(FrozenModel(str(larger)), model)
    read_frozen(FrozenModel(other), model)
