"""Charts as inline SVG, written by hand: text stays text, and the page's style sheet colours light, dark and print.

Every function returns one `<figure>` as Markup; whatever comes from a run goes through `Markup.format`, which escapes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from markupsafe import Markup

WIDTH, HEIGHT = 480, 280  # small enough that 12-unit text is still readable when scaled to a phone
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 30, 42
COLORS = 8  # the style sheet defines .c1 to .c8
MINUS = "\N{MINUS SIGN}"
MAX_POINTS = 1500
MAX_BARS = 100

Format = Callable[[float], str]
Point = tuple[float, float]
T = TypeVar("T")


@dataclass(frozen=True)
class Series:
    """A line or a layer of bars; `color` counts from 1, `dash` is an SVG dash pattern, `level` one value all along."""

    label: str
    points: Sequence[Point]
    color: int
    dash: str = ""
    level: bool = False


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on the pixels from `start` to `end`, with ticks that are written out."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[tuple[float, str]]
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; a logarithmic axis takes positive values only."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)


def number(value: float) -> str:
    """A short number for a tick or a label: at most four significant digits, with a real minus sign."""
    if not math.isfinite(value):
        return str(value)
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}").replace("-", MINUS)


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
    """Seconds in words that fit the length."""
    if not math.isfinite(seconds) or seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.3g} min" if seconds < 3600 else f"{minutes // 60} h {minutes % 60:02d} min"


def loss(value: float | None) -> str:
    """A loss with three decimals, so that columns of them line up."""
    return "no data" if value is None else f"{value:.3f}".replace("-", MINUS)


def change(first: float, last: float) -> str:
    """Percent from first to last, with a sign."""
    if first == 0 or not math.isfinite(first) or not math.isfinite(last):
        return "no data"
    return f"{100 * (last - first) / abs(first):+.1f} %".replace("-", MINUS)


def _linear(low: float, high: float, start: float, end: float, write: Format, whole: bool = False) -> Axis:
    """An axis whose ends are ticks at 1, 2 or 5 times a power of ten; `whole` keeps to integers (rounds, clients)."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-12):
        pad = abs(low) * 0.1 or 1.0  # one value only: put it in the middle
        low, high = (0.0, 2 * pad) if low == 0 else (low - pad, high + pad)
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    places = max(0, -math.floor(math.log10(step) + 1e-9))

    def tick(value: float) -> str:  # plain numbers all with the same decimals: 2.0, 2.5
        return f"{value:,.{places}f}".replace("-", MINUS) if write is number and places < 5 else write(value)

    ticks = [(i * step, tick(i * step)) for i in range(first, last + 1)]
    return Axis(first * step, last * step, start, end, ticks)


def _log(low: float, high: float, start: float, end: float, write: Format) -> Axis:
    """A logarithmic axis in decades; with few decades 2 and 5 are ticks too."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    every = max(1, math.ceil((last - first) / 6))
    marks = (1, 2, 5) if last - first <= 2 else (1,)
    values = [m * 10.0**p for p in range(first, last + 1, every) for m in marks]
    ticks = [(v, write(v)) for v in values if v <= 10.0**last * 1.001]
    return Axis(10.0**first, 10.0**last, start, end, ticks, log=True)


def _thin(items: Sequence[T], most: int) -> list[T]:
    """At most about `most` items, evenly spaced, with the first and the last kept."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _drawable(*values: float) -> bool:
    """Neither NaN nor so large that the span of an axis would overflow."""
    return all(abs(v) <= 1e300 for v in values)


def _finite(points: Sequence[Point]) -> list[Point]:
    return [p for p in points if _drawable(*p)]


def _axes(x: Axis, y: Axis, x_label: str, y_label: str) -> Markup:
    out = [Markup('<text class="t" x="0" y="14">{}</text>').format(y_label)]
    for value, text in y.ticks:
        out.append(
            Markup('<path class="g" d="M{} {}H{}"/><text class="t e" x="{}" y="{}">{}</text>').format(
                LEFT, y.at(value), WIDTH - RIGHT, LEFT - 7, y.at(value) + 4, text
            )
        )
    base = HEIGHT - BOTTOM
    for value, text in x.ticks:
        out.append(
            Markup('<path class="a" d="M{0} {1}v4"/><text class="t m" x="{0}" y="{2}">{3}</text>').format(
                x.at(value), base, base + 18, text
            )
        )
    middle = (LEFT + WIDTH - RIGHT) // 2
    out.append(Markup('<path class="a" d="M{} {}H{}"/>').format(LEFT, base, WIDTH - RIGHT))
    out.append(Markup('<text class="t m" x="{}" y="{}">{}</text>').format(middle, HEIGHT - 5, x_label))
    return Markup("").join(out)


def _figure(title: str, body: Markup | None, alt: str, keys: Sequence[Series] = (), bars: bool = False,
            note: str = "") -> Markup:  # fmt: skip
    legend = Markup("")
    for key in keys:
        dash = Markup(' stroke-dasharray="{}"').format(key.dash) if key.dash else ""
        mark = Markup('<path class="l" d="M0 7H24"{}/>').format(dash)
        if bars:
            mark = Markup('<rect class="f" width="12" height="12" y="1" x="6"/>')
        legend += Markup('<li class="c{}"><svg width="24" height="14" aria-hidden="true">{}</svg>').format(
            key.color, mark
        )
        legend += Markup('<span class="key">{}</span></li>').format(key.label)
    out = Markup("<figure><figcaption>{}</figcaption>").format(title)
    if body is None:
        empty = Markup('<div class="empty"><p class="none">no data</p><p class="note">{}</p></div>').format(note)
        return out + empty + Markup("</figure>")
    if legend:
        out += Markup('<ul class="legend">{}</ul>').format(legend)
    out += Markup('<svg class="chart" role="img" viewBox="0 0 {} {}" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, alt, body
    )
    return out + (Markup('<p class="note">{}</p>').format(note) if note else Markup("")) + Markup("</figure>")


def lines(title: str, series: Sequence[Series], x_label: str, y_label: str, write: Format = number,
          zero: bool = False, note: str = "") -> Markup:  # fmt: skip
    """Lines over rounds; a `level` runs across the chart. Logarithmic where values span 30 times."""
    every = [p for s in series for p in _finite(s.points)]
    log = zero and bool(every) and min(y for _, y in every) > 1e-300
    log = log and max(y for _, y in every) > 30 * min(y for _, y in every)
    if not every:
        return _figure(title, None, "")
    xs, ys = [x for x, _ in every], [y for _, y in every]
    x = _linear(min(xs), max(xs), LEFT, WIDTH - RIGHT, number, whole=True)
    if log:
        y = _log(min(ys), max(ys), HEIGHT - BOTTOM, TOP, write)
    else:
        y = _linear(min(0.0, *ys) if zero else min(ys), max(ys), HEIGHT - BOTTOM, TOP, write)
    body, told = _axes(x, y, x_label, y_label), []
    for one in series:
        points = _finite(one.points)
        if not points:
            continue
        told.append(f"{one.label}: {write(points[0][1])}")
        if one.level:
            points = [(x.low, points[0][1]), (x.high, points[0][1])]
        elif len(points) > 1:
            told[-1] += f" at {x_label} {number(points[0][0])}, {write(points[-1][1])} at {number(points[-1][0])}"
        pixels = [(x.at(a), y.at(b)) for a, b in _thin(points, MAX_POINTS)]
        path = "M" + "L".join(f"{a} {b}" for a, b in pixels)
        dash = Markup(' stroke-dasharray="{}"').format(one.dash) if one.dash else ""
        body += Markup('<path class="l c{}" d="{}"{}/>').format(one.color, path, dash)
        if not one.level and len(pixels) <= 30:
            for a, b in pixels:
                body += Markup('<circle class="f c{}" cx="{}" cy="{}" r="2.6"/>').format(one.color, a, b)
    shown = [s for s in series if _finite(s.points)]
    note = " ".join(filter(None, [note, "Logarithmic scale." if log else ""]))
    return _figure(title, body, f"{title}. {'; '.join(told)}.", shown, note=note)


def stacked(title: str, series: Sequence[Series], x_label: str, y_label: str, write: Format = number,
            note: str = "") -> Markup:  # fmt: skip
    """Stacked bars over rounds; where there are many rounds, a bar is the mean of several neighbours."""
    values: dict[float, list[float]] = {}
    for i, one in enumerate(series):
        for a, b in _finite(one.points):
            values.setdefault(a, [0.0] * len(series))[i] = max(b, 0.0)
    if not values:
        return _figure(title, None, "")
    rounds = sorted(values)
    group = math.ceil(len(rounds) / MAX_BARS)
    x = _linear(min(rounds), max(rounds), LEFT + 10, WIDTH - RIGHT - 10, number, whole=True)
    bars = []
    for i in range(0, len(rounds), group):
        part = rounds[i : i + group]
        bars.append((sum(part) / len(part), [sum(values[r][k] for r in part) / len(part) for k in range(len(series))]))
    y = _linear(0.0, max(sum(layers) for _, layers in bars), HEIGHT - BOTTOM, TOP, write)
    wide = round(min(20.0, 0.74 * group * (x.end - x.start) / (x.high - x.low)), 1)
    body = _axes(x, y, x_label, y_label)
    for at, layers in bars:
        below = 0.0
        for one, value in zip(series, layers, strict=True):
            top, bottom = y.at(below + value), y.at(below)
            below += value
            if bottom > top:
                body += Markup('<rect class="f c{}" x="{}" y="{}" width="{}" height="{}"/>').format(
                    one.color, round(x.at(at) - wide / 2, 1), top, wide, round(bottom - top, 1)
                )
    shown = [(s, [b for _, b in _finite(s.points)]) for s in series]
    told = "; ".join(f"{s.label}: {write(sum(v) / len(v))} on average" for s, v in shown if v)
    note = " ".join(filter(None, [note, f"A bar is the mean of {group} rounds." if group > 1 else ""]))
    return _figure(title, body, f"{title}. {told}.", [s for s, v in shown if v], bars=True, note=note)


def pairs(title: str, points: Sequence[tuple[str, float, float]], x_label: str, y_label: str, note: str) -> Markup:
    """A mark a client, (name, before, after), against the line of no change; those that got worse are triangles."""
    real = [p for p in points if _drawable(p[1], p[2])]
    if not real:
        return _figure(title, None, "", note=note)
    low, high = min(min(a, b) for _, a, b in real), max(max(a, b) for _, a, b in real)
    x = _linear(low, high, LEFT, WIDTH - RIGHT, number)
    y = _linear(low, high, HEIGHT - BOTTOM, TOP, number)
    body = _axes(x, y, x_label, y_label)
    body += Markup('<path class="d" d="M{} {}L{} {}"/>').format(x.start, y.start, x.end, y.end)
    body += Markup('<text class="t" x="{}" y="{}">worse</text>').format(LEFT + 8, TOP + 16)
    body += Markup('<text class="t e" x="{}" y="{}">better</text>').format(WIDTH - RIGHT - 6, HEIGHT - BOTTOM - 8)
    # Sorted by the change before thinning, so that what is drawn keeps both ends of the distribution.
    for name, before, after in _thin(sorted(real, key=lambda p: (p[2] - p[1], p[0])), MAX_POINTS):
        a, b = x.at(before), y.at(after)
        tip = Markup("<title>{}: {} to {}</title>").format(name[:80], number(before), number(after))
        if after > before:
            body += Markup('<path class="p c2" d="M{} {}l4.2 7.4h-8.4z">{}</path>').format(a, round(b - 4.9, 1), tip)
        else:
            body += Markup('<circle class="p c1" cx="{}" cy="{}" r="3">{}</circle>').format(a, b, tip)
    if len(real) > MAX_POINTS:
        note += f" {MAX_POINTS:,} of {len(real):,} clients are drawn, evenly over the change."
    return _figure(title, body, f"{title}. {note}", note=note)


def histogram(title: str, values: Sequence[float], x_label: str, y_label: str, note: str) -> Markup:
    """How many values lie in each bin; a bin is a factor of two wide or less, on a logarithmic axis."""
    real = [v for v in values if _drawable(v) and v > 1e-300]
    if not real:
        return _figure(title, None, "", note=note)
    x = _log(min(real), max(real), LEFT, WIDTH - RIGHT, number)
    decades = math.log10(x.high / x.low)
    bins = round(decades * max(4, min(10, 24 / decades)))
    counts = [0] * bins
    for v in real:
        counts[min(bins - 1, int(math.log10(v / x.low) / decades * bins + 1e-9))] += 1
    y = _linear(0, max(counts), HEIGHT - BOTTOM, TOP, number, whole=True)
    body = _axes(x, y, x_label, y_label)
    step = (x.end - x.start) / bins
    for i, count in enumerate(counts):
        if count:
            body += Markup('<rect class="f c1" x="{}" y="{}" width="{}" height="{}"/>').format(
                round(x.start + i * step + 0.5, 1), y.at(count), round(step - 1, 1), round(y.start - y.at(count), 1)
            )
    return _figure(title, body, f"{title}. {note}", note=note)
