"""Pictures of a store's skew as PNG files, drawn without pyplot, whose state is global."""

import io
import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from datasets_partition.store.stats import Categories, Sizes, Skew, TokenLengths
from experiments.report.charts import spread
from experiments.report.terminal import inert

BLUE, VERMILION, GRAY = "#0072B2", "#D55E00", "#666666"  # color-blind readers can distinguish them (Okabe and Ito)
MOST_BARS, MOST_POINTS = 60, 2000  # clients with a bar each; points of the outline that replaces more bars
MOST_CLIENTS, MOST_CATEGORIES = 60, 30  # rows and columns of the heat map
MOST_LETTERS = 28
SKEWED = 30  # the ratio of largest to smallest from which an axis is logarithmic


def draw_skew(skew: Skew, name: Callable[[int], str]) -> dict[str, bytes]:
    """The pictures that need no tokens, by file name; `name` returns a client's name."""
    pictures = {"rows_per_client.png": _rows_per_client(skew.rows)}
    if skew.categories is not None:
        pictures["categories.png"] = _categories(skew.categories, skew.rows, name)
    return pictures


def draw_tokens(lengths: TokenLengths, max_length: int) -> dict[str, bytes]:
    """The picture of the token lengths, by file name; rows were cut at `max_length`."""
    figure = _figure(11, 4.5)
    left, right = figure.subplots(1, 2)
    _token_rows(left, lengths.rows, max_length)
    _by_size(right, lengths.clients, "tokens")
    return {"token_lengths.png": _png(figure)}


def _rows_per_client(rows: Sizes) -> bytes:
    figure = _figure(11, 4.5)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _by_size(left, rows, "rows")
    # The Lorenz curve; the Gini coefficient is the area between it and the diagonal over the area of the triangle.
    clients = len(rows.each)
    held = np.concatenate([[0], np.cumsum(np.sort(rows.each)[::-1])]) / rows.total
    at = spread(clients + 1, MOST_POINTS)
    right.fill_between(at / clients, held[at], at / clients, color=BLUE, alpha=0.25, linewidth=0)
    right.plot(at / clients, held[at], color=BLUE, linewidth=1.8)
    right.plot([0, 1], [0, 1], color=GRAY, linewidth=1, linestyle="--")
    right.text(0.97, 0.04, f"Gini coefficient {rows.gini:.2f}\ndashed: all clients the same", ha="right", va="bottom")
    right.set(title="What the largest clients hold", xlim=(0, 1), ylim=(0, 1))
    right.set(xlabel="share of the clients, the largest first", ylabel="share of the rows")
    _write_ticks(right, _percent)
    return _png(figure)


def _by_size(axes: Axes, sizes: Sizes, what: str) -> None:
    """Each client's size, from the largest to the smallest: bars, or an outline of many clients."""
    ordered, clients = np.sort(sizes.each)[::-1], len(sizes.each)
    if clients <= MOST_BARS:
        axes.bar(np.arange(1, clients + 1), ordered, width=0.85, color=BLUE)
    else:
        at = spread(clients, MOST_POINTS)
        edges = np.concatenate([[0.5], (at[1:] + at[:-1]) / 2 + 1, [clients + 0.5]])
        axes.stairs(ordered[at], edges, fill=True, color=BLUE)
    label = f"median {_number(sizes.median)} (least {_number(sizes.least)}, most {_number(sizes.most)})"
    axes.axhline(sizes.median, color=VERMILION, linewidth=1.5, label=label)
    # A client may have no tokens at all, which a logarithmic axis cannot show.
    least = int(sizes.each[sizes.each > 0].min(initial=max(1, sizes.most)))
    if sizes.most > SKEWED * least:
        axes.set(yscale="log", ylim=(0.8 * least, 3 * sizes.most))
    else:
        axes.set_ylim(0, 1.18 * max(1, sizes.most))  # room for the legend
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    _write_ticks(axes, _number)
    axes.set(title=f"{what.capitalize()} per client", xlim=(0.5, clients + 0.5))
    axes.set(xlabel="clients, the largest first", ylabel=what)
    axes.legend(loc="upper right", framealpha=1)


def _token_rows(axes: Axes, lengths: NDArray[np.int32], max_length: int) -> None:
    """The histogram of the rows' lengths; all bins have the same width, and the last ends at the longest row."""
    longest = int(lengths.max(initial=1))
    width = -(-longest // MOST_BARS)
    edges = longest + 0.5 - width * np.arange(-(-longest // width), -1, -1)
    axes.stairs(np.histogram(lengths, edges)[0], edges, fill=True, color=BLUE)
    if cut := int(np.count_nonzero(lengths == max_length)):
        label = f"train.max_length = {max_length:,}, which {cut:,} of {len(lengths):,} rows reach"
        axes.axvline(max_length + 0.5, color=VERMILION, linewidth=1.5, linestyle="--", label=label)
    else:
        axes.plot([], [], " ", label=f"no row is as long as train.max_length = {max_length:,}")
    axes.set(title="Tokens per row", xlabel="tokens", ylabel="rows", xlim=(0, None))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    _write_ticks(axes, _number)
    axes.margins(y=0.18)  # room for the legend
    axes.legend(loc="upper right", framealpha=1, fontsize=8.5, handlelength=2 if cut else 0)


def _categories(categories: Categories, rows: Sizes, name: Callable[[int], str]) -> bytes:
    """The heat map: a row for all clients and one for each client, a column for each category."""
    by_size = np.argsort(-rows.each, kind="stable")
    drawn = by_size[spread(len(by_size), MOST_CLIENTS)]
    by_rows = np.argsort(-categories.totals, kind="stable")
    shown = MOST_CATEGORIES if len(by_rows) <= MOST_CATEGORIES else MOST_CATEGORIES - 1
    columns = _short_each([categories.names[code] for code in by_rows[:shown]])
    if len(by_rows) > shown:
        columns.append(f"{len(by_rows) - shown:,} others")

    line, column = np.full(len(rows.each), -1), np.full(len(by_rows), shown)
    line[drawn] = 1 + np.arange(len(drawn))
    column[by_rows[:shown]] = np.arange(min(shown, len(by_rows)))
    counts = np.zeros((1 + len(drawn), len(columns)))
    np.add.at(counts[0], column, categories.totals)
    inside = line[categories.clients] >= 0
    cells = line[categories.clients[inside]], column[categories.codes[inside]]
    np.add.at(counts, cells, categories.counts[inside])
    shares = counts / counts.sum(axis=1, keepdims=True)
    # Cells are high enough for the color bar's label; below them are the names of the categories, rotated.
    cells_high, names_high = max(1.7, 0.19 * len(shares)), 0.075 * max(map(len, columns))
    figure = _figure(max(7, 3.5 + 0.34 * len(columns)), 1.7 + cells_high + names_high)
    axes = figure.subplots()
    # By the square root of a share, so that small shares differ visibly from none.
    image = axes.imshow(shares, aspect="auto", cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="none")
    axes.axhline(0.5, color="black", linewidth=1)
    if len(by_rows) > shown:
        axes.axvline(shown - 0.5, color="black", linewidth=1)
    names = _short_each([name(client) for client in drawn.tolist()])
    labels = ["all clients", *(f"{name} ({rows:,})" for name, rows in zip(names, rows.each[drawn], strict=True))]
    axes.set_yticks(np.arange(len(labels)), labels, fontsize=8, parse_math=False)
    axes.set_xticks(np.arange(len(columns)), columns, fontsize=8, rotation=90, parse_math=False)
    axes.set(xlabel="category, the most frequent first", ylabel="client (its rows)")
    spaced = f"{len(drawn)} of {len(by_size):,} clients, evenly spaced by size"
    which = spaced if len(drawn) < len(by_size) else "every client"
    axes.set_title(f"Categories of {which}\nlabel divergence {categories.divergence:.2f}", fontsize=11)
    bar = figure.colorbar(image, ax=axes, label="share of the client's rows", shrink=min(1.0, 12 / len(shares)))
    bar.ax.yaxis.set_major_formatter(_percent)
    return _png(figure)


def _write_ticks(axes: Axes, write: Callable[[float, object], str]) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(write)


def _figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, whose texts do not overlap."""
    return Figure((width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))


def _short(name: str) -> str:
    """A line that fits beside the heat map; of a long name the beginning and the end."""
    line, half = inert(name), MOST_LETTERS // 2
    return line if len(line) <= MOST_LETTERS else f"{line[:half]}…{line[-half + 1 :]}"


def _short_each(names: list[str]) -> list[str]:
    """Short names; those that have become equal are numbered."""
    seen, lines = Counter[str](), []
    for line in map(_short, names):
        seen[line] += 1
        lines.append(line if seen[line] == 1 else f"{line} #{seen[line]}")
    return lines


def _number(value: float, _: object = None) -> str:
    return f"{value:,.10g}"


def _percent(value: float, _: object = None) -> str:
    return f"{100 * value:.3g}%"


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # such characters are drawn as boxes
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return file.getvalue()
