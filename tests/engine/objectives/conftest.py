"""Rows of each format, and trainers in float64, for objectives."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from datasets_partition.core.types import PREFERENCE, PROMPT_COMPLETION, UNPAIRED_PREFERENCE
from engine.config.adapters import FullTuning, Lora
from engine.config.federation import Federation
from engine.config.train import Train
from engine.models.base_model import map_base, read_base
from engine.models.frozen import map_frozen, read_frozen
from engine.models.trainable import Trainable
from engine.objectives.base import Objective
from engine.training.local_training import LocalTrainer

PROMPTS = ["", "say the", "name a color: ", "one and two are ", "count to ten: ", "the cat sat "]
GOOD = ["the cat and the hat", " end", "green", "three", "one two three four five six seven", "on the hat"]
BAD = ["hat the and cat the", " beginning of it all", "a dog", "the the", "ten nine", "and and and the end and the hat"]


@pytest.fixture(scope="session")
def tables() -> dict[str, pa.Table]:
    """Six rows of different lengths in each format."""
    return {
        PREFERENCE: pa.table({"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}),
        UNPAIRED_PREFERENCE: pa.table(
            {
                "prompt": PROMPTS,
                "completion": [*GOOD[:3], *BAD[3:]],
                "label": [True, True, True, False, False, False],
            }
        ),
        PROMPT_COMPLETION: pa.table({"prompt": PROMPTS, "completion": GOOD}),
    }


@pytest.fixture(scope="session")
def encoded(tables: dict[str, pa.Table], tokenizer: PreTrainedTokenizerFast) -> Callable[[Objective], pa.RecordBatch]:
    """The six rows as an objective encodes them."""

    def made(objective: Objective, length: int = 64) -> pa.RecordBatch:
        table = tables[objective.formats[0]]
        (batch,) = objective.encode(table, tokenizer, length).combine_chunks().to_batches()
        return batch

    return made


@pytest.fixture
def make_double(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> Callable[..., LocalTrainer]:
    """A trainer of an objective in float64, in which sums of another order are equal to 1e-10."""

    def normed(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def made(objective: Objective, train: Train, peft: Lora | FullTuning | None = None) -> LocalTrainer:
        monkeypatch.setattr(LlamaRMSNorm, "forward", normed)  # transformers casts to float32
        model = replace(federation.model, peft=peft or Lora(r=4, alpha=8))
        packed, buffer = read_base(model, scores="head" in objective.needs)
        trainable = Trainable(map_base(packed, torch.from_numpy(buffer)).double(), model, 3)
        models = [
            map_frozen(frozen, index, torch.from_numpy(weights), model).double()
            for frozen in objective.models
            for index, weights in [read_frozen(frozen, model)]
        ]
        return LocalTrainer(trainable, 0, replace(train, objective=objective), tokenizer, models)

    return made


@pytest.fixture(scope="session")
def moved() -> Callable[..., torch.Tensor]:
    """A vector near the initial one, whose LoRA B is not zero: every tensor has a gradient."""

    def made(trainer: LocalTrainer, seed: int = 5, size: float = 0.05) -> torch.Tensor:
        initial = trainer.trainable.initial
        noise = np.random.default_rng(seed).standard_normal(len(initial))
        return initial + size * torch.from_numpy(noise).to(initial.dtype)

    return made
