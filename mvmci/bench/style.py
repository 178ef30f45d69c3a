"""How the page looks: on a screen, light and dark, on paper and on a telephone.

The colours of candidates are Okabe and Ito's, darker or lighter until each is read on its ground. Those of a
job's parts go from waiting (blue) over getting ready (yellow) to work (green) and records (purple).
"""

from __future__ import annotations

from mvmci.jobs.times import WORDS

COLOURS = 6  # of candidates, the control's first

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fff; --ink: #1b1f24; --soft: #59636e; --rule: #d8dee4; --tint: #f5f7f9; --link: #0a5ca8;
  --k0: #3d4752; --k1: #0072b2; --k2: #c94f00; --k3: #00855f; --k4: #a8437f; --k5: #7a6a00;
  --queue: #c6dbef; --order: #9ecae1; --way: #5ba3d0; --slot: #2b6fae; --compile: #fbe3a2;
  --layout: #efbf4d; --guest: #1b8a5a; --effects: #74c69d; --writes: #8562a8;
  --good: #00704a; --bad: #b03a00;
}
@media (prefers-color-scheme: dark) { :root {
  --ground: #14171a; --ink: #e8ebee; --soft: #9ba5b0; --rule: #343b43; --tint: #1d2126; --link: #6db3f2;
  --k0: #c5ccd4; --k1: #4aa8e8; --k2: #ff8f4d; --k3: #2fc598; --k4: #e486bd; --k5: #d3bd3c;
  --queue: #31506e; --order: #3d6f9c; --way: #5092c8; --slot: #84bdea; --compile: #8a6f22;
  --layout: #c99a2e; --guest: #2fb27b; --effects: #1d7a55; --writes: #a78acb;
  --good: #4cc795; --bad: #ff9a66;
} }
* { box-sizing: border-box }
html { scroll-padding-top: 96px; -webkit-text-size-adjust: 100% }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { overflow-x: clip; max-width: 1080px; margin: 0 auto; padding: 48px 24px 96px }
h1, h2, h3 { line-height: 1.2; letter-spacing: -.015em; text-wrap: balance }
h1 { font-size: clamp(1.9rem, 5.5vw, 2.9rem); font-weight: 700; margin: 8px 0 20px }
h2 { font-size: 1.6rem; margin: 88px 0 4px; padding-top: 24px; border-top: 1px solid var(--rule) }
h3 { font-size: 1.08rem; margin: 44px 0 4px }
h2, h3, tbody th, summary { font-weight: 620 }
p, li { max-width: 68ch; overflow-wrap: anywhere }
p { margin: 0 0 12px }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: 3px }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere }
.whole { white-space: nowrap }
pre { background: var(--tint); padding: 12px 16px; border-radius: 6px; white-space: pre-wrap }
.soft, figcaption, dt { color: var(--soft); font-size: .9rem }
.lead { font-size: 1.25rem; line-height: 1.45; max-width: 60ch }
.said { columns: 2 400px; column-gap: 48px; padding-left: 1.2em; margin: 28px 0 20px }
h3 + .said { margin-top: 12px }
.said li { margin-bottom: 12px; break-inside: avoid }
.figures { font-size: .85rem; line-height: 1.55 }
.figures { color: var(--soft); display: block }
.figures > * { margin-right: 1em }
.pair, .many { display: grid; gap: 16px 40px }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)) }
.many { gap: 16px 28px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 205px), 1fr)) }
.pair > *, .many > * { min-width: 0 }
figure { margin: 16px 0 0 }
figcaption { margin-top: 6px }
figcaption p { margin-bottom: 6px }
figcaption strong, figcaption b { color: var(--ink) }
.wide { overflow-x: auto; margin: 16px 0 }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: 7px 18px 7px 0; text-align: left; vertical-align: top }
th, td { border-bottom: 1px solid var(--rule) }
th:last-child, td:last-child { padding-right: 0 }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; border-bottom-color: var(--soft) }
td:last-child:not(.n) { min-width: 11em }
.n { text-align: right }
tbody .n, tbody th { white-space: nowrap }
tbody th, thead th:first-child { position: sticky; left: 0; background: var(--ground) }
:target th { background: none }
:target { --mark: color-mix(in srgb, var(--link) 12%, transparent); background: var(--mark) }
figure:target { box-shadow: 0 0 0 10px var(--mark) }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 8px }
.swatch { background: var(--c) }
.mark { font-size: .82rem; white-space: nowrap; font-weight: 620; color: var(--soft) }
.confirmed { color: var(--good) }
.withdrawn { color: var(--bad) }
dl { display: grid; grid-template-columns: minmax(110px, max-content) 1fr; gap: 6px 24px; margin: 16px 0 }
dd { margin: 0; overflow-wrap: anywhere }
details { margin: 16px 0 }
summary { cursor: pointer }
.rest { margin-top: -8px }
.rest .said { margin-top: 12px }
svg { display: block; width: 100%; height: auto; margin-top: 8px; overflow: visible }
svg text { font-size: 13px; fill: var(--ink) }
svg .small { font-size: 12px; fill: var(--soft) }
svg .name { font-weight: 620; fill: var(--c) }
.axis { stroke: var(--soft) }
.rung { stroke: var(--rule) }
.linear { stroke: var(--soft); stroke-dasharray: 1 4; stroke-linecap: round; stroke-width: 1.5 }
.bound { stroke: var(--ink); stroke-dasharray: 5 4 }
.curve { fill: none; stroke: var(--c); stroke-width: 2.2; stroke-linejoin: round }
.behind { stroke: var(--soft); stroke-width: 1.2; opacity: .55 }
.law { fill: none; stroke: var(--c); stroke-width: 1.2; stroke-dasharray: 5 4 }
.law.station { stroke-dasharray: 1.5 3 }
.band { fill: var(--c); opacity: .13 }
.whisker { stroke: var(--c); stroke-width: 1.2 }
.repetition { fill: var(--c); opacity: .55 }
.ring { fill: var(--ground); stroke: var(--c); stroke-width: 2.2 }
.span { stroke: var(--c); stroke-width: 2.5 }
.span.closed { stroke-width: 1.2; stroke-dasharray: 3 3 }
.arrow { fill: none; stroke: var(--c); stroke-width: 2 }
.planned { fill: var(--c, var(--soft)) }
circle.closed { fill: var(--ground); stroke: var(--c, var(--soft)); stroke-width: 1.6 }
rect { fill: var(--c) }
@media (max-width: 600px) {
  main { padding: 28px 16px 64px }
  h2 { margin-top: 56px }
  .pair svg text { font-size: 15px }
  .pair svg .small { font-size: 14px }
  .many figure { max-width: 300px }
  dl { grid-template-columns: 1fr; gap: 0 }
  dd { margin-bottom: 10px }
}
@media print {
  @page { margin: 16mm }
  html { font-size: 13px }
  main { max-width: none; padding: 0 }
  h2 { margin-top: 40px }
  a { color: inherit }
  .wide { overflow: visible }
  .pair { grid-template-columns: 1fr 1fr }
  .many { grid-template-columns: repeat(4, 1fr) }
  figure, tr { break-inside: avoid }
  h2, h3, h2 + p, h3 + p { break-after: avoid }
  .rest::details-content { content-visibility: visible }
  .rest summary { list-style: none; color: var(--soft) }
  * { print-color-adjust: exact }
}
""" + "".join(
    f".{kind}{name} {{ --c: var(--{of}) }}\n"
    for kind, name, of in (
        *(("k", str(place), f"k{place}") for place in range(COLOURS)),
        *(("p-", part, part) for part in WORDS),
        ("", "ran", "k1"),
        ("", "waited", "layout"),
    )
)
