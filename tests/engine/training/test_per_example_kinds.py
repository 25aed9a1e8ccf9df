"""Example-level privacy and adapters beside LoRA: right where Opacus has the rows' gradients, else a sentence."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine.config.adapters import IA3, Adapters, LNTuning, Lora, Oft, Vera
from engine.config.federation import Federation
from engine.config.privacy import Privacy
from engine.config.train import Sgd, Train
from engine.messages.errors import RunError
from engine.training.per_example import PrivateTrainer
from engine.training.step_loop import Training
from strategies.privacy.budget import ExampleDp

STEP = Train(steps=1, batch=5, optimizer=Sgd(lr=1.0), clip=0)
LORA = Lora(r=4, alpha=8)


def step(private: PrivateTrainer, rows: pa.RecordBatch) -> torch.Tensor:
    start = private.trainable.initial
    (trained,) = private.train([Training(rows, start, np.random.default_rng(1), 0)], STEP)
    return trained.end - start


@pytest.mark.parametrize(
    "peft",
    [replace(LORA, use_rslora=True), replace(LORA, rank_pattern={"q_proj": 2}), LNTuning()],
    ids=["rslora", "patterns", "ln_tuning"],
)
def test_lora_with_options_and_norms_have_the_rows_gradients(
    make_private: Callable[..., PrivateTrainer], rows: pa.RecordBatch, peft: Adapters
) -> None:
    private = make_private(train=STEP, peft=peft)
    assert step(private, rows).abs().max() > 0  # the trainer compares their sum with the gradient


@pytest.mark.parametrize(
    ("peft", "key"),
    [
        (replace(LORA, use_dora=True), "model.peft.use_dora"),
        (replace(LORA, target_parameters=("experts.down_proj",)), "model.peft.target_parameters"),
        (IA3(), 'model.peft.kind = "ia3"'),
        (Vera(r=4), 'model.peft.kind = "vera"'),
        (Oft(oft_block_size=4), 'model.peft.kind = "oft"'),
    ],
)
def test_kinds_without_the_rows_gradients_are_refused(federation: Federation, peft: Adapters, key: str) -> None:
    dp = ExampleDp(noise_multiplier=1.0, clip=1.0)
    with pytest.raises(RunError, match=f'{key} does not work with privacy.dp.kind = "example"'):
        replace(federation, model=replace(federation.model, peft=peft), privacy=Privacy(dp=dp))
