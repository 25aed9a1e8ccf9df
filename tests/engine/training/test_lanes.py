"""A client in lanes is the same client alone: in float64 to 1e-10, whoever else is there, however long they take."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine.config.adapters import IA3, Adapters, LNTuning, Lora, Oft, RankShare, Vera
from engine.config.federation import Federation
from engine.config.sections import Clients
from engine.config.train import AdamW, Schedule, Sgd, TorchOptimizer, Train
from engine.models.base_model import map_base, read_base
from engine.models.trainable import Trainable
from engine.training.lanes import LaneTrainer
from engine.training.local_training import Job, LocalTrainer
from strategies import Strategies
from strategies.averaging.drift import FedProx, Scaffold
from strategies.averaging.fedavg import FedAvg
from strategies.core.protocol import ClientState, Update
from strategies.lora.hetlora import HetLora

LANES, CLIENTS = 3, 7
EPOCHS = Train(epochs=2, batch=2, optimizer=AdamW(lr=1e-2, eps=1e-6))
LORA = Lora(r=4, alpha=8)
Made = tuple[LocalTrainer, LaneTrainer]
Pair = Callable[..., Made]

PLAIN = [rule for rule in get_args(Strategies) if not rule.tunes]  # others train one client at a time


@pytest.fixture
def pair(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Pair:
    """Two trainers of the same clients over one base: one client at a time, and in lanes."""

    def normed(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def made(federation: Federation, *, base: str = "tied", double: bool = True) -> Made:
        if double:
            monkeypatch.setattr(LlamaRMSNorm, "forward", normed)  # transformers casts to float32
        packed, buffer = read_base(replace(federation.model, base=str(bases[base])))
        for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop") if base == "gpt2" else ():
            vars(packed.config)[name] = 0.0
        network = map_base(packed, torch.from_numpy(buffer))
        network = network.double() if double else network
        trainable = Trainable(network, federation.model, 3)
        alone = LocalTrainer(trainable, 0, federation.train)
        return alone, LaneTrainer(alone, LANES, federation.train)

    return made


@pytest.fixture
def lane_recipe(federation: Federation) -> Callable[..., Federation]:
    def made(train: Train = EPOCHS, peft: Adapters = LORA, **sections: Any) -> Federation:
        return replace(federation, train=train, model=replace(federation.model, peft=peft), **sections)

    return made


def jobs(trainer: LocalTrainer, federation: Federation, rows: pa.RecordBatch, **client_state: ClientState) -> list[Job]:
    """Clients of one to five rows, in no order, each with a vector of the client's rank."""
    layout, peft = trainer.trainable.layout, federation.model.peft
    noise = torch.from_numpy(np.random.default_rng(5).standard_normal(layout.size)).to(trainer.trainable.flat.dtype)
    made = []
    for client in range(CLIENTS):
        start = trainer.trainable.initial + 0.02 * noise
        lora_rank = peft.lora_rank_of(client, federation.seed)
        for pair in layout.lora_pairs(start) if lora_rank else ():
            pair.a_RI[lora_rank:], pair.b_OR[:, lora_rank:] = 0, 0
        state = federation.strategy.init(start, layout)
        broadcast = replace(federation.strategy.broadcast(state), round=2, layout=layout, lora_rank=lora_rank)
        part = rows.slice(client % 3, 1 + (3 * client) % 5)
        made.append(Job(client, part, 0.5, broadcast, client_state.get(f"of_{client}", {})))
    return made


def one_by_one(trainer: LocalTrainer, some: list[Job], federation: Federation) -> list[tuple[Update, ClientState]]:
    return [trainer.updates([job], federation)[0] for job in some]


def the_same(
    results: list[tuple[Update, ClientState]], expected: list[tuple[Update, ClientState]], within: float
) -> None:
    for (update, client_state), (other, remembered) in zip(results, expected, strict=True):
        assert update.client == other.client and other.delta.abs().max() > 1e-4
        assert (update.delta - other.delta).abs().max() <= within
        assert update.extras.keys() == other.extras.keys() and client_state.keys() == remembered.keys()
        for name, tensor in (update.extras | client_state).items():
            torch.testing.assert_close(tensor, (other.extras | remembered)[name], rtol=0, atol=within)
        assert update.metrics == pytest.approx(other.metrics, rel=max(within, 1e-9))


OPTIMIZERS = {
    "adamw": AdamW(lr=1e-2, eps=1e-6, weight_decay=0.1),
    "sgd": Sgd(lr=0.1),
    "momentum": Sgd(lr=0.1, momentum=0.9),
    "rprop": TorchOptimizer(name="Rprop", lr=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_client_is_the_same_as_alone(pair: Pair, lane_recipe: Any, rows: pa.RecordBatch, name: str) -> None:
    federation = lane_recipe(replace(EPOCHS, optimizer=OPTIMIZERS[name], clip=0.5))
    alone, lanes = pair(federation)
    some = jobs(alone, federation, rows)
    expected = one_by_one(alone, some, federation)
    the_same(lanes.updates(some, federation), expected, 1e-10)
    the_same(lanes.updates(some[::-1], federation), expected[::-1], 1e-10)  # no trace of earlier lanes
    the_same(one_by_one(alone, some, federation), expected, 0)


def viewed(trainer: LocalTrainer, some: list[Job], federation: Federation) -> list[tuple[Update, ClientState]]:
    """Each client's update as a slot takes it, which copies it before the next client."""
    results = []
    for job in some:
        ((update, client_state),) = trainer.updates([job], federation, view=True)
        results.append((replace(update, delta=update.delta.clone()), client_state))
    return results


@pytest.mark.parametrize(
    ("train", "peft"),
    [
        (replace(EPOCHS, accumulate=3), LORA),
        (replace(EPOCHS, batch=1, steps=5, epochs=None), LORA),
        (replace(EPOCHS, over_steps=Schedule("cosine", warmup=2), over_rounds=Schedule(warmup=5)), LORA),
        (EPOCHS, replace(LORA, dropout=0.3)),
        (EPOCHS, replace(LORA, ranks=(RankShare(1, 0.3), RankShare(2, 0.3), RankShare(4, 0.4)))),
        (EPOCHS, replace(LORA, targets=("q_proj", "lm_head"))),
        (EPOCHS, replace(LORA, use_rslora=True)),
        (EPOCHS, replace(LORA, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3.0})),
        (EPOCHS, replace(LORA, use_dora=True)),
        (EPOCHS, replace(LORA, use_dora=True, dropout=0.3)),
        (EPOCHS, IA3()),
    ],
    ids=[
        *("accumulate", "steps of one row", "schedules", "dropout", "mixed ranks", "an adapter on the head"),
        *("rslora", "patterns", "dora", "dora with dropout", "ia3"),
    ],
)
def test_whatever_the_recipe_says(pair: Pair, lane_recipe: Any, rows: pa.RecordBatch, train: Train, peft: Any) -> None:
    federation = lane_recipe(train, peft, strategy=HetLora() if peft.ranks else FedAvg(), rounds=5)
    alone, lanes = pair(federation, base="untied")
    some = jobs(alone, federation, rows)
    the_same(lanes.updates(some, federation), one_by_one(alone, some, federation), 1e-10)


@pytest.mark.parametrize(
    "peft", [LORA, replace(LORA, use_dora=True), IA3(("c_attn", "c_fc"), ("c_fc",))], ids=["lora", "dora", "ia3"]
)
def test_another_family_of_models(pair: Pair, lane_recipe: Any, rows: pa.RecordBatch, peft: Adapters) -> None:
    federation = lane_recipe(peft=peft)
    alone, lanes = pair(federation, base="gpt2")
    some = jobs(alone, federation, rows)
    the_same(lanes.updates(some, federation), one_by_one(alone, some, federation), 1e-10)


@pytest.mark.parametrize("rule", PLAIN, ids=[rule().kind for rule in PLAIN])
def test_in_single_precision_it_is_nearly_the_same(
    pair: Pair, lane_recipe: Any, rows: pa.RecordBatch, rule: Any
) -> None:
    """What is sent beside a change may be the change over the learning rate (SCAFFOLD), and is so much further off."""
    federation = lane_recipe()
    object.__setattr__(federation, "strategy", rule())
    alone, lanes = pair(federation, double=False)
    some = jobs(alone, federation, rows)
    results, expected = lanes.updates(some, federation), one_by_one(alone, some, federation)
    for (update, client_state), (other, remembered) in zip(results, expected, strict=True):
        assert (update.delta - other.delta).abs().max() <= 1e-5
        for name, tensor in (other.extras | remembered).items():
            torch.testing.assert_close((update.extras | client_state)[name], tensor, rtol=0, atol=1e-5 / 1e-2)
        assert update.metrics == pytest.approx(other.metrics, rel=1e-5)


def test_on_a_base_in_half_precision_it_is_the_same_but_for_its_rounding(
    pair: Pair, lane_recipe: Any, rows: pa.RecordBatch
) -> None:
    """One rounding of bfloat16 is 1/256; adapters and their steps are in single precision."""
    federation = lane_recipe(replace(EPOCHS, optimizer=Sgd(lr=0.1)))
    federation = replace(federation, model=replace(federation.model, dtype="bfloat16"))
    alone, lanes = pair(federation, double=False)
    assert alone.trainable.flat.dtype == torch.float32
    some = jobs(alone, federation, rows)
    results = lanes.updates(some, federation)
    for (update, _), (other, _) in zip(results, one_by_one(alone, some, federation), strict=True):
        assert (update.delta - other.delta).norm() < 0.02 * other.delta.norm()
        assert update.metrics == pytest.approx(other.metrics, rel=1e-2)


@pytest.mark.parametrize("rule", PLAIN, ids=[rule().kind for rule in PLAIN])
def test_every_strategy_allows_lanes(pair: Pair, lane_recipe: Any, rows: pa.RecordBatch, rule: Any) -> None:
    """Two rounds: in the second, clients remember the first."""
    train = replace(EPOCHS, optimizer=Sgd(lr=0.1))
    federation = replace(lane_recipe(train), strategy=FedAvg())
    object.__setattr__(federation, "strategy", rule())
    alone, lanes = pair(federation)
    first = jobs(alone, federation, rows)
    expected = one_by_one(alone, first, federation)
    for (update, client_state), (other, remembered) in zip(viewed(alone, first, federation), expected, strict=True):
        assert torch.equal(update.delta, other.delta)
        assert all(
            torch.equal((update.extras | client_state)[name], it) for name, it in (other.extras | remembered).items()
        )
    assert not rule().keeps_state or any(client_state for _, client_state in expected)
    second = jobs(alone, federation, rows, **{f"of_{update.client}": client_state for update, client_state in expected})
    for some in (first, second):
        results, wanted = lanes.updates(some, federation), one_by_one(alone, some, federation)
        for (update, client_state), (other, remembered) in zip(results, wanted, strict=True):
            torch.testing.assert_close(update.delta, other.delta, rtol=0, atol=1e-10)
            for name, tensor in (other.extras | remembered).items():
                torch.testing.assert_close((update.extras | client_state)[name], tensor, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("optimizer", [AdamW(lr=1e-2, eps=1e-6), Sgd(lr=0.1, momentum=0.9)], ids=["adamw", "momentum"])
def test_an_optimizers_state_is_each_clients_own(
    pair: Pair, lane_recipe: Any, rows: pa.RecordBatch, optimizer: AdamW | Sgd
) -> None:
    federation = lane_recipe(replace(EPOCHS, optimizer=optimizer, state="keep"))
    alone, lanes = pair(federation)
    first = jobs(alone, federation, rows)
    remembered = {f"of_{update.client}": client_state for update, client_state in one_by_one(alone, first, federation)}
    second = jobs(alone, federation, rows, **remembered)
    results, expected = lanes.updates(second, federation), one_by_one(alone, second, federation)
    the_same(results, expected, 1e-10)
    fresh = lanes.updates(first, federation)
    assert not torch.allclose(fresh[0][0].delta, results[0][0].delta, atol=1e-6)


def test_a_correction_is_each_clients_own(pair: Pair, lane_recipe: Any, rows: pa.RecordBatch) -> None:
    for strategy in (FedProx(mu=1.0), Scaffold()):
        federation = lane_recipe(replace(EPOCHS, optimizer=Sgd(lr=0.1)), strategy=strategy)
        alone, lanes = pair(federation)
        some = jobs(alone, federation, rows)
        corrected = lanes.updates(some, federation)
        the_same(corrected, one_by_one(alone, some, federation), 1e-10)
    plain = lane_recipe(replace(EPOCHS, optimizer=Sgd(lr=0.1)))
    prox = lane_recipe(replace(EPOCHS, optimizer=Sgd(lr=0.1)), strategy=FedProx(mu=1.0))
    some = jobs(lanes, plain, rows)
    assert not torch.allclose(lanes.updates(some, plain)[0][0].delta, lanes.updates(some, prox)[0][0].delta, atol=1e-6)


def test_a_single_client_trains_as_alone(pair: Pair, lane_recipe: Any, rows: pa.RecordBatch) -> None:
    federation = lane_recipe()
    alone, lanes = pair(federation, double=False)
    some = jobs(alone, federation, rows)[:1]
    the_same(lanes.updates(some, federation), one_by_one(alone, some, federation), 0)


def test_lanes_leave_nothing_in_the_model(pair: Pair, lane_recipe: Any, rows: pa.RecordBatch) -> None:
    federation = lane_recipe()
    alone, lanes = pair(federation)
    some = jobs(alone, federation, rows)
    before = alone.loss_terms(rows, 4)
    broken = replace(
        some[-1], broadcast=replace(some[-1].broadcast, params=torch.full_like(some[-1].broadcast.params, float("nan")))
    )
    results = lanes.updates([*some[:-1], broken], federation)
    the_same(results[:-1], one_by_one(alone, some[:-1], federation), 1e-10)  # NaN stays in its lane
    assert results[-1][0].delta.isnan().any()
    alone.trainable.flat.data.copy_(alone.trainable.initial)
    assert alone.loss_terms(rows, 4) == before
    assert not any("forward" in vars(module) for module in alone.trainable.network.modules())


def test_a_base_that_drops_activations_is_refused(bases: dict[str, Path], lane_recipe: Any) -> None:
    federation = lane_recipe()
    base_index, buffer = read_base(replace(federation.model, base=str(bases["gpt2"])))
    trainable = Trainable(map_base(base_index, torch.from_numpy(buffer)), federation.model, 3)
    alone = LocalTrainer(trainable, 0, federation.train)
    with pytest.raises(ValueError, match=r"pdrop = 0.1 in its config.json.*set clients.lanes = 1"):
        LaneTrainer(alone, LANES, federation.train)


def test_dropout_that_lanes_do_not_draw_is_refused(pair: Pair, lane_recipe: Any) -> None:
    """Such as that of a kind of adapter whose layers call it otherwise than LoRA's do."""
    alone, _ = pair(federation := lane_recipe())
    alone.trainable.network.add_module("other_dropout", torch.nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"other_dropout drops activations.*set clients.lanes = 1"):
        LaneTrainer(alone, LANES, federation.train)


def test_adapters_of_embeddings_are_refused(pair: Pair, lane_recipe: Any) -> None:
    with pytest.raises(ValueError, match="adapters of linear layers alone"):
        pair(lane_recipe(peft=replace(LORA, targets=("embed_tokens", "q_proj"))))


@pytest.mark.parametrize(
    ("peft", "key"),
    [
        (replace(LORA, bias="all"), r"model\.peft\.bias"),
        (replace(LORA, modules_to_save=("lm_head",)), r"model\.peft\.modules_to_save"),
        (Vera(r=4), 'model.peft.kind = "vera"'),
        (Oft(oft_block_size=4), 'model.peft.kind = "oft"'),
        (LNTuning(), 'model.peft.kind = "ln_tuning"'),
    ],
)
def test_kinds_without_a_batched_form_are_refused_by_key(
    federation: Federation, pair: Pair, peft: Adapters, key: str
) -> None:
    with pytest.raises(ValueError, match=f"{key} does not work with several lanes: set clients.lanes = 1"):
        replace(federation, model=replace(federation.model, peft=peft), clients=Clients(lanes=4))
    clients = Clients(lanes="auto")  # which then is 1
    single = replace(federation, model=replace(federation.model, peft=peft), clients=clients)
    if peft.kind != "lora":
        with pytest.raises(ValueError, match="adapters of linear layers alone"):
            pair(single)
