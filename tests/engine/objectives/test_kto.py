"""KTO by hand: which completions z0 is of, its periods, and rows of pairs."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from engine.config.train import Sgd, Train
from engine.objectives.kto import Kto
from engine.training.local_training import LocalTrainer
from engine.training.step_loop import Training

Encoded = Callable[..., pa.RecordBatch]
MakeDouble = Callable[..., LocalTrainer]
ONE_STEP = Train(steps=1, batch=6, optimizer=Sgd(lr=1.0), clip=0)


def texts(tokenizer: PreTrainedTokenizerFast, rows: pa.RecordBatch, name: str) -> list[str]:
    return [tokenizer.decode(ids) for ids in rows[name].to_pylist()]


def test_each_prompt_gets_the_completion_of_the_row_before(
    encoded: Encoded, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = encoded(Kto())
    step = Kto().step_rows(rows, np.array([2, 4, 1]))
    assert texts(tokenizer, step, "input_ids")[0] == "name a color: green<end>"
    assert texts(tokenizer, step, "kl_ids") == [
        "name a color:  end<end>",
        "count to ten: green<end>",
        "say theten nine<end>",
    ]
    assert step["mismatched"].to_pylist() == [1, 1, 1]
    # The completion starts where the tokens of prompt and completion together differ from the prompt's: at " and".
    # A step of one row takes the client's next row, the last one the first; a client of one row has no other.
    assert texts(tokenizer, Kto().step_rows(rows, np.array([5])), "kl_ids") == ["the cat satthe cat and the hat<end>"]
    only = Kto().step_rows(rows.slice(2, 1), np.array([0]))
    assert only["mismatched"].to_pylist() == [0]
    assert "kl_ids" not in Kto(kl="none").step_rows(rows, np.array([2])).schema.names


def test_a_mismatched_completion_is_whole_although_its_own_row_was_cut(
    tables: dict[str, pa.Table], tokenizer: PreTrainedTokenizerFast
) -> None:
    table = tables["unpaired_preference"]
    (rows,) = Kto().encode(table, tokenizer, 14).filter([True, True, True, True, True, True]).to_batches()
    kept = rows.filter(rows["input_ids"].is_valid())
    step = Kto().step_rows(kept, np.arange(kept.num_rows))
    whole = Kto().encode(table, tokenizer, 1000).to_pylist()
    for row in step.to_pylist():
        assert len(row["input_ids"]) <= 14 and len(row["kl_ids"]) <= 14
    prompts = {tuple(row["input_ids"][: row["prompt_tokens"]]): row for row in whole}
    for number, row in enumerate(step.to_pylist()):
        other = step.to_pylist()[number - 1]
        full = prompts[tuple(other["input_ids"][: other["prompt_tokens"]])]
        mixed = row["input_ids"][: row["prompt_tokens"]] + full["input_ids"][full["prompt_tokens"] :]
        assert row["kl_ids"] == mixed[:14]


def test_a_policy_that_is_its_reference_loses_one_half_times_the_weight(
    make_double: MakeDouble, encoded: Encoded
) -> None:
    objective = Kto(desirable_weight=3.0, undesirable_weight=0.5)
    trainer, rows = make_double(objective, ONE_STEP), encoded(objective)
    trainer.become(trainer.trainable.initial)
    terms = trainer.loss_terms(rows, 6)
    assert terms["preference"] == (pytest.approx(3 * 1.5 + 3 * 0.25), 6)
    assert terms["accuracy"] == (3.0, 6) and terms["kl"] == (0.0, 6)
    assert terms["chosen"][1] == terms["rejected"][1] == 3


def test_z0_is_the_steps_mean_and_not_below_zero(
    make_double: MakeDouble, encoded: Encoded, moved: Callable[..., torch.Tensor]
) -> None:
    objective = Kto()
    trainer, rows = make_double(objective, ONE_STEP), encoded(objective)
    network, vector = trainer.trainable.network, moved(trainer)

    def scores(ids: list[int], prompt: int) -> float:
        logits = network(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return sum(logits[place - 1, ids[place]].item() for place in range(max(1, prompt), len(ids)))

    def ratios(name: str) -> torch.Tensor:
        step = objective.step_rows(rows, np.arange(6))
        both = []
        for start in (vector, trainer.trainable.initial):
            trainer.become(start)
            pairs = zip(step[name].to_pylist(), step["prompt_tokens"].to_pylist(), strict=True)
            both.append([scores(*pair) for pair in pairs])
        return torch.tensor(both[0]).double() - torch.tensor(both[1]).double()

    with torch.no_grad():
        r_B, kl_B = ratios("input_ids"), ratios("kl_ids")
    z0 = max(0.0, kl_B.mean().item())
    sign_B = torch.tensor([1.0, 1, 1, -1, -1, -1])
    expected = (1 - torch.sigmoid(0.1 * sign_B * (r_B - z0))).sum().item()
    trainer.become(vector)
    terms = trainer.loss_terms(rows, 2)
    assert terms["preference"][0] == pytest.approx(expected, abs=1e-5)
    assert terms["kl"] == (pytest.approx(kl_B.sum().item(), abs=1e-4), 6)


def test_z0_of_a_round_is_that_of_the_rounds_start_in_all_steps(
    make_double: MakeDouble, encoded: Encoded, moved: Callable[..., torch.Tensor]
) -> None:
    objective, train = Kto(kl="round"), replace(ONE_STEP, steps=3, batch=2)
    trainer, rows = make_double(objective, train), encoded(objective)
    trainer.become(moved(trainer))
    means = trainer.step_means(rows, 6, None)
    trained = trainer.train([Training(rows, moved(trainer), np.random.default_rng(1), 0, means=means)], train)[0]
    assert trained.metrics["term.kl"] == pytest.approx(means["kl"])
    assert trained.metrics["units.kl"] == 6


def test_a_pair_without_a_usable_chosen_side_keeps_the_other(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts, chosen, rejected = ["a ", "", "b ", ""], ["x", "", "y", "z"], ["no", "bad", "worse", ""]
    table = pa.table({"prompt": prompts, "chosen": chosen, "rejected": rejected})
    encoded = Kto().encode(table, tokenizer, 64)
    assert encoded["input_ids"].null_count == 0
    rows = Kto().regroup(encoded, 64)
    assert rows["good"].to_pylist() == [True, True, True, False, False, False]
    texts = [
        tokenizer.decode(ids[start:])
        for ids, start in zip(rows["input_ids"].to_pylist(), rows["prompt_tokens"].to_pylist(), strict=True)
    ]
    assert texts == [f"{text}<end>" for text in ("x", "y", "z", "no", "bad", "worse")]


def test_pairs_become_two_rows_all_chosen_ones_first(
    tables: dict[str, pa.Table], tokenizer: PreTrainedTokenizerFast
) -> None:
    table = tables["preference"].slice(1, 2)
    rows = Kto().regroup(Kto().encode(table, tokenizer, 64), 64)
    assert [tokenizer.decode(ids) for ids in rows["input_ids"].to_pylist()] == [
        "say the end<end>",
        "name a color: green<end>",
        "say the beginning of it all<end>",
        "name a color: a dog<end>",
    ]
    assert rows["good"].to_pylist() == [True, True, False, False]


def test_clients_of_one_label_train(
    make_double: MakeDouble, encoded: Encoded, moved: Callable[..., torch.Tensor]
) -> None:
    trainer, rows = make_double(Kto(), ONE_STEP), encoded(Kto())
    trained = trainer.train([Training(rows.slice(3, 3), moved(trainer), np.random.default_rng(1), 0)], ONE_STEP)[0]
    assert trained.metrics["units.chosen"] == 0 and trained.metrics["term.chosen"] == 0
    assert trained.end.isfinite().all() and not torch.equal(trained.end, moved(trainer))
    assert Kto().counts(Kto().collate(Kto().step_rows(rows, np.arange(3)), 0))["rejected"] == 0
