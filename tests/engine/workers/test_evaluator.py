import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from engine.config.adapters import Lora
from engine.config.federation import Federation
from engine.config.sections import Evaluate
from engine.objectives.sft import Sft
from engine.training.generation import continuations
from engine.training.local_training import LocalTrainer
from engine.workers.evaluator import ClientLoss, client_loss, drawn_rows, pooled

MakeTrainer = Callable[[Federation], LocalTrainer]


@given(st.integers(0, 60), st.integers(0, 1000), st.integers(1, 20), st.integers(0, 99))
def test_the_rows_that_count_are_drawn_once(rows: int, client: int, most: int, seed: int) -> None:
    picked = drawn_rows(rows, client, Evaluate(rows=most), seed).tolist()
    assert picked == sorted(set(picked)) == drawn_rows(rows, client, Evaluate(rows=most), seed).tolist()
    assert len(picked) == min(rows, most)
    assert set(picked) <= set(range(rows))


def test_seed_and_client_decide_which() -> None:
    draws = [drawn_rows(100, client, Evaluate(rows=5), seed).tolist() for client, seed in ((1, 7), (2, 7), (1, 8))]
    assert draws[0] != draws[1] and draws[0] != draws[2]


def mean_loss(losses: list[ClientLoss]) -> float:
    return pooled(losses, Sft()).metrics("loss", Sft())["loss"]


def test_the_mean_is_over_tokens_by_hand() -> None:
    losses = [
        ClientLoss(2, {"nll": (9.0, 3)}, 1),
        ClientLoss(0, {"nll": (1.0, 1)}, 1),
        ClientLoss(1, {"nll": (0.0, 0)}, 0),
    ]
    assert mean_loss(losses) == 10.0 / 4
    assert math.isnan(mean_loss([]))


@given(st.permutations([ClientLoss(k, {"nll": (0.1 * 3**k, 7 + k)}, 1) for k in range(6)]))
def test_the_mean_does_not_depend_on_the_order(losses: list[ClientLoss]) -> None:
    assert mean_loss(losses) == mean_loss(sorted(losses, key=lambda loss: loss.client))


@torch.no_grad()
def by_row(trainer: LocalTrainer, rows: pa.RecordBatch, picked: list[int]) -> tuple[float, int]:
    """Row after row, token after token, without padding."""
    nll, tokens = 0.0, 0
    for i in picked:
        ids, mask = rows["input_ids"][i].as_py(), rows["mask"][i].as_py()
        logits_TV = trainer.trainable.network(input_ids=torch.tensor([ids])).logits[0]
        for t in range(1, len(ids)):
            if mask[t]:
                nll, tokens = nll - F.log_softmax(logits_TV[t - 1], -1)[ids[t]].item(), tokens + 1
    return nll, tokens


@pytest.mark.parametrize("evaluate", [Evaluate(batch=2), Evaluate(batch=16), Evaluate(rows=3, batch=2)])
def test_a_clients_loss_is_that_of_its_rows_one_by_one(
    federation: Federation, make_trainer: MakeTrainer, rows: pa.RecordBatch, evaluate: Evaluate
) -> None:
    trainer = make_trainer(federation)
    before = trainer.trainable.flat.detach().clone()
    result = client_loss(trainer, 4, rows, evaluate, 7)
    picked = drawn_rows(rows.num_rows, 4, evaluate, 7).tolist()
    nll, tokens = by_row(trainer, rows, picked)
    assert (result.client, result.terms, result.rows) == (
        4,
        {"nll": (pytest.approx(nll, rel=1e-5), tokens)},
        len(picked),
    )
    assert torch.equal(trainer.trainable.flat, before)


def test_nothing_is_dropped_out(federation: Federation, make_trainer: MakeTrainer, rows: pa.RecordBatch) -> None:
    model = replace(federation.model, peft=Lora(r=4, alpha=8, dropout=0.5))
    losses = []
    for trainer in (make_trainer(federation), make_trainer(replace(federation, model=model))):
        noise = torch.randn(trainer.trainable.layout.size, generator=torch.Generator().manual_seed(1))
        trainer.trainable.flat.data.copy_(0.1 * noise)
        trainer.trainable.network.train()
        losses.append(client_loss(trainer, 4, rows, Evaluate(), 7))
    assert losses[0] == losses[1]


def generate(trainer: LocalTrainer, tokenizer: Any, prompts: list[str], tokens: int) -> list[str]:
    return continuations(trainer.trainable.network, trainer.pad, trainer.device, tokenizer, prompts, tokens)


def test_greedy_continuations(federation: Federation, make_trainer: MakeTrainer, tokenizer: object) -> None:
    trainer = make_trainer(federation)
    prompts = ["count: ", "one and two "]
    texts = generate(trainer, tokenizer, prompts, 6)
    assert texts == [generate(trainer, tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert not any(text.startswith(prompt.strip()) for text, prompt in zip(texts, prompts, strict=True))


def test_a_text_is_generated_from_nothing(
    make_trainer: MakeTrainer, federation: Federation, tokenizer: PreTrainedTokenizerBase
) -> None:
    (text,) = generate(make_trainer(federation), tokenizer, [""], 4)
    (same,) = generate(make_trainer(federation), tokenizer, [str(tokenizer.eos_token)], 4)
    assert text == same
