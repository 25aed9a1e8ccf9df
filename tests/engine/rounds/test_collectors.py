"""Secured rounds on real slots: the same sum as in the clear, whoever drops out, and whichever slot dies."""

import math
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import ray.cloudpickle
import torch

from datasets_partition.store.build import build
from engine.aggregation.ring_encoding import ring_sums
from engine.aggregation.secure_clients import Authority, SecureClients
from engine.config.availability import DIED_WITH_SLOT, DRAWN, Availability
from engine.messages.broadcast import BroadcastMessage
from engine.messages.tasks import Work
from engine.records.journal import Journal
from engine.rounds.collectors import ClearCollector
from engine.rounds.secure_round import Relay, SecureCollector, placement
from engine.rounds.server import DriverServer
from engine.scheduling.pool import Pool
from engine.workers.worker import ClientActor
from strategies.core.cohort import UniformCohort
from strategies.core.protocol import ServerState
from strategies.privacy.central import CentralDp
from strategies.privacy.distributed import DistributedDp

COHORT = np.arange(7)
COSTS = np.array([3.0, 1, 4, 1, 5, 9, 2])
MOST_TOKENS = 3 * 4 * 48
UNIFORM = 'strategy={kind="fedavg", weighting="uniform"}'
MODES = ("ideal", "full")
DEADLINE_S = 3.0


class Mortal(ClientActor):
    """Dies, once, when it is asked for what the file `die` names; a client is slow that a file `late-` names."""

    def _die_at(self, name):
        flag = self.folder / "die"
        with suppress(FileNotFoundError):  # another slot may have died of it
            if flag.read_text() == name:
                flag.unlink()
                os._exit(1)

    def attach(self, *arguments):
        attached = super().attach(*arguments)
        trainer_of = self.attached.runner.trainer_of

        def slow(unit, message):
            if any((self.folder / f"late-{client}").exists() for client in unit):
                time.sleep(2 * DEADLINE_S)
            return trainer_of(unit, message)

        self.attached.runner.trainer_of = slow
        return attached

    def deadline(self, seconds):
        runner, clients = self.attached.runner, self.federation.clients
        availability = replace(clients.availability, deadline_s=seconds)
        runner.federation = replace(self.federation, clients=replace(clients, availability=availability))

    def forget(self):
        self.secure = self.attached.secure.clients = SecureClients()

    def open(self, opening, authority):
        self._die_at("open")
        return super().open(opening, authority)

    def shares(self, listed):
        self._die_at("shares")
        return super().shares(listed)

    def masked(self, inboxes, message):
        self._die_at("masked")
        return super().masked(inboxes, message)

    def unmask(self, requests):
        self._die_at("unmask")
        return super().unmask(requests)


@pytest.fixture(scope="module")
def pool(ray_session, small_recipe, tmp_path_factory):
    """Three slots of mortal clients, and the folder of their client state."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    patch = pytest.MonkeyPatch()
    patch.setattr(Pool, "client", Mortal)
    recipe = small_recipe("clients.slots=3", "privacy.secagg.mode=full", UNIFORM)
    data, memory = recipe.data, tmp_path_factory.mktemp("memory")
    slots = Pool.start(recipe, memory, build(data.source, data.partition, data.splits, recipe.seed, data.cache))
    yield slots, memory
    slots.stop()
    patch.undo()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def work(cohort, costs):
    return Work(cohort, costs[: len(cohort)], costs[: len(cohort)])


@pytest.fixture
def play(pool, small_recipe, tmp_path):
    """Collects one round under a recipe with changes; round 0 from the initial vector unless said."""
    slots, _ = pool

    def collect(
        *changes, mode=None, plan=None, clip=0.0, costs=COSTS, cohort=COHORT, on_slot_death="void", round_=0, lanes=1
    ):
        recipe = small_recipe("clients.slots=3", UNIFORM, *changes, *([f"privacy.secagg.mode={mode}"] if mode else []))
        state = ServerState(round_, torch.from_numpy(slots.initial), layout=slots.layout, seed=recipe.seed)
        message = replace(
            BroadcastMessage.of(recipe.strategy.broadcast(state)), noise_plan=plan, clip=clip, lanes=lanes
        )
        message = replace(message, full_rows=20)
        server = DriverServer(recipe, slots, len(COHORT))
        if mode is None:
            return ClearCollector(recipe, server).collect(work(cohort, costs), message)
        for actor in slots.actors:  # a slot keeps its clients' sum for the sessions of one round
            ray.get(actor.forget.remote())
        relay = Relay(server, ray.remote(Authority).options(num_cpus=0).remote(), on_slot_death)
        arguments = recipe, relay, MOST_TOKENS, Journal(tmp_path), lambda *_: None
        return SecureCollector(*arguments).collect(work(cohort, costs), message)

    return collect


def total(collected):
    """The sum of a round, which is whole."""
    (aggregate,) = collected.sums
    return aggregate


def same(a, b):
    assert total(a).weight == total(b).weight and total(a).count == total(b).count
    assert torch.equal(total(a).total, total(b).total) and a.metrics == b.metrics


def mean(collected):
    return total(collected).total / total(collected).weight


def test_the_secured_sum_is_the_plain_one_to_a_ring_step(play, pool, small_recipe):
    plain, ideal, full = play(), play(mode="ideal"), play(mode="full")
    same(ideal, full)
    recipe = small_recipe("privacy.secagg.mode=ideal", UNIFORM)
    sums = ring_sums(recipe, pool[0].layout, None, 0.0, len(COHORT), MOST_TOKENS, 0)
    step = 1 / sums.scale("delta")
    apart = (mean(full) - mean(plain)).abs().max().item()
    assert 0 < apart < step + 2**-24 * total(plain).total.abs().max().item()
    assert total(full).count == total(plain).count == 7
    for name in ("loss", "tokens"):
        assert full.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-4)
    assert full.clipped == pytest.approx(0, abs=0.01)


def test_a_bound_that_cuts_updates_says_so(play, pool):
    assert play(mode="ideal").clipped == 0 and pool[0].faults == []
    cut, plain = play("privacy.secagg.bound=1e-7", mode="ideal"), play()
    assert 0.5 < cut.clipped <= 1 and plain.clipped is None
    (fault,) = pool[0].faults
    pool[0].faults.clear()
    assert (fault.kind, fault.who) == ("round", "1")
    assert re.fullmatch(
        r"[\d.]+% of the coordinates that clients sent are beyond .*: raise privacy\.secagg\.bound.*", fault.why
    )


def test_who_plays_a_client_does_not_matter(play):
    same(play(mode="full"), play(mode="full", costs=COSTS[::-1].copy()))


def test_reports_tell_no_figures(play):
    collected = play(mode="full")
    assert not collected.by_client and [report.client for report in collected.reports] == list(range(7))
    assert {name for report in collected.reports for name in report.metrics} == {"protocol_bytes_down"}


@pytest.mark.parametrize("seed", [2, 3])
def test_who_drops_out_is_left_out_of_the_sum(play, seed):
    changes = [f"seed={seed}", "clients.availability.dropout=0.3", "privacy.secagg.dropout=0.6"]
    plain, ideal, full = play(*changes), play(*changes, mode="ideal"), play(*changes, mode="full")
    same(ideal, full)
    away = Availability(dropout=0.3).gone(COHORT, seed, 0)
    assert full.gone == plain.gone == dict.fromkeys(away, DRAWN) and total(full).count == 7 - len(away) < 7
    assert (mean(full) - mean(plain)).abs().max() < 1e-6


def test_who_comes_too_late_is_left_out_of_the_sum(play, pool):
    late = pool[1] / "late-4"
    late.touch()
    ray.get([actor.deadline.remote(DEADLINE_S) for actor in pool[0].actors])
    collected = play("privacy.secagg.dropout=0.3", mode="full")
    late.unlink()
    ray.get([actor.deadline.remote(None) for actor in pool[0].actors])
    assert collected.aborted is None and total(collected).count == 6
    assert collected.gone.keys() == {4} and re.fullmatch(r"too late: [\d.]+ s after .*\.deadline_s", collected.gone[4])
    assert {report.client for report in collected.reports if report.late} == {4}
    others = COHORT[COHORT != 4]
    expected = play("privacy.secagg.dropout=0.3", mode="full", cohort=others, costs=COSTS[COHORT != 4])
    assert (mean(collected) - mean(expected)).abs().max() < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_too_few_survivors_abort_the_round(play, mode):
    collected = play("clients.availability.dropout=0.9", mode=mode)
    assert collected.sums == [] and collected.metrics == pytest.approx({"loss": math.nan, "tokens": 0}, nan_ok=True)
    assert "secure aggregation was aborted in the phase" in collected.aborted


def test_a_cohort_of_too_few_is_not_summed(play):
    collected = play("privacy.secagg.min_contributors=3", mode="full", cohort=COHORT[:2])
    assert collected.aborted == "2 clients are there, and it takes 3" and collected.sums == []
    assert play(mode="full", cohort=COHORT[:0]).aborted is None


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["masked", "open", "shares"])
def test_a_slot_that_dies_voids_the_session_and_the_next_gives_the_same_sum(play, pool, full, phase):
    if not full and phase == "open":
        pytest.skip("of three deaths two are tried unless all are asked for")
    expected = play(mode="full")
    (pool[1] / "die").write_text(phase)
    collected = play(mode="full")
    assert not (pool[1] / "die").exists() and collected.sessions == 2 and collected.aborted is None
    same(expected, collected)


def test_once_shares_are_asked_for_nothing_is_void(play, pool):
    expected = play(mode="full")
    (pool[1] / "die").write_text("unmask")
    collected = play("privacy.secagg.threshold=2", mode="full")
    assert not (pool[1] / "die").exists() and collected.sessions == 1
    same(expected, collected)  # all had given their vectors


@pytest.mark.slow
@pytest.mark.parametrize("active", ["true", "false"])
@pytest.mark.parametrize("phase", ["open", "shares", "masked"])
def test_a_slot_that_dies_may_count_as_its_clients_dropping_out(play, pool, full, phase, active):
    if not full and (phase, active) not in {("masked", "true"), ("open", "false")}:
        pytest.skip("of six deaths two are tried unless all are asked for")
    placed = placement([(client,) for client in COHORT.tolist()], COSTS.tolist(), range(3))
    (pool[1] / "die").write_text(phase)
    changes = [f"privacy.secagg.active={active}", "privacy.secagg.threshold=4", "privacy.secagg.dropout=0.3"]
    collected = play(*changes, mode="full", on_slot_death="dropout")
    assert collected.sessions == 1 and collected.aborted is None
    assert sorted(collected.gone) in [sorted(client for (client,) in packs) for packs in placed.values()]
    assert set(collected.gone.values()) == {DIED_WITH_SLOT} and total(collected).count == 7 - len(collected.gone)


def test_the_active_profile_gives_the_same_sum_with_signatures(play):
    collected = play("privacy.secagg.active=true", mode="full")
    same(play(mode="full"), collected)
    assert [m.count for m in collected.messages if m.kind == "signature"] == [7]


def test_messages_are_counted_by_whom_they_reach(play):
    collected = play(mode="full")
    counts = {(m.party, m.kind): 0 for m in collected.messages}
    for message in collected.messages:
        counts[message.party, message.kind] += message.count
    assert counts == {
        ("client", "sum"): 7,
        ("server", "key"): 7,
        ("client", "key"): 7,
        ("server", "sealed share"): 7,
        ("other clients", "share"): 42,
        ("server", "masked update"): 7,
        ("client", "survivors"): 7,
        ("server", "share"): 7,
        ("server", "sum"): 1,
    }
    ideal = {(m.party, m.kind, m.count, m.nbytes) for m in play(mode="ideal").messages}
    assert ideal == {(m.party, m.kind, m.count, m.nbytes) for m in collected.messages}


@pytest.mark.parametrize("mode", [None, "full"])
def test_central_noise_comes_after_and_clipping_before_the_sum(play, mode):
    plan = CentralDp(noise_multiplier=1.0, clip=0.01).plan(*ASKED)
    collected = play(mode=mode, plan=plan, clip=0.01)
    assert torch.linalg.vector_norm(total(collected).total) <= 7 * 0.01 * (1 + 1e-5)
    smaller = play(mode=mode, plan=plan, clip=1e-4)
    assert torch.linalg.vector_norm(total(smaller).total) <= 7e-4 * (1 + 1e-3)


ASKED = (UniformCohort(size=7), 10, 1)


def test_distributed_noise_is_in_the_sum_when_it_arrives(play, pool):
    changes = ['privacy.dp={kind="distributed", noise_multiplier=0.1, clip=0.05}']
    length = pool[0].layout.size
    plan = DistributedDp(noise_multiplier=0.1, clip=0.05).plan(*ASKED, length)
    plain, noisy = play(), play(*changes, mode="full", plan=plan)
    again = play(*changes, mode="full", plan=plan)
    assert not torch.equal(total(noisy).total, total(again).total)  # fresh noise, which no seed gives again
    assert total(noisy).weight == 7
    clipped = play(mode="ideal", plan=CentralDp(noise_multiplier=1.0, clip=0.05).plan(*ASKED), clip=0.05)
    noise = (total(noisy).total - total(clipped).total).numpy()
    assert np.std(noise) == pytest.approx(0.1 * 0.05 * np.sqrt(7 / plan.least), rel=0.1)
    assert abs(noise.mean()) < 4 * np.std(noise) / np.sqrt(length)
    assert not torch.equal(total(plain).total, total(noisy).total)


def test_too_few_for_the_noise_are_not_unmasked(play, pool):
    changes = ['privacy.dp={kind="distributed", noise_multiplier=0.1, clip=0.05, survivors=1.0}', "seed=3"]
    plan = DistributedDp(noise_multiplier=0.1, clip=0.05, survivors=1.0).plan(*ASKED, pool[0].layout.size)
    dropping = [*changes, "clients.availability.dropout=0.3", "privacy.secagg.dropout=0.6"]
    collected = play(*dropping, mode="full", plan=plan)
    assert collected.sums == [] and "clients are there, and it takes 7" in collected.aborted
    assert not [message for message in collected.messages if message.kind == "sum" and message.party == "server"]


@pytest.mark.parametrize("changes", [(), ("clients.availability.dropout=0.3", "privacy.secagg.dropout=0.4")])
def test_packs_are_secured_as_clients_are(play, changes):
    """A pack of three and two packs of two; with drop-outs, of fewer."""
    alone, plain = play(*changes, mode="ideal"), play(*changes, lanes=3)
    ideal, full = (play(*changes, mode=mode, lanes=3) for mode in ("ideal", "full"))
    same(ideal, full)
    assert total(ideal).count == total(alone).count == total(plain).count
    torch.testing.assert_close(mean(ideal), mean(alone), rtol=0, atol=1e-4)
    torch.testing.assert_close(mean(ideal), mean(plain), rtol=0, atol=1e-4)
