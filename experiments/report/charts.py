"""Charts as SVG in a `<figure>`: `Markup.format` escapes a run's texts, and the page's style sheet has the colors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from markupsafe import Markup
from numpy.typing import NDArray

WIDTH, HEIGHT = 480, 280  # small enough that 12-unit text is still readable when scaled to a phone
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 30, 42
COLORS = 8  # the style sheet defines .c1 to .c8
MINUS = "\N{MINUS SIGN}"
MAX_POINTS = 1500
MAX_BARS = 100
LARGEST = 1e300  # of a value that is drawn

Format = Callable[[float], str]
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line or a layer of bars; `color` counts from 1, `dash` is an SVG dash pattern, a `level` is a constant."""

    label: str
    points: Sequence[Point]
    color: int
    dash: str = ""
    level: bool = False


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on the pixels from `start` to `end`, with the ticks and their labels."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[tuple[float, str]]
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; a logarithmic axis takes positive values only."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def number(value: float) -> str:
    """A short number for a tick or a label: at most four significant digits, with a true minus sign."""
    return (f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}").replace("-", MINUS)


def size(value: float) -> str:
    """Bytes in decimal units, three significant digits."""
    if not math.isfinite(value):
        return str(value)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} PB" if value < 1000 else f"{value:,.0f} PB"


def duration(seconds: float) -> str:
    """A time in the unit that fits it."""
    if not math.isfinite(seconds) or seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.3g} min" if seconds < 3600 else f"{minutes // 60} h {minutes % 60:02d} min"


def loss(value: float | None) -> str:
    """A loss with three decimals, so that a column of losses lines up."""
    return "no data" if value is None else f"{value:.3f}".replace("-", MINUS)


def change(first: float, last: float) -> str:
    """The change from first to last in percent, with a sign."""
    if first == 0 or not math.isfinite(first) or not math.isfinite(last):
        return "no data"
    return f"{100 * (last - first) / abs(first):+.1f} %".replace("-", MINUS)


def difference(first: float, last: float) -> str:
    """The change from first to last, with a sign and three decimals."""
    return f"{last - first:+.3f}".replace("-", MINUS)


def linear(low: float, high: float, start: float, end: float, write: Format, integers: bool = False) -> Axis:
    """An axis with ticks at multiples of 1, 2 or 5 times a power of ten, also at its ends; `whole`: integers only."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-12):
        pad = abs(low) * 0.1 or 1.0  # a single value goes to the middle
        low, high = (0.0, 2 * pad) if low == 0 else (low - pad, high + pad)
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(1.0 if integers else 0.0, next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    places = max(0, -math.floor(math.log10(step) + 1e-9))

    def tick(value: float) -> str:  # all plain numbers have the same decimals: 2.0, 2.5
        return f"{value:,.{places}f}".replace("-", MINUS) if write is number and places < 5 else write(value)

    return Axis(first * step, last * step, start, end, [(i * step, tick(i * step)) for i in range(first, last + 1)])


def _log(low: float, high: float, start: float, end: float, write: Format) -> Axis:
    """A logarithmic axis in decades; if there are few, 2 and 5 are ticks too."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    every = max(1, math.ceil((last - first) / 6))
    marks = (1, 2, 5) if last - first <= 2 else (1,)
    values = [m * 10.0**p for p in range(first, last + 1, every) for m in marks]
    ticks = [(v, write(v)) for v in values if v <= 10.0**last * 1.001]
    return Axis(10.0**first, 10.0**last, start, end, ticks, log=True)


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Positions among `count`, at most `most`, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _finite(points: Sequence[Point]) -> list[Point]:
    """The points that can be drawn: neither NaN nor so large that the span of an axis would overflow."""
    return [p for p in points if all(abs(v) <= LARGEST for v in p)]


def _svg(template: str, *values: object) -> Markup:
    """The template with its values escaped."""
    return Markup(template).format(*values)


def _axes(x: Axis, y: Axis, x_label: str, y_label: str) -> Markup:
    base, middle = HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) // 2
    out = _svg('<text class="t" x="0" y="14">{}</text>', y_label)
    line = '<path class="g" d="M{} {}H{}"/><text class="t e" x="{}" y="{}">{}</text>'
    for value, text in y.ticks:
        out += _svg(line, LEFT, y.at(value), WIDTH - RIGHT, LEFT - 7, y.at(value) + 4, text)
    mark = '<path class="a" d="M{0} {1}v4"/><text class="t m" x="{0}" y="{2}">{3}</text>'
    for value, text in x.ticks:
        out += _svg(mark, x.at(value), base, base + 18, text)
    out += _svg('<path class="a" d="M{} {}H{}"/>', LEFT, base, WIDTH - RIGHT)
    return out + _svg('<text class="t m" x="{}" y="{}">{}</text>', middle, HEIGHT - 5, x_label)


def _figure(title: str, body: Markup, alt: str, note: str, keys: Sequence[Series] = (), bars: bool = False) -> Markup:
    out = _svg("<figure><figcaption>{}</figcaption>", title)
    legend, bar = Markup(""), Markup('<rect class="f" width="12" height="12" y="1" x="6"/>')
    for key in keys:
        mark = bar if bars else _svg('<path class="l" d="M0 7H24"{}/>', _dash(key))
        legend += _svg('<li class="c{}"><svg width="24" height="14" aria-hidden="true">{}</svg>', key.color, mark)
        legend += _svg('<span class="key">{}</span></li>', key.label)
    if legend:
        out += _svg('<ul class="legend">{}</ul>', legend)
    chart = '<svg class="chart" role="img" viewBox="0 0 {} {}" aria-label="{}">{}</svg>'
    out += _svg(chart, WIDTH, HEIGHT, alt, body)
    return out + (_svg('<p class="note">{}</p>', note) if note else "") + Markup("</figure>")


def _dash(series: Series) -> Markup:
    return _svg(' stroke-dasharray="{}"', series.dash) if series.dash else Markup("")


def lines(title: str, series: Sequence[Series], x_label: str, y_label: str, write: Format = number,
          zero: bool = False, note: str = "") -> Markup:  # fmt: skip
    """Lines over rounds; with `zero` from 0, or on a logarithmic axis if values differ by a factor of more than 30."""
    shown = [(s, points) for s in series if (points := _finite(s.points))]
    if not shown:
        return empty(title)
    xs, ys = zip(*(point for _, points in shown for point in points), strict=True)
    log = zero and min(ys) > 1e-300 and max(ys) > 30 * min(ys)
    x = linear(min(xs), max(xs), LEFT, WIDTH - RIGHT, number, integers=True)
    scale, low = (_log, min(ys)) if log else (linear, min(0.0, *ys) if zero else min(ys))
    y = scale(low, max(ys), HEIGHT - BOTTOM, TOP, write)
    body, alt = _axes(x, y, x_label, y_label), []
    for line, points in shown:
        alt.append(f"{line.label}: {write(points[0][1])}")
        if line.level:
            points = [(x.low, points[0][1]), (x.high, points[0][1])]
        elif len(points) > 1:
            alt[-1] += f" at {x_label} {number(points[0][0])}, {write(points[-1][1])} at {number(points[-1][0])}"
        pixels = [(x.at(a), y.at(b)) for a, b in (points[i] for i in spread(len(points), MAX_POINTS))]
        path = "M" + "L".join(f"{a} {b}" for a, b in pixels)
        body += _svg('<path class="l c{}" d="{}"{}/>', line.color, path, _dash(line))
        if not line.level and len(pixels) <= 30:
            for a, b in pixels:
                body += _svg('<circle class="f c{}" cx="{}" cy="{}" r="2.6"/>', line.color, a, b)
    note = f"{note} Logarithmic scale.".lstrip() if log else note
    return _figure(title, body, f"{title}. {'; '.join(alt)}.", note, [s for s, _ in shown])


def stacked(title: str, series: Sequence[Series], x_label: str, y_label: str) -> Markup:
    """Stacked bars over rounds; of many rounds, a bar is the mean of several neighbors."""
    shown = [(s, dict(points)) for s in series if (points := _finite(s.points))]
    if not shown:
        return empty(title)
    rounds = sorted(set[float]().union(*(values for _, values in shown)))
    neighbors = math.ceil(len(rounds) / MAX_BARS)
    x = linear(min(rounds), max(rounds), LEFT + 10, WIDTH - RIGHT - 10, number, integers=True)
    groups = [rounds[i : i + neighbors] for i in range(0, len(rounds), neighbors)]
    means = [[sum(max(values.get(r, 0.0), 0.0) for r in group) / len(group) for _, values in shown] for group in groups]
    y = linear(0.0, max(map(sum, means)), HEIGHT - BOTTOM, TOP, number)
    wide = round(min(20.0, 0.74 * neighbors * (x.end - x.start) / (x.high - x.low)), 1)
    body = _axes(x, y, x_label, y_label)
    for group, heights in zip(groups, means, strict=True):
        at, below = sum(group) / len(group), 0.0
        for (layer, _), value in zip(shown, heights, strict=True):
            top, bottom = y.at(below + value), y.at(below)
            below += value
            if bottom > top:
                body += _bar(layer.color, x.at(at) - wide / 2, top, wide, bottom - top)
    alt = "; ".join(f"{s.label}: {number(sum(v.values()) / len(v))} on average" for s, v in shown)
    note = f"A bar is the mean of {neighbors} rounds." if neighbors > 1 else ""
    return _figure(title, body, f"{title}. {alt}.", note, [s for s, _ in shown], bars=True)


def _bar(color: int, x: float, top: float, width: float, height: float) -> Markup:
    bar = '<rect class="f c{}" x="{}" y="{}" width="{}" height="{}"/>'
    return _svg(bar, color, round(x, 1), top, round(width, 1), round(height, 1))


def empty(title: str, note: str = "") -> Markup:
    """A chart without data."""
    body = '<div class="empty"><p class="none">no data</p><p class="note">{}</p></div>'
    return _svg("<figure><figcaption>{}</figcaption>" + body + "</figure>", title, note)


def pairs(title: str, clients: pa.Table, x_label: str, y_label: str, note: str) -> Markup:
    """A mark for each client (client, before, after; sorted by the change), a triangle for those that got worse."""
    values = np.concatenate([clients["before"].to_numpy(), clients["after"].to_numpy()])
    low, high = float(values.min()), float(values.max())
    x = linear(low, high, LEFT, WIDTH - RIGHT, number)
    y = linear(low, high, HEIGHT - BOTTOM, TOP, number)
    body = _axes(x, y, x_label, y_label)
    body += _svg('<path class="d" d="M{} {}L{} {}"/>', x.start, y.start, x.end, y.end)
    body += _svg('<text class="t" x="{}" y="{}">worse</text>', LEFT + 8, TOP + 16)
    body += _svg('<text class="t e" x="{}" y="{}">better</text>', WIDTH - RIGHT - 6, HEIGHT - BOTTOM - 8)
    # Thinned in the order of the change, so that both ends of the distribution are drawn.
    for client in clients.take(spread(len(clients), MAX_POINTS)).to_pylist():
        name, before, after = client.values()
        a, b = x.at(before), y.at(after)
        tip = _svg("<title>{}: {} to {}</title>", name[:80], number(before), number(after))
        if after > before:
            body += _svg('<path class="p c2" d="M{} {}l4.2 7.4h-8.4z">{}</path>', a, round(b - 4.9, 1), tip)
        else:
            body += _svg('<circle class="p c1" cx="{}" cy="{}" r="3">{}</circle>', a, b, tip)
    if len(clients) > MAX_POINTS:
        note += f" {MAX_POINTS:,} of {len(clients):,} clients are drawn, evenly over the change."
    return _figure(title, body, f"{title}. {note}", note)


def histogram(title: str, values: NDArray[np.float64], x_label: str, y_label: str, note: str) -> Markup:
    """The number of values in each bin of a logarithmic axis; a bin is at most a factor of two wide."""
    values = values[(values > 1e-300) & (values <= LARGEST)]
    if not len(values):
        return empty(title, note)
    x = _log(float(values.min()), float(values.max()), LEFT, WIDTH - RIGHT, number)
    decades = math.log10(x.high / x.low)
    bins = round(decades * max(4, min(10, 24 / decades)))
    places = (np.log10(values / x.low) / decades * bins + 1e-9).astype(int)
    counts = np.bincount(np.minimum(places, bins - 1), minlength=bins).tolist()
    y = linear(0, max(counts), HEIGHT - BOTTOM, TOP, number, integers=True)
    body = _axes(x, y, x_label, y_label)
    step = (x.end - x.start) / bins
    for i, count in enumerate(counts):
        if count:
            body += _bar(1, x.start + i * step + 0.5, y.at(count), step - 1, y.start - y.at(count))
    return _figure(title, body, f"{title}. {note}", note)
