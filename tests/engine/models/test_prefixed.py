"""Learned places in front of texts, against PEFT, and what they leave in the model folder."""

import json
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config.prefixes import Prefix, Projected, Prompt, PromptWords
from engine.config.sections import Model
from engine.models.export import export_files
from engine.models.prefixed import Projection, spread_of
from engine.objectives.base import Context
from engine.objectives.sft import Sft
from engine.training.local_training import LocalTrainer
from engine.training.searching import greedy

N = 3
KINDS = {"prompt": Prompt(n=N), "prefix": Prefix(n=N), "words": PromptWords(n=N), "projected": Projected(n=N, d=4)}


def theirs(base, kind, learned):
    """PEFT's model with the same numbers."""
    network = AutoModelForCausalLM.from_pretrained(base)
    config = getattr(peft, kind.peft_class)(task_type="CAUSAL_LM", num_virtual_tokens=N)
    network = peft.get_peft_model(network, config)
    network.prompt_encoder["default"].embedding.weight.data.copy_(learned.view(N, -1))
    return network


@pytest.mark.parametrize("base", ["tied", "gpt2"])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_logits_and_gradients_equal_those_of_peft(bases, make_trainable, rows, name, base):
    trainable = make_trainable(bases[base], KINDS[name])
    if name == "prefix":  # numbers of another size than PEFT draws would make no difference here
        trainable.flat.data.mul_(0.1)
    network = trainable.network.eval()
    other = theirs(bases[base], KINDS[name], trainable.flat.detach()).eval()
    batch = Sft().collate(rows, 0)
    ours = network(input_ids=batch.ids_BT, attention_mask=batch.attention_BT).logits
    expected = other(input_ids=batch.ids_BT, attention_mask=batch.attention_BT).logits
    expected = expected[:, -ours.shape[1] :]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    ours.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    gradient = other.prompt_encoder["default"].embedding.weight.grad.reshape(-1)
    torch.testing.assert_close(trainable.grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_losses_are_those_of_the_text_alone(bases, make_trainable, rows, name):
    """Label places do not shift: the loss of each token equals that from all logits."""
    network = make_trainable(bases["untied"], KINDS[name]).network.eval()
    batch = Sft().collate(rows, 0)
    few, all_of_them = (
        Sft().terms(network, batch, Context(every_logit=every))["nll"].values_N for every in (False, True)
    )
    torch.testing.assert_close(few, all_of_them, rtol=1e-5, atol=1e-5)
    assert len(few) == batch.learned


def test_without_the_places_the_base_computes(bases, make_trainable, rows):
    network = make_trainable(bases["tied"], KINDS["prompt"]).network.eval()
    batch = Sft().collate(rows, 0)
    network._disable_adapters = True
    alone = network(input_ids=batch.ids_BT, attention_mask=batch.attention_BT).logits
    plain = AutoModelForCausalLM.from_pretrained(bases["tied"])
    torch.testing.assert_close(alone, plain(batch.ids_BT, attention_mask=batch.attention_BT).logits)


def test_words_are_the_embeddings_of_tokens(bases, make_trainable):
    trainable = make_trainable(bases["tied"], KINDS["words"])
    assert trainable.layout.choices == 300 and trainable.layout.size == N
    trainable.flat.data.copy_(torch.tensor([5.0, 0.0, 299.0]))
    embeddings = trainable.network.get_input_embeddings().weight
    assert torch.equal(trainable.network.vectors(), embeddings[[5, 0, 299]])


def test_a_projection_is_drawn_by_the_seed_alone(bases, make_trainable):
    trainable = make_trainable(bases["tied"], KINDS["projected"], seed=3)
    start = make_trainable(bases["tied"], KINDS["projected"].injected, seed=3).initial
    spread = spread_of(trainable.network)
    projection = Projection.drawn(KINDS["projected"], start, spread, 3)
    assert torch.equal(trainable.network.vectors().reshape(-1), start)  # z is zero at first
    numbers = torch.tensor([1.0, -2.0, 0.5, 3.0])
    trainable.flat.data.copy_(numbers)
    assert torch.equal(trainable.network.vectors().reshape(-1), projection(numbers))
    wide = Projection.drawn(replace(KINDS["projected"], d=400), start, spread, 3)
    assert float(wide.matrix_Pd.std()) == pytest.approx(spread / 20, rel=0.05)


@pytest.mark.parametrize("name", KINDS)
def test_the_model_folder_loads_with_peft(bases, make_trainable, tokenizer, rows, tmp_path, name):
    trainable = make_trainable(bases["tied"], KINDS[name])
    trainable.flat.data.add_(torch.arange(len(trainable.flat.data)) % 3)
    model = Model(base=str(bases["tied"]), peft=KINDS[name])
    for file, content in export_files(trainable, model, tokenizer, "card").items():
        (tmp_path / file).write_bytes(content)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["tied"]), tmp_path).eval()
    batch = Sft().collate(rows, 0)
    inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.attention_BT}
    ours = trainable.network.eval()(**inputs).logits
    torch.testing.assert_close(ours, loaded(**inputs).logits[:, -ours.shape[1] :], rtol=1e-5, atol=1e-5)
    if name == "words":
        words = json.loads((tmp_path / "prompt.json").read_text())
        assert words == {"text": tokenizer.decode(words["ids"]), "ids": trainable.flat.long().tolist()}


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_what_is_written_equals_what_peft_generates(bases, federation, make_trainable, name):
    trainable = make_trainable(bases["tied"], KINDS[name])
    trainer = LocalTrainer(trainable, 0, federation.train)
    prompt = np.array([40, 7, 12])
    (written,) = greedy(trainer, trainable.initial, [prompt], [6])
    other = theirs(bases["tied"], KINDS[name], trainable.initial).eval()
    ids_BT = torch.from_numpy(prompt)[None]
    out = other.generate(
        input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert written == out[0, len(prompt) :].tolist()
