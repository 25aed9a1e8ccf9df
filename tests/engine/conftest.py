"""Tiny random models and a tokenizer, made here so that the tests need neither a download nor shared data."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.config.adapters import FullTuning, Lora
from engine.config.federation import Federation
from engine.config.sections import Model
from engine.config.train import Sgd, Train
from engine.models.base_model import map_base, read_base
from engine.models.trainable import Trainable
from engine.objectives.sft import Sft
from engine.training.local_training import LocalTrainer
from engine.training.per_example import PrivateTrainer
from strategies.privacy.accounting import Scheme
from strategies.privacy.budget import ExamplePlan
from strategies.privacy.noise import seeded_words

VOCABULARY = 300
PROMPTS = ["", "say th", "name a color: ", "one and two are ", "count to ten: "]
COMPLETIONS = ["the cat and the hat", "e end", "green", "three", "one two three four five six seven"]
PLAIN_SGD = Train(steps=1, optimizer=Sgd(lr=1.0))  # a step is the gradient, turned round


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges ("the", " and") reach across the border of prompt and completion."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(["the cat and the hat in the end", "one and two and three"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<pad>")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """Model folders by name: a Llama with tied and one with untied embeddings, and a GPT-2."""
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    llama = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **tokens}
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **tokens)
    torch.manual_seed(0)
    networks = {
        "tied": LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **llama)),
        "untied": LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, tie_word_embeddings=False, **llama)),
        "gpt2": GPT2LMHeadModel(gpt2),
    }
    folder = tmp_path_factory.mktemp("bases")
    for name, network in networks.items():
        network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in networks}


@pytest.fixture(scope="session")
def texts() -> pa.Table:
    return pa.table({"prompt": PROMPTS, "completion": COMPLETIONS})


@pytest.fixture(scope="session")
def rows(texts: pa.Table, tokenizer: PreTrainedTokenizerFast) -> pa.RecordBatch:
    """Five encoded rows of different lengths."""
    (batch,) = Sft().encode(texts, tokenizer, 64).to_batches()
    return batch


@pytest.fixture(scope="session")
def federation(bases: dict[str, Path]) -> Federation:
    """A federation on the tied Llama; tests replace sections of it."""
    model = Model(base=str(bases["tied"]), peft=Lora(r=4, alpha=8))
    return Federation(name="test", seed=7, rounds=1, model=model, train=Train(steps=3, batch=2))


@pytest.fixture(scope="session")
def make_trainable() -> Callable[..., Trainable]:
    """A fresh Trainable on a model folder."""

    def made(base: Path | str, peft: Lora | FullTuning | None = None, seed: int = 3, **model: Any) -> Trainable:
        settings = Model(base=str(base), peft=peft or Lora(r=4, alpha=8), **model)
        packed, buffer = read_base(settings)
        return Trainable(map_base(packed, torch.from_numpy(buffer)), settings, seed)

    return made


@pytest.fixture(scope="session")
def make_trainer(make_trainable: Callable[..., Trainable]) -> Callable[[Federation], LocalTrainer]:
    """A fresh LocalTrainer for a federation."""

    def made(federation: Federation) -> LocalTrainer:
        trainable = make_trainable(federation.model.base, federation.model.peft)
        return LocalTrainer(trainable, 0, federation.train)

    return made


@pytest.fixture(scope="session")
def make_private(make_trainable: Callable[..., Trainable], bases: dict[str, Path]) -> Callable[..., PrivateTrainer]:
    """A fresh PrivateTrainer on a base by name, for noise multiplier and clip, with seeded words."""

    def made(
        z: float = 0.0, clip: float = 1e6, train: Train = PLAIN_SGD, base: str = "tied", **options: Any
    ) -> PrivateTrainer:
        trainable = make_trainable(bases[base], options.get("peft"))
        for module in trainable.network.modules():
            if isinstance(module, nn.Dropout):  # GPT-2 has it by default
                module.p = 0.0
        plan = ExamplePlan(z, clip, Scheme("poisson", 1.0), 1e-5)
        plain = LocalTrainer(trainable, 0, train)
        plain.objective = options.get("objective", plain.objective)
        return PrivateTrainer(plain, plan, seeded_words(np.random.default_rng(11)))

    return made


@pytest.fixture(scope="session")
def training(federation: Federation) -> Callable[..., Federation]:
    """The federation with another train section, and any other section by name."""

    def made(train: Train, **sections: Any) -> Federation:
        return replace(federation, train=train, **sections)

    return made
