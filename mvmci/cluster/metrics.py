"""What a unit, or the broker, tells of itself when asked: counters since its start.

Who wants shares asks twice; `rates` is what lies between two answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import msgspec

from mvmci.system.usage import Cgroup, Machine, Process

EDGE_US = 125  # of the first bucket; each next is twice as wide
SCRAPE_S = 90.0  # who scrapes asks again within that: so long units watch what costs something
BUCKETS = 18  # the last ends at 16 s, and all else is in it

_Buckets = Annotated[list[int], msgspec.Meta(min_length=BUCKETS, max_length=BUCKETS)]


class Histogram(msgspec.Struct, array_like=True):
    """How long something took: how often, µs in all, the longest, and a count for each bucket."""

    count: int = 0
    total_us: int = 0
    longest_us: int = 0
    buckets: _Buckets = msgspec.field(default_factory=lambda: [0] * BUCKETS)

    def observe(self, us: int) -> None:
        """Once more."""
        self.count += 1
        self.total_us += us
        self.longest_us = max(self.longest_us, us)
        self.buckets[min((us // EDGE_US).bit_length(), BUCKETS - 1)] += 1

    def since(self, before: Histogram) -> Histogram:
        """What came after `before`; its longest is that of all."""
        pairs = zip(self.buckets, before.buckets, strict=True)
        return Histogram(
            self.count - before.count,
            self.total_us - before.total_us,
            self.longest_us,
            [now - then for now, then in pairs],
        )

    def quantile_us(self, share: float) -> float:
        """About what `share` of them took at most, by the edges of their bucket; 0 where there are none."""
        left = share * self.count
        for place, count in enumerate(self.buckets):
            if count and left <= count:
                low, high = edges_us(place)
                return low + (high - low) * left / count
            left -= count
        return 0.0


def edges_us(place: int) -> tuple[int, int]:
    """Between what the durations of a bucket lie."""
    high = EDGE_US << place
    return (high >> 1 if place else 0), high


class UnitMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One unit. `at_us` is by its machine's monotonic clock.

    `slot_us` is time in which slots were taken, summed over them, and `slots_run` how many of them have had a
    job: as many as were ever taken at once. `jobs` counts runs by how they came out,
    `refused` orders that found no free slot: that a worker sent, that an executor got. `late`, how late its
    loop came, `round_trips` to the broker and `orders` to executors and back are only watched while somebody
    asks. `writes` are of journals, until they were on disk.
    """

    unit: str
    incarnation: str
    role: str
    host: str
    at_us: int
    machine: Machine
    process: Process
    cgroup: Cgroup
    slots: int = 0
    slot_us: int = 0
    slots_run: int = 0
    jobs: dict[str, int] = {}
    refused: int = 0
    writes: Histogram
    orders: Histogram
    late: Histogram
    round_trips: Histogram


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """One connection, as the broker sees it; `pending_bytes` are on their way to it and not yet taken."""

    name: str
    round_trip_us: int
    pending_bytes: int


class BrokerMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """The broker, by its own word. `at_us` is by the clock of who asked, `cores` are the processors that it
    uses just now.

    `slow` counts connections that were cut because they took too little; of the `connections` only those are
    there for which most is on its way. `process` is that of a broker whose process is of this machine.
    """

    at_us: int
    version: str
    cores: float
    memory_bytes: int
    connected: int
    slow: int
    messages_in: int
    messages_out: int
    bytes_in: int
    bytes_out: int
    stored_messages: int
    stored_bytes: int
    stored_bytes_max: int
    requests: int  # to JetStream's interface, and how many of them failed
    requests_failed: int
    connections: list[Connection]
    process: Process | None = None


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What a unit did between two answers: a second, or as shares of that time. Durations are medians in µs;
    what was not seen is 0."""

    seconds: float
    loop_ran: float
    loop_waited: float
    cores: float
    slots_taken: float
    jobs: float
    refused: float
    writes: float
    write_us: float
    order_us: float
    round_trip_us: float
    late_us: float
    late_p99_us: float
    throttled: float
    killed: int


def rates(before: UnitMetrics, now: UnitMetrics) -> Rates:
    """Both of one incarnation."""
    us = max(1, now.at_us - before.at_us)
    seconds = us / 1_000_000
    was, process = before.process, now.process
    used = process.cpu_us + process.children_us - was.cpu_us - was.children_us
    late = now.late.since(before.late)
    writes = now.writes.since(before.writes)
    return Rates(
        seconds=seconds,
        loop_ran=(process.loop_ran_us - was.loop_ran_us) / us,
        loop_waited=(process.loop_waited_us - was.loop_waited_us) / us,
        cores=used / us,
        slots_taken=(now.slot_us - before.slot_us) / us,
        jobs=(sum(now.jobs.values()) - sum(before.jobs.values())) / seconds,
        refused=(now.refused - before.refused) / seconds,
        writes=writes.count / seconds,
        write_us=writes.quantile_us(0.5),
        order_us=now.orders.since(before.orders).quantile_us(0.5),
        round_trip_us=now.round_trips.since(before.round_trips).quantile_us(0.5),
        late_us=late.quantile_us(0.5),
        late_p99_us=late.quantile_us(0.99),
        # The kernel adds up the processors on which it was held back.
        throttled=min(1.0, (now.cgroup.throttled_us - before.cgroup.throttled_us) / us),
        killed=now.cgroup.killed - before.cgroup.killed,
    )


class MachineRates(msgspec.Struct, frozen=True, kw_only=True):
    """A machine between two answers, by its units that are known: processors in use, by them and by all else;
    shares of the time in which something waited, by resource."""

    hosts: list[str]
    processors: int
    busy: float
    ours: float
    others: float
    free_bytes: int
    stalled: dict[str, float]


def broker_cores(before: BrokerMetrics | None, now: BrokerMetrics | None) -> float:
    """The processors that it used: by its process where that is of this machine, else by its own word."""
    if now is None or before is None:
        return 0.0
    if now.process is None or before.process is None:
        return now.cores
    return (now.process.cpu_us - before.process.cpu_us) / max(1, now.at_us - before.at_us)


def machine_rates(
    before: Mapping[str, UnitMetrics], now: Mapping[str, UnitMetrics], more: Mapping[str, float] = {}
) -> list[MachineRates]:
    """Each machine of which a unit told something twice. `more` are processors that something else of ours
    uses, by the start of the machine."""
    pairs: dict[str, list[tuple[UnitMetrics, UnitMetrics]]] = {}
    for was, one in both(before, now):
        pairs.setdefault(one.machine.boot, []).append((was, one))
    return [_machine(found, more.get(boot, 0.0)) for boot, found in pairs.items()]


def both(
    before: Mapping[str, UnitMetrics], now: Mapping[str, UnitMetrics]
) -> Iterable[tuple[UnitMetrics, UnitMetrics]]:
    """The two answers of each unit that was not started again between them."""
    return [
        (before[name], one)
        for name, one in now.items()
        if name in before and before[name].incarnation == one.incarnation
    ]


def _machine(pairs: Sequence[tuple[UnitMetrics, UnitMetrics]], more: float) -> MachineRates:
    (before, now), us = pairs[0], max(1, pairs[0][1].at_us - pairs[0][0].at_us)
    was, machine = before.machine, now.machine
    busy = (machine.busy_us - was.busy_us) / us
    ours = more + sum(rates(*pair).cores for pair in pairs)
    return MachineRates(
        hosts=sorted({one.host for _, one in pairs}),
        processors=machine.processors,
        busy=busy,
        ours=ours,
        others=max(0.0, busy - ours),
        free_bytes=machine.free_bytes,
        stalled={
            what: (total - was.stalled.get(what, total)) / us for what, total in machine.stalled.items()
        },
    )
