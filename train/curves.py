"""Numbers over steps as small SVG drawings that scale with the page and take its colours. Knows nothing of runs."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT = 360, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 352, 10, 146  # where the lines are
_MANY = 30  # points, from which a smooth line is drawn over them

STYLE = """
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); gap: 1.2em 1.5em }
figure { margin: 0 } figcaption { font-size: 14px; display: flex; flex-wrap: wrap; gap: 0 .8em }
figcaption span:last-child { margin-left: auto; color: var(--dim); font-variant-numeric: tabular-nums }
svg { width: 100%; height: auto; display: block } svg text { font-size: 11px; fill: var(--dim) }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round } svg .raw { opacity: .35 }
svg .grid { stroke: var(--rule) } svg .mark { stroke: var(--wrong); stroke-dasharray: 3 3 } svg .band { opacity: .15 }
svg .line0 { stroke: var(--line0) } svg .line1 { stroke: var(--line1); stroke-dasharray: 5 3 }
svg circle.line0, svg .band { fill: var(--line0); stroke: none } svg circle.line1 { fill: var(--line1); stroke: none }
figcaption .line0 { color: var(--line0) } figcaption .line1 { color: var(--line1) }
"""


class Line(NamedTuple):
    """A number over the steps."""

    label: str  # "" where the title says it
    points: Sequence[tuple[int, float]]
    band: Sequence[tuple[float, float]] = ()  # from, to: one a point


def draw(title: str, lines: Sequence[Line], marks: Sequence[int] = ()) -> str:
    """A figure of one or two lines, `marks` at some steps; nothing where there are not two points to join."""
    lines = [line for line in lines if len(line.points) > 1]
    if not lines:
        return ""
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points] + [it for line in lines for it in sum(line.band, ())]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    middle, half = (low + high) / 2, (high - low) / 2 or abs(low) or 1.0

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first or 1) * (_RIGHT - _LEFT)

    def y(value: float) -> float:
        return (_TOP + _BOTTOM) / 2 - (value - middle) / half * (_BOTTOM - _TOP) / 2

    def path(points: Sequence[tuple[int, float]]) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)

    parts = [f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='{html.escape(title, quote=True)}'>"]
    shown = list(dict.fromkeys((high, middle, low)))
    for value, text in zip(shown, _texts(shown), strict=True):
        parts.append(f"<path class=grid d='M{_LEFT},{y(value):.1f}H{_RIGHT}' />")
        parts.append(f"<text x={_LEFT - 6} y={y(value) + 4:.1f} text-anchor=end>{text}</text>")
    parts.append(f"<text x={_LEFT} y={_HEIGHT - 6}>step {first}</text>")
    parts.append(f"<text x={_RIGHT} y={_HEIGHT - 6} text-anchor=end>{last}</text>")
    parts += [f"<path class=mark d='M{x(step):.1f},{_TOP}V{_BOTTOM}' />" for step in marks if first <= step <= last]
    ends: list[float] = []
    for n, line in enumerate(lines):
        if line.band:
            there = [(step, top) for (step, _), (_, top) in zip(line.points, line.band, strict=True)]
            back = [(step, bottom) for (step, _), (bottom, _) in zip(line.points, line.band, strict=True)]
            parts.append(f"<polygon class=band points='{path(there)} {path(back[::-1])}' />")
        drawn = _smooth(line.points) if len(line.points) >= _MANY else line.points
        if drawn is not line.points:
            parts.append(f"<polyline class='line{n} raw' points='{path(line.points)}' />")
        parts.append(f"<polyline class=line{n} points='{path(drawn)}' />")
        step, value = drawn[-1]
        parts.append(f"<circle class=line{n} cx={x(step):.1f} cy={y(value):.1f} r=3 />")
        ends.append(value)
    labels = [f"<span class=line{n}>{html.escape(it.label)}</span>" for n, it in enumerate(lines) if it.label]
    caption = (
        f"<figcaption><b>{html.escape(title)}</b>{''.join(labels)}<span>{', '.join(_texts(ends))}</span></figcaption>"
    )
    return f"<figure>{caption}{''.join(parts)}</svg></figure>"


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Every point the mean of a tenth of all around it."""
    reach = len(points) // 20
    values = [value for _, value in points]
    windows = (values[max(0, n - reach) : n + reach + 1] for n in range(len(points)))
    return [(step, sum(it) / len(it)) for (step, _), it in zip(points, windows, strict=True)]


def _texts(values: Sequence[float]) -> list[str]:
    """Three digits each, or as many as tell them apart.

    >>> _texts([0.4561, 0.375]), _texts([0.004812, 0.004811]), _texts([3.3e-5, 0]), _texts([1, 1])
    (['0.456', '0.375'], ['0.004812', '0.004811'], ['3.3e-05', '0'], ['1', '1'])
    """
    texts: list[str] = []
    for digits in range(3, 7):
        texts = [f"{value:.{digits}g}" for value in values]
        if len({*texts}) == len({*values}):
            return texts
    return texts
