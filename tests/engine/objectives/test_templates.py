"""Masks on the chat templates that TRL ships, read where it is installed; names, files and dates of templates."""

import copy
import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from datasets_partition.core.turns import Conversation
from datasets_partition.sources.files import Jsonl
from engine.config.sections import Model
from engine.messages.errors import RunError
from engine.models.export import _folder_files
from engine.models.tokenizer import load_tokenizer
from engine.objectives.chat_template import encode_conversations
from engine.objectives.sft import Sft
from engine.objectives.templates import chosen_template, dated, template_file, undated, writes_the_date

SHIPPED = Path(trl.__path__[0]) / "chat_templates"
TWINS = sorted(file.stem.removesuffix("_training") for file in SHIPPED.glob("*_training.jinja"))
CASES = Path(__file__).resolve().parents[4] / "shared" / "cases"


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]
CONVERSATIONS = {
    "one": [user("a"), assistant("b")],
    "two": [user("a"), assistant("b"), user("c"), assistant("d")],
    "system": [{"role": "system", "content": "be brief"}, user("a"), assistant("b"), user("c"), assistant("d")],
    "assistant first": [assistant("hello"), user("c"), assistant("d")],
    "assistant first, empty": [assistant(""), user("c"), assistant("d")],
    "user last": [user("a"), assistant("b"), user("c")],
}
# Known to write what they are given, one mark of the assistant's words after another.
SAME = {"cohere", "cohere2", "gemma", "gemma3", "lfm2", "lfm2_v2", "llama3", "qwen2_5_vl", "qwen3_instruct_2507"}


@pytest.fixture
def chatting(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a place for a template."""
    chatting = copy.deepcopy(tokenizer)
    chatting.bos_token = "<end>"
    return chatting


def shipped(name: str) -> str:
    return (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")


def encoded(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    turns: list[dict[str, Any]],
    learned: list[bool] | None = None,
    **options: Any,
) -> tuple[list[int], list[int]]:
    tokenizer.chat_template = template
    (ids,), (mask,) = encode_conversations([Conversation(turns, learned or [True] * len(turns), options)], tokenizer)
    return ids, mask


def words(tokenizer: PreTrainedTokenizerBase, row: tuple[list[int], list[int]]) -> str:
    return tokenizer.decode([token for token, bit in zip(*row, strict=True) if bit])


@pytest.mark.parametrize("name", TWINS)
def test_a_template_and_its_training_twin_have_the_same_masks_or_it_is_refused(
    chatting: PreTrainedTokenizerBase, name: str
) -> None:
    """Where the twin writes another text there is nothing to compare; where it learns headers too, ours is within."""
    compared = 0
    for case, turns in CONVERSATIONS.items():
        try:
            ids, mask = encoded(chatting, shipped(name), turns)
            twin_ids, twin_mask = encoded(chatting, shipped(f"{name}_training"), turns)
        except RunError as error:
            assert "model.chat_template" in str(error) and "\n" not in str(error)
            continue
        if ids == twin_ids:
            compared += 1
            assert all(theirs or not ours for ours, theirs in zip(mask, twin_mask, strict=True)), case
            assert name not in SAME or mask == twin_mask, case
            assert any(mask), case
    assert compared or name not in SAME


def test_of_a_template_that_drops_earlier_thoughts_the_refusal_names_the_twin(
    chatting: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(RunError, match=r'{% generation %} marks in model\.chat_template, such as "qwen3_training", wh'):
        encoded(chatting, shipped("qwen3"), CONVERSATIONS["two"])
    thoughtful = [user("a"), assistant("b", reasoning_content="why"), user("c"), assistant("d")]
    with pytest.raises(
        RunError, match=r'leaves out the reasoning_content of .*, such as "qwen3_training", which trl sh'
    ):
        encoded(chatting, shipped("qwen3"), thoughtful)
    row = encoded(chatting, shipped("qwen3_training"), thoughtful)
    assert words(chatting, row) == "<think>\nwhy\n</think>\n\nb<|im_end|>\n<think>\n\n</think>\n\nd<|im_end|>\n"


def trainer(tokenizer: PreTrainedTokenizerBase, rows: list[Any], folder: Path, **how: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None, **sizes)
    arguments = SFTConfig(output_dir=str(folder), max_length=1000, report_to="none", use_cpu=True, bf16=False, **how)
    return SFTTrainer(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
    )


def same_as_trl(tokenizer: PreTrainedTokenizerBase, path: Path, theirs: Any) -> None:
    """Our columns of the rows in `path` are a trainer's tokens and labels."""
    rows = Sft().encode(Jsonl(path=str(path)).load().table, tokenizer, 1000)
    batch = theirs.data_collator([*theirs.train_dataset])
    ours = Sft().collate(rows.combine_chunks().to_batches()[0], tokenizer.pad_token_id or 0)
    assert torch.equal(ours.ids_BT, batch["input_ids"]) and torch.equal(ours.labels_BT, batch["labels"])


def test_several_turns_and_tools_are_learned_as_by_trl(chatting: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """TRL puts the training twin in the place of a template that it knows; our recipe names it."""
    result = {"role": "tool", "name": "add", "content": "3"}
    called = [user("a"), assistant("", tool_calls=[CALL]), result, assistant("so 3", reasoning_content="sum")]
    rows = [{"messages": called, "tools": json.dumps(TOOLS)}, {"messages": CONVERSATIONS["system"], "tools": None}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chatting.chat_template = shipped("qwen3")
    theirs = trainer(chatting, rows, tmp_path, assistant_only_loss=True)
    chatting.chat_template = shipped("qwen3_training")
    same_as_trl(chatting, path, theirs)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_training", "llama3"])
def test_a_completion_after_several_turns_is_learned_as_by_trl(
    chatting: PreTrainedTokenizerBase, tmp_path: Path, name: str
) -> None:
    row = {"prompt": [user("2+2?"), assistant("4"), user("plus 1?")], "completion": [assistant("5")]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    chatting.chat_template = shipped(name)
    same_as_trl(chatting, path, trainer(chatting, [row], tmp_path))


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_training"])
def test_turns_that_are_not_learned_have_no_mask(chatting: PreTrainedTokenizerBase, name: str) -> None:
    thought = "<think>\n\n</think>\n\n" if name == "qwen3_training" else ""
    for first, second in ((True, False), (False, True), (False, False)):
        row = encoded(chatting, shipped(name), CONVERSATIONS["two"], [True, first, True, second])
        expected = [f"{thought}{word}<|im_end|>\n" for word, learn in (("b", first), ("d", second)) if learn]
        assert words(chatting, row) == "".join(expected)
        assert row[0] == encoded(chatting, shipped(name), CONVERSATIONS["two"])[0]


def test_marks_that_are_not_one_for_each_turn_do_not_say_which_is_not_learned(
    chatting: PreTrainedTokenizerBase,
) -> None:
    template = "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    with pytest.raises(RunError, match="marks 4 parts of a conversation in which the assistant has 2 turns, so that"):
        encoded(chatting, template, CONVERSATIONS["two"], [True, False, True, True])


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "lfm2"])
def test_an_assistant_that_speaks_first_is_learned_from_its_first_word(
    chatting: PreTrainedTokenizerBase, name: str
) -> None:
    """Qwen2.5 writes a system prompt of its own before, with the word "assistant" in it."""
    for content in ("assistant", "", "You are"):
        turns = [assistant(content), user("c"), assistant("d")]
        learned = words(chatting, encoded(chatting, shipped(name), turns))
        assert learned.startswith(content + ("<|eot_id|>" if name == "llama3" else "<|im_end|>"))


@pytest.mark.parametrize(
    ("name", "turns", "options", "left_out"),
    [
        ("llama3", [user("a"), assistant("b", reasoning_content="why")], {}, "reasoning_content of a turn of the role"),
        ("qwen2_5", [user("a"), assistant("b", thinking="why")], {}, "thinking of a turn of the role assistant"),
        ("llama3", [user("a"), assistant("b", tool_calls=[CALL])], {}, "tool_calls of a turn of the role assistant"),
        ("llama3", [user("a"), assistant("b")], {"tools": TOOLS}, "tools"),
        ("first call", [user("a"), assistant("", tool_calls=[CALL, CALL])], {}, "tool_calls of a turn of the role a"),
        (
            "phi3",
            [user("a"), assistant("b"), {"role": "tool", "content": "3"}],
            {},
            "content of a turn of the role tool",
        ),
        (
            "qwen3",
            [user("a"), {"role": "developer", "content": "x"}, assistant("b")],
            {},
            "content of a turn of the role d",
        ),
        (
            "deepseek_r1_distill",
            [user("a"), assistant("<think>why</think>b")],
            {},
            "words before </think> in the content",
        ),
    ],
)
def test_what_a_template_leaves_out_is_refused(
    chatting: PreTrainedTokenizerBase, name: str, turns: Any, options: Any, left_out: str
) -> None:
    template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls[0] | tojson if m.tool_calls }}{% endfor %}"
    template = template if name == "first call" else shipped(name)
    with pytest.raises(RunError, match=rf"^the chat template of model\.base leaves out the {left_out}.*: name a templ"):
        encoded(chatting, template, turns, **options)


def test_arguments_that_are_no_templates_are_refused(chatting: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RunError, match="rows give the chat template tokenize, which is not its to take: leave it out"):
        encoded(chatting, shipped("llama3"), CONVERSATIONS["one"], tokenize=True)


def test_tools_of_a_tokenizer_with_a_template_for_them(chatting: PreTrainedTokenizerBase) -> None:
    chatting.chat_template = {"default": shipped("llama3"), "tool_use": shipped("qwen3_instruct_2507")}
    conversation = Conversation([user("a"), assistant("", tool_calls=[CALL])], [True, True], {"tools": TOOLS})
    (ids,), (mask,) = encode_conversations([conversation], chatting)
    assert words(chatting, (ids, mask)).startswith("<tool_call>") and '"adds"' in chatting.decode(ids)


def test_a_template_by_name_and_by_file(chatting: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages }}", encoding="utf-8")
    chatting.chat_template = {"chat": "C", "rag": "R"}
    assert chosen_template(chatting, "rag") == "R"
    assert chosen_template(chatting, str(tmp_path / "own.jinja")) == "{{ messages }}"
    assert chosen_template(chatting, "qwen3_training") == shipped("qwen3_training")
    assert template_file("../chat_templates/qwen3") is None
    assert chosen_template(chatting, None) == {"chat": "C", "rag": "R"}  # rows of text need none
    with pytest.raises(RunError, match=r'named chat, rag, none of them "default": name one in model\.chat_template$'):
        encode_conversations([Conversation([user("a")], [False], {})], chatting)
    with pytest.raises(RunError, match=r"is 'qwen', which is no file, no template of the tokenizer \(chat, rag\) and "):
        chosen_template(chatting, "qwen")


def test_a_template_writes_the_recipes_date(chatting: PreTrainedTokenizerBase) -> None:
    template = shipped("llama3_2")
    assert writes_the_date(template) and not writes_the_date(shipped("llama3"))
    for day, written in ((date(2026, 1, 31), "31 Jan 2026"), (date(2025, 12, 1), "01 Dec 2025")):
        ids, mask = encoded(chatting, dated(template, day), CONVERSATIONS["one"])
        assert f"Today Date: {written}\n" in chatting.decode(ids)
        assert words(chatting, (ids, mask)) == "b<|eot_id|>"
    assert undated(dated(template, day)) == template and dated("plain", day) == undated("plain") == "plain"
    text = "\n{{ strftime_now('%Y-%m-%d|%B|%-d/%-m|%H:%M') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    chatting.chat_template = dated(text, date(2026, 3, 4))
    assert chatting.apply_chat_template(CONVERSATIONS["one"], tokenize=False) == ("\n2026-03-04|March|4/3|00:00ab")


def test_the_tokenizer_of_a_recipe_has_its_template_and_date(bases: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "dated.jinja"
    file.write_text("{{ strftime_now('%Y') }}", encoding="utf-8")
    model = Model(base=str(bases["tied"]), chat_template=str(file), template_date="2020-05-06")
    tokenizer = load_tokenizer(model)
    assert tokenizer.apply_chat_template(CONVERSATIONS["one"], tokenize=False) == "2020"
    exported = dict(_folder_files(lambda folder: None, tokenizer, ""))
    assert exported["chat_template.jinja"] == file.read_bytes(), "whoever uses the model has another day"
    assert tokenizer.apply_chat_template(CONVERSATIONS["one"], tokenize=False) == "2020"
    with pytest.raises(
        RunError, match=r"^model\.template_date is '6\.5\.2020': write a day as \"2026-01-31\", or leave"
    ):
        Model(template_date="6.5.2020")


CASE_COLUMNS = {"prompt": "question", "completion": "response", "system": "system_prompt", "client": "id"}


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("07-weight-zero", "Lima, sorry.<|im_end|>\n"),
        ("09-reasoning-content", None),
        ("10-alpaca-history", "Rainy.<end>"),
        ("12-mapped-system", "Arr, 4<|im_end|>\n"),
        ("13-assistant-first-mask", "chat<|im_end|>\nWhat can I do?<|im_end|>\n"),
        ("14-assistant-first-empty", "<|im_end|>\nHi<|im_end|>\n"),
        ("15-prompt-with-assistant-turn", "5<|im_end|>\n"),
        ("16-content-parts", "hello<|im_end|>\n"),
    ],
)
def test_small_inputs_that_failed(chatting: PreTrainedTokenizerBase, name: str, learned: str | None) -> None:
    path = CASES / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip("the shared cases are not here")
    table = Jsonl(path=str(path), columns=CASE_COLUMNS if name.startswith("12") else {}).load().table
    chatting.chat_template = shipped("qwen2_5")
    if learned is None:
        with pytest.raises(RunError, match="leaves out the reasoning_content"):
            Sft().encode(table, chatting, 600)
        chatting.chat_template, learned = shipped("qwen3"), "<think>\n17*3 = 51\n</think>\n\n51<|im_end|>\n"
    row = Sft().encode(table, chatting, 600)
    assert words(chatting, (row["input_ids"][0].as_py(), row["mask"][0].as_py())) == learned


def test_conversations_without_more_are_encoded_together_and_alone_alike(chatting: PreTrainedTokenizerBase) -> None:
    chatting.chat_template = shipped("qwen3_training")
    mixed = [
        Conversation(CONVERSATIONS["two"], [True] * 4, {}),
        Conversation(CONVERSATIONS["two"], [True, False, True, True], {}),
        Conversation(CONVERSATIONS["one"], [True] * 2, {"enable_thinking": False}),
        Conversation(CONVERSATIONS["one"], [True] * 2, {}),
    ]
    together = encode_conversations(mixed, chatting)
    alone = [encode_conversations([each], chatting) for each in mixed]
    assert together == ([ids for (ids,), _ in alone], [mask for _, (mask,) in alone])
    assert pa.array(together[1]).type == pa.list_(pa.int64())
