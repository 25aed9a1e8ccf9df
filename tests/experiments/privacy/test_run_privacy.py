"""Whole private runs: what is written, what ends them, and that the driver never holds what it must not see."""

import json

import pyarrow.compute as pc
import pytest

import experiments
from engine.messages.events import RoundDone, Started
from engine.records.metrics import read_log

FULL = "privacy.secagg.mode=full"
UNIFORM = "strategy={kind='fedavg', weighting='uniform'}"
WORDS = 16


def values(run, name, split):
    rows = run.metrics.filter(pc.equal(run.metrics["name"], name)).to_pylist()
    return [row["value"] for row in rows if row["split"] == split and row["client"] is None]


def test_a_private_run_says_what_it_cost_and_who_saw_what(ray_session, small_recipe, tmp_path):
    events = []
    dp = "privacy.dp={kind='distributed', noise_multiplier=0.5, clip=0.2, delta=0.01}"
    changes = (FULL, UNIFORM, dp, "rounds=2", "evaluate.every=0")
    run = experiments.run(small_recipe(*changes), out=tmp_path / "run", on_event=events.append)
    said = [event.epsilon for event in events if isinstance(event, RoundDone)]
    assert all("for one client (zero out one), without amplification" in epsilon for epsilon in said)
    epsilons = values(run, "epsilon", "privacy")
    assert 0 < epsilons[0] < epsilons[1] and values(run, "delta", "privacy") == [0.01] * 2
    privacy = json.loads((run.folder / "privacy.json").read_text())
    assert privacy["epsilon"] == epsilons[1] and privacy["statement"] == said[-1] and "simulated" not in said[-1]

    ledger = read_log(run.folder / "ledger").to_pylist()
    seen = {(row["party"], row["kind"]) for row in ledger}
    assert ("server", "masked update") in seen and ("other clients", "share") in seen
    assert not {kind for party, kind in seen if party == "server"} & {"update", "metric", "rows"}
    assert {row["mode"] for row in ledger} == {"full"}
    # The server learns no client's figures, the metrics know of a round's clients only together.
    train = run.metrics.filter(pc.equal(run.metrics["split"], "train")).to_pylist()
    assert {row["client"] for row in train} == {None} and {row["name"] for row in train} == {"loss", "tokens"}
    assert privacy["statement"].endswith(f", {privacy['weights']}") and privacy["weights"] == "weight 1 for each client"
    assert privacy["statement"] in (run.model / "README.md").read_text()
    assert privacy["statement"] in (run.folder / "report.html").read_text()


@pytest.mark.slow
def test_what_comes_without_privacy_is_the_run_without_privacy(ray_session, small_recipe, tmp_path, full):
    if not full:
        pytest.skip("half a minute: three runs")
    private = ("privacy.secagg.mode=ideal", "privacy.dp={kind='adaptive', noise_multiplier=0.1}")
    changes = (UNIFORM, "rounds=2", "evaluate.every=0")
    recipe = small_recipe(*changes, *private, "evaluate.without_privacy=true")
    run = experiments.run(recipe, out=tmp_path / "run")
    plain = experiments.run(small_recipe(*changes), out=tmp_path / "plain")
    assert run.losses["not private"] == plain.losses["end"] != run.losses["end"]
    clips = values(run, "clip", "privacy")
    assert clips[0] == 0.1 and clips[1] != 0.1


def test_an_aborted_round_leaves_the_model_and_what_clients_know(ray_session, small_recipe, tmp_path):
    events = []
    changes = ["strategy=scaffold", "train.optimizer={kind='sgd', lr=0.1}", "privacy.secagg.bounds={c=1.0}", FULL]
    changes += ["clients.availability.dropout=0.95", "privacy.secagg.max_aborts=2", "rounds=5", "evaluate.every=1"]
    with pytest.raises(ValueError, match=r"3 rounds had no result, more than privacy\.secagg\.max_aborts = 2 allows"):
        experiments.run(small_recipe(*changes), out=tmp_path / "run", on_event=events.append)
    rounds = [event for event in events if isinstance(event, RoundDone)]
    assert [event.clients for event in rounds] == [0, 0] and all(event.aborted for event in rounds)
    metrics = read_log(tmp_path / "run" / "metrics").to_pylist()
    held = [row for row in metrics if (row["name"], row["split"], row["client"]) == ("loss", "heldout", None)]
    assert len({row["value"] for row in held}) == 1 and len(held) == 3
    assert not list((tmp_path / "run" / "client_state").rglob("*.safetensors"))


def test_a_deadline_that_nobody_meets_moves_nothing(ray_session, small_recipe, tmp_path):
    events = []
    changes = ("clients.availability.deadline_s=1e-6", "rounds=1")
    run = experiments.run(small_recipe(*changes), out=tmp_path / "run", on_event=events.append)
    (round_,) = (event for event in events if isinstance(event, RoundDone))
    assert (round_.clients, len(round_.gone), round_.failed) == (0, 5, {})
    assert run.losses["end"] == run.losses["round 0"]


def test_a_warning_about_delta_is_shown(ray_session, small_recipe, tmp_path):
    events = []
    changes = (UNIFORM, "privacy.dp={kind='central', noise_multiplier=1.0, delta=0.4}", "rounds=1", "evaluate.every=0")
    experiments.run(small_recipe(*changes), out=tmp_path / "run", on_event=events.append)
    (started,) = (event for event in events if isinstance(event, Started))
    assert "delta = 0.4 is above 1 / 8" in started.notes[0]


class Stop(Exception):
    """The test's own interruption."""


def test_a_resumed_run_has_spent_what_was_spent_before(ray_session, small_recipe, tmp_path):
    dp = "privacy.dp={kind='distributed', noise_multiplier=0.5, clip=0.2, delta=0.01}"
    recipe = small_recipe(FULL, UNIFORM, dp, "rounds=5", "evaluate.every=0", "checkpoint.every=2")
    out, events = tmp_path / "run", []

    def stop(event):
        if isinstance(event, RoundDone) and event.round == 3:
            raise Stop

    with pytest.raises(Stop):
        experiments.run(recipe, out=out, on_event=stop)
    before = json.loads((out / "privacy.json").read_text())
    run = experiments.run(recipe, out=out, resume=True, on_event=events.append)
    resumed = next(event for event in events if isinstance(event, Started)).resumed
    after = json.loads((out / "privacy.json").read_text())
    # Rounds since the checkpoint are played again with fresh noise, which costs again.
    assert before["rounds"] >= max(3, resumed) and after["rounds"] == before["rounds"] + 5 - resumed
    assert after["epsilon"] > before["epsilon"] and values(run, "epsilon", "privacy")[-1] == after["epsilon"]
