"""DPO and its family by hand: worked numbers, ties, and what the rows become."""

import math
from collections.abc import Callable

import pyarrow as pa
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from engine.config.train import Train
from engine.messages.errors import RunError
from engine.objectives.base import Context
from engine.objectives.dpo import Dpo, Ratios
from engine.objectives.pairs import encode_pairs, wins
from engine.training.local_training import LocalTrainer

R_W, R_L = 2.0, -1.0
N_W, N_L = 4, 2


def loss_of(kind: str, w: float = R_W, l: float = R_L, **options: float) -> float:  # noqa: E741
    objective = Dpo(loss_type=kind, **options)  # type: ignore[arg-type]
    ratios = Ratios(*(torch.tensor([value], dtype=torch.float64) for value in (w, l, w / N_W, l / N_L)))
    return objective.pair_loss(kind, ratios).item()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("sigmoid", {}, 0.5544),  # -ln sigmoid(0.3)
        ("sigmoid", {"label_smoothing": 0.1}, 0.9 * 0.55436 + 0.1 * 0.85436),
        ("robust", {"label_smoothing": 0.1}, (0.9 * 0.55436 - 0.1 * 0.85436) / 0.8),
        ("hinge", {}, 0.7),
        ("ipo", {}, (0.5 + 0.5 - 5) ** 2),
        ("sigmoid_norm", {}, -math.log(sigmoid(0.1 * (0.5 + 0.5)))),
        ("nca_pair", {}, -math.log(sigmoid(0.2)) - 0.5 * math.log(sigmoid(-0.2)) - 0.5 * math.log(sigmoid(0.1))),
        ("bco_pair", {}, -math.log(sigmoid(0.2)) - math.log(sigmoid(0.1))),
        ("sppo_hard", {}, (2 - 5) ** 2 + (-1 + 5) ** 2),
        ("apo_zero", {}, 1 - sigmoid(0.2) + sigmoid(-0.1)),
        ("apo_down", {}, sigmoid(0.2) + 1 - sigmoid(0.3)),
        ("discopop", {}, (1 - sigmoid(6)) * 0.55436 + sigmoid(6) * math.exp(-0.3)),
        (
            "exo_pair",
            {"label_smoothing": 0.1},
            sigmoid(0.3) * math.log(sigmoid(0.3) / 0.9) + sigmoid(-0.3) * math.log(sigmoid(-0.3) / 0.1),
        ),
    ],
)
def test_losses_are_those_worked_by_hand(kind: str, options: dict[str, float], expected: float) -> None:
    assert loss_of(kind, **options) == pytest.approx(expected, abs=5e-5)


def test_a_policy_that_is_its_reference_has_the_known_losses() -> None:
    assert loss_of("sigmoid", 0, 0) == pytest.approx(math.log(2))
    assert loss_of("ipo", 0, 0) == 25
    assert wins(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, 2.0, 1.0])).tolist() == [0, 0.5, 1]


def test_figures_of_a_fresh_adapter_are_ties(
    make_double: Callable[..., LocalTrainer], encoded: Callable[..., pa.RecordBatch]
) -> None:
    trainer, rows = make_double(Dpo(), Train(steps=1)), encoded(Dpo())
    trainer.become(trainer.trainable.initial)
    terms = trainer.loss_terms(rows, 4)
    assert terms["accuracy"] == (3.0, 6) and terms["preference"] == (pytest.approx(6 * math.log(2)), 6)
    assert terms["margin"] == terms["chosen"] == (0.0, 6)
    assert 0 <= terms["ranking"][0] <= 6


def test_rows_are_cut_at_their_end_and_dropped_without_a_scored_side(tokenizer: PreTrainedTokenizerFast) -> None:
    """Equal sides, and prompts as long as the limit, teach nothing."""
    rows = pa.table(
        {
            "prompt": ["count to ten: ", "name a color: ", "say", "count to ten: "],
            "chosen": ["one two three four five six", "green", "x", "one<end>"],
            "rejected": ["ten", "green", "y", "two"],
        }
    )
    full, short = encode_pairs(rows, tokenizer, 64), encode_pairs(rows, tokenizer, 12)
    prompt = len(tokenizer("count to ten: ")["input_ids"])
    assert full["input_ids"].is_valid().to_pylist() == [True, False, True, True]
    assert short["input_ids"].is_valid().to_pylist() == [prompt < 12, False, True, prompt < 12]
    assert full["prompt_tokens"].to_pylist()[0] == prompt
    assert full["input_ids"].to_pylist()[3].count(tokenizer.eos_token_id) == 1
    batch = Dpo().collate(full.filter(full["input_ids"].is_valid()).combine_chunks().to_batches()[0], 0)
    assert batch.group == 2 and batch.units == 3 and len(batch.ids_BT) == 6
    assert tokenizer.decode(batch.ids_BT[1][: int(batch.attention_BT[1].sum())]) == "count to ten: ten<end>"
    assert batch.columns["size"].tolist()[1] == int((batch.labels_BT[1] != -100).sum())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "train.objective.beta must be above 0"),
        ({"loss_type": "exo_pair"}, "needs label_smoothing above 0"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "does nothing for hinge"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "give a share from 0 to below 0.5"),
        ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0,)}, "has 1 numbers for 2 losses"),
        ({"loss_type": ("sigmoid", "sigmoid")}, "name each loss once"),
        ({"loss_type": "sft"}, 'has "sft" alone'),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(RunError, match=words):
        Dpo(**options)  # type: ignore[arg-type]


def test_several_losses_add_up(
    make_double: Callable[..., LocalTrainer], encoded: Callable[..., pa.RecordBatch]
) -> None:
    rows, network = encoded(Dpo()), make_double(Dpo(), Train(steps=1)).trainable.network
    batch = Dpo().collate(rows, 0)
    batch = batch.plus(Dpo().reference_columns(network, batch, Context()))
    batch = batch.plus({"reference": batch.columns["reference"].detach() * 0.9})
    both = Dpo(loss_type=("sigmoid", "hinge", "sft"), loss_weights=(0.5, 2.0, 0.25)).terms(network, batch, Context())
    each = [Dpo(loss_type=kind).terms(network, batch, Context())["preference"].total() for kind in ("sigmoid", "hinge")]
    assert both["preference"].total().item() == pytest.approx((0.5 * each[0] + 2 * each[1]).item())
    scored = [label[1:][label[1:] != -100] for label in batch.labels_BT[::2]]
    logits = network(input_ids=batch.ids_BT, attention_mask=batch.attention_BT).logits[::2, :-1].log_softmax(-1)
    nll = sum(
        -logits[row][batch.labels_BT[2 * row, 1:] != -100, tokens].sum().item() for row, tokens in enumerate(scored)
    )
    assert both["sft"].total().item() == pytest.approx(0.25 * nll)
    assert Dpo(loss_type=("sigmoid", "sft")).counts(batch)["sft"] == sum(map(len, scored))
