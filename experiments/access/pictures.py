"""Pictures of a comparison: a bubble for each run, its area by the bytes that a client sends."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from experiments.access.measured import Measured
from experiments.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, linear, number, size

COLORS = {"black box": 3, "gray box": 2, "open weights": 1, "open source": 4}


def bubbles(title: str, runs: Sequence[Measured], xs: Sequence[float], x_label: str, y_label: str) -> Markup:
    """A chart of losses on unseen clients over `xs`, as an SVG in a figure."""
    ys = [run.after.get("unseen", math.nan) for run in runs]
    places = [place for place, y in enumerate(ys) if math.isfinite(y)]
    if not places:
        return Markup("<figure><figcaption>{}</figcaption><p>no data</p></figure>").format(title)
    x_axis = linear(0.0, max(xs[place] for place in places), LEFT, WIDTH - RIGHT, number)
    y_axis = linear(
        min(ys[place] for place in places), max(ys[place] for place in places), HEIGHT - BOTTOM, TOP, number
    )
    parts = [_grid(x_axis, y_axis)]
    most = max(max(run.up for run in runs), 1.0)
    for place in places:
        run, radius = runs[place], 4 + 14 * math.sqrt(runs[place].up / most)
        x, y = x_axis.at(xs[place]), y_axis.at(ys[place])
        at_end = x > WIDTH * 0.7
        parts.append(
            Markup(
                '<circle class="b c{}" cx="{}" cy="{}" r="{:.1f}"><title>{}: {:.3f}, {} a round</title></circle>'
                '<text class="t{}" x="{:.1f}" y="{}">{}</text>'
            ).format(
                *(COLORS[run.box], x, y, radius, run.name, ys[place], size(run.up)),
                *(" e" if at_end else "", x - radius - 3 if at_end else x + radius + 3, y + 4, run.name),
            )
        )
    boxes = dict.fromkeys(run.box for run in runs)
    legend = Markup("").join(
        Markup('<li class="c{}"><span class="key">{}</span></li>').format(COLORS[box], box) for box in boxes
    )
    return Markup(
        '<figure><figcaption>{}</figcaption><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}'
        '<text class="t m" x="{}" y="{}">{}</text><text class="t" x="4" y="14">{}</text></svg>'
        '<ul class="legend">{}</ul></figure>'
    ).format(
        *(title, WIDTH, HEIGHT, title, Markup("").join(parts)),
        *((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, y_label, legend),
    )


def _grid(x_axis: Axis, y_axis: Axis) -> Markup:
    lines = [
        Markup('<path class="g" d="M{} {}H{}"/><text class="t e" x="{}" y="{}">{}</text>').format(
            LEFT, y_axis.at(value), WIDTH - RIGHT, LEFT - 6, y_axis.at(value) + 4, text
        )
        for value, text in y_axis.ticks
    ]
    lines += [
        Markup('<text class="t m" x="{}" y="{}">{}</text>').format(x_axis.at(value), HEIGHT - BOTTOM + 16, text)
        for value, text in x_axis.ticks
    ]
    return Markup("").join(lines)
