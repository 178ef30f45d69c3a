"""`python -m benchmarks`: the engine alone, beside plain wasmtime, in one run.

Prints a Markdown table, and with `--write` puts it into the README. Numbers are medians, with the 10th
and the 90th percentile behind them. The store is a folder whose appends are synced, as `mvmci run` has it.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mvmci.allow import Allow
from mvmci.engines.embedded import Embedded
from mvmci.holder import load
from mvmci.journal import Spec, status
from mvmci.sandbox.host import Host
from mvmci.store import Store, keep_text
from mvmci.stores.memory import Memory
from mvmci.submission import submit

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
ROUNDS = 3
LIGHT_RUNS = 200
COMMAND_RUNS = 60
EFFECTS = 500
REPLAYED_EFFECTS = 5_000  # an intent and a result each
STARTS = 10
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"

Row = tuple[str, str, str, str]


class Bench:
    """One engine with one slot on a folder store."""

    def __init__(self, folder: Path) -> None:
        self.store: Store = Memory(folder / "store").store("bench")
        self.host = Host(store=self.store, root=folder / "host", allow=Allow())
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
        began = time.perf_counter()
        await self.engine.run(job, fresh=True)
        took_ms = (time.perf_counter() - began) * 1000
        state = (await load(self.store, job)).state
        assert status(state)[0] == "succeeded", status(state)
        return took_ms


def plain(kind: str, path: Path, runs: int) -> list[float]:
    """Milliseconds of each run under wasmtime alone; the first few warm up."""
    command = [sys.executable, "-m", "benchmarks.plain", kind, str(path), str(runs + 5)]
    times: list[float] = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout)
    return times[5:]


def shown(times: Sequence[float], unit: str = "ms") -> str:
    """The median, and where most of the others lie."""
    deciles = statistics.quantiles(times, n=10)
    return f"{statistics.median(times):.2f} {unit} ({deciles[0]:.2f}–{deciles[-1]:.2f})"


async def compare(bench: Bench, name: str, path: Path, *, workflow: bool, runs: int) -> Row:
    """The same module under mvmci and under wasmtime alone, in turns."""
    ours: list[float] = []
    theirs: list[float] = []
    await bench.run(path, workflow=workflow)
    for _ in range(ROUNDS):
        ours += [await bench.run(path, workflow=workflow) for _ in range(runs // ROUNDS)]
        theirs += plain("workflow" if workflow else "command", path, runs // ROUNDS)
    more = statistics.median(ours) - statistics.median(theirs)
    return name, shown(ours), shown(theirs), f"{more:.1f} ms more"


def synced_write(folder: Path) -> list[float]:
    """Milliseconds of one append of 300 bytes and its fsync: the floor of an effect."""
    times = []
    with open(folder / "floor", "ab") as file:
        for _ in range(EFFECTS):
            began = time.perf_counter()
            file.write(b"x" * 300)
            file.flush()
            os.fsync(file.fileno())
            times.append((time.perf_counter() - began) * 1000)
    return times


async def effects(bench: Bench, folder: Path) -> Row:
    """What an effect costs that itself takes no time: a sleep of 0 ms."""
    script = DIST / "guests" / "script.wasm"
    empty = [await bench.run(script, workflow=True, input_={"steps": []}) for _ in range(ROUNDS)]
    each = []
    for _ in range(ROUNDS):
        took = await bench.run(script, workflow=True, input_={"steps": [{"sleep": 0}] * EFFECTS})
        each.append((took - statistics.median(empty)) / EFFECTS)
    floor = synced_write(folder)
    ratio = statistics.median(each) / statistics.median(floor)
    return (
        "an effect, journaled",
        shown(each),
        f"one synced write: {shown(floor)}",
        f"{ratio:.1f} times",
    )


async def replay(bench: Bench) -> Row:
    """A finished workflow run again from its journal."""
    script = DIST / "guests" / "script.wasm"
    job = await bench.submit(script, workflow=True, input_={"steps": [{"sleep": 0}] * REPLAYED_EFFECTS})
    await bench.engine.run(job, fresh=True)
    times, folds = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        await load(bench.store, job)
        folds.append(time.perf_counter() - began)
        began = time.perf_counter()
        await bench.engine.verify(job)
        times.append(time.perf_counter() - began)
    records = len((await load(bench.store, job)).records)
    fold = statistics.median(folds)
    return f"replay of {records:,} records", shown(times, "s"), "", f"of it reading and folding {fold:.2f} s"


def starts() -> list[Row]:
    """`mvmci version` from the zipapp: unpacked anew, and warm."""
    zipapp = DIST / "mvmci.pyz"
    cold, warm, python = [], [], []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as root:
            cold.append(_timed([str(zipapp), "version"], SHIV_ROOT=root))
            warm += [_timed([str(zipapp), "version"], SHIV_ROOT=root) for _ in range(STARTS)]
        python += [_timed(["python3", "-c", "pass"]) for _ in range(STARTS)]
    bare = f"`python3 -c pass`: {shown(python)}"
    size = f"the file has {zipapp.stat().st_size / 2**20:.1f} MiB"
    return [
        ("`mvmci version`, unpacked anew", shown(cold), bare, size),
        ("`mvmci version`, warm", shown(warm), bare, ""),
    ]


def _timed(command: list[str], **env: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **env})
    return (time.perf_counter() - began) * 1000


async def memory(bench: Bench) -> Row:
    """What a warm slot has for itself that has run a tiny component and a Python workflow."""
    await bench.run(DIST / "examples" / "tiny.wasm", workflow=True)
    await bench.run(DIST / "guests" / "script.wasm", workflow=True, input_={"steps": []})
    warm = next(slot.warm for slot in bench.engine.slots.all if slot.warm is not None)
    rollup = Path(f"/proc/{warm.pid}/smaps_rollup").read_text()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
    own = f"{kib['Private_Dirty'] / 1024:.1f} MiB written by itself"
    return (
        "memory of a warm slot",
        own,
        "",
        f"{kib['Pss'] / 1024:.0f} MiB as its share, {kib['Rss'] / 1024:.0f} MiB resident",
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, and what they were measured on."""
    lines = ["| what | mvmci | alone | |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    cpu = models[0] if models else platform.machine()
    lines += [
        "",
        "Median (10th–90th percentile) of interleaved runs. "
        f"`./just bench` on {os.cpu_count()} cores ({cpu}), Linux {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}, "
        f"wasmtime {version('wasmtime')}; isolation and logs on, every append synced.",
    ]
    return "\n".join(lines)


async def measure() -> list[Row]:
    """All rows."""
    with tempfile.TemporaryDirectory(dir=DIST) as folder:
        bench = Bench(Path(folder))
        try:
            rows = [
                await compare(
                    bench, "a tiny component", DIST / "examples" / "tiny.wasm", workflow=True, runs=LIGHT_RUNS
                ),
                await compare(
                    bench, "a warm command", DIST / "guests" / "files.wasm", workflow=False, runs=COMMAND_RUNS
                ),
                await effects(bench, Path(folder)),
                await replay(bench),
                await memory(bench),
            ]
        finally:
            await bench.engine.close()
            await bench.store.close()
    return rows + starts()


def main() -> None:
    """Measure, print, and with `--write` put it into the README."""
    text = table(asyncio.run(measure()))
    print(text)
    if "--write" in sys.argv[1:]:
        readme = ROOT / "README.md"
        before, _, rest = readme.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
