"""Bar charts as SVG; colours and fonts come from the style sheet around them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

WIDTH, VALUE_WIDTH = 360, 58  # pixels: fits the screen of a telephone
LABEL_WIDTH, LETTER = 94, 7.2  # pixels: a label beside its bars; a letter of the widest usual font
BAR_HEIGHT, BAR_GAP, GROUP_GAP, LABEL_HEIGHT, TOP, BOTTOM = 16, 3, 10, 19, 26, 22


@dataclass(frozen=True)
class Bar:
    """One value, and its interval if it has one."""

    css: str  # class that gives its colour
    name: str  # HTML text
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Axis:
    """A scale from 0 to a round number that is not less than `largest`, in 6 steps at most."""

    largest: float
    left: float
    pixels: float

    @property
    def step(self) -> float:
        return tick_step(self.largest)

    @property
    def ticks(self) -> int:
        """The number of steps."""
        return math.ceil(self.largest / self.step - 1e-9) or 1

    @property
    def scale(self) -> float:
        """Pixels per unit of value."""
        return self.pixels / (self.ticks * self.step)

    def grid(self, top: float, bottom: float) -> Iterator[str]:
        """Vertical lines (class grid) with their values below (class tick)."""
        for tick in range(self.ticks + 1):
            x, value = self.left + tick * self.step * self.scale, tick * self.step
            text = f"{value:,.0f}" if value >= 1000 else f"{value:.6g}"
            yield f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>'
            yield f'<text class="tick" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{text}</text>'


def tick_step(largest: float) -> float:
    """The least of 1, 2, 5, 10, 20, 50, ... and their like below 1 that divides `largest` into 6 parts at most.

    1 for 0.
    """
    if not largest > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest / 6))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * 6 >= largest * (1 - 1e-9))


def bar_chart(title: str, groups: Mapping[str, Sequence[Bar]], spec: str = ",.1f") -> str:
    """Horizontal bars from 0, group below group, with whiskers for intervals.

    A group's name stands beside its bars, or above them where one of the names is too long for that.
    title, groups' names: HTML text; spec: format of the values.
    """
    bars = [bar for group in groups.values() for bar in group]
    above = any(LETTER * len(name) > LABEL_WIDTH for name in groups)
    left = 0 if above else LABEL_WIDTH
    axis = Axis(max((bar.high or bar.value for bar in bars), default=0), left + 8, WIDTH - left - 8 - VALUE_WIDTH)
    parts, y = [], TOP + GROUP_GAP / 2
    for name, group in groups.items():
        height = len(group) * (BAR_HEIGHT + BAR_GAP)
        if above:
            for line in textwrap.wrap(name, int((WIDTH - axis.left) / LETTER), break_on_hyphens=False):
                parts.append(f'<text x="{axis.left}" y="{y + 13:.1f}">{line}</text>')
                y += LABEL_HEIGHT
        else:
            parts.append(f'<text x="{left}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{name}</text>')
        for bar in group:
            parts.append(_bar(bar, y, axis, spec))
            y += BAR_HEIGHT + BAR_GAP
        y += GROUP_GAP
    bottom = round(y)
    return (
        f'<svg viewBox="0 0 {WIDTH} {bottom + BOTTOM}" width="{WIDTH}" height="{bottom + BOTTOM}" role="img" '
        f'aria-label="{title}"><text class="title" x="{axis.left}" y="14">{title}</text>'
        f"{''.join(axis.grid(TOP, bottom))}{''.join(parts)}</svg>"
    )


def _bar(bar: Bar, y: float, axis: Axis, spec: str) -> str:
    width, middle = bar.value * axis.scale, y + BAR_HEIGHT / 2
    label_x = axis.left + max(width, (bar.high or 0) * axis.scale) + 6
    interval = f" (95 %: {bar.low:.1f} to {bar.high:.1f})" if bar.low is not None else ""
    parts = [
        f'<rect class="{bar.css}" x="{axis.left}" y="{y:.1f}" width="{width:.1f}" height="{BAR_HEIGHT}" rx="2">'
        f"<title>{bar.name}: {bar.value:{spec}}{interval}</title></rect>"
    ]
    if bar.low is not None and bar.high is not None:
        low, high = (axis.left + x * axis.scale for x in (bar.low, bar.high))
        parts.append(
            f'<path class="whisker" fill="none" d="M{low:.1f} {middle:.1f}H{high:.1f}'
            f'M{low:.1f} {middle - 4:.1f}v8M{high:.1f} {middle - 4:.1f}v8"/>'
        )
    parts.append(f'<text x="{label_x:.1f}" y="{middle + 4.5:.1f}">{bar.value:{spec}}</text>')
    return "".join(parts)
