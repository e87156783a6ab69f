"""A bar chart as inline SVG; colours and fonts come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LABEL_WIDTH, PLOT_WIDTH, VALUE_WIDTH = 108, 320, 60  # pixels
BAR_HEIGHT, BAR_GAP, GROUP_GAP, TOP, AXIS = 16, 3, 12, 26, 22


@dataclass(frozen=True)
class Bar:
    """One value, and its interval if it has one."""

    css: str  # class that gives its colour
    name: str  # HTML text
    value: float
    low: float | None = None
    high: float | None = None


def bar_chart(title: str, groups: Mapping[str, Sequence[Bar]]) -> str:
    """Horizontal bars from 0, group below group, with whiskers for intervals.  title and groups' names: HTML text."""
    bars = [bar for group in groups.values() for bar in group]
    end = nice_end(max((bar.high or bar.value for bar in bars), default=0))
    scale = PLOT_WIDTH / end
    bottom = TOP + sum(len(group) * (BAR_HEIGHT + BAR_GAP) + GROUP_GAP for group in groups.values())
    parts = [_grid(end, scale, bottom)]
    y = TOP + GROUP_GAP / 2
    for name, group in groups.items():
        middle = y + len(group) * (BAR_HEIGHT + BAR_GAP) / 2
        parts.append(f'<text x="{LABEL_WIDTH - 8}" y="{middle + 4:.1f}" text-anchor="end">{name}</text>')
        for bar in group:
            parts.append(_bar(bar, y, scale))
            y += BAR_HEIGHT + BAR_GAP
        y += GROUP_GAP
    width, height = LABEL_WIDTH + PLOT_WIDTH + VALUE_WIDTH, bottom + AXIS
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{title}">'
        f'<text x="{LABEL_WIDTH}" y="14">{title}</text>{"".join(parts)}</svg>'
    )


def nice_end(largest: float) -> float:
    """The least of 1, 2, 5, 10, 20, 50, ... and their like below 1 that is not less than `largest`; 1 for 0."""
    if not largest > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= largest * (1 - 1e-12))


def _grid(end: float, scale: float, bottom: float) -> str:
    parts = []
    for step in range(6):
        value = end * step / 5
        x = LABEL_WIDTH + value * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{_number(value)}</text>')
    return "".join(parts)


def _bar(bar: Bar, y: float, scale: float) -> str:
    width, middle = bar.value * scale, y + BAR_HEIGHT / 2
    label_x = LABEL_WIDTH + max(width, (bar.high or 0) * scale) + 6
    interval = f" (95 %: {bar.low:.1f} to {bar.high:.1f})" if bar.low is not None else ""
    parts = [
        f'<rect class="{bar.css}" x="{LABEL_WIDTH}" y="{y:.1f}" width="{width:.1f}" height="{BAR_HEIGHT}" rx="2">'
        f"<title>{bar.name}: {bar.value:.2f}{interval}</title></rect>"
    ]
    if bar.low is not None and bar.high is not None:
        low, high = (LABEL_WIDTH + x * scale for x in (bar.low, bar.high))
        parts.append(
            f'<path class="whisker" fill="none" d="M{low:.1f} {middle:.1f}H{high:.1f}'
            f'M{low:.1f} {middle - 4:.1f}v8M{high:.1f} {middle - 4:.1f}v8"/>'
        )
    parts.append(f'<text x="{label_x:.1f}" y="{middle + 4.5:.1f}">{bar.value:,.1f}</text>')
    return "".join(parts)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"
