"""What was seen of a cluster between two looks: of its units, by what they tell; of this machine, by /proc.

Shares are of the time between, of a processor for a loop and of all processors for a machine. Where units are
on other machines, each tells of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import msgspec

from mvmci.bench.bottleneck import Evidence, Loop
from mvmci.bench.report import MachineFacts
from mvmci.bench.stage import Staged
from mvmci.cluster.metrics import (
    BrokerMetrics,
    UnitMetrics,
    both,
    broker_cores,
    machine_rates,
    rates,
)
from mvmci.deploy.operate import open_admin
from mvmci.deploy.state import ClusterState
from mvmci.errors import MvmciError
from mvmci.runtimes.local.messages import SupervisorFiles, SupervisorProcess
from mvmci.stores.nats import Cluster
from mvmci.system import usage
from mvmci.system.tasks import cancel

ASKED = ("worker", "executor", "control-plane")  # roles of units that tell
PROBE_EVERY_S = 0.2
_PROBE_KEY = "probe"  # in CONFIG: written, and read by nobody


@dataclass(frozen=True, kw_only=True)
class Look:
    """Counters at one moment. `family` is this process with all that it started, `own` it alone, `cluster`
    the processes of a cluster. No `units`: they were not asked."""

    at: float
    machine: usage.Machine
    family_us: int
    own: usage.Process
    cluster_us: int
    started: Mapping[str, object]  # which process each unit is
    units: Mapping[str, UnitMetrics] = field(default_factory=dict)
    broker: BrokerMetrics | None = None
    broker_boot: str = ""  # the start of the machine on which it is


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What two looks come to. Times are medians, in ms; 0 is not known."""

    seconds: float
    busy: float
    others: float
    beside: float
    cluster_us: int
    generator: Loop
    units: Sequence[Loop] = ()
    slots_taken: float = 0.0
    in_slot_ms: float = 0.0
    order_ms: float = 0.0
    killed: int = 0
    started_again: Sequence[str] = ()  # units that were
    memory: dict[str, int] = {}  # bytes of one unit, by role
    write_ms: float = 0.0
    round_trip_ms: float = 0.0


async def look(staged: Staged, *, units: bool, watch_s: float = 0.0) -> Look:
    """One look at a candidate; its `units` are asked, and watch for `watch_s` from then on."""
    told, broker = {}, None
    if units or not staged.is_local:
        told = await staged.asker.ask(_asked(staged), watch_s=watch_s)
    if not staged.is_local:
        broker = await staged.broker()
        started: dict[str, object] = {unit: one.incarnation for unit, one in told.items()}
    else:
        started = {one.name: one.pid for one in await staged.state.runtime().observe()}
    own = usage.process()
    return Look(
        at=time.monotonic(),
        machine=usage.machine(),
        family_us=own.cpu_us + own.children_us,
        own=own,
        cluster_us=_cluster_us(staged, told.values()),
        started=started,
        units=told,
        broker=broker,
        broker_boot=_broker_boot(staged, told),
    )


async def machines(up: Sequence[Staged]) -> list[MachineFacts]:
    """This machine, and those of which a unit of `up` tells. Raises StoreUnavailable, TicketRefused."""
    here = usage.machine()
    found, hosts, nats = {here.boot: here}, dict[str, set[str]](), dict[str, str]()
    for one in up:
        told, broker = await one.asker.ask(_asked(one)), await one.broker()
        placed = {unit.name: unit.host for unit in one.units}
        for name, unit in told.items():
            found.setdefault(unit.machine.boot, unit.machine)
            hosts.setdefault(unit.machine.boot, set()).add(placed.get(name, unit.host))
        boot = here.boot if one.is_local else _broker_boot(one, told)
        nats[boot] = "" if broker is None else broker.version
    return [
        MachineFacts(
            name=platform.node() if boot == here.boot else ", ".join(sorted(hosts[boot])),
            hosts=sorted(hosts.get(boot, ())),
            processors=machine.processors,
            model=machine.model,
            memory_bytes=machine.memory_bytes,
            kernel=platform.release() if boot == here.boot else "",
            python=platform.python_version() if boot == here.boot else "",
            nats=nats.get(boot, ""),
        )
        for boot, machine in found.items()
    ]


def _asked(staged: Staged) -> set[str]:
    return {unit.name for unit in staged.units if unit.role in ASKED}


def _broker_boot(staged: Staged, told: Mapping[str, UnitMetrics]) -> str:
    """The start of the broker's machine, where a unit beside it told something."""
    return next((told[name].machine.boot for name in staged.beside_broker if name in told), "")


def _cluster_us(staged: Staged, told: Collection[UnitMetrics]) -> int:
    """Processor time of a cluster: of its supervisor's family here, else of all units that tell."""
    if not staged.is_local:
        return sum(one.process.cpu_us + one.process.children_us for one in told)
    file = SupervisorFiles(staged.state.folder).supervisor
    found = usage.process(msgspec.json.decode(file.read_bytes(), type=SupervisorProcess).pid)
    return found.cpu_us + found.children_us


def seen_between(before: Look, after: Look, *, is_local: bool, slotted: Collection[str]) -> Seen:
    """What happened between two looks; slots are those of the units `slotted`."""
    seconds = after.at - before.at
    ran, waited = (
        (now - then) / 1e6 / seconds
        for then, now in (
            (before.own.loop_ran_us, after.own.loop_ran_us),
            (before.own.loop_waited_us, after.own.loop_waited_us),
        )
    )
    pairs = both(before.units, after.units)
    units = [_unit(then, now) for then, now in pairs]
    slots = [(then, now) for then, now in pairs if now.unit in slotted]
    took_us = sum(now.slot_us - then.slot_us for then, now in slots)
    room_us = sum(now.slots * (now.at_us - then.at_us) for then, now in slots)
    jobs = sum(sum(now.jobs.values()) - sum(then.jobs.values()) for then, now in slots)
    busy, others = _shares(before, after, is_local=is_local)
    idle = 1 - _busy(before.machine, after.machine, seconds * 1e6)
    return Seen(
        seconds=seconds,
        busy=busy,
        others=others,
        beside=_beside(before, after) if is_local else 0.0,
        cluster_us=after.cluster_us - before.cluster_us,
        generator=Loop(unit="load", role="generator", idle=idle, ran=ran, waited=waited),
        units=units,
        slots_taken=took_us / room_us if room_us else 0.0,
        in_slot_ms=took_us / jobs / 1000 if jobs else 0.0,
        order_ms=min((one.order_ms for one in units if one.order_ms), default=0.0),
        started_again=sorted(
            unit for unit, process in before.started.items() if after.started.get(unit) != process
        ),
        memory=_memory(after),
        killed=max((now.cgroup.killed - then.cgroup.killed for then, now in pairs), default=0),
    )


def _unit(then: UnitMetrics, now: UnitMetrics) -> Loop:
    seen = rates(then, now)
    return Loop(
        unit=now.unit,
        role=now.role,
        idle=1 - _busy(then.machine, now.machine, now.at_us - then.at_us),
        ran=seen.loop_ran,
        waited=seen.loop_waited,
        late_ms=seen.late_us / 1000,
        round_trip_ms=seen.round_trip_us / 1000,
        order_ms=seen.order_us / 1000,
        throttled=seen.throttled,
    )


def _memory(seen: Look) -> dict[str, int]:
    by_role: dict[str, list[int]] = {}
    for one in seen.units.values():
        by_role.setdefault(one.role, []).append(one.process.memory_bytes)
    return {role: sum(sizes) // len(sizes) for role, sizes in by_role.items()}


def _busy(then: usage.Machine, now: usage.Machine, us: float) -> float:
    """Of all its processors."""
    return (now.busy_us - then.busy_us) / (now.processors * us)


def _shares(before: Look, after: Look, *, is_local: bool) -> tuple[float, float]:
    """How busy the fullest machine was, and by how much others were the reason on the one where they took
    most. Here, ours is this process with all that it started; elsewhere, what tells."""
    us = (after.at - before.at) * 1e6
    busy, mine = _busy(before.machine, after.machine, us), (after.family_us - before.family_us) / us
    if is_local:
        return busy, max(0.0, busy - mine / after.machine.processors)
    more = {after.machine.boot: mine}
    more[after.broker_boot] = more.get(after.broker_boot, 0.0) + broker_cores(before.broker, after.broker)
    there = machine_rates(before.units, after.units, more)
    return (
        max((one.busy / one.processors for one in there), default=busy),
        max((one.others / one.processors for one in there), default=0.0),
    )


def _beside(before: Look, after: Look) -> float:
    """Of the machine, what all took that this process started, but for the cluster that was looked at."""
    then_us, now_us = (one.family_us - one.own.cpu_us - one.cluster_us for one in (before, after))
    room_us = (after.at - before.at) * 1e6 * after.machine.processors
    return max(0, now_us - then_us) / room_us


def weigh(load: Seen, rest: Seen, *, failed: int) -> Evidence:
    """What speaks for a bottleneck: a cluster under load, and the same with one job at a time."""
    return Evidence(
        generator=load.generator,
        units=load.units,
        busy=load.busy,
        others=load.others,
        beside=load.beside,
        slots_taken=load.slots_taken,
        in_slot_ms=load.in_slot_ms,
        in_slot_alone_ms=rest.in_slot_ms,
        write_ms=load.write_ms,
        write_alone_ms=rest.write_ms,
        round_trip_ms=load.round_trip_ms,
        round_trip_alone_ms=rest.round_trip_ms,
        order_alone_ms=rest.order_ms,
        killed=load.killed,
        failed=failed,
    )


class Probe:
    """A lone write and a round trip, again and again on a connection of its own: the load's own writes wait
    for each other (group commit), and say less of the broker's disk."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._writes: list[float] = []
        self._round_trips: list[float] = []

    async def run(self) -> NoReturn:
        """Until cancelled."""
        while True:
            with contextlib.suppress(MvmciError):
                self._round_trips.append(await _timed(self._cluster.link.round_trip()))
                self._writes.append(await _timed(self._cluster.config.put(_PROBE_KEY, b"{}")))
            await asyncio.sleep(PROBE_EVERY_S)

    def medians_ms(self) -> tuple[float, float]:
        """Of writes and of round trips since this was last asked; 0 where there were none."""
        found = [statistics.median(one) if one else 0.0 for one in (self._writes, self._round_trips)]
        self._writes, self._round_trips = [], []
        return found[0], found[1]


async def _timed(work: Awaitable[object]) -> float:
    began = time.perf_counter()
    await work
    return (time.perf_counter() - began) * 1000


@asynccontextmanager
async def probing(state: ClusterState) -> AsyncIterator[Probe]:
    """A probe at work. Raises StoreUnavailable."""
    async with open_admin(state) as cluster:
        probe = Probe(cluster)
        running = asyncio.create_task(probe.run(), name="probe")
        try:
            yield probe
        finally:
            await cancel(running)
