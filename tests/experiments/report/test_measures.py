"""What the page shows of objectives: figures with their units, beside the loss and in charts of their own."""

import re
from pathlib import Path

import pytest

from experiments.report import measures
from experiments.report.run_folder import read_run
from tests.experiments.report.test_page import RECIPE, Row, page_of, text_of, write_metrics

MINUS = "\N{MINUS SIGN}"


def make_run(folder: Path, objective: str, rows: list[Row], name: str = "run") -> Path:
    folder.mkdir()
    (folder / "recipe.toml").write_text(f"{RECIPE.format(name)}[train]\nobjective = {objective}\n")
    write_metrics(folder, rows)
    return folder


def pair_rows(*metrics: tuple[str, float, float]) -> list[Row]:
    """Rows of held-out metrics at the rounds 0 and 2, on unseen clients the same."""
    return [
        (at, split, None, name, value)
        for name, *values in metrics
        for at, value in zip((0, 2), values, strict=True)
        for split in ("heldout", "unseen")
    ]


DPO_ROWS = pair_rows(
    ("loss", 0.693, 0.5),
    ("loss.preference", 0.693, 0.5),
    ("loss.accuracy", 0.5, 0.875),
    ("loss.ranking", 0.75, 0.75),
    ("loss.margin", 0.0, 1.5),
    ("loss.chosen", 0.0, -2.0),
    ("loss.rejected", 0.0, -9.0),
)


def charts_of(page: str) -> dict[str, tuple[str, list[str], str]]:
    """The label of the y axis, the keys of the legend and the note of each chart, by its title."""
    charts = {}
    for figure in re.findall(r"<figure>.*?</figure>", page, re.DOTALL):
        labels, notes = re.findall(r'<text class="t" x="0" y="14">(.*?)<', figure), re.findall(r'"note">(.*?)<', figure)
        keys = re.findall(r'<span class="key">(.*?)</span>', figure)
        charts[re.findall(r"<figcaption>(.*?)<", figure)[0]] = "".join(labels), keys, " ".join(notes)
    return charts


def test_a_run_on_pairs_by_hand(tmp_path: Path) -> None:
    extra: list[Row] = [(2, "heldout", None, "loss_local_only.accuracy", 0.625), (2, "train", None, "loss", 9.0)]
    extra += [(2, "train", None, "term.preference", 0.4)]
    each: list[Row] = [(at, "heldout", "b", "loss", 1.0 - at / 4) for at in (0, 2)]
    page = page_of(tmp_path, make_run(tmp_path / "a", '{ kind = "dpo", beta = 0.5 }', DPO_ROWS + extra + each))
    text = text_of(page)
    assert "Loss (per pair), start to end" in text and "objective dpo" in text and "nats per token" not in text
    assert f"held-out 0.693 round 0 0.500 round 2 {MINUS}27.8 % no data no data" in text
    table = text.split("Accuracy (share), start to end")[1]
    assert "held-out 0.500 round 0 0.875 round 2 +0.375 0.625 no data unseen clients 0.500" in table
    assert page.count('<span class="good">+0.375</span>') == 2  # a figure that rises is better
    charts = charts_of(page)
    sides = "held-out", "unseen clients"
    assert charts["Loss"][:2] == ("loss (per pair)", [*sides, "train"])
    assert "train: 0.4" in re.findall(r'aria-label="(Loss\..*?)"', page)[0]  # the same term as on held-out rows
    assert charts["Accuracy"][:2] == (
        "share",
        [f"{side}, {name}" for name in ("accuracy", "ranking") for side in sides],
    )
    assert charts["Margin of rewards"][:2] == ("nats", [*sides])
    both = [f"{side}, {name}" for name in ("chosen", "rejected") for side in sides]
    assert charts["Chosen and rejected completions"][:2] == ("nats", both)
    assert "KL divergence" not in charts and "rewards/margins" in charts["Margin of rewards"][2]
    assert charts["Held-out loss of each client"][0] == "loss at round 2 (per pair)"


def test_figures_without_a_chart_of_their_own_share_that_of_their_unit(tmp_path: Path, monkeypatch) -> None:
    from engine.objectives.kto import Kto

    monkeypatch.setattr(Kto, "units", {**Kto.units, "low": "words", "high": "words"})
    names = ("loss", "loss.kl", "loss.high", "loss.low", "loss.odd")
    page = page_of(tmp_path, make_run(tmp_path / "a", '"kto"', pair_rows(*((name, 1.0, 2.0) for name in names))))
    charts = charts_of(page)
    assert charts["high, low"][0] == "words" and len(charts["high, low"][1]) == 4
    assert charts["KL divergence"][0] == "nats" and charts["odd"][:2] == ("odd", ["held-out", "unseen clients"])


def test_the_likelihood_beside_pairs_is_in_nats_per_token(tmp_path: Path) -> None:
    rows = pair_rows(("loss", 0.1, 0.2), ("loss.preference", 0.1, 0.2), ("loss.nll", 4.0, 3.0))
    charts = charts_of(page_of(tmp_path, make_run(tmp_path / "a", '"orpo"', rows)))
    assert charts["Negative log-likelihood"][0] == "nats per token" and charts["Loss"][0] == "loss (per pair)"


@pytest.mark.parametrize("objective", ['"sft"', '{ kind = "sft", packing = false }'])
def test_a_run_of_one_term_has_no_more_than_its_loss(tmp_path: Path, objective: str) -> None:
    page = page_of(tmp_path, make_run(tmp_path / "a", objective, pair_rows(("loss", 3.0, 2.0))))
    assert "Loss (nats per token), start to end" in page and page.count("start to end</h3>") == 1
    assert charts_of(page)["Loss"][0] == "loss (nats per token)" and "Accuracy" not in charts_of(page)


def test_an_objective_of_another_version_is_shown_without_units(tmp_path: Path) -> None:
    evil = "<b>" * 50
    rows = pair_rows(("loss", 3.0, 2.0), ("loss.accuracy", 0.5, 1.0), (f"loss.{evil}", 1.0, 1.0))
    rows += pair_rows(*((f"loss.{number}", 1.0, 1.0) for number in range(100)))
    page = page_of(tmp_path, make_run(tmp_path / "a", f'{{ kind = "{evil}", units = {{ loss = 3 }} }}', rows))
    charts = charts_of(page)
    assert "<b>" not in page and f"loss ({'&lt;b&gt;' * 26}&lt;b objective)" in charts["Loss"][0]
    assert charts["Accuracy"][0] == "Accuracy" and len(charts) < 60


def test_runs_of_several_objectives_are_compared_by_what_they_share(tmp_path: Path) -> None:
    pairs = make_run(tmp_path / "a", '"dpo"', DPO_ROWS, "pairs")
    other = make_run(tmp_path / "b", '{ kind = "dpo", beta = 0.5 }', DPO_ROWS, "other")
    server: list[Row] = [(0, "server", None, "loss", 3.0), (2, "server", None, "loss", 1.0)]
    plain = make_run(tmp_path / "c", '"sft"', pair_rows(("loss", 3.0, 2.0)) + server, "plain")
    page = page_of(tmp_path, pairs, plain)
    text, charts = text_of(page), charts_of(page)
    assert "These runs differ in train.objective.kind: their losses may be of different rows or tokens, or diff" in text
    assert charts["Held-out loss"][:2] == ("loss", ["pairs", "plain"]) and "Loss, start to end" in text
    assert charts["Held-out accuracy"][:2] == ("accuracy (share)", ["pairs"])
    assert charts["Accuracy of unseen clients"][1] == ["pairs"]
    rows = re.findall(r"<table>.*?</table>", page, re.DOTALL)[:2]
    heads = [len(re.findall(r"<td", row)) for table in rows for row in table.split("<tbody>")[1].split("<tr>")[1:]]
    assert heads == [15] * 4  # three splits of five columns, although one run has no rows of the server
    same = page_of(tmp_path, pairs, other)
    assert "differ in" not in text_of(same)  # an earlier recipe did not write all options
    assert charts_of(same)["Held-out loss"][0] == "loss (per pair)"
    (pairs / "recipe.toml").write_text((other / "recipe.toml").read_text().replace("0.5", "0.25"))
    assert "These runs differ in train.objective.beta: " in text_of(page_of(tmp_path, pairs, other))


def test_no_change_is_neither_good_nor_bad(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", '"dpo"', pair_rows(("loss", 1.0, 1.0), ("loss.accuracy", 0.5, 0.25))))
    assert [row["better"] for row in measures.summary(run, "loss", ["heldout"])] == [None]
    (row,) = measures.summary(run, "accuracy", ["heldout"])
    assert (row["better"], row["change"]) == (False, f"{MINUS}0.250")
