"""Clocks: one that nobody sets, and that also counts the time for which the machine was suspended; and the
time of day.
"""

from __future__ import annotations

import time


def boottime_s() -> float:
    """Seconds since this machine started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boottime_ns() -> int:
    """Nanoseconds since this machine started."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def wall_clock_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
