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
    losses = {"round 0": {"heldout": 2.0}, "end": {"heldout": 1.0}}
    assert "| held-out rows of training clients | 2.0000 | 1.0000 |\n\n```python" in model_card(
        small_recipe(), losses, store, merged=False
    )
