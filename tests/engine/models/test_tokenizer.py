"""Tokenizers as they are published: what they lack is made up for, or refused in a sentence with the way out."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pyarrow as pa
import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from engine.config.federation import Federation
from engine.config.sections import Model
from engine.config.train import Train
from engine.models.tokenizer import embedded_tokens, load_tokenizer, padding, refuse_unembedded
from engine.models.trainable import Trainable
from engine.objectives.sft import Sft
from engine.training.local_training import LocalTrainer

CHAT = "{% for turn in messages %}{{ bos_token }}{{ turn.role }}: {{ turn.content }}{% endfor %}"
FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def altered(bases: dict[str, Path], tmp_path: Path) -> Callable[..., Model]:
    """Makes a copy of a base whose tokenizer has changed keys, lacks files and has others."""

    def make(keys: dict[str, Any] | None = None, without: tuple[str, ...] = (), **files: str) -> Model:
        folder = copytree(bases["tied"], tmp_path / "base")
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | (keys or {})))
        for name in without:
            (folder / name).unlink()
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text)
        return Model(base=str(folder))

    return make


@pytest.fixture
def with_tokens(bases: dict[str, Path], tmp_path: Path) -> Callable[..., Model]:
    """Makes a copy of a base whose tokenizer has more tokens than the base has embeddings."""

    def make(*tokens: str, **special: str) -> Model:
        folder = copytree(bases["tied"], tmp_path / "base")
        tokenizer = load_tokenizer(Model(base=str(folder)))
        tokenizer.add_tokens([f"<{number}>" for number in range(len(tokenizer), 300)])
        tokenizer.add_tokens(list(tokens))
        for name, token in special.items():
            tokenizer.add_special_tokens({name: token})
        tokenizer.save_pretrained(folder)
        return Model(base=str(folder))

    return make


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(altered: Callable[..., Model]) -> None:
    tokenizer = load_tokenizer(altered({"pad_token": None}))
    assert tokenizer.pad_token == "<end>" and tokenizer.bos_token is None


@pytest.mark.parametrize(
    ("keys", "without", "files", "complaint"),
    [
        (
            {"eos_token": None},
            (),
            {},
            "has no end token, which fine-tuning needs: name one in its tokenizer_config.json",
        ),
        ({}, FILES, {}, "has no tokenizer.json: copy the tokenizer's files of the model that it was made from into"),
        ({}, ("tokenizer.json",), {}, "has no tokenizer.json: copy the tokenizer's files"),
        ({}, FILES, {"tokenizer_model": "x"}, "has no tokenizer.json and tokenizer.model cannot be made into one ("),
        ({}, (), {"tokenizer_json": "{}"}, "has no tokenizer that can be loaded: KeyError: 'added_tokens'"),
        ({}, (), {"tokenizer_json": "{"}, "has no tokenizer that can be loaded: "),
        (
            {"tokenizer_class": "CTRLTokenizer"},
            ("tokenizer.json",),
            {"vocab_json": '{"<unk>": 0, "a</w>": 1, "b": 2}', "merges_txt": "#version: 0.2\na b</w>\n"},
            "is a CTRLTokenizer, which is slow and does not tell where in the text a token lies: convert it",
        ),
    ],
    ids=["no-end", "no-files", "no-vocabulary", "not-a-model", "not-a-tokenizer", "not-json", "slow"],
)
def test_what_cannot_be_used_is_one_sentence(
    altered: Callable[..., Model],
    keys: dict[str, Any],
    without: tuple[str, ...],
    files: dict[str, str],
    complaint: str,
) -> None:
    with pytest.raises(ValueError) as caught:
        load_tokenizer(altered(keys, without, **files))
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_the_only_named_template_that_is_not_for_tools_is_the_usual_one(altered: Callable[..., Model]) -> None:
    named = [{"name": "chat", "template": CHAT}, {"name": "tool_use", "template": "tools"}]
    tokenizer = load_tokenizer(altered({"chat_template": named}))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi"


def test_one_of_several_usual_templates_is_not_chosen(altered: Callable[..., Model]) -> None:
    named = [{"name": name, "template": CHAT} for name in ("chat", "story")]
    assert load_tokenizer(altered({"chat_template": named})).chat_template.keys() == {"chat", "story"}


def test_a_start_token_that_template_and_tokenizer_both_write_stands_once(tokenizer: PreTrainedTokenizerFast) -> None:
    starting = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<pad>", eos_token="<end>", chat_template=CHAT
    )
    starting.backend_tokenizer.post_processor = processors.TemplateProcessing("<pad> $A", None, [("<pad>", 0)])
    try:
        turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        spoken = Sft().encode(pa.table({"messages": [turns]}), starting, 64)["input_ids"].to_pylist()[0]
        written = Sft().encode(pa.table({"prompt": ["one"], "completion": ["two"]}), starting, 64)
        assert spoken[0] == 0 and spoken[1] != 0 and spoken.count(0) == 2  # one before each turn
        assert written["input_ids"].to_pylist()[0].count(0) == 1
    finally:
        starting.backend_tokenizer.post_processor = processors.Sequence([])


def test_a_pad_token_beyond_the_embedding_will_do(
    with_tokens: Callable[..., Model],
    make_trainable: Callable[..., Trainable],
    federation: Federation,
    rows: pa.RecordBatch,
) -> None:
    model = with_tokens(pad_token="[PAD]")
    tokenizer, trainable = load_tokenizer(model), make_trainable(model.base)
    assert tokenizer.pad_token_id == 300 == embedded_tokens(model)
    pads = padding(tokenizer, trainable.network), 7
    losses = [LocalTrainer(trainable, pad, Train(steps=1)).loss_terms(rows, 8)["nll"] for pad in pads]
    assert pads[0] == 0 and losses[0] == losses[1] and torch.tensor(losses[0]).isfinite().all()


def test_a_pad_token_that_is_the_end_stays_it(
    altered: Callable[..., Model], make_trainable: Callable[..., Trainable], bases: dict[str, Path]
) -> None:
    network = make_trainable(bases["tied"]).network
    assert padding(load_tokenizer(altered({"pad_token": "<end>"})), network) == 1


def test_rows_with_a_token_beyond_the_embedding_are_refused(with_tokens: Callable[..., Model]) -> None:
    model = with_tokens("<think>", pad_token="[PAD]")
    tokenizer = load_tokenizer(model)

    def check(prompt: str) -> None:
        columns = Sft().encode(pa.table({"prompt": [prompt], "completion": ["two"]}), tokenizer, 64)
        refuse_unembedded(columns, tokenizer, embedded_tokens(model), model)

    check("one")
    with pytest.raises(
        ValueError, match=r"the token '<think>' \(number 300\), and model\.base '.*' has embeddings for "
    ):
        check("one <think>")
    with pytest.raises(ValueError, match=r"300 tokens: .*resize_token_embeddings\(302\), save it with its tokenizer"):
        check("<think>")
