"""Line and bar charts as SVG, readable on light and dark pages, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 44, 52
BAR_LEFT, BAR_RIGHT, BAR_STEP, BAR_HEIGHT = 270, 84, 28, 18  # room for names, for figures
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.grid { stroke: #d0d7de; stroke-width: 1 } .axis { stroke: #57606a; stroke-width: 1 }
path { fill: none } .line { stroke-width: 2; stroke-linejoin: round }
.line0, .key0 { stroke: #0a63c9 } .line1, .key1 { stroke: #c4420a }
.dot0, .bar0 { fill: #0a63c9 } .dot1, .bar1 { fill: #c4420a }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .grid { stroke: #30363d } .axis { stroke: #8b949e }
.line0, .key0 { stroke: #6cb6ff } .line1, .key1 { stroke: #ff9a63 }
.dot0, .bar0 { fill: #6cb6ff } .dot1, .bar1 { fill: #ff9a63 }
}"""


@dataclass(frozen=True)
class Line:
    """One curve; `dots` marks its points, for curves that have few."""

    name: str
    points: Points
    dots: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar; `instead` stands where one without a value would be."""

    name: str
    value: float | None
    is_ours: bool = False
    instead: str = ""


@dataclass(frozen=True)
class Axis:
    """A linear axis from the first to the last of its ticks."""

    label: str
    ticks: Sequence[float]

    def at(self, value: float, low: float, high: float) -> float:
        """Position of a value, where the first tick lies at `low` and the last at `high`."""
        first, last = self.ticks[0], self.ticks[-1]
        return low + (value - first) / (last - first) * (high - low)


def line_chart(title: str, x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    """The chart as SVG text. At most two lines: there are colours for two.

    Raises: ValueError for more, or for a point outside the axes.
    """
    if len(lines) > 2:
        raise ValueError(f"{len(lines)} lines, but colours for two")
    parts = [*_head(title, HEIGHT), *_axes(x, y)]
    for index, line in enumerate(lines):
        parts += _curve(index, line, x, y)
        parts += _key(index, line.name)
    return "\n".join([*parts, "</svg>", ""])


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Bars from zero, in the order given, each with its name and figure, as SVG text.

    Raises: ValueError for a negative value.
    """
    if any(bar.value is not None and bar.value < 0 for bar in bars):
        raise ValueError(f"{title}: a bar starts at zero, a value lies below it")
    longest = max((bar.value for bar in bars if bar.value is not None), default=0) or 1
    height = TOP + BAR_STEP * len(bars) + 12
    parts = [*_head(title, height), f'<text x="16" y="26">{escape(title)}</text>']
    for index, bar in enumerate(bars):
        top = TOP + BAR_STEP * index
        base = top + BAR_HEIGHT - 4
        parts.append(
            f'<text x="{BAR_LEFT - 8}" y="{base}" text-anchor="end">{escape(bar.name)}</text>'
        )
        wide = 0.0
        if bar.value is not None:
            wide = bar.value / longest * (WIDTH - BAR_LEFT - BAR_RIGHT)
            parts.append(
                f'<rect class="bar{0 if bar.is_ours else 1}" x="{BAR_LEFT}" y="{top}" '
                f'width="{wide:.1f}" height="{BAR_HEIGHT}"/>'
            )
        said = bar.instead if bar.value is None else three_digits(bar.value)
        parts.append(f'<text x="{BAR_LEFT + wide + 8:.1f}" y="{base}">{escape(said)}</text>')
    bottom = height - 8
    parts.append(f'<path class="axis" d="M{BAR_LEFT} {TOP - 6}V{bottom}"/>')
    return "\n".join([*parts, "</svg>", ""])


def three_digits(value: float) -> str:
    """A figure to three significant digits, or to its last whole one: 12,345  123  12.3  0.0123."""
    decimals = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def _head(title: str, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
    ]


def _axes(x: Axis, y: Axis) -> list[str]:
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    parts = []
    for tick in y.ticks:
        at = y.at(tick, bottom, top)
        parts.append(f'<path class="grid" d="M{left} {at:.1f}H{right}"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x.ticks:
        at = x.at(tick, left, right)
        if tick == int(tick):
            parts.append(f'<path class="grid" d="M{at:.1f} {top}V{bottom}"/>')
        parts.append(f'<path class="axis" d="M{at:.1f} {bottom}v5"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 20}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<path class="axis" d="M{left} {top}V{bottom}H{right}"/>')
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    parts.append(
        f'<text x="{middle_x:g}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x.label)}</text>'
        f'<text transform="translate(18 {middle_y:g}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.label)}</text>"
    )
    return parts


def _curve(index: int, line: Line, x: Axis, y: Axis) -> list[str]:
    places = []
    for px, py in line.points:
        if not (x.ticks[0] <= px <= x.ticks[-1] and y.ticks[0] <= py <= y.ticks[-1]):
            raise ValueError(f"{line.name}: the point ({px:g}, {py:g}) is outside the axes")
        at_x, at_y = x.at(px, LEFT, WIDTH - RIGHT), y.at(py, HEIGHT - BOTTOM, TOP)
        places.append((f"{at_x:.1f}", f"{at_y:.1f}"))
    parts = [f'<path class="line line{index}" d="M{"L".join(" ".join(p) for p in places)}"/>']
    if line.dots:
        parts += [f'<circle class="dot{index}" cx="{a}" cy="{b}" r="3"/>' for a, b in places]
    return parts


def _key(index: int, name: str) -> list[str]:
    at = LEFT + 8 + 290 * index
    return [
        f'<path class="line key{index}" d="M{at} 22h28"/>'
        f'<text x="{at + 36}" y="26">{escape(name)}</text>'
    ]
