"""What a run's objective measures: tables from start to end, and charts of what is counted in one unit.

A run may be foreign: its objective is looked up by the recipe's kind, and no options of it are read.
"""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from markupsafe import Markup

from engine.records.metrics import JUDGED, with_unit
from experiments.report import charts
from experiments.report.charts import Series, change, difference, loss
from experiments.report.run_folder import MAX_LISTED, Run

SPLITS = {"heldout": "held-out", "unseen": "unseen clients", "train": "train", "server": "the server's rows"}
COLORS = {split: number for number, split in enumerate(SPLITS, 1)}
OF_SOME_RUNS = {
    "loss_personal": ("personal", "1 3"),
    "loss_finetuned": ("fine-tuned", "9 3"),
    "loss_not_private": ("not private", "5 2 1 2"),
}
BASELINES = {"loss_local_only": ("local only", "7 4"), "loss_centralized": ("centralized", "2 3")}
# Figures that share a chart, with its title and note; each other one shares a chart with those of its unit.
TOGETHER = (
    ("Accuracy", ("accuracy", "ranking"), "Ties count one half. In TRL: rewards/accuracies."),
    (
        "Margin of rewards",
        ("margin",),
        "The chosen completion's reward minus the rejected one's. In TRL: rewards/margins.",
    ),
    (
        "Chosen and rejected completions",
        ("chosen", "rejected"),
        "Both may fall while the margin grows. In TRL: rewards/chosen and rewards/rejected, which are beta times these "
        "under DPO and KTO.",
    ),
    ("Negative log-likelihood", ("nll", "sft"), "As it is added to the loss, with its weight. In TRL: nll_loss."),
    (
        "Reward",
        ("reward", "greedy"),
        "Of samples, and of the likeliest tokens. In TRL: reward, in training.",
    ),
    ("KL divergence", ("kl",), "Under KTO an estimate that may be below 0. In TRL: kl."),
)
DASHES = ("", "6 3", "2 3", "9 3 2 3")


def objective_options(run: Run) -> dict[str, str]:
    """The options of `train.objective`, its kind among them, from the recipe."""
    key = "train.objective"
    options = {k.removeprefix(f"{key}."): v for k, v in run.recipe.items() if k.startswith(f"{key}.")}
    return {"kind": run.recipe.get(key, "sft"), **options}


def _declared(run: Run, name: str, default: Any) -> Any:
    """What the class of the run's objective declares; the default for a kind that is not known."""
    from engine.objectives import Objectives  # imports torch

    kind = objective_options(run)["kind"]
    return next((getattr(each, name) for each in get_args(Objectives) if each.kind == kind), default)


def unit_of(run: Run, name: str) -> str:
    """The unit of the "loss" or of a figure; empty if it is not known."""
    units = _declared(run, "units", {})
    if name == "loss":
        return str(units.get(_declared(run, "heldout", ""), f"{objective_options(run)['kind'][:80]} objective"))
    return str(units.get(name, ""))


def shown_names(runs: Sequence[Run]) -> list[str]:
    """What tables and comparisons of runs have: the loss, and the figures that their objectives show beside it."""
    shown = [name for run in runs for name in _declared(run, "shown", ()) if name in figure_names(run)]
    return ["loss", *dict.fromkeys(shown)]


def figure_names(run: Run) -> list[str]:
    """The figures and terms that were measured on rows that models are judged on, beside the term that is the loss."""
    names = (name.removeprefix("loss.") for split, name in run.curves if split in JUDGED and name.startswith("loss."))
    known = [name for _, together, _ in TOGETHER for name in together]
    return sorted({*names} - {_declared(run, "heldout", "")}, key=lambda name: (name not in known, name))[:MAX_LISTED]


def common_title(runs: Sequence[Run], name: str) -> str:
    """The loss's or a figure's name, with its unit if all runs that measure it have the same."""
    units = {unit_of(run, name) for run in runs if name == "loss" or name in figure_names(run)}
    return with_unit(name, units.pop() if len(units) == 1 else "")


def summary(run: Run, name: str, splits: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each split: the loss's or a figure's first and last value, their change, and the baselines' values."""
    ending = "" if name == "loss" else f".{name}"
    table = []
    for split in splits:
        points = run.points(split, f"loss{ending}")
        row: dict[str, Any] = {"split": SPLITS[split], "first": "no data", "last": "no data", "change": "no data"}
        if points:
            (start, before), (end, after) = points[0], points[-1]
            row |= {"first": loss(before), "from": int(start)}
            if len(points) > 1:
                changed, rises = (change, -1) if name == "loss" else (difference, 1)
                row |= {"last": loss(after), "to": int(end), "change": changed(before, after)}
                row["better"] = None if after == before else rises * (after - before) > 0
        for baseline in OF_SOME_RUNS | BASELINES:
            row[baseline] = loss(next((v for _, v in reversed(run.points(split, f"{baseline}{ending}"))), None))
        table.append(row)
    return table


def loss_chart(run: Run) -> Markup:
    """The loss over rounds, of clients in training and on rows that models are judged on, with the baselines'."""
    term = f"term.{_declared(run, 'heldout', '')}"  # beside it, the training loss may have other terms
    names = {"train": term if run.points("train", term) else "loss"}
    curves = [Series(label, run.points(s, names.get(s, "loss")), COLORS[s]) for s, label in SPLITS.items()]
    for name, (label, dash) in (OF_SOME_RUNS | BASELINES).items():
        for split in JUDGED:
            points = run.points(split, name)[-1:]
            curves.append(Series(f"{SPLITS[split]}, {label}", points, COLORS[split], dash, level=True))
    return charts.lines("Loss", curves, "round", with_unit("loss", unit_of(run, "loss")))


def figure_charts(run: Run) -> list[Markup]:
    """A chart for figures that belong together, over rounds; a color is a split, a dash pattern a figure."""
    drawn = []
    for title, names, note in _groups(run):
        curves = []
        for number, name in enumerate(names):
            for split in JUDGED:
                label = SPLITS[split] if len(names) == 1 else f"{SPLITS[split]}, {name[:80]}"
                dash = DASHES[number % len(DASHES)]
                curves.append(Series(label, run.points(split, f"loss.{name}"), COLORS[split], dash))
        drawn.append(charts.lines(title, curves, "round", unit_of(run, names[0]) or title, note=note))
    return drawn


def _groups(run: Run) -> Iterator[tuple[str, list[str], str]]:
    left = figure_names(run)
    for title, names, note in TOGETHER:
        if group := [name for name in names if name in left]:
            yield title, group, note
        left = [name for name in left if name not in names]
    by_unit: dict[str, list[str]] = {}
    for name in left:
        by_unit.setdefault(unit_of(run, name) or name, []).append(name)
    for group in by_unit.values():
        yield ", ".join(name[:80] for name in group), group, ""
