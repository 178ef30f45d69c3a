"""The comparison as an SVG, for light and for dark pages."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape

from benchmarks.compare import Outcome
from benchmarks.figures import number, percentile
from benchmarks.peers import PEERS

WIDTH, ROW, TOP, LEFT = 780, 30, 50, 240
RATES, TIMES = (LEFT, 490), (590, 760)  # from, to
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328 }
  .small { font-size: 11px; fill: #59636e }
  .bar { fill: #8c959f } .ours { fill: #0969da } .dot { fill: #1f2328 } .axis { stroke: #d1d9e0 }
  .loose { fill: none; stroke: #8c959f; stroke-dasharray: 3 2 } .range { stroke: #59636e; stroke-width: 2 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .small { fill: #9198a1 } .axis { stroke: #3d444d }
    .bar { fill: #656c76 } .ours { fill: #4493f8 } .dot { fill: #f0f6fc } .loose { stroke: #656c76 }
    .range { stroke: #9198a1 }
  }"""


def draw(outcomes: Mapping[str, Outcome]) -> str:
    """Bars of runs a second; and how long one takes alone, from the median to the 99th percentile."""
    shown = {name: one for name, one in outcomes.items() if not PEERS[name].floor and not one.missing}
    most = max(statistics.median(one.noop) for one in shown.values())
    longest = max(percentile(one.alone, 99) for one in shown.values())
    height = TOP + ROW * len(shown) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">',
        "<title>Runs a second, and how long one takes alone</title>",
        f"<style>{STYLE}\n</style>",
        _text(RATES[0], 20, "runs a second that do nothing"),
        _text(RATES[0], 36, "bulk; the line spans the rounds", "small"),
        _text(TIMES[0], 20, "one alone, ms"),
        _text(TIMES[0], 36, "p50 to p99", "small"),
    ]
    powers = [10**power for power in range(math.floor(math.log10(longest)) + 2)]
    for power in powers:
        x = _place(power, powers)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{height - 20}"/>')
        parts.append(_text(x, height - 6, str(power), "small", "middle"))
    for row, (name, one) in enumerate(shown.items()):
        parts += _row(TOP + ROW * row, name, one, most, powers)
    return "\n".join([*parts, "</svg>", ""])


def _row(y: int, name: str, one: Outcome, most: float, powers: Sequence[int]) -> list[str]:
    middle, scale = statistics.median(one.noop), (RATES[1] - RATES[0]) / most
    kind = "ours" if name == "mvmci" else "bar" if PEERS[name].durable else "loose"
    title = PEERS[name].title if PEERS[name].durable else f"{PEERS[name].title}, not durable"
    low, high = (RATES[0] + rate * scale for rate in (min(one.noop), max(one.noop)))
    p50, p99 = (_place(percentile(one.alone, percent), powers) for percent in (50, 99))
    return [
        _text(LEFT - 10, y + 15, title, anchor="end"),
        f'<rect class="{kind}" x="{RATES[0]}" y="{y}" width="{middle * scale:.1f}" height="{ROW - 10}"/>',
        f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{y + 10}" y2="{y + 10}"/>',
        _text(max(high, RATES[0] + middle * scale) + 8, y + 15, number(middle)),
        f'<line class="range" x1="{p50:.1f}" x2="{p99:.1f}" y1="{y + 10}" y2="{y + 10}"/>',
        f'<circle class="dot" cx="{p50:.1f}" cy="{y + 10}" r="4"/>',
    ]


def _place(ms: float, powers: Sequence[int]) -> float:
    """Where a time lies on its axis, which is logarithmic and begins at 1 ms."""
    return TIMES[0] + (TIMES[1] - TIMES[0]) * math.log10(max(ms, 1)) / math.log10(powers[-1])


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
