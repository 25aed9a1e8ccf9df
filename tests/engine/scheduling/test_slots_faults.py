"""Slots that die or do not see what they need, on real Ray: while products are merged, and where clients remember."""

import os
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import ray.cloudpickle
import torch

from datasets_partition.store.build import build
from engine.aggregation import exact_sum as sums
from engine.messages.broadcast import BroadcastMessage
from engine.messages.shards import borrow
from engine.messages.tasks import Work
from engine.scheduling.pool import Pool
from engine.workers.worker import ClientActor
from strategies.core.protocol import Broadcast

BLOCK = 256  # of the sums of these slots, so that small ones have several


class Dying(ClientActor):
    """Dies of the first merge and of the first second section of a sum, and is stopped by the first texts and export.

    If there is a file `stops`, it is stopped by the first two merges too, and when it is given its base again.
    """

    def __init__(self, *arguments):
        sums.BLOCK = BLOCK
        super().__init__(*arguments)

    def section_of_sum(self, first, size):
        if first and self.first("died of a sum"):
            os._exit(1)
        return super().section_of_sum(first, size)

    def run(self, chunk, message):
        for unit in chunk:
            with (self.folder.parent / "trained").open("a") as file:
                file.write("".join(f"{client} " for client in unit))
        return super().run(chunk, message)

    def attach(self, packed, base, tokens, first):
        if (self.folder.parent / "stops").exists() and self.first("silent in attach"):
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().attach(packed, base, tokens, first)

    def merge_weights(self, merged_delta):
        if (self.folder.parent / "stops").exists():
            if self.first("silent in merge") or self.first("silent in its stead"):
                os.kill(os.getpid(), signal.SIGSTOP)
        elif self.first("died"):
            os._exit(1)
        return super().merge_weights(merged_delta)

    def generate(self, message, prompts, tokens):
        if self.first("silent in generate"):
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().generate(message, prompts, tokens)

    def export(self, message, card):
        for number, file in enumerate(super().export(message, card)):
            if number and self.first("silent in export"):
                os.kill(os.getpid(), signal.SIGSTOP)
            yield file

    def first(self, flag):
        try:
            (self.folder.parent / flag).touch(exist_ok=False)
            return True
        except FileExistsError:
            return False


@pytest.fixture
def started(ray_session, small_recipe, tmp_path, monkeypatch):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(Pool, "client", Dying)
    begun = []

    def make(*changes):
        recipe = small_recipe(*changes)
        data = recipe.data
        store = build(data.source, data.partition, data.splits, recipe.seed, data.cache)
        begun.append(Pool.start(recipe, tmp_path / "client_state", store))
        return begun[-1]

    yield make
    for slots in begun:
        slots.stop()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_a_slot_that_dies_of_handing_over_its_sum_costs_its_own_clients_alone(started, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.scheduling.pool.SECTION", 2 * BLOCK)
    slots = started("clients.slots=2")
    clients = np.arange(6)
    message = initial(slots)

    def train():
        (tmp_path / "trained").write_text("")
        worked = slots.train(Work(clients, np.ones(6), np.ones(6)), message, 1)
        (total,) = worked.sums
        trained = sorted(map(int, (tmp_path / "trained").read_text().split()))
        assert [report.client for report in worked.reports] == clients.tolist() and total.count == 6
        return total.total.numpy().tobytes(), total.weight, trained

    *first, trained = train()
    assert (tmp_path / "died of a sum").exists() and [fault.kind for fault in slots.faults] == ["slot"]
    assert 6 < len(trained) < 12 and set(trained) == {*clients.tolist()}
    assert train() == (*first, clients.tolist())
    assert slots.layout.size > 4 * BLOCK


@pytest.mark.slow
def test_a_death_while_merging_costs_one_slot_and_not_the_run(started, tmp_path, full):
    if not full:
        pytest.skip("half a minute; a death at the sum is tried")
    slots = started("strategy=flora", "clients.slots=2")
    before = slots.ask(lambda actor: actor.evaluate.remote([0], initial(slots), 4))
    slots.merge_into_base(random_delta(slots.layout))
    assert (tmp_path / "died").exists() and slots.deaths == 1
    after = [ray.get(actor.evaluate.remote([0], initial(slots), 4)) for actor in slots.actors]
    assert after[0] == after[1] != before
    slots.merge_into_base(None)
    assert slots.ask(lambda actor: actor.evaluate.remote([0], initial(slots), 4)) == before


def initial(slots):
    """The initial vector as slots are sent it."""
    return replace(BroadcastMessage.of(Broadcast(0, borrow(slots.initial))), full_rows=20)


def random_delta(layout):
    size = sum(outputs * inputs for outputs, inputs in layout.product_shapes)
    return np.random.default_rng(0).standard_normal(size).astype(np.float32) * 0.1


@pytest.mark.slow
def test_slots_that_fall_silent_while_merging_or_being_made_anew_are_replaced(started, tmp_path, full):
    if not full:
        pytest.skip("half a minute")
    slots = started("strategy=flora", "clients.slots=1", "clients.timeout_s=5")
    slots.patience.start_s = 15.0
    (tmp_path / "stops").touch()
    slots.merge_into_base(random_delta(slots.layout))
    assert sorted(path.name for path in tmp_path.glob("silent in *")) == [
        "silent in attach",
        "silent in its stead",
        "silent in merge",
    ]
    assert [fault.why for fault in slots.faults] == ["no answer for 5 s", "no answer for 15 s", "no answer for 5 s"]
    evaluated = slots.ask(lambda actor: actor.evaluate.remote([0], initial(slots), 4))
    slots.merge_into_base(None)
    assert slots.ask(lambda actor: actor.evaluate.remote([0], initial(slots), 4)) != evaluated


@pytest.mark.slow
def test_a_slot_that_falls_silent_over_texts_or_an_export_is_replaced(started, tmp_path, full):
    if not full:
        pytest.skip("a quarter of a minute")
    slots = started("clients.timeout_s=4", "clients.slots=1")
    sent = ray.put(initial(slots))
    assert len(slots.ask(lambda actor: actor.generate.remote(sent, ["say "], 3))) == 1
    slots.export(tmp_path / "model", sent, "a card")
    assert (tmp_path / "model" / "adapter_model.safetensors").exists()
    assert [fault.why for fault in slots.faults] == ["no answer for 4 s"] * 2


def test_a_few_steps_on_the_pooled_rows_are_better_for_all(started):
    slots = started("clients.slots=1")
    everybody = list(range(8))
    trained = slots.ask(lambda actor: actor.centralized.remote(everybody, initial(slots), 8), long=True)
    before, after = (
        sum(
            loss.terms["nll"][0]
            for loss in slots.ask(lambda actor, message=message: actor.evaluate.remote(everybody, message, 99))
        )
        for message in (initial(slots), BroadcastMessage.of(Broadcast(0, torch.from_numpy(trained))))
    )
    assert after < 0.99 * before


def test_memory_in_a_folder_that_a_slot_does_not_see_is_refused(started, tmp_path):
    slots = started("strategy=ditto")
    with pytest.raises(ValueError, match=r"which is not seen on the node .*: put --out on a disk that all nodes share"):
        slots.refuse_lost_states()
    (tmp_path / "client_state").mkdir()
    slots.refuse_lost_states()


def test_a_run_that_remembers_nothing_needs_no_such_folder(started):
    slots = started()
    slots.refuse_lost_states()
