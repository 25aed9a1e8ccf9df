"""Gangs of DeepSpeed ranks: each client as if it were the first, and as one process trains it."""

import time
from shutil import copytree

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import ObjectLostError
from safetensors.torch import load_file, save_file

from datasets_partition.store.build import build
from datasets_partition.store.tokens import Tokens
from engine.aggregation.exact_sum import STEP
from engine.messages.broadcast import BroadcastMessage
from engine.models.base_model import map_base, read_base
from engine.models.trainable import Trainable
from engine.rounds.server import RankServer
from engine.scheduling.pool import Pool, is_lost
from engine.system.failures import GangLost, ShardLost, last_line
from engine.training.local_training import Job, LocalTrainer
from engine.workers.worker_group import Gang
from strategies.core.protocol import Broadcast
from strategies.core.seeds import torch_seed

FIRST, SECOND = 3, 6  # clients
FULL_ROWS = 20  # the rows of weight 1
CASES = [(stage, peft, optimizer) for stage in (1, 2, 3) for peft in ("lora", "none") for optimizer in ("adamw", "sgd")]
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OPTIMIZERS = {
    "adamw": "train.optimizer={kind='adamw', lr=1e-2, eps=1e-6}",
    # A gradient as it is: clipped to a length, one of another length would look the same.
    "sgd": "train.optimizer={kind='sgd', lr=0.1, momentum=0.9}; train.clip=0",
}


def changes(stage, peft="lora", optimizer="adamw", ranks=2):
    """A recipe's changes for gangs."""
    zero = f"clients.zero={{stage={stage}, ranks={ranks}, timeout_s=60}}"
    adapters = {"lora": (), "none": ("model.peft=none",)}[peft]
    return (zero, "clients.slots=1", "train.accumulate=2", *OPTIMIZERS[optimizer].split("; "), *adapters)


@pytest.fixture
def gangs(ray_session, tmp_path):
    """Starts a pool of gangs for a recipe; gives the pool and the initial state."""
    pools = []

    def started(recipe):
        data = recipe.data
        store = build(data.source, data.partition, data.splits, recipe.seed, data.cache)
        pools.append(Pool.start(recipe, tmp_path / "client_state", store))
        return pools[-1], RankServer(recipe, pools[-1], 0).initial()

    yield started
    for pool in pools:
        pool.stop()


@pytest.fixture(scope="module")
def doubled(tiny_base, tmp_path_factory):
    """Changes of a recipe to bases that are called tied and have both matrices: as one, or as two."""
    changes = {}
    for name in ("one", "two"):
        folder = copytree(tiny_base, tmp_path_factory.mktemp("doubled") / name)
        weights = load_file(folder / "model.safetensors")
        embedded = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = embedded.clone() if name == "one" else embedded.flip(0).contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        changes[name] = f"model.base={folder}"
    return changes


def trained(pool, slot, chunk, state):
    """The reports of a chunk, and the sum of its clients as a vector on the grid."""
    message = BroadcastMessage(state.round, state.shards, partition=pool.partition, full_rows=FULL_ROWS)
    reports = ray.get(pool.actors[slot].run.remote([(client,) for client in chunk], message))
    shards = ray.get(pool.worker_kinds[0].close(pool.actors[slot], pool.partition)[1])
    return reports, pool.partition.join([torch.from_numpy(shard.vectors["delta"].copy()) for shard in shards])


def alone(recipe, tokens, client):
    """The report and the change of a client in one process."""
    packed, buffer = read_base(recipe.model)
    seed = torch_seed(recipe.seed, 0, -1, "initial")
    trainable = Trainable(map_base(packed, torch.from_numpy(buffer)), recipe.model, seed)
    trainer = LocalTrainer(trainable, 1, recipe.train)
    rows = Tokens.open(tokens).rows(client, "train")
    broadcast = Broadcast(0, trainable.initial.clone(), layout=trainable.layout, seed=recipe.seed)
    return trainer.updates([Job(client, rows, 1.0, broadcast, {})], recipe)[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 1])
@pytest.mark.parametrize(("stage", "peft", "optimizer"), CASES)
def test_a_client_after_another_is_the_client_in_a_fresh_gang_and_in_one_process(
    gangs, small_recipe, doubled, full, stage, peft, optimizer, ranks
):
    if not full and (stage, peft, optimizer, ranks) != (3, "lora", "adamw", 2):
        pytest.skip("LoRA with AdamW is tried at stage 3 unless all are asked for")
    other = (doubled["two" if optimizer == "sgd" else "one"],) if peft == "none" else ()
    recipe = small_recipe(*changes(stage, peft, optimizer, ranks=ranks), *other)
    pool, state = gangs(recipe)
    fresh_reports, fresh = trained(pool, 0, [SECOND], state)
    trained(pool, 0, [FIRST], state)
    reports, after = trained(pool, 0, [SECOND], state)
    assert torch.equal(after, fresh) and reports == fresh_reports
    rows = Tokens.open(pool.columns.folder).counts("train")
    expected = alone(recipe, pool.columns.folder, SECOND)
    change = after.double() / STEP * FULL_ROWS / rows[SECOND]
    assert (change - expected.delta).abs().max() < 1e-5 < expected.delta.abs().max()
    assert reports[0].metrics["loss"] == pytest.approx(expected.metrics["loss"], abs=1e-5)
    for name in ("tokens", "learned", "steps", "rows", "rates"):
        assert reports[0].metrics[name] == expected.metrics[name]


@pytest.mark.slow
@pytest.mark.parametrize("saving", ["checkpointing = true", 'offload = "cpu"'])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("gpus", [0, pytest.param(1, marks=ON_A_GPU)])
def test_what_saves_memory_trains_the_same(gangs, small_recipe, doubled, full, saving, stage, gpus):
    if not full:
        pytest.skip("half a minute for each")
    saving = saving.replace(" = ", "=")
    zero, *others = changes(stage, ranks=1 if gpus else 2)
    recipe = small_recipe(zero.replace("{", f"{{{saving}, "), *others, doubled["two"], f"clients.num_gpus={gpus}")
    pool, state = gangs(recipe)
    trained(pool, 0, [FIRST], state)
    _, total = trained(pool, 0, [SECOND], state)
    rows = Tokens.open(pool.columns.folder).counts("train")
    expected = alone(recipe, pool.columns.folder, SECOND)
    apart = (total.double() / STEP * FULL_ROWS / rows[SECOND] - expected.delta).abs().max()
    assert apart < (1e-3 if gpus else 1e-5)  # a GPU adds up in another order


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_step_is_no_change(gangs, small_recipe, full, dtype):
    if not full:
        pytest.skip("steps are tried")
    still = "train.optimizer={kind='adamw', lr=0.0}"
    pool, state = gangs(small_recipe(*changes(3), still, f"model.dtype={dtype}", "train.steps=1"))
    reports, total = trained(pool, 0, [FIRST], state)
    assert not total.any() and all(np.isfinite(report.metrics["loss"]) for report in reports)


def test_a_gang_that_fits_nowhere_says_what_it_asked_for(ray_session, small_recipe, tmp_path):
    recipe = small_recipe(*changes(3, ranks=40))
    with pytest.raises(
        ValueError, match=r"needs 40 ranks of 1 CPUs and 0 GPUs each, but all nodes together have 6 CPUs"
    ):
        Pool.start(recipe, tmp_path, tmp_path)


class Keeper:
    """Has an object that is lost with it."""

    def keep(self, shard):
        """A reference to the same of its own."""
        return [ray.put(shard)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_that_is_lost_is_looked_for_in_the_last_checkpoint(gangs, small_recipe, full, rank):
    """Whichever rank needed it, the gang is not made anew again and again."""
    if not full:
        pytest.skip("half a minute for each")
    pool, state = gangs(small_recipe("clients.zero={stage=3, ranks=2, timeout_s=20}", "clients.slots=1"))
    shards = list(state.shards)
    keeper = ray.remote(num_cpus=0)(Keeper).remote()
    (shards[rank],) = ray.get(keeper.keep.remote(shards[rank]))
    ray.kill(keeper)
    while ray.wait([shards[rank]], timeout=0.1)[0] and not is_lost(shards[rank]):
        time.sleep(0.1)
    sent = BroadcastMessage(state.round, tuple(shards), partition=pool.partition, full_rows=FULL_ROWS)
    with pytest.raises((ShardLost, ObjectLostError)) as raised:
        pool.map(np.array([3]), np.ones(1), lambda actor, chunk: actor.run.remote([(c,) for c in chunk], sent))
    assert not pool.faults
    assert "an object is gone from the store" in last_line(raised.value)


class Failing(Gang):
    """A first rank whose clients raise what quotes a row of theirs."""

    def __init__(self):
        pass

    def run(self):
        """In the clear, faults say why."""
        raise TypeError("no number: my telephone number is 1234")

    masked = run


def test_what_a_client_raises_stays_with_it_under_secure_aggregation():
    with pytest.raises(GangLost, match=r"^a rank of a gang failed: TypeError: no number: .* 1234$"):
        Failing().lead("run")
    with pytest.raises(GangLost, match=r"^a rank of a gang failed: TypeError$"):
        Failing().lead("masked")
