"""What a unit tells of itself when asked: counters since its start, so that who wants shares asks twice."""

from __future__ import annotations

import msgspec

from mvmci.system.usage import Cgroup, Machine, Process

EDGE_US = 125  # of the first bucket; each next is twice as wide
BUCKETS = 18  # the last ends at 16 s, and all else is in it


class Histogram(msgspec.Struct, array_like=True):
    """How long something took: how often, µs in all, the longest, and a count for each bucket."""

    count: int = 0
    total_us: int = 0
    longest_us: int = 0
    buckets: list[int] = msgspec.field(default_factory=lambda: [0] * BUCKETS)

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

    `slot_us` is time in which slots were taken, summed over them; `jobs` counts them by what became of them.
    `late`, how late its loop came, and `round_trips` to the broker are only watched while somebody asks.
    `writes` are of journals, until they were on disk; `orders` to executors, until one had answered.
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
    jobs: dict[str, int] = {}
    writes: Histogram
    orders: Histogram
    late: Histogram
    round_trips: Histogram
