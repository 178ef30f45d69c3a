"""The engine alone, in this process, beside plain wasmtime; and how the zipapp starts.

The store is a folder whose appends are synced, as `mvmci run` has it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Line, deciles
from benchmarks.processes import ROOT
from benchmarks.program import DIST, step, tiny
from mvmci.engines.embedded.engine import Embedded
from mvmci.engines.embedded.host import Host
from mvmci.jobs.allow import Allow
from mvmci.jobs.journal import Spec, status
from mvmci.journals.client import submit
from mvmci.journals.reader import load
from mvmci.store import Store, keep_text
from mvmci.stores import open_folder


@dataclass(frozen=True)
class Scale:
    """How long it takes."""

    rounds: int
    light: int  # runs of a tiny component, in each round
    commands: int
    effects: int
    replayed: int  # effects, a record for what is asked and one for the answer each
    starts: int


class Bench:
    """One engine with one slot on a folder store."""

    def __init__(self, folder: Path) -> None:
        self.store: Store = open_folder("bench", folder / "store")
        self.host = Host(store=self.store, root=folder / "host", allow=Allow)
        self.engine = Embedded(self.host, slots=1)
        self._number = 0

    async def submit(self, path: Path, *, workflow: bool, input_: Any = None) -> str:
        """A new job, submitted."""
        self._number += 1
        spec = Spec(
            at=time.time_ns() // 1_000_000,
            id=f"b{self._number}",
            queue="default",
            kind="workflow" if workflow else "command",
            module=await self.store.blobs.put_file(path),
            name=path.name,
            component=workflow,
            input=await keep_text(self.store.blobs, json.dumps(input_)),
            seed=1,
            by="bench",
        )
        await submit(self.store, spec)
        return spec.id

    async def run(self, path: Path, *, workflow: bool, input_: Any = None) -> float:
        """Milliseconds from the taking of a job to its recorded end."""
        job = await self.submit(path, workflow=workflow, input_=input_)
        spec_entry = (await self.store.journals.read(job))[0]
        began = time.perf_counter()
        await self.engine.run(job, spec_entry=spec_entry)
        took_ms = (time.perf_counter() - began) * 1000
        state = (await load(self.store, job)).state
        assert status(state)[0] == "succeeded", status(state)
        return took_ms


def plain(kind: str, path: Path, runs: int) -> list[float]:
    """Milliseconds of each run under wasmtime alone; the first few warm up."""
    command = [sys.executable, "-m", "benchmarks.plain", kind, str(path), str(runs + 5)]
    times: list[float] = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout)
    return times[5:]


async def beside_wasmtime(
    bench: Bench, what: str, path: Path, runs: int, rounds: int, *, limit: float | None = None
) -> Line:
    """What the same module costs under mvmci more than under wasmtime alone, in turns."""
    ours: list[float] = []
    theirs: list[float] = []
    more: list[float] = []
    workflow = path == tiny()
    await bench.run(path, workflow=workflow)
    for _ in range(rounds):
        ours += (round_ := [await bench.run(path, workflow=workflow) for _ in range(runs)])
        theirs += (alone := plain("workflow" if workflow else "command", path, runs))
        more.append(statistics.median(round_) - statistics.median(alone))
    both = f"{deciles(ours, 'ms')}; wasmtime {deciles(theirs, 'ms')}"
    return Line(what=f"{what} over wasmtime alone", values=more, unit="ms", limit=limit, beside=both)


def synced_write(folder: Path, count: int) -> list[float]:
    """Milliseconds of one append of 300 bytes and its fsync: the floor of an effect."""
    times = []
    with open(folder / "floor", "ab") as file:
        for _ in range(count):
            began = time.perf_counter()
            file.write(b"x" * 300)
            file.flush()
            os.fsync(file.fileno())
            times.append((time.perf_counter() - began) * 1000)
    return times


async def effects(bench: Bench, folder: Path, scale: Scale) -> Line:
    """What an effect costs that itself takes no time."""
    each = []
    for _ in range(scale.rounds):
        empty = await bench.run(step(folder), workflow=True, input_=0)
        took = await bench.run(step(folder), workflow=True, input_=scale.effects)
        each.append((took - empty) / scale.effects)
    floor = deciles(synced_write(folder, scale.effects), "ms")
    return Line(
        what="an effect, journaled in a folder", values=each, unit="ms", beside=f"one synced write: {floor}"
    )


async def replay(bench: Bench, folder: Path, scale: Scale) -> Line:
    """A finished workflow run again from its journal."""
    job = await bench.submit(step(folder), workflow=True, input_=scale.replayed)
    await bench.engine.run(job)
    records = len((await load(bench.store, job)).records)
    times = []
    for _ in range(scale.rounds):
        began = time.perf_counter()
        await bench.engine.verify(job)
        times.append(time.perf_counter() - began)
    return Line(what=f"replay of {records:,} records in a folder", values=times, unit="s")


def memory(bench: Bench) -> Line:
    """What a warm slot has for itself that has run a component."""
    warm = next(slot.warm for slot in bench.engine.slots.all if slot.warm is not None)
    rollup = Path(f"/proc/{warm.pid}/smaps_rollup").read_text()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
    shared = f"{kib['Pss'] / 1000:.0f} MB as its share, {kib['Rss'] / 1000:.0f} MB resident"
    return Line(
        what="a warm slot, memory of its own", values=[kib["Private_Dirty"] / 1000], unit="MB", beside=shared
    )


def starts(scale: Scale) -> list[Line]:
    """`mvmci version` from the zipapp: unpacked anew, and warm; and its size."""
    zipapp = DIST / "mvmci.pyz"
    # As the file starts itself, but for `python3`, which may be a shell script that looks for one.
    command = [sys.executable, "-I", str(zipapp), "version"]
    cold, warm, python = [], [], []
    for _ in range(scale.rounds):
        with tempfile.TemporaryDirectory() as root:
            cold.append(_timed(command, SHIV_ROOT=root))
            warm += [_timed(command, SHIV_ROOT=root) for _ in range(scale.starts)]
        python += [_timed([sys.executable, "-c", "pass"]) for _ in range(scale.starts)]
    bare = f"`python -c pass`: {deciles(python, 'ms')}"
    return [
        Line(what="the zipapp", values=[zipapp.stat().st_size / 1e6], unit="MB", limit=40),
        Line(what="`mvmci version`, warm", values=warm, unit="ms", limit=150, beside=bare),
        Line(what="`mvmci version`, unpacked anew", values=cold, unit="ms"),
    ]


def _timed(command: Sequence[str], **env: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **env})
    return (time.perf_counter() - began) * 1000


async def measure(folder: Path, scale: Scale) -> list[Line]:
    """All lines."""
    folder.mkdir(mode=0o711)
    bench = Bench(folder)
    files = DIST / "guests" / "files.wasm"
    try:
        lines = [
            await beside_wasmtime(bench, "a tiny component", tiny(), scale.light, scale.rounds),
            await beside_wasmtime(bench, "a warm command", files, scale.commands, scale.rounds, limit=15),
            await effects(bench, folder, scale),
            await replay(bench, folder, scale),
            memory(bench),
        ]
    finally:
        await bench.engine.close()
        await bench.store.close()
    return lines + starts(scale)
