"""What charts are drawn with: scales, axes, and labels that do not lie on each other.

Colours are the page's: whatever has one is of a class, and a drawing is as wide as the page gives it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mvmci.bench.markup import Inside, Markup, tag


@dataclass(frozen=True)
class Scale:
    """From values `low` to `high` to places `start` to `end`; by doubling where it is `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(one) if self.log else one for one in (self.low, self.high, value))
        return self.start + (self.end - self.start) * ((value - low) / (high - low) if high > low else 0.5)


def ticks(most: float, about: int = 5) -> list[float]:
    """Round numbers from 0 up to `most`, about so many."""
    if most <= 0:
        return [0.0]
    rough = most / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * one for one in (1, 2, 5, 10) if power * one >= rough)
    return [step * place for place in range(math.floor(most / step + 1e-9) + 1)]


def drawing(width: float, height: float, title: str, told: str, *inside: Inside) -> Markup:
    """A chart with a title, and with what it shows for those who do not see it."""
    return tag(
        "svg",
        tag("title", title),
        tag("desc", told),
        inside,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=f"{title}. {told}",
    )


def text(x: float, y: float, shown: str, class_: str | None = None, anchor: str | None = None) -> Markup:
    """A line of text; `anchor` is "middle" or "end" where it does not start at `x`."""
    return tag("text", shown, x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """From one place to another."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Iterable[tuple[float, float]], class_: str) -> Markup:
    """A line through `points`."""
    return tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_)


def dot(x: float, y: float, radius: float, class_: str, said: str | None = None) -> Markup:
    """A point; a pointer over it is told what is `said`."""
    return tag("circle", said and tag("title", said), cx=x, cy=y, r=radius, class_=class_)


def bar(x: float, y: float, width: float, height: float, class_: str, said: str | None = None) -> Markup:
    """A rectangle, likewise."""
    title = said and tag("title", said)
    return tag("rect", title, x=x, y=y, width=max(width, 0), height=height, class_=class_)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """`places` moved apart until `gap` lies between any two, within bounds as far as that is possible."""
    order = sorted(range(len(places)), key=lambda place: places[place])
    moved = list(places)
    bound = low
    for place in order:
        moved[place] = bound = max(moved[place], bound)
        bound += gap
    bound = high
    for place in reversed(order):
        moved[place] = bound = min(moved[place], bound)
        bound -= gap
    return moved
