"""The four ways to an engine, side by side: the same machine and minutes, as many guests at once in each.

Each cluster is brought up anew in every round, and the rounds are interleaved. What an access costs is
told as a ratio to `per-worker` in the same round: the extra hop.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compare import Outcome, Scale, measure
from benchmarks.figures import number, percentile, spread, table
from benchmarks.peers.mvmci import Peer
from benchmarks.processes import resident_mb
from benchmarks.program import SLOTS, WORKERS, Cluster
from benchmarks.report import origin

GUESTS = WORKERS * SLOTS  # at once, in each of them
BASE = "per-worker"
ACCESSES = {
    BASE: "access: per-worker\n",
    "peer": f"access: peer\nexecutors: {{slots: {GUESTS}}}\n",
    "pool, by the broker": f"access: pool\nexecutors: {{count: 2, slots: {GUESTS // 2}}}\n",
    "pool, by HAProxy": f"access: pool\nexecutors: {{count: 2, slots: {GUESTS // 2}, balancer: haproxy}}\n",
    "shared": f"access: shared\nexecutors: {{slots: {GUESTS}}}\n",
}
BEGIN, END = "<!-- accesses -->", "<!-- /accesses -->"


@dataclass
class Measured(Outcome):
    """Of one access: also every p50 and p99 alone, ms, and MB of one unit of each role, round by round."""

    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    mb: dict[str, list[float]] = field(default_factory=dict)


class Here:
    """A peer at work in this process, to be called as one in a process of its own is."""

    def __init__(self, peer: Peer, loop: asyncio.AbstractEventLoop) -> None:
        self._peer = peer
        self._loop = loop

    def __call__(self, call: str, *args: Any) -> Any:
        found = getattr(self._peer, call)(*args)
        return self._loop.run_until_complete(found) if asyncio.iscoroutine(found) else found


def _cluster(access: str, folder: Path) -> Cluster:
    """The workers of all see to as many jobs at once as there are guests."""
    slots = SLOTS if access == BASE else GUESTS
    return Cluster(folder, slots=slots, access=ACCESSES[access])


def compare(folder: Path, scale: Scale) -> dict[str, Measured]:
    """Measure them all. Raises RuntimeError when one cannot be brought up."""
    outcomes = {access: Measured() for access in ACCESSES}
    with asyncio.Runner() as runner:
        for number_ in range(scale.rounds):
            for access, outcome in outcomes.items():
                print(f"round {number_ + 1} of {scale.rounds}: {access}", file=sys.stderr, flush=True)
                name = "".join(letter for letter in access if letter.isalpha())
                one_round(runner.get_loop(), access, folder / name, scale, outcome)
    return outcomes


def one_round(
    loop: asyncio.AbstractEventLoop, access: str, folder: Path, scale: Scale, outcome: Measured
) -> None:
    """Bring one up, measure it, and take it down."""
    peer = Peer(lambda place: _cluster(access, place))
    here = Here(peer, loop)
    here("start", folder)
    try:
        before = len(outcome.alone)
        measure(here, scale, outcome)
        times = outcome.alone[before:]
        outcome.p50.append(percentile(times, 50))
        outcome.p99.append(percentile(times, 99))
        for group, pids in peer.cluster.processes().items():
            if group != "slots":
                outcome.mb.setdefault(group, []).append(statistics.mean(map(resident_mb, pids)))
    finally:
        here("stop")


def markdown(outcomes: Mapping[str, Measured], facts: Mapping[str, Any], command: str) -> str:
    """The table of docs/deployment.md."""
    head = ("access", "jobs/s", "of per-worker", "alone, p50 ms", "p99 ms", "times per-worker")
    head += ("with one effect, jobs/s", "processor time, µs a job", "MB a unit")
    rows = [_row(access, outcome, outcomes[BASE]) for access, outcome in outcomes.items()]
    about = (
        f"Light jobs (a workflow of a few instructions, everything synced), {WORKERS} workers and {GUESTS} "
        f"guests at once in each. {origin(outcomes, facts, command)}."
    )
    return f"{table(head, rows)}\n\n{about}"


def _row(access: str, outcome: Measured, base: Measured) -> Sequence[str]:
    used = {group: statistics.median(values) for group, values in outcome.cpu.items()}
    shares = ", ".join(f"{group} {number(us)}" for group, us in used.items())
    sizes = ", ".join(f"{group} {number(statistics.median(mb))}" for group, mb in outcome.mb.items())
    return (
        access,
        spread(outcome.noop),
        spread([mine / first for mine, first in zip(outcome.noop, base.noop, strict=True)]),
        spread(outcome.p50),
        spread(outcome.p99),
        spread([mine / first for mine, first in zip(outcome.p50, base.p50, strict=True)]),
        spread(outcome.step),
        f"{number(sum(used.values()))}: {shares}",
        sizes,
    )
