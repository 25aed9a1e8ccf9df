"""Messages as Sft encodes them, against what TRL's SFTTrainer makes of the same rows."""

import copy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from engine.objectives.base import require_format
from engine.objectives.sft import Sft
from engine.objectives.token_batch import IGNORED

MAX_LENGTH = 100
HEAD = "{% for message in messages %}<|{{ message.role }}|>\n"
TAIL = "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
PLAIN = HEAD + "{{ message.content }}<end>\n" + TAIL
MARKED = (
    HEAD + "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<end>\n{% endgeneration %}"
    "{% else %}{{ message.content }}<end>\n{% endif %}" + TAIL
)


def said(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ["system"] * (system is not None) + ["user", "assistant"] * len(contents)
    texts = ([system] if system is not None else []) + list(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


CONVERSATIONS = [
    said("name a color", "green"),
    said("one", "two", "three", "four", system="count"),
    said("the cat", "and the hat", "in the end"),  # the user has the last word
    said("über", "naïve 🙂\n\ttabs"),
    said("go on", "and one and two and three " * 20),
    [{"role": "assistant", "content": "the assistant begins"}, {"role": "user", "content": "and ends"}],
]


@pytest.fixture
def chatting(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a place for a template."""
    return copy.deepcopy(tokenizer)


def encoded(conversations: list[Any], tokenizer: PreTrainedTokenizerBase, template: str) -> pa.Table:
    tokenizer.chat_template = template
    return Sft().encode(
        pa.table({"client": ["x"] * len(conversations), "messages": conversations}), tokenizer, MAX_LENGTH
    )


def batch_of(rows: pa.Table) -> pa.RecordBatch:
    (batch,) = rows.filter(rows["input_ids"].is_valid()).combine_chunks().to_batches()
    return batch


def learned(rows: pa.Table, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    batch = Sft().collate(batch_of(rows), 0)
    return [tokenizer.decode(labels[labels != IGNORED]) for labels in batch.labels_BT]


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_only_the_assistants_turns_are_learned(chatting: PreTrainedTokenizerBase, template: str) -> None:
    rows = encoded(CONVERSATIONS, chatting, template)
    assert chatting.decode(rows["input_ids"][1].as_py()) == (
        "<|system|>\ncount<end>\n<|user|>\none<end>\n<|assistant|>\ntwo<end>\n"
        "<|user|>\nthree<end>\n<|assistant|>\nfour<end>\n"
    )
    texts = learned(rows, chatting)
    assert texts[:4] == ["green<end>\n", "two<end>\nfour<end>\n", "and the hat<end>\n", "naïve 🙂\n\ttabs<end>\n"]
    assert texts[4].startswith("and one and two and") and "<end>" not in texts[4]
    assert texts[5] == "the assistant begins<end>\n"


@pytest.mark.parametrize("template", [MARKED, PLAIN])
@pytest.mark.parametrize("content", ["", "assistant", "a"])
def test_an_assistant_may_begin_with_nothing_or_with_what_the_template_writes(
    chatting: PreTrainedTokenizerBase, template: str, content: str
) -> None:
    """The turn begins after its header, which holds the word "assistant" too."""
    conversation = [{"role": "assistant", "content": content}, *said("name a color", "green")]
    assert learned(encoded([conversation], chatting, template), chatting) == [f"{content}<end>\ngreen<end>\n"]


def test_tokens_and_labels_are_trls(chatting: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = encoded(CONVERSATIONS, chatting, MARKED)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(chatting),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_length=MAX_LENGTH,
        assistant_only_loss=True,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=Dataset.from_list([{"messages": turns} for turns in CONVERSATIONS]),
        processing_class=chatting,
    )
    theirs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(CONVERSATIONS))])
    assert chatting.pad_token_id is not None
    ours = Sft().collate(batch_of(rows), chatting.pad_token_id)
    assert torch.equal(ours.ids_BT, theirs["input_ids"])
    assert torch.equal(ours.labels_BT, theirs["labels"])
    assert torch.equal(ours.attention_BT, theirs["attention_mask"])


def test_templates_with_and_without_marks_give_the_same(chatting: PreTrainedTokenizerBase) -> None:
    assert encoded(CONVERSATIONS, chatting, PLAIN).equals(encoded(CONVERSATIONS, chatting, MARKED))


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_rows_with_nothing_to_learn_are_null(chatting: PreTrainedTokenizerBase, template: str) -> None:
    rows = encoded([said("the user alone"), said("a " * MAX_LENGTH, "cut away"), said("a", "b")], chatting, template)
    assert rows["input_ids"].is_null().to_pylist() == rows["mask"].is_null().to_pylist() == [True, True, False]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            None,
            r"the rows are conversations, but the tokenizer of model\.base has no chat template: name a base that",
        ),
        ("{{ raise_exception('no system') }}", r"model\.base refuses a conversation \(no system\): leave it out"),
        (
            "{{ 1 + messages[0].content }}",
            r"refuses a conversation \(TypeError: unsupported .*\): leave it",
        ),
        (
            "{{ messages | length }}" + PLAIN,
            r"otherwise than its generation prompt begins it, .*model\.chat_template$",
        ),
        (
            PLAIN.replace("{{ message.content }}", "{{ message.content if loop.last else '' }}"),
            r"leaves out the content of a turn of the role user: name a template that writes them in model",
        ),
        (
            PLAIN + "{{ '' if add_generation_prompt else '<bye>' }}",
            r"otherwise when more follows, .* {% generation %}",
        ),
    ],
)
def test_templates_that_will_not_do(chatting: PreTrainedTokenizerBase, template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoded([said("a", "b", "c")], chatting, template)


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}, r"preference pairs \(prompt, chosen, rejected\)"),
        (
            {"prompt": ["a"], "completion": ["b"], "label": [True]},
            r"unpaired preferences \(prompt, completion, label\)",
        ),
        ({"prompt": ["a"]}, r"prompts alone \(prompt\)"),
    ],
)
def test_rows_of_other_formats_are_refused(columns: Any, kind: str) -> None:
    message = (
        f'^train.objective = "sft" learns from texts, prompts with completions or conversations, but the rows '
        f"are {kind}: "
        r"name yours in data\.source\.columns so that they make prompt, completion or messages$"
    )
    with pytest.raises(ValueError, match=message):
        require_format(Sft(), pa.table(columns))
