"""Sft against what TRL's SFTTrainer makes of the same rows, and against the loss that a model computes itself."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.data_utils import pack_dataset

from datasets_partition.core.turns import Conversation
from engine.objectives.base import Context
from engine.objectives.sft import Sft
from engine.objectives.token_batch import IGNORED, Batch, token_losses

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "stories260k"
MAX_LENGTH = 24
PAIRS = [
    ("say th", "e end"),  # "the" is one token: the completion begins within the prompt's last word
    ("name a color: ", "green"),
    ("", "a plain text, trained whole and long enough to be cut somewhere near its end"),
    ("", "short"),
    ("a prompt that alone fills all of the tokens there are, and then some: ", "cut away entirely"),
    ("count: ", "one two three four five six seven eight nine ten eleven twelve thirteen"),
    ("über ", "naïve 🙂\n\ttabs"),
    ("nothing is said: ", ""),
]


@pytest.fixture(params=["made here", "stories260k"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if request.param == "made here":
        return tokenizer
    if not SHARED.is_dir():
        pytest.skip("the shared data is not here")
    return AutoTokenizer.from_pretrained(SHARED)


def table(*pairs: tuple[str, str]) -> pa.Table:
    prompts, completions = zip(*pairs, strict=True)
    return pa.table({"prompt": prompts, "completion": completions})


def encoded(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int = MAX_LENGTH) -> Any:
    return Sft().encode(table(*pairs), tokenizer, max_length)


def kept(rows: pa.Table) -> pa.RecordBatch:
    (batch,) = rows.filter(rows["input_ids"].is_valid()).combine_chunks().to_batches()
    return batch


def loss(network: Any, batch: Batch) -> tuple[torch.Tensor, int]:
    """The sum and the count of the loss's only term."""
    (term,), counts = Sft().terms(network, batch, Context()).values(), Sft().counts(batch)
    assert counts == {"nll": len(term.values_N)}
    return term.total(), counts["nll"]


def llama(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def test_tokens_and_labels_are_trls(any_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    pairs = [*PAIRS, ("already ended: ", f"yes{any_tokenizer.eos_token}")]
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_length=MAX_LENGTH,
        completion_only_loss=True,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(
        model=llama(len(any_tokenizer)),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": p, "completion": c} for p, c in pairs]),
        processing_class=any_tokenizer,
    )
    theirs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    assert any_tokenizer.pad_token_id is not None
    ours = Sft().collate(kept(encoded(pairs, any_tokenizer)), any_tokenizer.pad_token_id)
    assert len(pairs) - 1 == len(ours.ids_BT), "the row whose completion is cut away is left out"
    assert torch.equal(ours.ids_BT, theirs["input_ids"])
    assert torch.equal(ours.labels_BT, theirs["labels"])
    assert torch.equal(ours.attention_BT, theirs["attention_mask"])


def test_the_loss_is_the_models_own(any_tokenizer: PreTrainedTokenizerBase) -> None:
    network, objective = llama(len(any_tokenizer)), Sft()
    batch = objective.collate(kept(encoded(PAIRS, any_tokenizer)), 0)
    nll, learned = loss(network, batch)
    theirs = network(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, labels=batch.labels_BT).loss
    assert learned == int((batch.labels_BT[:, 1:] != IGNORED).sum())
    assert nll.item() / learned == pytest.approx(theirs.item(), rel=1e-6)


def test_the_completion_begins_where_the_tokens_differ(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = encoded([("say th", "e end")], tokenizer, 64)
    ids, mask = rows["input_ids"][0].as_py(), rows["mask"][0].as_py()
    learned = [token for token, bit in zip(ids, mask, strict=True) if bit]
    assert ids == tokenizer("say the end<end>")["input_ids"]
    assert tokenizer.decode(learned) == " the end<end>"


@pytest.mark.parametrize(
    ("prompt", "completion", "learned"),
    [
        ("ab: ", "xyz", "xyz<end>"),
        ("ab: ", "xyz<end>", "xyz<end>"),
        ("ab: ", "", "<end>"),
        ("", "xyz", "yz<end>"),  # nothing comes before the first token
        ("ab: ", "0123456789", "01234567"),  # twelve tokens at most: the end token is cut too
        ("ab: ", "0123456", "0123456<end>"),
    ],
)
def test_what_is_learned_by_hand(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, learned: str
) -> None:
    objective = Sft()
    batch = objective.collate(kept(encoded([(prompt, completion)], tokenizer, 12)), 0)
    labels = batch.labels_BT[0, 1:]
    assert tokenizer.decode(labels[labels != IGNORED]) == learned


@pytest.mark.parametrize(
    ("prompt", "completion", "dropped"),
    [("0123456789ab", "xyz", True), ("0123456789a", "xyz", False), ("0123456789abcdef", "", True), ("", "", True)],
)
def test_rows_with_nothing_to_learn_are_null(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, dropped: bool
) -> None:
    rows = encoded([(prompt, completion)], tokenizer, 12)
    assert rows["input_ids"].is_null().to_pylist() == rows["mask"].is_null().to_pylist() == [dropped]


@settings(deadline=None, max_examples=60)
@given(pairs=st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), min_size=1, max_size=5))
def test_masks_are_a_prefix_of_zeros(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]) -> None:
    rows = encoded(pairs, tokenizer)
    assert (rows.schema.types, rows.num_rows) == ([pa.list_(pa.int32()), pa.list_(pa.int8())], len(pairs))
    for (prompt, completion), ids, mask in zip(
        pairs, rows["input_ids"].to_pylist(), rows["mask"].to_pylist(), strict=True
    ):
        if ids is not None:
            assert len(ids) == len(mask) <= MAX_LENGTH
            assert mask == sorted(mask) and mask[-1] == 1
            assert ids == tokenizer(prompt + completion + "<end>")["input_ids"][:MAX_LENGTH]


def test_collate_by_hand() -> None:
    (rows,) = pa.table({"input_ids": [[5, 6, 7], [8, 9]], "mask": [[0, 1, 1], [0, 1]]}).to_batches()
    batch = Sft().collate(rows, 2)
    assert batch.ids_BT.tolist() == [[5, 6, 7], [8, 9, 2]]
    assert batch.attention_BT.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels_BT.tolist() == [[-100, 6, 7], [-100, 9, -100]]


def test_columns_of_an_objective_lie_beside_their_rows_in_lanes() -> None:
    """A value or several for each row, of lanes with two rows, without any, and with one."""
    (rows,) = pa.table({"input_ids": [[5, 6, 7], [8, 9]], "mask": [[0, 1, 1], [0, 1]]}).to_batches()
    parts = {
        "flag": (torch.tensor([True, False]), torch.tensor([True])),
        "other": (torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6, 7]])),
    }
    two, single = (
        replace(Sft().collate(rows.slice(0, count), 2), columns={name: values[part] for name, values in parts.items()})
        for part, count in enumerate((2, 1))
    )
    batch = Batch.side_by_side([two, None, single], 2).to(torch.device("cpu"))
    assert batch.columns["flag"].tolist() == [True, False, False, False, True, False]
    assert batch.columns["other"].tolist() == [[1, 2, 0], [3, 4, 0], *[[0, 0, 0]] * 2, [5, 6, 7], [0, 0, 0]]
    assert batch.ids_BT.tolist() == [[5, 6, 7], [8, 9, 2], *[[2, 2, 2]] * 2, [5, 6, 7], [2, 2, 2]]
    assert batch.attention_BT.tolist() == [[1, 1, 1], [1, 1, 0], *[[1, 0, 0]] * 2, [1, 1, 1], [1, 0, 0]]
    assert batch.row_N.tolist() == [0, 0, 1, 4, 4] and batch.place_N.tolist() == [0, 1, 0, 0, 1]


def test_a_sample_is_the_prompt_and_its_answer() -> None:
    turns = [{"role": role, "content": content} for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert Sft().sample({"prompt": "p", "completion": "c"}) == ("p", "c")
    assert Sft().sample({"messages": turns}) == (Conversation(turns[:1], [True], {}), "b")


@pytest.mark.parametrize("name", ["tied", "gpt2"])
def test_padding_never_changes_a_loss(bases: dict[str, Path], rows: pa.RecordBatch, name: str) -> None:
    network, objective = AutoModelForCausalLM.from_pretrained(bases[name]).eval(), Sft()

    def losses(batch: Batch) -> tuple[float, int]:
        nll, learned = loss(network, batch)
        return nll.item(), learned

    alone = [losses(objective.collate(rows.slice(i, 1), 0)) for i in range(rows.num_rows)]
    together = objective.collate(rows, 0)
    nll, learned = sum(nll for nll, _ in alone), sum(learned for _, learned in alone)
    fills = (7, 0, IGNORED)
    vectors = [together.ids_BT, together.attention_BT, together.labels_BT]
    padded = [F.pad(x, (0, 9), value=v) for x, v in zip(vectors, fills, strict=True)]
    wider = Batch.of(padded[0], padded[1], padded[2], together.tokens)
    for batch in (together, wider, objective.collate(rows, 255)):
        assert losses(batch) == (pytest.approx(nll, rel=1e-5), learned)


@pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])
def test_logits_are_computed_where_a_label_is(bases: dict[str, Path], rows: pa.RecordBatch, name: str) -> None:
    network, objective = AutoModelForCausalLM.from_pretrained(bases[name]).eval(), Sft()
    batch, seen = objective.collate(rows, 0), list[torch.Size]()
    head = network.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, logits: seen.append(logits.shape))
    some, count = loss(network, batch)
    hook.remove()
    assert seen == [(1, count, 300)] and count == batch.learned < batch.tokens
    each, chosen = (
        objective.terms(network, batch, Context(every_logit=every))["nll"].by_row(len(batch.ids_BT))
        for every in (True, False)
    )
    assert some.item() == pytest.approx(each.sum().item(), rel=1e-6)
    assert chosen.tolist() == pytest.approx(each.tolist(), rel=1e-6)


def test_gradients_come_from_the_learned_tokens_alone(bases: dict[str, Path], rows: pa.RecordBatch) -> None:
    """The loss of a row does not move when what is not learned is predicted better."""
    network, objective = AutoModelForCausalLM.from_pretrained(bases["untied"]).eval(), Sft()
    batch = objective.collate(rows, 0)
    logits_BTV = network(input_ids=batch.ids_BT, attention_mask=batch.attention_BT).logits.detach().requires_grad_()
    network.forward = lambda **_: SimpleNamespace(logits=logits_BTV)
    token_losses(network, batch, every_logit=True).sum().backward()
    assert logits_BTV.grad is not None
    moved_BT = logits_BTV.grad.abs().sum(-1) > 0
    assert torch.equal(moved_BT[:, :-1], batch.labels_BT[:, 1:] != IGNORED)
    assert not moved_BT[:, -1].any()


@pytest.mark.parametrize("length", [5, 16, 1000])
def test_packed_blocks_are_those_of_trl(tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """No token is lost, and nothing is cut but at the ends of blocks."""
    objective = Sft(packing=True)
    rows = table(*PAIRS)
    encoded = objective.encode(rows, tokenizer, length)
    packed = objective.regroup(encoded.filter(encoded["input_ids"].is_valid()), length)
    single = Sft().encode(rows, tokenizer, 10**6)
    theirs = pack_dataset(Dataset.from_list(single.to_pylist()), length, strategy="wrapped")
    wanted = [(ids, mask) for ids, mask in zip(theirs["input_ids"], theirs["mask"], strict=True) if any(mask[1:])]
    assert list(zip(packed["input_ids"].to_pylist(), packed["mask"].to_pylist(), strict=True)) == wanted
    assert max(len(ids) for ids, _ in wanted) <= length
    assert objective.regroup(encoded.slice(0, 0), length).num_rows == 0
