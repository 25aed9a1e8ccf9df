"""Clients that the recipe lets drop out: each is named with its reason, and every other one is counted once."""

from collections import Counter

import pyarrow.compute as pc
import pytest

import experiments
from engine.config.availability import AWAY, DRAWN
from engine.messages.events import RoundDone
from engine.records.metrics import read_log
from experiments.cli.screen import Screen

SECURED = ("privacy.secagg={mode='full', dropout=0.6}", "privacy.rows_cap=20", "cohort.size=8")


def gone(run):
    """Who was not there, by round: names and reasons."""
    reasons = {}
    for row in read_log(run.folder / "faults").to_pylist():
        assert row["kind"] == "dropout"
        assert reasons.setdefault(row["round"], {}).setdefault(row["who"], row["why"]) == row["why"]
    return reasons


def trained(run):
    """Who was counted, by round, as often as it was."""
    rows = run.metrics.filter(pc.and_(pc.equal(run.metrics["split"], "train"), pc.equal(run.metrics["name"], "loss")))
    counts = {}
    for row in rows.to_pylist():
        if row["client"] is not None:
            counts.setdefault(row["round"], Counter())[row["client"]] += 1
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("changes", [("cohort.size=8",), SECURED], ids=["plain", "secured"])
def test_who_drops_out_is_named_and_everybody_else_counted_once(ray_session, small_recipe, tmp_path, changes, full):
    if changes == SECURED and not full:
        pytest.skip("in secured rounds it is tried without a whole run")
    trace, events = tmp_path / "trace.csv", []
    trace.write_text("client,first,last\nclient-3,2,3\nclient-7,1,1\n")
    drawn = f"clients.availability={{dropout=0.2, trace='{trace}'}}"
    recipe = small_recipe("rounds=2", "evaluate.every=0", *changes, drawn)
    run = experiments.run(recipe, out=tmp_path / "run", on_event=events.append)
    away, everybody = gone(run), {event.round: event for event in events if isinstance(event, RoundDone)}
    assert all(everybody[round_].gone == names for round_, names in away.items())
    reasons = {(round_, name): why for round_, names in away.items() for name, why in names.items()}
    by_trace = {place for place, why in reasons.items() if why == AWAY}
    assert by_trace == {(1, "client-3"), (2, "client-7")}
    assert {why for place, why in reasons.items() if place not in by_trace} == {DRAWN}
    clients = {name for by_round in (trained(run), away) for names in by_round.values() for name in names}
    for round_, event in everybody.items():
        assert event.aborted is None and event.clients == 8 - len(away[round_])
        if not recipe.privacy.secure:
            cohort = dict.fromkeys(clients - away[round_].keys(), 1)
            assert trained(run)[round_] == cohort and len(cohort) == event.clients


def test_of_thousands_away_the_screen_says_how_many_and_names_a_few(capsys):
    names = {f"client-{number}": AWAY for number in range(4000)}
    late = {"a": "too late: 3.2 s after the deadline", "b": "too late: 1 s after the deadline"}
    Screen(3).show(RoundDone(1, 2.5, 1.0, 10.0, 7, {}, names | late))
    first, away, too_late, *more = capsys.readouterr().out.splitlines()
    assert "7 clients (4002 dropped out)" in first and not any(more)
    assert away.split() == f"4,000 clients {AWAY}: {', '.join(map(repr, list(names)[:5]))}, ...".split()
    assert too_late.strip() == "2 clients too late: 'a', 'b'"
