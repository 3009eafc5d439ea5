"""Charts as inline SVG: scales, ticks, paths, and the values that the page shows under the pointer. Standard library only.

The curves are drawn in a square of 1000 x 1000 that is stretched to the place the page has, with strokes that keep their width. Text is
HTML beside it, placed in percent: so it keeps its size in a narrow window and on paper.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_POINTS = 2000
FEW_POINTS = 30  # that are shown one by one
MOST_BARS = 300
MOST_MARKS = 200
LARGEST = 1e30  # beyond it a number is as good as infinite, and a scale would overflow
SMALLEST = 1e-30  # below it a stretch is as good as none, and a tick's step would be 0
LOG_FROM = 50  # a curve whose largest value is this many times its smallest is read better on a logarithmic scale

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A curve. ``style`` names its class in page.css; ``dots``: every point is a dot, joined."""

    name: str
    points: Sequence[Point]
    style: str
    dots: bool = False


@dataclass(frozen=True)
class Tick:
    """A number on an axis; ``at`` in percent from the left or from the top."""

    at: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A drawn line or area."""

    name: str
    style: str
    path: str
    dots: str = ""
    area: bool = False


@dataclass
class Chart:
    """What the template draws. ``values`` is what the page reads under the pointer, as JSON."""

    title: str
    unit: str
    curves: list[Curve]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Tick] = field(default_factory=list)
    lost: list[Tick] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    wide: bool = False


@dataclass(frozen=True)
class Scale:
    """Numbers to places in the square, 0 to 1000."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        return 1000 * ((math.log10(value) if self.log else value) - low) / (high - low)


def line_chart(
    title: str, lines: Sequence[Line], *, unit: str = "", zero: bool = False, log: bool = False, marks: Iterable[int] = (),
    over: Point | None = None, wide: bool = False,
) -> Chart | None:  # fmt: skip
    """Curves over steps; None when there is nothing to draw.

    Args:
        zero: the axis begins at 0.
        log: a logarithmic axis, where the values are positive and far apart.
        marks: steps that training was resumed from.
        over: first and last step of the axis; without it those of the curves.
    """
    finite = {line.name: [p for p in line.points if usable(p[1])] for line in lines}
    values = [y for points in finite.values() for _, y in points]
    steps = [x for line in lines for x, _ in line.points]
    if not values:
        return None
    across = Scale(*_apart(*(over or (min(steps), max(steps)))))
    up = _up(values, zero, log)
    kept = {line.name: thinned(finite[line.name], MOST_POINTS) for line in lines}
    curves = []
    for line in lines:
        runs = _runs(kept[line.name], line.points, line.dots)
        alone = (
            kept[line.name]
            if line.dots or len(kept[line.name]) <= FEW_POINTS
            else [run[0] for run in runs if len(run) == 1]
        )
        curves.append(Curve(line.name, line.style, _path(runs, across, up), _dots(alone, across, up)))
    lost = sorted({x for line in lines for x, y in line.points if not usable(y)})
    return Chart(
        title, unit, curves, _x_ticks(across), _y_ticks(up), _marks(marks, across),
        [Tick(across(x) / 10, f"step {x:g}") for x in lost[:: max(1, len(lost) // MOST_MARKS)]],
        {
            "x": [across.low, across.high], "y": [up.low, up.high], "log": up.log, "unit": unit,
            "lines": [
                {"name": line.name, "style": line.style, "x": [x for x, _ in kept[line.name]], "y": [_short(y) for _, y in kept[line.name]]}
                for line in lines if kept[line.name]
            ],
        },
        wide,
    )  # fmt: skip


def stacked_chart(
    title: str, parts: Mapping[str, tuple[str, Sequence[Point]]], whole: Sequence[Point] = (), *, unit: str = "",
    marks: Iterable[int] = (), over: Point | None = None, wide: bool = False,
) -> Chart | None:  # fmt: skip
    """Parts on top of each other, name -> (style, points); a column is the mean of its steps. None when there is nothing to draw.

    Args:
        whole: what the parts are parts of, drawn as a line: parts that are done at the same time add up to more.
        over: first and last step of the axis.
    """
    by_step: dict[float, dict[str, float]] = {}
    for name, (_, points) in parts.items():
        for x, y in points:
            if usable(y):
                by_step.setdefault(x, {})[name] = max(0.0, y)
    steps = sorted(by_step)
    if not steps:
        return None
    width = -(-len(steps) // MOST_BARS)
    groups = [steps[i : i + width] for i in range(0, len(steps), width)]
    gap = (steps[-1] - steps[0]) / max(1, len(steps) - 1) or 1.0
    edges = [g[0] - gap / 2 for g in groups] + [steps[-1] + gap / 2]
    means = [{n: sum(by_step[x].get(n, 0.0) for x in g) / len(g) for n in parts} for g in groups]
    sums = [sum(m.values()) for m in means]
    known = {x: y for x, y in whole if usable(y) and y > 0}
    wholes = [statistics.fmean(found) if (found := [known[x] for x in g if x in known]) else 0.0 for g in groups]
    across = Scale(edges[0], edges[-1]) if over is None else Scale(min(edges[0], over[0]), max(edges[-1], over[1]))
    top = max(sums + wholes)
    up = Scale(0.0, top * 1.05 if top > SMALLEST else 1.0)
    middles, below, curves, lines = [g[len(g) // 2] for g in groups], [0.0] * len(groups), [], []
    for name, (style, _) in parts.items():
        above = [b + m[name] for b, m in zip(below, means, strict=True)]
        if above != below:
            curves.append(Curve(name, style, _area(edges, below, above, across, up), area=True))
            lines.append({"name": name, "style": style, "x": middles, "y": [_short(m[name]) for m in means]})
        below = above
    if not curves:
        return None
    if known:
        columns = [(left, right, y) for left, right, y in zip(edges, edges[1:], wholes, strict=False) if y]
        path = _path([[p for left, right, y in columns for p in ((left, y), (right, y))]], across, up)
        curves.append(Curve("whole step", "whole", path))
        lines.append({"name": "whole step", "style": "whole", "x": middles, "y": [_short(y) for y in wholes]})
    else:
        lines.append({"name": "sum", "style": "", "x": middles, "y": [_short(y) for y in sums]})
    values = {"x": [across.low, across.high], "y": [0, up.high], "log": False, "unit": unit, "lines": lines}
    return Chart(title, unit, curves, _x_ticks(across), _y_ticks(up), _marks(marks, across), [], values, wide)


def usable(value: float) -> bool:
    """Whether a number can be drawn."""
    return abs(value) < LARGEST  # false for nan too


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most ``most`` of the points: the smallest and the largest of every stretch, so that no peak is lost, and both ends."""
    if len(points) <= most:
        return list(points)
    count = (most - 2) // 2
    kept = [points[0]]
    for i in range(count):
        stretch = range(1 + i * (len(points) - 2) // count, 1 + (i + 1) * (len(points) - 2) // count)
        pair = {min(stretch, key=lambda k: points[k][1]), max(stretch, key=lambda k: points[k][1])}
        kept += [points[k] for k in sorted(pair)]
    return [*kept, points[-1]]


def smoothed(points: Sequence[Point], span: int) -> list[Point]:
    """Means over ``span`` neighbouring points around each, fewer at the ends: without the lag of a mean of what came before."""
    points = [p for p in points if usable(p[1])]
    sums = list(itertools.accumulate((y for _, y in points), initial=0.0))
    reach = span // 2
    found = []
    for i, (x, _) in enumerate(points):
        start, stop = max(0, i - reach), min(len(points), i + reach + 1)
        found.append((x, (sums[stop] - sums[start]) / (stop - start)))
    return found


def compact(value: float) -> str:
    """A number for an axis: ``1.5``, ``20k``, ``1e-05``."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def _apart(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _up(values: Sequence[float], zero: bool, log: bool) -> Scale:
    low, high = min(values), max(values)
    if log and low > 0 and high / low > LOG_FROM:
        return Scale(low / 1.15, high * 1.15, True)
    stretch = (high - low) or abs(high)
    margin = 0.06 * (stretch if stretch > SMALLEST else 1.0)
    if zero and low >= 0:
        return Scale(0.0, high + margin)
    return Scale(low - margin, high + margin)


def _nice(low: float, high: float, most: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most ``most`` of them: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((f * power for f in (1, 2, 5, 10) if f * power >= rough), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _x_ticks(across: Scale) -> list[Tick]:
    whole = [x for x in _nice(across.low, across.high, 8) if abs(x - round(x)) < 1e-6 and x >= 0]
    return [Tick(across(x) / 10, compact(round(x))) for x in whole]


def _y_ticks(up: Scale) -> list[Tick]:
    if up.log:
        first, last = math.floor(math.log10(up.low)), math.ceil(math.log10(up.high))
        factors = (1, 2, 5) if math.log10(up.high / up.low) < 2.5 else (1,)
        every = max(1, (last - first) // 5)
        values = [f * 10.0**e for e in range(first, last + 1, every) for f in factors]
        values = [v for v in values if up.low <= v <= up.high]
    else:
        values = _nice(up.low, up.high, 5)
    return [Tick(100 - up(v) / 10, compact(v)) for v in values]


def _marks(steps: Iterable[int], across: Scale) -> list[Tick]:
    return [
        Tick(across(x) / 10, f"resumed at step {x:,}") for x in dict.fromkeys(steps) if across.low <= x <= across.high
    ]


def _runs(kept: Sequence[Point], every: Sequence[Point], joined: bool) -> list[list[Point]]:
    """The points, broken where values that are no numbers lie between them."""
    lost = [] if joined else sorted(x for x, y in every if not usable(y))
    runs, at = [[]], 0
    for point in kept:
        broken = False
        while at < len(lost) and lost[at] < point[0]:
            at, broken = at + 1, True
        if broken and runs[-1]:
            runs.append([])
        runs[-1].append(point)
    return runs


def _path(runs: Sequence[Sequence[Point]], across: Scale, up: Scale) -> str:
    drawn = []
    for run in runs:
        if run:
            drawn.append("M" + "L".join(f"{across(x):.1f} {1000 - up(y):.1f}" for x, y in run))
    return "".join(drawn)


def _dots(points: Sequence[Point], across: Scale, up: Scale) -> str:
    return "".join(f"M{across(x):.1f} {1000 - up(y):.1f}h0" for x, y in points)


def _area(edges: Sequence[float], below: Sequence[float], above: Sequence[float], across: Scale, up: Scale) -> str:
    columns = list(zip(edges, edges[1:], below, above, strict=False))
    there = [f"{across(x):.1f} {1000 - up(a):.1f}" for left, right, _, a in columns for x in (left, right)]
    back = [f"{across(x):.1f} {1000 - up(b):.1f}" for left, right, b, _ in reversed(columns) for x in (right, left)]
    return "M" + "L".join([*there, *back]) + "Z"


def _short(value: float) -> float:
    return float(f"{value:.5g}")
