"""The comparison as a table for the terminal and as one self-contained HTML page."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
from rich.table import Table

from engine.system.atomic import write_file
from experiments.access.measured import Measured
from experiments.access.pictures import bubbles
from experiments.openness.card import Card
from experiments.openness.licences import licences
from experiments.report.charts import duration, loss, size
from experiments.report.terminal import console, inert_lines, plain

COLUMNS: dict[str, Callable[[Measured], str]] = {
    "run": lambda run: run.name,
    "level": lambda run: run.level,
    "box": lambda run: run.box,
    "unseen clients": lambda run: f"{loss(run.before.get('unseen'))} to {loss(run.after.get('unseen'))}",
    "held-out rows": lambda run: loss(run.after.get("heldout")),
    "down, up": lambda run: f"{size(run.down)}, {size(run.up)}",
    "rows to the owner": lambda run: f"{run.rows:,} ({run.distinct:,} of {run.training_rows:,})",
    "tokens": lambda run: f"{run.tokens:,}",
    "cost": lambda run: "none" if not run.rows else _cost(run),
    "rows forward, back": lambda run: f"{run.forward:,}, {run.backward:,}",
    "time": lambda run: duration(run.seconds),
    "client's memory": lambda run: size(run.memory),
    "secure sums": lambda run: "yes" if run.sums else "no",
    "without the owner": lambda run: "none" if run.alone is None else loss(run.alone),
    "run again": lambda run: run.autonomy.again or "not tried",
    "another base": lambda run: run.autonomy.replaced or "not tried",
    "less access": lambda run: run.autonomy.lowered,
    "rounds": lambda run: str(run.rounds),
}
SHORT = ("run", "level", "unseen clients", "down, up", "rows to the owner", "cost", "time", "without the owner")


def _cost(run: Measured) -> str:
    return "not given" if run.cost is None else f"{run.cost:,.2f} {run.currency}"


def show_table(runs: Sequence[Measured]) -> None:
    """Prints the columns that fit a terminal."""
    table = Table(*SHORT)
    for run in runs:
        table.add_row(*(plain(COLUMNS[name](run)) for name in SHORT))
    console(soft_wrap=False).print(table)


def panel(runs: Sequence[Measured], card: Card | None, refused: tuple[int, int]) -> list[tuple[str, str, str, str]]:
    """Rows after Table 1 of arXiv 2505.23593: what is closed, and what that does to privacy and others."""
    boxes = {run.box: [other for other in runs if other.box == run.box] for run in runs}

    def by_box(write: Callable[[list[Measured]], str]) -> str:
        return "; ".join(f"{box}: {write(of_box)}" for box, of_box in boxes.items())

    def shown(of_box: list[Measured]) -> str:
        low, high = min(run.share for run in of_box), max(run.share for run in of_box)
        return f"{low:.0%} of training rows" if low == high else f"{low:.0%} to {high:.0%} of training rows"

    def left(of_box: list[Measured]) -> str:
        scores = [run.alone for run in of_box if run.alone is not None]
        return f"without the owner {loss(min(scores))} is left" if scores else "nothing is left without the owner"

    def lost(of_box: list[Measured]) -> str:
        most = max(of_box, key=lambda run: len(run.lost))
        return ", ".join(word.replace("_", " ") for word in most.lost) + " lost" if most.lost else "nothing lost"

    licence = None if card is None else licences().get(card.licence or "")
    clauses = "no card" if licence is None else f"{licence.id}: field of use {licence.field_of_use}"
    corpus = "cannot be checked" if card is None or card.corpus == "none" else f"{card.corpus}; not checked here"
    clients, rows = refused
    return [
        ("model weights", f"shown to the owner: {by_box(shown)}", by_box(left), "as autonomy"),
        ("architecture and code", "-", by_box(lost), "-"),
        ("licence", "-", clauses, f"{clients:,} clients with {rows:,} rows refuse"),
        ("pre-training data", f"overlap with clients' rows: {corpus}", "-", "-"),
    ]


def write_page(
    title: str, runs: Sequence[Measured], card: Card | None, refused: tuple[int, int], out: Path, failed: dict[str, str]
) -> None:
    """Writes the page; the same runs give the same bytes."""
    known = [run for run in runs if run.cost is not None and math.isfinite(run.cost)]
    distinct = [float(run.distinct) for run in runs]
    charts = [
        bubbles(
            "Loss over rows shown", runs, distinct, "different rows that the owner has seen", "loss, unseen clients"
        )
    ]
    if known:
        costs = [float(run.cost or 0.0) for run in known]
        charts.append(bubbles("Loss over cost", known, costs, f"cost in {known[0].currency}", "loss, unseen clients"))
    loader = jinja2.FileSystemLoader(Path(__file__).parent.parent / "templates")
    env = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    rows = [[write(run) for write in COLUMNS.values()] for run in runs]
    facts = {"title": title, "columns": [*COLUMNS], "rows": rows, "charts": charts, "failed": failed}
    page = env.get_template("access.html").render(facts | {"panel": panel(runs, card, refused)})
    write_file(out, inert_lines(page).encode())
