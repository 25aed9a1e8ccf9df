"""Clients too slow for a deadline by simulated time: who they are is the seed's, whatever runs them."""

import re

import pytest
from safetensors.numpy import load_file

import experiments
from engine.messages.events import RoundDone
from engine.records.metrics import read_log

SLOW = "clients.availability={deadline_s=3, step_s=1, slowness=1}"  # three steps: half of all are in time
CHANGES = ("evaluate.every=0", "cohort.size=8", SLOW)
SECURED = "privacy={rows_cap=20, secagg={mode='full', dropout=0.6}}"
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def play(ray_session, small_recipe, tmp_path_factory):
    """A run with changes, and who was late in each round."""

    def played(*changes, out=None, resume=False):
        events = []
        out = out or tmp_path_factory.mktemp("stragglers") / "run"
        run = experiments.run(small_recipe(*CHANGES, *changes), out=out, resume=resume, on_event=events.append)
        return run, {event.round: set(event.gone) for event in events if isinstance(event, RoundDone)}

    return played


@pytest.mark.slow
def test_the_same_are_late_on_more_slots_and_after_a_resume_and_the_bits_are_the_same(play, tmp_path, full):
    if not full:
        pytest.skip("three runs")
    alone, late = play("rounds=2")
    assert 0 < len(late[1]) < 8 and late[1] == late[2]  # all clients are in each cohort, and as slow as before
    play("rounds=1", "clients.slots=2", out=tmp_path / "run")
    resumed, late_then = play("rounds=2", "clients.slots=2", out=tmp_path / "run", resume=True)
    assert late_then == {2: late[2]}
    assert (resumed.model / ADAPTER).read_bytes() == (alone.model / ADAPTER).read_bytes()
    for run in (alone, resumed):
        named = read_log(run.folder / "faults").to_pylist()
        assert {(row["round"], row["who"]) for row in named} == {(n, name) for n in late for name in late[n]}
        too_late = re.compile(r"too late: [\d.]+ s after clients\.availability\.deadline_s")
        assert all(row["kind"] == "dropout" and too_late.fullmatch(row["why"]) for row in named)
        vector = sum(param.size for param in load_file(run.model / ADAPTER).values()) * 4
        ledger = read_log(run.folder / "ledger").to_pylist()
        seen = {(row["round"], row["party"], row["kind"], row["count"], row["bytes"]) for row in ledger}
        for round_, in_time in ((round_, 8 - len(names)) for round_, names in late.items()):
            assert (round_, "client", "sum", 8, 8 * vector) in seen
            assert (round_, "server", "update", in_time, in_time * vector) in seen


@pytest.mark.slow
def test_the_same_are_late_in_packs_under_secure_aggregation_and_in_gangs(play, full):
    if not full:
        pytest.skip("five runs; slots of single clients are tried")
    lanes = "clients.lanes=3"
    changes = (
        (lanes,),
        (lanes, "strategy=median"),
        (SECURED,),
        ("clients.zero={stage=2}",),
        ("clients.zero={stage=3}",),
    )
    (_, late), *others = [play("rounds=1", *some) for some in changes]
    assert all(names == late for _, names in others) and 0 < len(late[1]) < 8
