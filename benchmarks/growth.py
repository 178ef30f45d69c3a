"""What a job costs when there is more of something: workers, units, ended jobs, records, bytes of code.

Each section varies one thing and leaves the rest. `docs/growth.md` says what is to grow, and why.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import wasmtime

from benchmarks.figures import number, spread, table, tail
from benchmarks.processes import ROOT, cpu_of, resident_mb
from benchmarks.program import NAME, Client, Cluster, step, tiny
from mvmci.cluster.broker import BATCH_MESSAGES_MAX
from mvmci.cluster.identity import Identity, Login
from mvmci.deploy.state import ClusterState
from mvmci.jobs.journal import Done, Entry, Journal, Lease, MessageKind, Spec
from mvmci.journals.client import submit
from mvmci.stores import open_cluster
from mvmci.stores.nats import Cluster as Broker
from mvmci.stores.nats.hints import PULL_S
from mvmci.stores.nats.link import accepted
from mvmci.trust.authority import Authority

ARCHIVE = "archive"  # a queue that nobody serves: jobs that were written as ended are no work
ARCHIVIST = "archivist"  # who is said to have held them
SETTLE_S = 1.0
IDLE = 0.15  # of a processor, for all units together
BEGIN, END = "<!-- growth -->", "<!-- /growth -->"
TERMS, FUNCTION_BYTES = 32, 387  # of a function that nobody calls


@dataclass(frozen=True)
class Scale:
    """How much there is of everything."""

    rounds: int
    bulk: int
    alone: int
    workers: Sequence[int]
    units: Sequence[int]
    ended: Sequence[int]
    effects: Sequence[int]
    bytes: Sequence[int]
    long: int = 200_000
    rest_s: float = PULL_S  # for so long units at rest are looked at


FULL = Scale(
    rounds=3,
    bulk=4000,
    alone=100,
    workers=(1, 4, 16),
    units=(10, 100, 300, 1000),
    ended=(0, 10_000, 200_000),
    effects=(4, 499, 4999),
    bytes=(0, 1_000_000, 20_000_000),
)
QUICK = Scale(
    rounds=1,
    bulk=500,
    alone=20,
    workers=(1, 4),
    units=(10, 50),
    ended=(0, 10_000),
    effects=(4, 499),
    bytes=(0, 1_000_000),
    long=5000,
)


@dataclass
class Section:
    """One thing that grows: what its rows are called, its columns, and the figures of each cell."""

    title: str
    columns: Sequence[str]
    rows: dict[str, list[list[float]]] = field(default_factory=dict)


async def measure(folder: Path, scale: Scale, *, long: bool) -> list[Section]:
    """All sections, each on a cluster of its own."""
    sections = [
        await more_workers(folder / "workers", scale),
        await more_units(folder / "units", scale),
        await more_ended(folder / "ended", scale),
        await longer_journals(folder / "journals", scale),
        await larger_modules(folder / "modules", scale),
    ]
    return [*sections, await many(folder / "many", scale.long)] if long else sections


@asynccontextmanager
async def running(cluster: Cluster) -> AsyncIterator[Client]:
    """A client of `cluster`, which is up meanwhile and has run a job on each slot."""
    try:
        cluster.up()
        async with cluster.client() as client:
            await client.bulk(tiny(), 50 * cluster.workers)
            yield client
    finally:
        cluster.down(purge=True)


LIGHT = (
    "jobs/s",
    "alone, p50 / p99 ms",
    "processor time, µs a job",
    "broker's",
    "workers'",
    "worker, MB",
    "control plane, MB",
    "broker, MB",
)


async def light(cluster: Cluster, client: Client, scale: Scale, module: Path) -> list[list[float]]:
    """What a light job costs now: the columns `LIGHT`."""
    rates = []
    used: list[list[float]] = [[], [], []]
    groups = cluster.processes()
    for _ in range(scale.rounds):
        before = cpu_of(groups)
        rates.append(scale.bulk / await client.bulk(module, scale.bulk))
        each = {role: (now - before[role]) / scale.bulk * 1e6 for role, now in cpu_of(groups).items()}
        for values, us in zip(used, (sum(each.values()), each["broker"], each["workers"]), strict=True):
            values.append(us)
    await client.succeeded()
    times = await client.alone(module, scale.alone)
    memory = [[resident_mb(pid) for pid in groups[role]] for role in ("workers", "control plane", "broker")]
    return [rates, times, *used, *memory]


async def more_workers(folder: Path, scale: Scale) -> Section:
    """The same machine, divided among more workers."""
    section = Section("workers", LIGHT)
    for count in scale.workers:
        cluster = Cluster(folder, workers=count)
        async with running(cluster) as client:
            section.rows[str(count)] = await light(cluster, client, scale, tiny())
    return section


AT_REST = (
    "the broker, ms of processor time a second",
    "the control plane, the same",
    "a worker, the same",
    "control plane, MB",
    "broker, MB",
)


async def more_units(folder: Path, scale: Scale) -> Section:
    """Workers at rest: each says that it is there, and waits for hints. All but two are in this process."""
    section = Section("workers at rest", AT_REST)
    cluster = Cluster(folder)
    async with running(cluster), AsyncExitStack() as resting:
        groups = cluster.processes()
        there = len(groups["workers"])
        for count in scale.units:
            for nth in range(there, count):
                await resting.enter_async_context(_at_rest(_worker(cluster, f"rest-{nth}")))
            there = count
            await asyncio.sleep(SETTLE_S)
            before = cpu_of(groups)
            await asyncio.sleep(scale.rest_s)
            ms = {role: (now - before[role]) / scale.rest_s * 1e3 for role, now in cpu_of(groups).items()}
            used = [[ms["broker"]], [ms["control plane"]], [ms["workers"] / cluster.workers]]
            memory = [[resident_mb(pid) for pid in groups[role]] for role in ("control plane", "broker")]
            section.rows[f"{count:,}"] = [*used, *memory]
    return section


@asynccontextmanager
async def _at_rest(identity: Identity) -> AsyncIterator[None]:
    """What a worker does while there is nothing to do."""
    cluster = await open_cluster(identity)

    async def wait() -> None:
        while True:
            hint = await cluster.hints.pull(identity.queues[0], wait_s=PULL_S)
            if hint is not None:
                await hint.redeliver(0)

    waiting = asyncio.create_task(wait())
    try:
        yield
    finally:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await cluster.close()


async def more_ended(folder: Path, scale: Scale) -> Section:
    """Jobs that ended long ago and are still kept."""
    cluster = Cluster(folder)
    section = Section("ended jobs in the store", (*LIGHT, "`mvmci status`, ms", "`mvmci list`, s"))
    there = 0
    async with running(cluster) as client:
        for count in scale.ended:
            await write_ended(cluster, client, count - there)
            there = count
            await settled(cluster)
            costs = await light(cluster, client, scale, tiny())
            (journal,) = await client.done([await submitted(client, tiny())])
            status = [cluster.timed("status", journal.job) * 1000 for _ in range(3)]
            section.rows[f"{count:,}"] = [*costs, status, [cluster.timed("list", "--json")]]
    return section


async def submitted(client: Client, module: Path, input_: str = "null") -> Spec:
    """A job that was just submitted."""
    spec = await client.spec(module, input_)
    await submit(client.store, spec)
    return spec


async def settled(cluster: Cluster) -> None:
    """Wait until nothing is at work: the control plane reads on in the stream what was just written."""
    groups = cluster.processes()
    idle = False
    while not idle:
        before = sum(cpu_of(groups).values())
        await asyncio.sleep(SETTLE_S)
        idle = sum(cpu_of(groups).values()) - before < SETTLE_S * IDLE


async def write_ended(cluster: Cluster, client: Client, count: int) -> None:
    """Write `count` jobs that have ended into the stream, as they would stand there."""
    authority, base = _trust(cluster)
    asked, held = authority.admin(base), authority.renewed(None, ARCHIVIST, "worker", [ARCHIVE], base)
    spec = await client.spec(tiny(), queue=ARCHIVE)
    async with AsyncExitStack() as stack:
        by = []
        for identity in (asked, held):
            by.append(await open_cluster(identity, announce=False))
            stack.push_async_callback(by[-1].close)
        for start in range(0, count, BATCH_MESSAGES_MAX):
            numbers = range(start, min(start + BATCH_MESSAGES_MAX, count))
            ended = [_ended(spec, f"{spec.id}-{number}") for number in numbers]
            for place, (identity, broker) in enumerate(zip((asked, held), by, strict=True)):
                await _write_batch(broker, identity.unit, [messages[place] for messages in ended])


async def _write_batch(broker: Broker, unit: str, messages: list[tuple[str, MessageKind, bytes]]) -> None:
    name = secrets.token_hex(8)
    to, answer = broker.link.expect()
    for place, (job, kind, data) in enumerate(messages, 1):
        headers = {"Nats-Batch-Id": name, "Nats-Batch-Sequence": str(place)}
        last = place == len(messages)
        if last:
            headers["Nats-Batch-Commit"] = "1"
        subject = broker.layout.message(job, kind, ARCHIVE, unit)
        await broker.link.publish(subject, data, headers=headers, reply=to if last else "")
    accepted(await broker.link.answer(answer, 60))


def _worker(cluster: Cluster, name: str) -> Identity:
    authority, base = _trust(cluster)
    path = cluster.state / NAME / "units" / name / "identity.json"
    return authority.identity(name, "worker", ["default"], base, path)


def _trust(cluster: Cluster) -> tuple[Authority, Login]:
    facts = ClusterState(cluster.state, NAME).facts()
    assert facts is not None
    return Authority.load(cluster.state / NAME), facts.login


def _ended(like: Spec, job: str) -> list[tuple[str, MessageKind, bytes]]:
    """The two messages of a light job that has ended."""
    journal = Journal(job)
    first = journal.encode([msgspec.structs.replace(like, id=job)], "a")
    journal.absorb([Entry(seq=1, data=first)])
    lease = Lease(at=like.at, epoch=1, unit=ARCHIVIST, incarnation="0" * 16, run="0" * 16, why="first")
    last = journal.encode([lease, Done(at=like.at, status="succeeded")], "b")
    return [(job, "spec", first), (job, "done", last)]


async def longer_journals(folder: Path, scale: Scale) -> Section:
    """Jobs with more effects: what each costs, and what it costs to read and to replay them."""
    cluster = Cluster(folder)
    section = Section("records of a job", ("an effect, ms", "read and folded, ms", "`mvmci replay`, s"))
    async with running(cluster) as client:
        module = step(folder)
        for count in scale.effects:
            each, reads, replays = [], [], []
            records = 0
            for _ in range(scale.rounds):
                empty = statistics.median(await client.alone(module, 3, "0"))
                (took,) = await client.alone(module, 1, str(count))
                each.append((took - empty) / count)
                spec = await submitted(client, module, str(count))
                await client.done([spec])
                began = time.perf_counter()
                records = len((await client.journal(spec.id)).records)
                reads.append((time.perf_counter() - began) * 1000)
                replays.append(cluster.timed("replay", spec.id))
            section.rows[f"{records:,}"] = [each, reads, replays]
    return section


async def larger_modules(folder: Path, scale: Scale) -> Section:
    """The same work in a module with more code."""
    cluster = Cluster(folder)
    section = Section("bytes of a module", (*LIGHT, "the first job, s"))
    async with running(cluster) as client:
        for size in scale.bytes:
            module = padded(folder, size)
            began = time.perf_counter()
            await client.alone(module, 1)
            first = time.perf_counter() - began
            await client.bulk(module, 200)
            costs = await light(cluster, client, scale, module)
            section.rows[f"{module.stat().st_size:,}"] = [*costs, [first]]
    return section


def padded(folder: Path, size: int) -> Path:
    """The smallest workflow with `size` bytes of functions that it does not call."""
    term = "(i32.add (i32.mul (local.get 0) (i32.const 123456789)) (local.get 0))"
    function = f"(func (param i32) (result i32) {term * TERMS} {'(i32.xor)' * (TERMS - 1)})\n"
    source = (ROOT / "examples" / "tiny" / "tiny.wat").read_text()
    head, memory, rest = source.partition("(memory (export")
    target = folder / f"tiny-{size}.wasm"
    target.write_bytes(wasmtime.wat2wasm(head + function * (size // FUNCTION_BYTES) + memory + rest))
    return target


async def many(folder: Path, count: int) -> Section:
    """All at once through one client: the rate of each tenth, and the memory of every unit at its end."""
    cluster = Cluster(folder)
    async with running(cluster) as client:
        pids = {name: unit["pid"] for name, unit in cluster.units().items()}
        section = Section(f"of {count:,} jobs in one go", ("jobs/s", *(f"{name}, MB" for name in pids)))
        tenth, since = max(count // 10, 1), time.perf_counter()

        def tell(heard: int) -> None:
            nonlocal since
            if heard % tenth == 0:
                now = time.perf_counter()
                memory = [[resident_mb(pid)] for pid in pids.values()]
                section.rows[f"{heard:,}"] = [[tenth / (now - since)], *memory]
                since = now

        await client.bulk(tiny(), count, tell=tell)
        await client.succeeded()
    return section


def markdown(sections: Sequence[Section], facts: Mapping[str, Any], command: str) -> str:
    """A table of each section."""
    parts = []
    for section in sections:
        rows = [
            (title, *(_cell(name, values) for name, values in zip(section.columns, cells, strict=True)))
            for title, cells in section.rows.items()
        ]
        parts.append(table((section.title, *section.columns), rows))
    parts.append(
        f"Medians (least–greatest). `{command}` on {facts['cores']} cores ({facts['processor']}), load "
        f"{facts['load']:.1f} before."
    )
    return "\n\n".join(parts)


def _cell(column: str, values: Sequence[float]) -> str:
    if "p99" in column:
        return tail(values)
    return number(statistics.median(values)) if "MB" in column else spread(values)
