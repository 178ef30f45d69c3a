"""Figures as a reader sees them: medians with their spread, and Markdown tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Cells = Sequence[str]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that is not below `percent` of them."""
    assert values
    assert 0 < percent <= 100
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def number(value: float) -> str:
    """`value` with three digits that count: 0.31, 4.2, 61, 3,480."""
    if abs(value) >= 1000:
        digits = len(str(int(abs(value)))) - 3
        return f"{round(value, -digits):,.0f}"
    if abs(value) >= 100 or value == 0:
        return f"{value:.0f}"
    return f"{value:.{2 if abs(value) < 1 else 1}f}"


def spread(values: Sequence[float], unit: str = "") -> str:
    """The median, and the least and the greatest."""
    low, high = number(min(values)), number(max(values))
    middle = number(statistics.median(values)) + (f" {unit}" if unit else "")
    return middle if low == high else f"{middle} ({low}–{high})"


def deciles(values: Sequence[float], unit: str = "") -> str:
    """The median, and where most of the others lie: the 10th and the 90th percentile."""
    cuts = statistics.quantiles(values, n=10)
    middle = number(statistics.median(values)) + (f" {unit}" if unit else "")
    return f"{middle} ({number(cuts[0])}–{number(cuts[-1])})"


def tail(values: Sequence[float]) -> str:
    """The median and the 99th percentile."""
    return f"{number(statistics.median(values))} / {number(percentile(values, 99))}"


def table(head: Cells, rows: Sequence[Cells]) -> str:
    """Markdown."""
    assert all(len(row) == len(head) for row in rows), "a row has another number of cells"
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One thing that was measured, and what it was to be. `values` are those of the rounds."""

    what: str
    values: Sequence[float]
    unit: str
    limit: float | None = None
    better: Literal["≤", "≥"] = "≤"
    beside: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median is within its limit; None where there is none."""
        if self.limit is None:
            return None
        middle = statistics.median(self.values)
        return middle <= self.limit if self.better == "≤" else middle >= self.limit

    def cells(self) -> Cells:
        """What it is, what it was to be, and what it came to."""
        wanted = "" if self.limit is None else f"{self.better} {number(self.limit)} {self.unit}"
        verdict = {None: "", True: "met", False: "**missed**"}[self.met]
        return self.what, spread(self.values, self.unit), wanted, verdict, self.beside


def lines_table(lines: Sequence[Line]) -> str:
    """All of them."""
    return table(("what", "measured", "target", "", "beside it"), [line.cells() for line in lines])
