"""What a run's screen leaves out, and what it notes instead."""

import json

import pytest

from engine.messages.events import Evaluated, RunDone
from engine.models.export import model_card
from experiments.cli.screen import Screen
from experiments.runs.api import build_store, without_losses


@pytest.fixture
def few_rows(small_recipe, tmp_path):
    """Makes the small recipe over eight clients of three rows, with a share held out and a share unseen."""
    rows = [{"client": f"c{n % 8}", "prompt": f"{n} is ", "completion": f"{n}"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(heldout, unseen):
        changes = f"data.source.path='{tmp_path}/rows.jsonl'", f"data.cache='{tmp_path}/stores'"
        return small_recipe(*changes, f"data.splits.heldout={heldout}", f"data.splits.unseen={unseen}")

    return make


@pytest.mark.parametrize(
    ("heldout", "unseen", "notes"),
    [
        (0.2, 0.0, ()),
        (
            *(0.1, 0.0),
            (
                "no training client has a held-out row, so that there are no losses to show; data.splits.heldout = 0.1 "
                "of a client's rows is less than half a row: raise it, or data.splits.unseen",
            ),
        ),
        (
            *(0.1, 0.25),
            (
                "no training client has a held-out row; data.splits.heldout = 0.1 of a client's rows is less than half "
                "a row: raise it, or data.splits.unseen",
            ),
        ),
        (0.0, 0.25, ()),
        (0.0, 0.0, ("nothing is held out, so that there are no losses to show: see data.splits",)),
    ],
)
def test_that_no_row_is_held_out_is_noted(few_rows, heldout, unseen, notes):
    recipe = few_rows(heldout, unseen)
    assert without_losses(recipe, build_store(recipe)) == notes


def test_without_losses_there_are_no_empty_lines_and_tables(small_recipe, tmp_path, capsys):
    screen = Screen(3)
    screen.show(Evaluated(0, {}))
    assert capsys.readouterr().out == ""
    screen.show(RunDone(tmp_path, {}))
    shown = capsys.readouterr().out
    assert "the trained model" in shown and "rows of" not in shown and "nats" not in shown
    store = {"source": "Jsonl()", "clients": 8, "unseen_clients": 0}
    assert "| loss" not in model_card(small_recipe(), {}, store, merged=False)
    tables = {"loss": {"round 0": {"heldout": 2.0}, "end": {"heldout": 1.0}}}
    card = model_card(small_recipe(), tables, store, merged=False)
    assert "| loss (nats per token) | round 0 | end |\n" in card
    assert "| held-out rows of training clients | 2.0000 | 1.0000 |\n\n```python" in card


def test_figures_stand_beside_the_loss_and_have_tables_of_their_own(tmp_path, capsys):
    """An accuracy from 0.5 to 0.75 rises by 0.25, where a loss from 0.8 to 0.6 falls by 25%."""
    screen = Screen(3)
    losses, accuracy = {"heldout": 0.5, "unseen": 0.625}, {"heldout": 0.75, "unseen": 0.25}
    screen.show(Evaluated(1, losses, figures={"accuracy": accuracy, "reward": accuracy}))
    line = (
        "round   1/3  held-out rows 0.500, accuracy 0.750, reward 0.750  unseen clients 0.625, accuracy 0.250, reward"
    )
    assert capsys.readouterr().out.startswith(line)
    screen.show(Evaluated(3, {"heldout": 0.5}, "local_only", {"accuracy": {"heldout": 0.75}}))
    assert capsys.readouterr().out == "   local only  held-out rows 0.500, accuracy 0.750\n"
    table = {"round 0": {"heldout": 0.8}, "not private": {"heldout": 0.5}, "end": {"heldout": 0.6}}
    figures = {"accuracy": {"round 0": {"heldout": 0.5}, "end": {"heldout": 0.75}}}
    screen.show(RunDone(tmp_path, table, [], figures, {"loss": "per pair", "accuracy": "share"}))
    shown = capsys.readouterr().out
    loss, accuracy = shown.split("accuracy (share)")
    assert "loss (per pair)" in loss and "0.800" in loss and "-25.0%" in loss and "nats" not in shown
    assert "0.500 │ 0.750 │ +0.250" in accuracy and "%" not in accuracy
    assert "the cost of privacy: +0.100 per pair on held-out rows, 0.600 instead of 0.500" in shown


def test_a_loss_that_begins_at_nothing_has_no_change_in_percent(tmp_path, capsys):
    losses = {"round 0": {"heldout": 0.0, "unseen": -0.5}, "end": {"heldout": 0.5, "unseen": -0.75}}
    Screen(1).show(RunDone(tmp_path, losses, units={"loss": "per pair"}))
    shown = capsys.readouterr().out
    assert "0.000 │  0.500 │        │" in shown and "-0.500 │ -0.750 │ -50.0% │" in shown
