"""Reward models: worked numbers, TRL's loss and tokens, a head that starts alike everywhere, and what is refused."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    XLNetConfig,
)

from engine.config.adapters import FullTuning, Lora
from engine.config.federation import Federation
from engine.config.sections import Model
from engine.config.train import Sgd, Train
from engine.messages.errors import RunError
from engine.models.adapters import refuse_other_adapters
from engine.models.base_model import map_base, read_base
from engine.models.export import export_files
from engine.models.trainable import Trainable
from engine.objectives.base import Context
from engine.objectives.reward import Reward, scores
from engine.objectives.token_batch import Batch
from engine.training.local_training import LocalTrainer
from strategies.lora.frozen_half import FfaLora
from strategies.lora.products import FedExLora
from tests.engine.objectives import trl_losses

Encoded = Callable[..., pa.RecordBatch]
MakeDouble = Callable[..., LocalTrainer]
IDS_BT = torch.tensor([[5, 9, 7, 4], [8, 6, 0, 0]])  # the second is two tokens and padding


def made(base: Path, peft: Lora | FullTuning | None = None, seed: int = 3) -> Trainable:
    model = Model(base=str(base), peft=peft or Lora(r=4, alpha=8))
    packed, buffer = read_base(model, scores=True)
    return Trainable(map_base(packed, torch.from_numpy(buffer)), model, seed)


class Fixed(torch.nn.Module):
    """A network with these scores."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.logits = torch.tensor(values)[:, None]

    def forward(self, **_: Any) -> Any:
        return self


@pytest.mark.parametrize(("coefficient", "expected"), [(0.0, 0.048587), (0.01, 0.048587 + 0.01 * (2 - 1) ** 2)])
def test_the_loss_is_that_worked_by_hand(coefficient: float, expected: float) -> None:
    ids = torch.tensor([[3, 4], [3, 5]])
    batch = Batch.of(ids, torch.ones_like(ids), ids, 4, group=2)
    terms = Reward(center_rewards_coefficient=coefficient).terms(Fixed(2.0, -1.0), batch, Context())
    values = {name: term.total().item() for name, term in terms.items()}
    assert values.pop("preference") == pytest.approx(expected, abs=1e-6)  # -ln sigmoid(3) + c (2 - 1)^2
    assert values == {"accuracy": 1, "margin": 3, "chosen": 2, "rejected": -1}
    equal = Reward().terms(Fixed(0.5, 0.5), batch, Context())
    assert equal["preference"].total().item() == pytest.approx(math.log(2))
    assert equal["accuracy"].total().item() == 0.5


def test_a_score_is_the_heads_product_with_the_last_token(make_double: MakeDouble) -> None:
    trainer = make_double(Reward(), Train(steps=1))
    network = trainer.trainable.network.eval()
    body, head = network.get_base_model().model, network.get_base_model().score
    batch = Batch.of(IDS_BT, (IDS_BT != 0).long(), IDS_BT, 6)
    with torch.no_grad():
        hidden = (
            body(input_ids=IDS_BT[:1]).last_hidden_state[0, 3],
            body(input_ids=IDS_BT[1:, :2]).last_hidden_state[0, 1],
        )
        expected = torch.stack([head(state)[0] for state in hidden])
        torch.testing.assert_close(scores(network, batch), expected, rtol=0, atol=1e-12)


CONVERSATIONS = [
    {
        "prompt": [{"role": "user", "content": "say the"}],
        "chosen": [{"role": "assistant", "content": "the end"}],
        "rejected": [{"role": "assistant", "content": "hat"}],
    },
    {
        "prompt": [{"role": "user", "content": "one"}],
        "chosen": [{"role": "assistant", "content": "two three"}],
        "rejected": [{"role": "assistant", "content": "and and and and"}],
    },
]
TEMPLATE = "{% for turn in messages %}{{ turn.role + ':' + turn.content }}\n{% endfor %}"


@pytest.mark.parametrize("peft", [Lora(r=4, alpha=8), FullTuning()], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("coefficient", "max_length", "pad", "turns"),
    [(0.0, 64, "<pad>", False), (0.3, 16, "<pad>", False), (0.0, 64, "<end>", False), (0.3, 64, "<pad>", True)],
    ids=["plain", "centered and some dropped", "the end token pads", "conversations"],
)
def test_tokens_loss_figures_and_gradient_are_those_of_trl(
    make_double: MakeDouble,
    tables: dict[str, pa.Table],
    tokenizer: PreTrainedTokenizerFast,
    moved: Callable[..., torch.Tensor],
    peft: Lora | FullTuning,
    coefficient: float,
    max_length: int,
    pad: str,
    turns: bool,
) -> None:
    chosen = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>", pad_token=pad)
    chosen.chat_template = TEMPLATE
    table = pa.Table.from_pylist(CONVERSATIONS) if turns else tables["preference"]
    objective = Reward(center_rewards_coefficient=coefficient)
    trainer = make_double(objective, Train(steps=1), peft)
    trainable = trainer.trainable
    trainable.network.config.pad_token_id = chosen.pad_token_id
    trainer.become(moved(trainer))
    encoded = objective.encode(table, chosen, max_length)
    kept = [number for number, ids in enumerate(encoded["input_ids"].to_pylist()) if ids is not None]
    assert len(kept) < table.num_rows if max_length == 16 else len(kept) == table.num_rows
    (rows,) = encoded.take(kept).combine_chunks().to_batches()
    theirs = trl_losses.reward(
        trainable.network,
        chosen,
        table.to_pylist(),
        max_length=max_length,
        center_rewards_coefficient=coefficient or None,
    )
    assert theirs.rows == kept
    for name, side in (("input_ids", "chosen"), ("rejected_ids", "rejected")):
        assert rows[name].to_pylist() == [tokens.ids for tokens in theirs.sequences[side]]
    trainable.network.eval()
    terms = objective.terms(trainable.network, objective.collate(rows, chosen.pad_token_id), Context())
    trainable.grad.zero_()
    loss = terms["preference"].total() / len(kept)
    loss.backward()
    assert loss.item() == pytest.approx(theirs.loss, abs=1e-5)
    assert [*theirs.parameters] == [*trainable.layout.names]
    assert (trainable.grad - theirs.gradient).norm() < 1e-5 * theirs.gradient.norm()
    for name in ("accuracy", "margin"):
        assert terms[name].total().item() / len(kept) == pytest.approx(theirs.metrics[name], abs=1e-5)


def test_a_new_head_follows_from_the_seed_and_from_nothing_else(bases: dict[str, Path]) -> None:
    heads = [made(bases["tied"], peft).flat[-32:] for peft in (Lora(r=4, alpha=8), FullTuning(), Lora(r=8, alpha=8))]
    assert all(torch.equal(head, heads[0]) for head in heads[1:])
    other = made(bases["tied"], seed=4).flat[-32:]
    assert not torch.equal(other, heads[0]) and 0.01 < other.std() < 0.03


@pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])
@pytest.mark.parametrize("peft", [Lora(r=4, alpha=8), FullTuning()], ids=["lora", "full"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_the_exported_folder_scores_in_plain_transformers_and_peft(
    bases: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, peft: Lora | FullTuning
) -> None:
    trainable = made(bases[name], peft)
    LocalTrainer(trainable, 0, Train(steps=1, objective=Reward()))
    trainable.flat.data.add_(torch.randn(trainable.layout.size, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    trainable.network.eval()
    for merged in (False, True):
        if merged and peft.peft_class is None:
            continue
        folder = tmp_path / f"merged {merged}"
        folder.mkdir()
        for file, content in export_files(trainable, Model(peft=peft), tokenizer, "card", merged=merged).items():
            (folder / file).write_bytes(content)
        whole = merged or peft.peft_class is None
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(folder if whole else bases[name], num_labels=1)
        assert loaded.config.pad_token_id == 0
        network = loaded if whole else PeftModel.from_pretrained(loaded, folder)
        with torch.no_grad():
            ours, theirs = (each(input_ids=IDS_BT).logits for each in (trainable.network, network.eval()))
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
        if whole:  # a classifier as a base keeps its head
            again = made(folder)
            assert torch.equal(again.flat[-32:], trainable.flat[-32:])
            with pytest.raises(RunError, match="not a causal language model"):
                read_base(Model(base=str(folder)))


def test_a_base_in_bfloat16_has_a_head_in_float32(bases: dict[str, Path], encoded: Encoded) -> None:
    model = Model(base=str(bases["tied"]), dtype="bfloat16", peft=Lora(r=4, alpha=8))
    packed, buffer = read_base(model, scores=True)
    trainable = Trainable(map_base(packed, torch.from_numpy(buffer)), model, 3)
    trainer = LocalTrainer(trainable, 0, Train(steps=1, objective=Reward()))
    total, count = trainer.loss_terms(encoded(Reward()), 4)["preference"]
    assert scores(trainable.network, Reward().collate(encoded(Reward()), 0)).dtype == torch.float32
    assert total / count == pytest.approx(math.log(2), abs=0.1)


def test_rules_on_pairs_of_matrices_take_the_head_beside_them(bases: dict[str, Path], federation: Federation) -> None:
    trainable, train = made(bases["tied"]), Train(steps=1, objective=Reward(), optimizer=Sgd())
    for strategy in (FedExLora(), FfaLora()):
        refuse_other_adapters(trainable.network, replace(federation, train=train, strategy=strategy))


def test_bases_without_one_linear_score_are_refused_in_a_sentence(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
    llama = LlamaConfig(**sizes, intermediate_size=16, num_labels=2)
    networks: dict[str, Any] = {
        "no ForSequenceClassification class": AutoModelForCausalLM.from_config(
            CohereConfig(**sizes, intermediate_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        ),
        "classifies by 2 labels": LlamaForSequenceClassification(llama),
        "head is no linear layer": AutoModelForCausalLM.from_config(
            XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=16, vocab_size=30)
        ),
    }
    for why, network in networks.items():
        network.save_pretrained(folder := tmp_path / why)
        with pytest.raises(RunError, match=why):
            made(folder)
