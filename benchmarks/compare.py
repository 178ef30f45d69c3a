"""mvmci beside what a user would pick instead: the same machine, disk and minutes, one at a time.

Each peer is started anew in every round, and the rounds are interleaved, so that what the machine does
meanwhile falls on all alike. A peer that cannot be had, or fails, is said so and left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS
from benchmarks.peers.install import CannotInstall, have_program, install
from benchmarks.processes import ROOT, busy_s, cpu_of, families, stop

WARM = 16  # runs
GROW_MAX = 8
ENOUGH = 0.6
SYNC_RUNS = 50
STOP_S = 60.0
HEAR_S = 180.0  # a peer whose server has died may wait for it for ever
SYNCS = ("fsync", "fdatasync", "msync", "sync_file_range")


@dataclass(frozen=True)
class Scale:
    """How long it takes."""

    rounds: int
    seconds: float  # of each kind of run, in each round
    alone: int


@dataclass
class Outcome:
    """What became of one peer: a rate of each round, every run alone, and microseconds of CPU a run."""

    noop: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)  # per cent of the machine that was busy with others
    durability: str = ""
    syncs: dict[str, float] = field(default_factory=dict)  # a run alone
    missing: str = ""


class Driver:
    """A peer at work, in its own process."""

    def __init__(self, python: Path, name: str, folder: Path) -> None:
        folder.mkdir(mode=0o711, exist_ok=True)
        self.name = name
        self.log = folder / "driver.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [python, "-m", "benchmarks.peers", name, folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                text=True,
                start_new_session=True,
            )
        try:
            self.hear()
        except BaseException:
            self.close()
            raise

    def hear(self) -> Any:
        """The next answer. Raises RuntimeError."""
        assert self.process.stdout is not None
        there, _, _ = select.select([self.process.stdout], [], [], HEAR_S)
        if not there:
            raise RuntimeError(f"it said nothing for {HEAR_S:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"it failed: {said[-1][:200] if said else 'it says nothing'}")
        return json.loads(line)

    def __call__(self, *call: str | int) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        """The peer stops by itself when nobody speaks to it any more. Ctrl-C has to wait for that."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
            stop(self.process)
            self.process.stdout.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def driver(python: Path, name: str, folder: Path) -> Iterator[Driver]:
    """A peer, for as long as the block lasts."""
    found = Driver(python, name, folder)
    try:
        yield found
    finally:
        found.close()


def compare(folder: Path, names: list[str], scale: Scale) -> dict[str, Outcome]:
    """Measure the peers `names`."""
    outcomes = {name: Outcome() for name in names}
    pythons: dict[str, Path] = {}
    for name in names:
        try:
            pythons[name] = install(name)
        except CannotInstall as reason:
            outcomes[name].missing = f"could not be installed: {reason}"
    for number in range(scale.rounds):
        for name, python in pythons.items():
            outcome = outcomes[name]
            if outcome.missing:
                continue
            print(f"round {number + 1} of {scale.rounds}: {PEERS[name].title}", file=sys.stderr, flush=True)
            try:
                with driver(python, name, folder / name) as peer:
                    measure(peer, scale, outcome)
                    if not outcome.durability:
                        outcome.durability = peer("durability")
                        outcome.syncs = count_syncs(peer)
            except (OSError, RuntimeError) as failure:
                outcome.missing = str(failure)
    return outcomes


def measure(peer: Callable[..., Any], scale: Scale, outcome: Outcome) -> None:
    """One round of one peer: runs in bulk for about so many seconds, after some to warm up."""
    groups = peer("processes")
    for kind, rates in (("noop", outcome.noop), ("step", outcome.step)):
        count, took_s = WARM, peer(kind, WARM)
        before, busy = cpu_of(groups), busy_s()
        while took_s is not None and (took_s < scale.seconds * ENOUGH or count == WARM):
            grown = count * scale.seconds / max(took_s, 1e-3)
            count = int(min(max(grown, count + 1), count * GROW_MAX))
            before, busy = cpu_of(groups), busy_s()
            took_s = peer(kind, count)
        if took_s is None:
            continue
        rates.append(count / took_s)
        used = {name: used_s - before[name] for name, used_s in cpu_of(groups).items()}
        others_s = busy_s() - busy - sum(used.values())
        outcome.others.append(max(others_s, 0) / took_s / (os.cpu_count() or 1) * 100)
        if kind == "noop":
            for name, used_s in used.items():
                outcome.cpu.setdefault(name, []).append(used_s / count * 1e6)
    outcome.alone += peer("alone", scale.alone)


def count_syncs(peer: Driver) -> dict[str, float]:
    """How often what writes to the disk asks for it to be synced, for each of some runs alone."""
    try:
        have_program("strace", "strace")
    except CannotInstall:
        return {}
    writers = families(peer("processes"))[PEERS[peer.name].writes]
    report = peer.log.with_name("strace")
    pids = [part for pid in writers for part in ("-p", str(pid))]
    tracing = subprocess.Popen(
        ["strace", "-f", "-c", "-e", f"trace={','.join(SYNCS)}", "-o", report, *pids],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert tracing.stderr is not None
    try:
        for _ in writers:
            tracing.stderr.readline()  # it says of each that it is attached
        peer("alone", SYNC_RUNS)
    finally:
        stop(tracing, signal.SIGINT)
        tracing.stderr.close()
    rows = [line.split() for line in report.read_text().splitlines()]
    # % time, seconds, usecs/call, calls, errors if there were any, syscall
    return {row[-1]: int(row[3]) / SYNC_RUNS for row in rows if row and row[-1] in SYNCS}
