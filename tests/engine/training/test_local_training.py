from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine.config.adapters import FullTuning, Lora
from engine.config.federation import Federation
from engine.config.train import AdamW, Sgd, Train
from engine.models.base_model import map_base, read_base
from engine.models.trainable import Trainable
from engine.objectives.token_batch import token_losses
from engine.training.local_training import Job, LocalTrainer, _on
from strategies.averaging.drift import FedProx
from strategies.averaging.fedavg import FedAvg
from strategies.core.protocol import Broadcast, Update

Training = Callable[..., Federation]
MakeTrainer = Callable[[Federation], LocalTrainer]
OPTIMIZERS = [AdamW(lr=1e-2, weight_decay=0.1), Sgd(lr=0.1, momentum=0.9), Sgd(lr=0.1)]
NAMES = ["adamw", "sgd with momentum", "sgd"]


def trained(trainer: LocalTrainer, federation: Federation, rows: pa.RecordBatch, client: int = 1) -> Update:
    broadcast = Broadcast(2, start_of(trainer))
    return trainer.updates([Job(client, rows, 0.5, broadcast, {})], federation)[0][0]


def start_of(trainer: LocalTrainer) -> torch.Tensor:
    """A vector whose LoRA B is not zero, so that every tensor has a gradient."""
    noise = torch.from_numpy(np.random.default_rng(5).standard_normal(trainer.trainable.layout.size)).float()
    return trainer.trainable.initial + 0.02 * noise


@pytest.mark.parametrize("peft", [Lora(r=4, alpha=8, dropout=0.2), FullTuning()], ids=["lora", "full"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=NAMES)
def test_no_client_leaves_a_trace_in_the_next(
    federation: Federation,
    make_trainer: MakeTrainer,
    rows: pa.RecordBatch,
    optimizer: AdamW | Sgd,
    peft: Lora | FullTuning,
) -> None:
    federation = replace(
        federation, train=Train(steps=4, batch=2, optimizer=optimizer), model=replace(federation.model, peft=peft)
    )
    used, fresh = make_trainer(federation), make_trainer(federation)
    first = trained(used, federation, rows.slice(0, 2), client=1)
    after, alone = trained(used, federation, rows.slice(2), client=2), trained(fresh, federation, rows.slice(2), 2)
    assert torch.equal(after.delta, alone.delta)
    assert after.metrics == alone.metrics
    assert first.delta.any() and not torch.equal(first.delta, after.delta)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=NAMES)
def test_the_optimizer_on_the_flat_vector_is_the_one_on_its_tensors(
    training: Training, make_trainer: MakeTrainer, rows: pa.RecordBatch, optimizer: AdamW | Sgd
) -> None:
    """A plain loop over the same full batch, with torch's own unfused optimizer on the model's parameters."""
    federation = training(Train(steps=3, batch=5, optimizer=optimizer, clip=0))
    trainer, other = make_trainer(federation), make_trainer(federation)
    delta = trained(trainer, federation, rows).delta

    start, network = start_of(other), other.trainable.network
    other.trainable.flat.data.copy_(start)
    parameters = [p for p in network.parameters() if p.requires_grad]
    if isinstance(optimizer, AdamW):
        reference: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, foreach=False)
    else:
        reference = torch.optim.SGD(parameters, lr=0.1, momentum=optimizer.momentum, foreach=False)
    batch = other.objective.collate(rows, 0)
    network.train()
    for _ in range(3):
        reference.zero_grad(set_to_none=False)
        network(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, labels=batch.labels_BT).loss.backward()
        reference.step()
    torch.testing.assert_close(delta, other.trainable.flat.detach() - start, rtol=1e-3, atol=1e-5)


def test_metrics_of_a_single_step_by_hand(training: Training, make_trainer: MakeTrainer, rows: pa.RecordBatch) -> None:
    federation = training(Train(steps=1, batch=5))
    trainer = make_trainer(federation)
    update = trained(trainer, federation, rows)
    trainer.trainable.flat.data.copy_(start_of(trainer))
    nll = token_losses(trainer.trainable.network, trainer.objective.collate(rows, 0)).mean()
    lengths = [len(ids) for ids in rows["input_ids"].to_pylist()]
    assert update.metrics["loss"] == pytest.approx(nll.item(), rel=1e-6)
    assert (update.metrics["rows"], update.metrics["steps"], update.metrics["tokens"]) == (5, 1, sum(lengths))
    assert (update.client, update.weight) == (1, 0.5)


def test_rows_steps_and_tokens_are_those_trained_on(
    training: Training, make_trainer: MakeTrainer, rows: pa.RecordBatch
) -> None:
    federation = training(Train(epochs=2, batch=2))
    metrics = trained(make_trainer(federation), federation, rows).metrics
    lengths = [len(ids) for ids in rows["input_ids"].to_pylist()]
    assert (metrics["rows"], metrics["steps"], metrics["tokens"]) == (5, 6, 2 * sum(lengths))


def test_seed_round_and_client_decide_the_batches(
    training: Training, make_trainer: MakeTrainer, rows: pa.RecordBatch
) -> None:
    federation = training(Train(steps=1, batch=2, optimizer=Sgd(lr=0.1)))
    trainer = make_trainer(federation)
    deltas = [trained(trainer, federation, rows, client).delta for client in range(6)]
    assert len({tuple(delta.tolist()) for delta in deltas}) > 1
    reseeded = [trained(trainer, replace(federation, seed=8), rows, client).delta for client in range(6)]
    assert any(not torch.equal(a, b) for a, b in zip(deltas, reseeded, strict=True))


def test_the_proximal_term_holds_clients_near_the_global_model(
    training: Training, make_trainer: MakeTrainer, rows: pa.RecordBatch
) -> None:
    train = Train(steps=6, batch=5, optimizer=Sgd(lr=0.1), clip=0)
    trainer = make_trainer(training(train))
    deltas = {mu: trained(trainer, training(train, strategy=FedProx(mu=mu)), rows).delta for mu in (0.0, 0.1, 1.0, 5.0)}
    assert torch.equal(deltas[0.0], trained(trainer, training(train, strategy=FedAvg()), rows).delta)
    norms = [delta.norm().item() for delta in deltas.values()]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 0.5 * norms[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_global_vector_of_the_proximal_term_is_on_the_clients_gpu(training: Training, rows: pa.RecordBatch) -> None:
    federation = training(Train(steps=2, batch=5), strategy=FedProx(mu=0.1))
    packed, buffer = read_base(federation.model)
    trainable = Trainable(map_base(packed, torch.from_numpy(buffer).cuda()), federation.model, 3)
    trainer = LocalTrainer(trainable, 0, federation.train)
    assert trained(trainer, federation, rows).delta.any()


def test_clipping_bounds_the_step(training: Training, make_trainer: MakeTrainer, rows: pa.RecordBatch) -> None:
    norms = {}
    for clip in (0.0, 1e-2, 1e6):
        federation = training(Train(steps=1, batch=5, optimizer=Sgd(lr=0.5), clip=clip))
        norms[clip] = trained(make_trainer(federation), federation, rows).delta.norm().item()
    assert norms[0.0] == norms[1e6] > 0.5 * 1e-2
    assert norms[1e-2] == pytest.approx(0.5 * 1e-2, rel=1e-3)


def test_the_correction_comes_before_clipping(
    training: Training, make_trainer: MakeTrainer, rows: pa.RecordBatch
) -> None:
    """Otherwise mu would pull harder than clipping allows."""
    train = Train(steps=4, batch=5, optimizer=Sgd(lr=0.5), clip=1e-2)
    federation = training(train, strategy=FedProx(mu=1e3))
    assert trained(make_trainer(federation), federation, rows).delta.norm() <= 4 * 0.5 * 1e-2 * 1.001


def test_dropout_is_drawn_in_training(federation: Federation, make_trainer: MakeTrainer, rows: pa.RecordBatch) -> None:
    model = replace(federation.model, peft=Lora(r=4, alpha=8, dropout=0.5))
    dropping = replace(federation, model=model, train=Train(steps=1, batch=5))
    trainer, plain = make_trainer(dropping), make_trainer(federation)
    trainer.trainable.network.eval()  # as an evaluation leaves it
    delta = trained(trainer, dropping, rows).delta
    assert not torch.equal(delta, trained(plain, replace(federation, train=dropping.train), rows).delta)
    assert torch.equal(delta, trained(trainer, dropping, rows).delta)


@pytest.mark.parametrize("optimizer", [AdamW(lr=0.0, weight_decay=0.1), Sgd(lr=0.0, momentum=0.9)])
def test_without_a_learning_rate_nothing_moves(
    training: Training, make_trainer: MakeTrainer, rows: pa.RecordBatch, optimizer: AdamW | Sgd
) -> None:
    federation = training(Train(steps=3, batch=2, optimizer=optimizer))
    assert not trained(make_trainer(federation), federation, rows).delta.any()


def test_training_leaves_the_broadcast_as_it_was(
    training: Training, make_trainer: MakeTrainer, rows: pa.RecordBatch
) -> None:
    federation = training(Train(steps=3, batch=2))
    trainer = make_trainer(federation)
    broadcast = Broadcast(0, start_of(trainer))
    before = broadcast.params.clone()
    update, _ = trainer.updates([Job(1, rows, 0.5, broadcast, {})], federation)[0]
    assert torch.equal(broadcast.params, before)
    kept = update.delta.clone()
    trainer.updates([Job(2, rows, 0.5, broadcast, {})], federation)[0]
    assert torch.equal(update.delta, kept), "an update is its own memory"


def test_training_learns(federation: Federation, make_trainer: MakeTrainer, rows: pa.RecordBatch) -> None:
    model = replace(federation.model, peft=FullTuning())

    def loss_after(steps: int) -> float:
        federation_ = replace(federation, model=model, train=Train(steps=steps, batch=5, optimizer=AdamW(lr=1e-2)))
        return trained(make_trainer(federation_), federation_, rows).metrics["loss"]

    assert loss_after(40) < 0.5 * loss_after(1)


def kernels(federation: Federation) -> LocalTrainer:
    """A trainer with the recipe's own kernels."""
    packed, buffer = read_base(federation.model)
    trainable = Trainable(map_base(packed, torch.from_numpy(buffer)), federation.model, 3)
    return LocalTrainer(trainable, 0, federation.train)


def test_attention_kernels_are_the_recipes(federation: Federation, rows: pa.RecordBatch) -> None:
    losses = {}
    for kernel in ("sdpa", "eager"):
        trainer = kernels(replace(federation, model=replace(federation.model, attention=kernel)))
        assert trainer.trainable.network.config._attn_implementation == kernel
        losses[kernel], _ = trainer.loss_terms(rows, 8)["nll"]
    assert losses["sdpa"] == pytest.approx(losses["eager"], rel=1e-5)


@pytest.mark.parametrize("held", ["float32", "float16"])
@pytest.mark.parametrize("peft", [Lora(r=4, alpha=8), FullTuning()], ids=["lora", "full"])
def test_what_a_client_computes_in_is_the_recipes(
    federation: Federation, rows: pa.RecordBatch, held: str, peft: Lora | FullTuning
) -> None:
    if held != "float32" and isinstance(peft, FullTuning):
        with pytest.raises(ValueError, match=r"needs model\.dtype = .float32. \(train\.dtype may be .bfloat16.\)"):
            computing(federation, held, "bfloat16", peft)
        return
    federations = computing(federation, "float32", None, peft), computing(federation, held, "bfloat16", peft)
    plain, mixed = map(kernels, federations)
    assert computed(plain, rows) == torch.float32 and computed(mixed, rows) == torch.bfloat16
    start = start_of(plain)
    losses, deltas = [], []
    for trainer, chosen in zip((plain, mixed), federations, strict=True):
        update = trainer.updates([Job(1, rows, 0.5, Broadcast(2, start), {})], chosen)[0][0]
        losses.append(update.metrics["loss"])
        deltas.append(update.delta)
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]
    assert mixed.trainable.flat.dtype == mixed.trainable.grad.dtype == deltas[1].dtype == torch.float32
    assert torch.cosine_similarity(deltas[0], deltas[1], dim=0) > 0.9


def computing(federation: Federation, held: str, computed: str | None, peft: Lora | FullTuning) -> Federation:
    """The federation with a base in one number format, and passes through it in another."""
    train = replace(federation.train, optimizer=Sgd(lr=0.1), dtype=computed)
    return replace(federation, model=replace(federation.model, dtype=held, peft=peft), train=train)


def computed(trainer: LocalTrainer, rows: pa.RecordBatch) -> torch.dtype:
    """What the last linear layer gives, in a pass and in generation alike."""
    seen = list[torch.dtype]()
    hook = trainer.trainable.network.get_output_embeddings().register_forward_hook(
        lambda _, __, out: seen.append(out.dtype)
    )
    trainer.loss_terms(rows, 8)
    trainer.trainable.network.generate(input_ids=torch.ones(1, 2, dtype=torch.int64), max_new_tokens=1, pad_token_id=0)
    hook.remove()
    assert len(seen) > 1 and len(set(seen)) == 1
    return seen[0]


@pytest.mark.parametrize(
    ("held", "computed", "complaint"),
    [
        ("bfloat16", "float32", r'holds the base in bfloat16: set model\.dtype = "float32" too'),
        ("float16", None, r'gradients vanish in it: set train\.dtype = "bfloat16" to compute in that'),
    ],
)
def test_number_formats_that_do_not_go_together(
    federation: Federation, held: str, computed: str | None, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        computing(federation, held, computed, Lora(r=4, alpha=8))


@pytest.mark.slow
def test_compiled_layers_train_as_they_are(federation: Federation, rows: pa.RecordBatch, full: bool) -> None:
    if not full:
        pytest.skip("half a minute of a compiler")
    plain, compiled = (
        trained(kernels(chosen), chosen, rows)
        for chosen in (federation, replace(federation, model=replace(federation.model, compile=True)))
    )
    torch.testing.assert_close(compiled.delta, plain.delta, rtol=0, atol=1e-5)
    assert plain.delta.any()


def test_broadcasts_keep_what_is_theirs_on_the_device_and_share_what_is_shared() -> None:
    """Two clients with one vector, but other extras, seeds and ranks; the meta device shows what was copied."""
    vector, shared, other = torch.zeros(3), torch.ones(3), torch.ones(2)
    sent = [
        Broadcast(4, vector, {"c": shared, "d": other}, seed=1),
        Broadcast(5, vector, {"c": shared}, lora_rank=2, seed=3),
    ]
    first, second = _on(torch.device("meta"), sent)
    assert first.params is second.params and first.params.is_meta and first.extras["c"] is second.extras["c"]
    assert (first.round, first.seed, first.lora_rank, list(first.extras)) == (4, 1, None, ["c", "d"])
    assert (second.round, second.seed, second.lora_rank, list(second.extras)) == (5, 3, 2, ["c"])
    assert first.extras["d"].shape == (2,)
