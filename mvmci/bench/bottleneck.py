"""What bounds a cluster at one point, from what was seen there: causes before symptoms, the first that holds.

A loop that comes late, full slots and slow writes are symptoms: of a machine that others use, of a unit that
is held back, of a network. So these are looked at first, and a name is only a guess until raising what it
names has moved the curve (`Finding.stands`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import msgspec

# Set on one half of the planted cases (tests/faults/bench), and seen to hold on the other.
GENERATOR_FULL = 0.75  # of the time its loop ran
OTHERS_MANY = 0.15  # of the machine
HELD_BACK, HELD_IDLE = 0.3, 0.25  # waited for a processor while so much of its machine was idle
LATE_MS, LATE_RAN, LATE_WAITED = 5.0, 0.6, 0.2  # late though it neither ran nor waited
FAR_MS, FAR_TIMES = 3.0, 4.0  # a round trip, and how many times that of the machine at rest
SYNC_MS, SYNC_TIMES = 10.0, 5.0  # a lone write beyond its round trip, and how many times that at rest
SLOTS_FULL, SLOTS_AS_ALONE = 0.85, 1.3  # slots taken, and how much longer a job was in one than alone
BUSY = 0.88  # of the machine's processors
LOOP_FULL = 0.8  # of the time a loop ran or waited for a processor


class Loop(msgspec.Struct, frozen=True, kw_only=True):
    """One unit, or the generator, in one window. Shares are of its length; `late_ms` is a median."""

    unit: str
    role: str
    idle: float  # of its machine
    ran: float
    waited: float
    late_ms: float = 0.0
    round_trip_ms: float = 0.0
    order_ms: float = 0.0
    throttled: float = 0.0


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen at one point, and of the same at rest: one job at a time, on the same cluster."""

    generator: Loop
    units: Sequence[Loop]
    busy: float  # of all processors, on the fullest machine
    others: float  # the part of it that no process of the cluster and of the load took
    slots_taken: float  # of all slots
    in_slot_ms: float
    in_slot_alone_ms: float
    write_ms: float  # a lone write on a connection of its own, and that connection's round trip
    write_alone_ms: float
    round_trip_ms: float
    round_trip_alone_ms: float
    order_alone_ms: float = 0.0
    killed: int = 0  # processes, for want of memory
    failed: int = 0  # jobs


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """A cause, whose it is, and the sentence that says why. `stands` once raising it was tried."""

    cause: str
    whose: str = ""
    why: str
    stands: bool | None = None
    tried: str = ""  # what was raised, and how the curve moved


def find(seen: Evidence) -> list[Finding]:
    """All that hold, causes first; the first is the name. With none, more load is needed."""
    return [found for rule in RULES if (found := next(rule(seen), None)) is not None]


def _generator(seen: Evidence) -> Iterator[Finding]:
    one = seen.generator
    held = one.waited > HELD_BACK and one.waited > 2 * one.ran and one.idle > HELD_IDLE
    if one.ran > GENERATOR_FULL or held or one.throttled > HELD_BACK:
        yield Finding(
            cause="generator",
            why=f"what makes the load ran {one.ran:.0%} of the time and waited {one.waited:.0%} for a "
            "processor",
        )


def _memory(seen: Evidence) -> Iterator[Finding]:
    if seen.killed:
        why = f"the kernel ended {seen.killed} processes for want of memory, and {seen.failed} jobs failed"
        yield Finding(cause="memory", why=why)


def _others(seen: Evidence) -> Iterator[Finding]:
    if seen.others > OTHERS_MANY:
        yield Finding(cause="others", why=f"other programs took {seen.others:.0%} of the machine")


def _quota(seen: Evidence) -> Iterator[Finding]:
    """It wants a processor, processors are idle, and it gets none."""
    for one in _worst(seen.units, lambda one: one.waited):
        if one.throttled > HELD_BACK or (
            one.waited > HELD_BACK and one.waited > 2 * one.ran and one.idle > HELD_IDLE
        ):
            yield Finding(
                cause="quota",
                whose=one.role,
                why=f"{one.unit} waited {one.waited:.0%} of the time for a processor while {one.idle:.0%} of "
                "its machine was idle",
            )


def _stopped(seen: Evidence) -> Iterator[Finding]:
    for one in _worst(seen.units, lambda one: one.late_ms):
        if one.late_ms > LATE_MS and one.ran < LATE_RAN and one.waited < LATE_WAITED:
            yield Finding(
                cause="stopped",
                whose=one.role,
                why=f"the loop of {one.unit} came {one.late_ms:.0f} ms late, though it ran only "
                f"{one.ran:.0%} of the time and waited {one.waited:.0%} for a processor",
            )


def _network(seen: Evidence) -> Iterator[Finding]:
    """All round trips grew: that of one unit alone is that unit's."""
    trips = [one.round_trip_ms for one in seen.units if one.round_trip_ms]
    least = min(trips, default=0.0)
    if least > FAR_MS and least > FAR_TIMES * seen.round_trip_alone_ms:
        yield Finding(
            cause="network",
            why=f"a round trip to the broker took every unit {least:.0f} ms or more, at rest "
            f"{seen.round_trip_alone_ms:.1f}",
        )


def _sync(seen: Evidence) -> Iterator[Finding]:
    beyond, alone = seen.write_ms - seen.round_trip_ms, seen.write_alone_ms - seen.round_trip_alone_ms
    if beyond > SYNC_MS and beyond > SYNC_TIMES * max(alone, 0.1):
        yield Finding(
            cause="sync",
            whose="broker",
            why=f"a write took {seen.write_ms:.0f} ms to be on disk, {beyond:.0f} more than its round trip; "
            f"at rest {seen.write_alone_ms:.1f}",
        )


def _slots(seen: Evidence) -> Iterator[Finding]:
    if seen.slots_taken > SLOTS_FULL and seen.in_slot_ms < SLOTS_AS_ALONE * seen.in_slot_alone_ms:
        yield Finding(
            cause="slots",
            why=f"{seen.slots_taken:.0%} of the slots were taken, and a job was in one for "
            f"{seen.in_slot_ms:.0f} ms, alone {seen.in_slot_alone_ms:.0f}",
        )


def _processors(seen: Evidence) -> Iterator[Finding]:
    if seen.busy > BUSY and seen.others <= OTHERS_MANY:
        yield Finding(cause="processors", why=f"the machine's processors were {seen.busy:.0%} busy")


def _loop(seen: Evidence) -> Iterator[Finding]:
    for one in _worst(seen.units, lambda one: one.ran + one.waited):
        if one.ran + one.waited > LOOP_FULL:
            yield Finding(
                cause="loop",
                whose=one.role,
                why=f"the loop of {one.unit} ran {one.ran:.0%} of the time and waited {one.waited:.0%} for a "
                "processor",
            )


def _worst(units: Sequence[Loop], by: Callable[[Loop], float]) -> list[Loop]:
    return sorted(units, key=by, reverse=True)


RULES: Sequence[Callable[[Evidence], Iterator[Finding]]] = (
    _generator,
    _memory,
    _others,
    _quota,
    _stopped,
    _network,
    _sync,
    _slots,
    _processors,
    _loop,
)
NOTHING = Finding(cause="nothing", why="nothing is full: more load would show more")


def names(seen: Evidence) -> Finding:
    """The first that holds."""
    return next(iter(find(seen)), NOTHING)


def moved(before: float, after: float, noise: float) -> bool:
    """Whether raising something moved a rate by more than noise does."""
    return math.isfinite(after) and after > before * (1 + max(2 * noise, 0.05))
