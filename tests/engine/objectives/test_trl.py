"""Preference objectives against TRL's own trainers: losses, gradients, figures, and what rows become."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from datasets_partition.core.types import PREFERENCE, UNPAIRED_PREFERENCE
from engine.config.adapters import Lora
from engine.config.federation import Federation
from engine.config.train import Sgd, Train
from engine.models.adapters import peft_config
from engine.objectives.base import Objective
from engine.objectives.cpo import Cpo, SimPo
from engine.objectives.dpo import Dpo
from engine.objectives.kto import KL_COLUMNS, Kto
from engine.objectives.orpo import Orpo
from engine.objectives.token_batch import IGNORED
from engine.training.local_training import LocalTrainer
from engine.training.step_loop import Training, batches
from tests.engine.objectives.trl_trainers import Sequence, Step, trl_sequences, trl_step, trl_trainer, unpadded

ONE_STEP = Train(steps=1, batch=6, optimizer=Sgd(lr=1.0), clip=0)
SMOOTH = 0.1
POSITIVE, NEGATIVE = 23, 6  # seeds of vectors for which the mean log-ratio of KTO's mismatched completions is such
# TRL's DPO ignores label_smoothing for "sigmoid". With A and B the losses of a pair and of the pair turned round,
# "robust" is ((1 - e) A - e B) / (1 - 2e), so that the conservative loss (1 - e) A + e B is this sum:
CONSERVATIVE = {"loss_type": ["sigmoid", "robust"], "loss_weights": [2 * (1 - SMOOTH), 2 * SMOOTH - 1]}


@dataclass(frozen=True)
class Both:
    """A step from the same vector over the same rows, by TRL and by us."""

    theirs: Step
    ours: dict[str, float]
    grad_P: torch.Tensor

    def agree(self, **figures: float) -> None:
        """Compares loss and gradient, and TRL's metrics with figures of ours, whose names have _ for /."""
        assert self.ours["loss"] == pytest.approx(self.theirs.loss, rel=1e-6)
        assert self.grad_P.norm() > 1e-4
        assert (self.grad_P - self.theirs.grad_P).norm() < 1e-5 * self.grad_P.norm()
        logged = {name.replace("/", "_"): value for name, value in self.theirs.metrics.items()}
        assert figures == pytest.approx({name: logged[name] for name in figures}, rel=1e-5, abs=1e-5)


MakeBoth = Callable[..., Both]


@pytest.fixture
def both(
    bases: dict[str, Path],
    tokenizer: PreTrainedTokenizerFast,
    federation: Federation,
    make_double: Callable[..., LocalTrainer],
    moved: Callable[..., torch.Tensor],
    tmp_path: Path,
) -> MakeBoth:
    """Makes a step of an objective and of one of TRL's trainers; the reference is the base.

    Both are in float64, but TRL's head and some of its sums are in float32.
    """

    def made(objective: Objective, table: pa.Table, kind: str, seed: int = POSITIVE, **options: Any) -> Both:
        trainer = make_double(objective, ONE_STEP)
        encoded = objective.regroup(objective.encode(table, tokenizer, 64), 64)
        (rows,) = encoded.combine_chunks().to_batches()
        start, train = moved(trainer, seed, 0.2), replace(ONE_STEP, batch=rows.num_rows)
        # The step takes the rows in the table's order: KTO's mismatches depend on it.
        (order,) = batches(rows.num_rows, train, np.random.default_rng(1))
        rows = rows.take(pa.array(np.argsort(order)))
        trained = trainer.train([Training(rows, start, np.random.default_rng(1), 0)], train)[0]
        network = AutoModelForCausalLM.from_pretrained(bases["tied"], dtype=torch.float64)
        options["peft_config"] = peft_config(replace(federation.model, peft=Lora(r=4, alpha=8)))
        theirs = trl_trainer(kind, network, table.to_pylist(), tokenizer, tmp_path, **options)
        return Both(trl_step(theirs, start), trained.metrics, start - trained.end)

    return made


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"beta": 0.5}, {}),
        ({"label_smoothing": SMOOTH}, CONSERVATIVE),
        ({"loss_type": "robust", "label_smoothing": SMOOTH}, {}),
        ({"loss_type": "hinge"}, {}),
        ({"loss_type": "ipo"}, {}),
        ({"loss_type": "sigmoid_norm"}, {}),
        ({"loss_type": "exo_pair", "label_smoothing": SMOOTH}, {}),
        ({"loss_type": "nca_pair"}, {}),
        ({"loss_type": "bco_pair"}, {}),
        ({"loss_type": "sppo_hard"}, {}),
        ({"loss_type": "apo_zero"}, {}),
        ({"loss_type": "apo_down"}, {}),
        ({"loss_type": "discopop", "discopop_tau": 0.2}, {}),
        ({"loss_type": ("sigmoid", "sft", "hinge"), "loss_weights": (0.8, 0.5, 2.0)}, {}),
    ],
    ids=lambda options: str(options.get("loss_type", "_".join(options))),
)
def test_dpo_is_trls(
    both: MakeBoth, tables: dict[str, pa.Table], options: dict[str, Any], theirs: dict[str, Any]
) -> None:
    pair = both(Dpo(**options), tables[PREFERENCE], "dpo", **{**options, **theirs})
    beta, ours = options.get("beta", 0.1), pair.ours
    pair.agree(
        rewards_chosen=beta * ours["term.chosen"],
        rewards_rejected=beta * ours["term.rejected"],
        rewards_margins=ours["term.margin"],
        rewards_accuracies=ours["term.accuracy"],
    )


@pytest.mark.parametrize(
    ("seed", "options", "theirs"),
    [
        (POSITIVE, {}, {}),
        (NEGATIVE, {}, {}),
        (POSITIVE, {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.5}, {}),
        (POSITIVE, {"kl": "none", "desirable_weight": 2.0}, {"loss_type": "apo_zero_unpaired"}),
    ],
    ids=["positive", "negative", "weights", "none"],
)
def test_kto_is_trls(
    both: MakeBoth, tables: dict[str, pa.Table], seed: int, options: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """With a client's step as TRL's batch."""
    shared = {name: value for name, value in options.items() if name != "kl"}
    pair = both(Kto(**options), tables[UNPAIRED_PREFERENCE], "kto", seed, **shared, **theirs)
    beta, ours = options.get("beta", 0.1), pair.ours
    kl = ours.get("term.kl", 0.0)  # z0 before it is cut at 0, which TRL logs afterwards
    assert (kl > 0.1) == (seed == POSITIVE and "kl" not in options)
    pair.agree(
        rewards_chosen=beta * ours["term.chosen"],
        rewards_rejected=beta * ours["term.rejected"],
        rewards_margins=beta * (ours["term.chosen"] - ours["term.rejected"]),
        kl=max(0.0, kl),
    )


def test_kto_of_pairs_is_trls(both: MakeBoth, tables: dict[str, pa.Table]) -> None:
    pair = both(Kto(), tables[PREFERENCE], "kto")
    pair.agree(kl=max(0.0, pair.ours["term.kl"]))


@pytest.mark.parametrize(
    "objective",
    [
        Orpo(),
        Orpo(beta=0.5),
        Cpo(),
        Cpo(beta=0.3, cpo_alpha=0.5, label_smoothing=SMOOTH),
        Cpo(cpo_alpha=0.0),
        Cpo(loss_type="hinge"),
        Cpo(loss_type="ipo"),
        SimPo(),
        SimPo(beta=1.5, gamma=0.3, label_smoothing=SMOOTH),
    ],
    ids=lambda objective: objective.kind,
)
def test_losses_without_a_reference_are_trls(both: MakeBoth, tables: dict[str, pa.Table], objective: Any) -> None:
    kind, options = objective.kind, asdict(objective)
    del options["kind"]
    if isinstance(objective, SimPo):  # TRL's CPOTrainer, whose likelihood term has a weight of 1 by default
        kind, options["simpo_gamma"] = "cpo", options.pop("gamma")
        options |= {"loss_type": "simpo", "cpo_alpha": 0.0}
    # The last row's completion takes a token of the prompt, which these trainers mask otherwise (see below).
    pair = both(objective, tables[PREFERENCE].slice(0, 5), kind, **options)
    ours = pair.ours
    figures = {f"rewards_{name}": ours[f"term.{name}"] for name in ("chosen", "rejected")}
    figures |= {"rewards_margins": ours["term.margin"], "rewards_accuracies": ours["term.accuracy"]}
    if isinstance(objective, Orpo):
        figures |= {"nll_loss": ours["term.nll"], "log_odds_ratio": -ours["term.preference"] / objective.beta}
    elif isinstance(objective, Cpo) and objective.cpo_alpha:
        figures["nll_loss"] = ours["term.nll"] / objective.cpo_alpha
    pair.agree(**figures)


PAIRS = [
    ("say the", " end", " the end of it"),
    ("", "the cat and the hat", "hat"),  # no token of the prompt: the first of the completion cannot be scored
    ("already ended: ", "yes<end>", "no<end>"),
    ("empty: ", "", "x"),  # the end token alone
    ("the cat sat ", "on the hat", "and the hat"),  # the rejected side alone has " and", a token with the prompt's end
    ("cut: ", "one two", "one and two and three " * 5),
    ("left out: " + "the cat and the hat " * 9, "four", "five"),  # the prompt fills the length
]
TEXT, TURNS = 18, 66  # lengths that cut the next to last pair
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def rows_of(pairs: list[tuple[Any, Any, Any]], format: str = PREFERENCE) -> pa.Table:
    """Pairs; or their rows as good and bad completions in turn."""
    if format == PREFERENCE:
        return pa.table(dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*pairs, strict=True)), strict=True)))
    labels = [number % 2 == 0 for number in range(len(pairs))]
    completions = [good if label else bad for (_, good, bad), label in zip(pairs, labels, strict=True)]
    return pa.table({"prompt": [prompt for prompt, *_ in pairs], "completion": completions, "label": labels})


def conversed(pairs: list[tuple[str, str, str]]) -> list[tuple[Any, Any, Any]]:
    """The pairs as conversations; the first has a system prompt and an answer before."""

    def said(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    turns = [tuple(said(*turn) for turn in zip(("user", "assistant", "assistant"), p, strict=True)) for p in pairs]
    first, *others = turns
    before = said("system", "count") + said("user", "one") + said("assistant", "two")
    return [(before + first[0], first[1], first[2]), *others]


@pytest.fixture(params=["plain", "begins"])
def any_tokenizer(tokenizer: PreTrainedTokenizerFast, request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template, also one that puts a token before each text."""
    chosen = copy.deepcopy(tokenizer)
    chosen.chat_template = TEMPLATE
    if request.param == "begins":
        chosen.add_special_tokens({"bos_token": "<begin>"})
        processor = TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", chosen.bos_token_id)])
        chosen.backend_tokenizer.post_processor = processor
    return chosen


Encodings = Callable[..., tuple[dict[str, list[Sequence]], dict[str, list[Sequence]]]]


@pytest.fixture
def encodings(bases: dict[str, Path], any_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Encodings:
    """The sequences that rows become, by us and by one of TRL's trainers."""

    def made(objective: Objective, kind: str, table: pa.Table, length: int = TEXT) -> Any:
        network = AutoModelForCausalLM.from_pretrained(bases["tied"])
        options = {"beta": 0.1, "max_length": length}
        theirs = trl_sequences(trl_trainer(kind, network, table.to_pylist(), any_tokenizer, tmp_path, **options))
        encoded = objective.encode(table, any_tokenizer, length)
        (kept,) = encoded.filter(encoded["input_ids"].is_valid()).combine_chunks().to_batches()
        batch = objective.collate(objective.step_rows(kept, np.arange(kept.num_rows)), 0)
        ours = unpadded(batch.ids_BT, batch.attention_BT, batch.labels_BT != IGNORED)
        if KL_COLUMNS[0] in batch.columns:
            return {"": ours, "KL_": unpadded(*(batch.columns[name] for name in KL_COLUMNS))}, theirs
        return {"chosen": ours[::2], "rejected": ours[1::2]}, theirs

    return made


@pytest.mark.parametrize("turns", [False, True], ids=["text", "turns"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_tokens_and_masks_are_trls(encodings: Encodings, kind: str, turns: bool) -> None:
    """Text gets an end token unless it ends with one; turns end as their template ends them."""
    pairs, length = (conversed(PAIRS), TURNS) if turns else (PAIRS, TEXT)
    objective, format = (Dpo(), PREFERENCE) if kind == "dpo" else (Kto(), UNPAIRED_PREFERENCE)
    ours, theirs = encodings(objective, kind, rows_of(pairs, format), length)
    assert ours == theirs
    sequences = [sequence for side in ours.values() for sequence in side]
    assert len(sequences) == 2 * len(PAIRS) - 2, "the row whose prompt fills the length is left out"
    assert max(len(sequence.ids) for sequence in sequences) == length


def test_pairs_that_teach_nothing_are_left_out(encodings: Encodings, any_tokenizer: PreTrainedTokenizerFast) -> None:
    """TRL keeps equal sides, whose gradients cancel, and sides without a token that anything predicts.

    An end token after an empty prompt is such a side, unless a token begins each text. TRL's loss has a value for it.
    """
    ours, theirs = encodings(Dpo(), "dpo", rows_of([("same: ", "x", "x"), ("", "", "x"), PAIRS[0]]))
    kept = [2] if any_tokenizer.bos_token is None else [1, 2]
    for side in ("chosen", "rejected"):
        assert len(theirs[side]) == 3
        assert ours[side] == [theirs[side][number] for number in kept]
    assert theirs["chosen"][0] == theirs["rejected"][0]
    assert len(theirs["chosen"][1].ids) == 1 + (any_tokenizer.bos_token is not None)


def test_tokens_of_cpo_are_trls_but_for_its_older_path(
    encodings: Encodings, any_tokenizer: PreTrainedTokenizerFast
) -> None:
    """ORPO's path in TRL is the same: `build_tokenized_answer` puts ids of begin and end around.

    TRL lets each side's completion start by itself, one token before the prompt's end where tokens differ, so that a
    pair's sides may have different prompts; ours starts where either first differs, as in DPO. A prompt that fills the
    length is kept without a completion, whose mean is 0 / 0; we leave it out.
    """
    ours, theirs = encodings(Cpo(), "cpo", rows_of(PAIRS))
    merged = ours["chosen"][4]
    ours["chosen"][4] = Sequence(merged.ids, [False, *merged.scored[:-1]])
    for side in ("chosen", "rejected"):
        *same, left_out = theirs[side]
        assert ours[side] == same
        assert not any(left_out.scored)


def test_tokens_of_cpos_conversations_are_trls_but_for_its_older_path(
    encodings: Encodings, any_tokenizer: PreTrainedTokenizerFast
) -> None:
    """TRL adds begin and end also to what a template has written; ours is what the template writes, as in DPO."""
    ours, theirs = encodings(Cpo(), "cpo", rows_of(conversed(PAIRS)), TURNS)
    begin = [] if any_tokenizer.bos_token_id is None else [any_tokenizer.bos_token_id]
    for side in ("chosen", "rejected"):
        assert theirs[side][:-1] == [
            Sequence(
                [*begin, *ids, any_tokenizer.eos_token_id][:TURNS], [*(False for _ in begin), *scored, True][:TURNS]
            )
            for ids, scored in ours[side]
        ]
