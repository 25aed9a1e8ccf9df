import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.config.adapters import FullTuning
from engine.config.federation import Federation
from engine.config.train import AdamW, Sgd, Train
from engine.objectives.base import Context, Term
from engine.objectives.sft import Sft
from engine.objectives.token_batch import Batch, token_losses
from engine.training.local_training import Job
from engine.training.per_example import PrivateTrainer
from engine.training.step_loop import Training
from strategies.averaging.drift import FedProx
from strategies.core.protocol import Broadcast, Update
from strategies.privacy.noise import seeded_words

ONE_STEP = Train(steps=1, batch=2, accumulate=3, optimizer=Sgd(lr=1.0))  # all five rows, in pieces of 2, 2 and 1

MakePrivate = Callable[..., PrivateTrainer]


def start_of(trainer: PrivateTrainer) -> torch.Tensor:
    """A vector whose LoRA B is not zero, so that every tensor has a gradient."""
    noise = torch.from_numpy(np.random.default_rng(5).standard_normal(trainer.trainable.layout.size)).float()
    return trainer.trainable.initial + 0.02 * noise


def change(trainer: PrivateTrainer, rows: pa.RecordBatch, train: Train = ONE_STEP, **options: Any) -> torch.Tensor:
    """What steps on these rows change of the vector (P,)."""
    start = start_of(trainer)
    training = Training(rows, start, np.random.default_rng(9), 0, **options)
    return trainer.train([training], train)[0].end - start


def traces(network: nn.Module) -> list[str]:
    """What training by Opacus has left on modules and parameters."""
    left = [f"hook on {name}" for name, m in network.named_modules() if m._forward_hooks or m._backward_hooks]
    names = {"activations", "max_batch_len", "ft_compute_sample_grad", "autograd_grad_sample_hooks"}
    left += [f"{key} of {name}" for name, m in network.named_modules() for key in names & vars(m).keys()]
    return left + [f"{key} of {name}" for name, p in network.named_parameters() for key in vars(p)]


def trained(
    trainer: PrivateTrainer, rows: pa.RecordBatch, federation: Federation, client: int, seed: int = 0
) -> tuple[torch.Tensor, dict[str, float]]:
    trainer.words = seeded_words(np.random.default_rng(seed))
    update: Update = trainer.updates([Job(client, rows, 0.5, Broadcast(2, start_of(trainer)), {})], federation)[0][0]
    return update.delta, update.metrics


@pytest.mark.parametrize("optimizer", [AdamW(lr=1e-2), Sgd(lr=0.1, momentum=0.9)], ids=["adamw", "sgd"])
def test_no_client_leaves_a_trace_in_the_next(
    federation: Federation, make_private: MakePrivate, rows: pa.RecordBatch, optimizer: AdamW | Sgd
) -> None:
    train = Train(steps=4, batch=2, optimizer=optimizer)
    federation = replace(federation, train=train, strategy=FedProx(mu=0.1))
    used, fresh = make_private(1.0, 0.1, train), make_private(1.0, 0.1, train)
    first = trained(used, rows.slice(0, 2), federation, client=1)
    assert traces(used.trainable.network) == []
    after, alone = trained(used, rows.slice(2), federation, 2), trained(fresh, rows.slice(2), federation, 2)
    assert torch.equal(after[0], alone[0]) and after[1] == alone[1]
    assert first[0].any() and not torch.equal(after[0], trained(used, rows.slice(2), federation, 2, seed=1)[0])


def test_an_error_leaves_no_trace_either(make_private: MakePrivate, rows: pa.RecordBatch) -> None:
    trainer, fresh = make_private(1.0, 0.1), make_private(1.0, 0.1)

    def fails(grad_KP: torch.Tensor, params_KP: torch.Tensor) -> None:
        token_losses(trainer.trainable.network, trainer.objective.collate(rows, 0))  # as if backward failed
        raise MemoryError

    with pytest.raises(MemoryError):
        change(trainer, rows, correct=fails)
    assert traces(trainer.trainable.network) == []
    trainer.words = seeded_words(np.random.default_rng(11))
    assert torch.equal(change(trainer, rows), change(fresh, rows))


class SometimesNan(Sft):
    """Rows with five learned tokens are lost in NaN."""

    def terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        logits_BTV = network(input_ids=batch.ids_BT, attention_mask=batch.attention_BT).logits[:, :-1]
        labels_BT = batch.labels_BT[:, 1:]
        factor_B = torch.where((labels_BT != -100).sum(1) == 5, float("nan"), 1.0)
        logits_BTV = logits_BTV * factor_B[:, None, None]
        nll_BT = F.cross_entropy(logits_BTV.mT, labels_BT, reduction="none")
        return {"nll": Term(nll_BT[batch.row_N, batch.place_N], batch.row_N)}


def test_a_row_without_a_finite_gradient_moves_nothing(make_private: MakePrivate, rows: pa.RecordBatch) -> None:
    learned = [sum(mask[1:]) for mask in rows["mask"].to_pylist()]
    kept = rows.take([row for row, count in enumerate(learned) if count != 5])
    assert 0 < kept.num_rows < 5
    all_of_them = change(make_private(clip=0.1, objective=SometimesNan()), rows)
    torch.testing.assert_close(5 * all_of_them, kept.num_rows * change(make_private(clip=0.1), kept))


class Forgetful(Sft):
    """Uses parameters past their layers, where no hook of a layer sees it."""

    def terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        term = super().terms(network, batch, context)["nll"]
        unseen = torch.stack([p.sum() for p in network.parameters() if p.requires_grad]).sum()
        return {"nll": Term(term.values_N + unseen, term.row_N)}


def test_gradients_that_opacus_does_not_see_are_refused(make_private: MakePrivate, rows: pa.RecordBatch) -> None:
    with pytest.raises(ValueError, match=r"do not sum up to the gradient: train adapters"):
        change(make_private(objective=Forgetful()), rows)


def test_a_parameter_without_rows_gradients_is_refused(
    make_private: MakePrivate, rows: pa.RecordBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of all rows in one dimension, and a layer that is not used at all."""
    message = r"does not give for .*q_proj\.lora_A.* of this model: train adapters"
    flat = make_private()
    layer = flat.trainable.network.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    monkeypatch.setattr(layer, "forward", lambda x_BTI: type(layer).forward(layer, x_BTI.flatten(0, 1)).view_as(x_BTI))
    with pytest.raises(ValueError, match=message):
        change(flat, rows)
    assert traces(flat.trainable.network) == []
    unused = make_private()
    layer = unused.trainable.network.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    monkeypatch.setattr(layer, "forward", layer.base_layer.forward)
    with pytest.raises(ValueError, match=message):
        change(unused, rows)


def test_training_that_moves_nothing_is_an_error(make_private: MakePrivate, rows: pa.RecordBatch) -> None:
    trainer = make_private()
    trainer.optimizer.step = lambda: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="private steps moved no weight"):
        change(trainer, rows)
    assert not change(make_private(1.0), rows, replace(ONE_STEP, optimizer=Sgd(lr=0.0))).any()


def test_tied_parameters_are_refused(make_private: MakePrivate) -> None:
    message = r"not supported for tied parameters, and lm_head\.weight is .*embed_tokens\.weight: train adapters"
    with pytest.raises(ValueError, match=message):
        make_private(base="tied", peft=FullTuning())


def test_a_missing_library_is_one_sentence(make_private: MakePrivate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    with pytest.raises(ValueError, match=r'not installed: pip install "fedpost\[opacus\]"'):
        make_private()
