"""What bounds a cluster at one point, from what was seen there: causes before symptoms, the first that holds.

A loop that comes late, full slots and slow writes are symptoms: of a machine that others use, of a unit that
is held back, of a network. So these are looked at first, and a name is only a guess until raising what it
names has moved the curve (`Finding.stands`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import msgspec

# Set on one half of the planted cases (tests/faults/bench), and seen to hold on the other.
GENERATOR_FULL, GENERATOR_IDLE = 0.75, 0.15  # it ran; or so much of its machine was idle while it waited
OTHERS_MANY = 0.15  # of the machine
HELD_BACK, HELD_IDLE = 0.3, 0.25  # waited for a processor while so much of its machine was idle
LATE_MS, LATE_RAN, LATE_WAITED = 5.0, 0.6, 0.2  # late though it neither ran nor waited
FAR_MS, FAR_TIMES = 3.0, 4.0  # a round trip, and how many times that at rest
WAY_MS, WAY_SHARE = 6.0, 0.25  # an order's round trip, beyond late loops; and of a job alone
SYNC_MS, SYNC_TIMES = 10.0, 5.0  # a lone write beyond its round trip, and how many times that at rest
SLOTS_FULL, SLOTS_AS_ALONE = 0.85, 1.3  # slots taken, and how much longer a job was in one than alone
BUSY = 0.85  # of the machine's processors
LOOP_FULL = 0.8  # of the time a loop ran or waited for a processor
MOVED_LEAST = 0.05  # of a rate: less is no move, however quiet the machine


class Loop(msgspec.Struct, frozen=True, kw_only=True):
    """One unit, or the generator, in one window. Shares are of its length; times are medians.

    `order_ms` is the round trip of an order, seen by a worker; 0 where there is none.
    """

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
    """What was seen at one point, and of the same at rest: one job at a time, on the same cluster.

    Slots are those of executors. Where each worker has its own they are full because the load is made so, and
    what would raise them is the number of workers: the curve itself. They count as free then.
    """

    generator: Loop
    units: Sequence[Loop]
    busy: float  # of all processors, on the fullest machine
    others: float  # the part of it that no process of the cluster and of the load took
    beside: float = 0.0  # and that which clusters took that were up and had no load; 0 where it is not known
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


class Raising(msgspec.Struct, frozen=True, kw_only=True):
    """What is given more of, how many times as much, and by what it is given."""

    what: str
    times: float
    by: Literal["file", "cgroup", "units"]


# What can be raised to confirm a cause, and why the others cannot.
RAISED: Mapping[str, Raising] = {
    "quota": Raising(what="the share of a processor", times=2.5, by="cgroup"),
    "slots": Raising(what="slots", times=3, by="file"),
    "loop": Raising(what="executors", times=2, by="units"),
}
FIXED: Mapping[str, str] = {
    "memory": "failed jobs and the kernel's count say it already",
    "generator": "one program makes all of the load",
    "others": "what other people run is not stopped for a measurement",
    "stopped": "who stops it is outside of the cluster",
    "network": "the network is what it is",
    "way": "the network is what it is",
    "sync": "the disk is what it is",
    "processors": "these are all that there are",
    "loop": "only executors can be added without changing the load",
}


def find(seen: Evidence) -> list[Finding]:
    """All that hold, causes first. With none, nothing is full."""
    return [found for rule in RULES if (found := rule(seen)) is not None]


def named(findings: Sequence[Finding]) -> Finding:
    """The first that was not withdrawn. With none, nothing is full; with none left, it is unclear."""
    left = [one for one in findings if one.stands is not False]
    if left or not findings:
        return left[0] if left else Finding(cause="nothing", why="nothing is full: more load would show more")
    return Finding(cause="unclear", why="; ".join(one.tried for one in findings), stands=False)


def raising(found: Finding) -> Raising | None:
    """What can be raised to confirm it; None where nothing can."""
    return None if found.cause == "loop" and found.whose != "executor" else RAISED.get(found.cause)


def tried(
    found: Finding, given: tuple[str, str], rates: tuple[float, float], *, noise: float, others: float
) -> Finding:
    """What is thought of it now that what it names was raised from `given[0]` to `given[1]`: the rate went
    from `rates[0]` to `rates[1]` jobs/s, a difference that is off by a part of `noise` (standard deviation)
    by chance, while other programs took `others` of the machine."""
    what = RAISED[found.cause].what
    stands = rates[1] > rates[0] * (1 + max(2 * noise, MOVED_LEAST))
    raised = f"raising {what} from {given[0]} to {given[1]}"
    moved = f"{rates[0]:,.1f} → {rates[1]:,.1f} jobs/s"
    if stands:
        return msgspec.structs.replace(found, stands=True, tried=f"{raised} moved it: {moved}")
    if others > OTHERS_MANY:
        beside = f"{raised} told nothing: other programs took {others:.0%} of the machine then"
        return msgspec.structs.replace(found, tried=beside)
    of = f"{found.whose}'s {found.cause}" if found.whose else found.cause
    in_vain = f"it looked like {of}, and {raised} moved nothing ({moved})"
    return msgspec.structs.replace(found, stands=False, tried=in_vain)


def _memory(seen: Evidence) -> Finding | None:
    """It shows as failures, and hardly as slowness: so it is named whatever else holds."""
    if not seen.killed:
        return None
    failed = f", and {seen.failed:,} jobs failed" if seen.failed else ""
    why = f"the kernel ended {seen.killed:,} processes for want of memory{failed}"
    return Finding(cause="memory", why=why)


def _generator(seen: Evidence) -> Finding | None:
    one = seen.generator
    if one.ran <= GENERATOR_FULL and not _held_back(one, GENERATOR_IDLE):
        return None
    return Finding(cause="generator", why=f"what makes the load {_spent(one)}")


def _others(seen: Evidence) -> Finding | None:
    if seen.others <= OTHERS_MANY:
        return None
    return Finding(cause="others", why=f"other programs took {seen.others:.0%} of the machine")


def _quota(seen: Evidence) -> Finding | None:
    """It wants a processor, processors are idle, and it gets none."""
    one = _most((one for one in seen.units if _held_back(one, HELD_IDLE)), lambda one: one.waited)
    if one is None:
        return None
    why = f"{one.unit} {_spent(one)} while {one.idle:.0%} of its machine was idle"
    return Finding(cause="quota", whose=one.role, why=why)


def _stopped(seen: Evidence) -> Finding | None:
    late = (one for one in seen.units if one.ran < LATE_RAN and one.waited < LATE_WAITED)
    one = _most(late, lambda one: one.late_ms)
    if one is None or one.late_ms <= LATE_MS:
        return None
    why = f"the loop of {one.unit} came {one.late_ms:.0f} ms late, though it {_spent(one)}"
    return Finding(cause="stopped", whose=one.role, why=why)


def _network(seen: Evidence) -> Finding | None:
    """All are long: that of one unit alone is that unit's. Either they are so at rest, or they have grown
    and the machine is not the reason."""
    least = min((one.round_trip_ms for one in seen.units if one.round_trip_ms), default=0.0)
    alone = seen.round_trip_alone_ms
    is_far = min(least, alone) > FAR_MS or (_grew(least, alone) and seen.busy <= BUSY)
    if not is_far:
        return None
    why = f"a round trip to the broker took every unit {least:.1f} ms or more, at rest {alone:.1f}"
    return Finding(cause="network", why=why)


def _sync(seen: Evidence) -> Finding | None:
    beyond, alone = seen.write_ms - seen.round_trip_ms, seen.write_alone_ms - seen.round_trip_alone_ms
    is_slow = min(beyond, alone) > SYNC_MS or (
        beyond > max(SYNC_MS, SYNC_TIMES * alone) and seen.busy <= BUSY
    )
    if not is_slow:
        return None
    why = (
        f"a lone write took {seen.write_ms:.0f} ms to be on disk, {beyond:.0f} more than its round trip; "
        f"at rest {seen.write_alone_ms:.1f}"
    )
    return Finding(cause="sync", whose="broker", why=why)


def _way(seen: Evidence) -> Finding | None:
    """Orders of all workers alone are long on their way, at rest or since, no loop at its ends is why, and to
    a job it matters."""
    one = min((unit for unit in seen.units if unit.order_ms), key=lambda unit: unit.order_ms, default=None)
    executors = [unit for unit in seen.units if unit.role == "executor"]
    full = seen.busy > BUSY or any(unit.ran + unit.waited > LOOP_FULL for unit in executors)
    if one is None or full or _network(seen):
        return None
    trip_ms, alone_ms = one.order_ms, seen.order_alone_ms
    trip_ms -= one.late_ms + max((unit.late_ms for unit in executors), default=0.0)
    is_far = alone_ms > max(WAY_MS, FAR_TIMES * seen.round_trip_alone_ms) or trip_ms > FAR_TIMES * alone_ms
    if not is_far or trip_ms <= max(WAY_MS, WAY_SHARE * seen.in_slot_alone_ms):
        return None
    why = (
        f"the round trip of an order took every worker {one.order_ms:.1f} ms or more, at rest {alone_ms:.1f}"
    )
    return Finding(cause="way", whose="executor", why=why)


def _slots(seen: Evidence) -> Finding | None:
    """Full, and not because something else makes jobs stay in them."""
    if seen.slots_taken <= SLOTS_FULL or seen.in_slot_ms >= SLOTS_AS_ALONE * seen.in_slot_alone_ms:
        return None
    why = (
        f"{seen.slots_taken:.0%} of the slots were taken, and a job was in one for {seen.in_slot_ms:.0f} ms, "
        f"alone {seen.in_slot_alone_ms:.0f}"
    )
    return Finding(cause="slots", whose="executor", why=why)


def _processors(seen: Evidence) -> Finding | None:
    if seen.busy <= BUSY or seen.others > OTHERS_MANY:
        return None
    return Finding(cause="processors", why=f"the machine's processors were {seen.busy:.0%} busy")


def _loop(seen: Evidence) -> Finding | None:
    one = _most(seen.units, lambda one: one.ran + one.waited)
    if one is None or one.ran + one.waited <= LOOP_FULL:
        return None
    return Finding(cause="loop", whose=one.role, why=f"the loop of {one.unit} {_spent(one)}")


RULES: Sequence[Callable[[Evidence], Finding | None]] = (
    _memory,
    _generator,
    _others,
    _quota,
    _stopped,
    _network,
    _way,
    _sync,
    _slots,
    _processors,
    _loop,
)


def _held_back(one: Loop, idle: float) -> bool:
    """Whether something else than a want of processors keeps it from one."""
    waits = one.waited > HELD_BACK and one.waited > 2 * one.ran and one.idle > idle
    return waits or one.throttled > HELD_BACK


def _grew(trip_ms: float, alone_ms: float) -> bool:
    return trip_ms > FAR_MS and trip_ms > FAR_TIMES * alone_ms


def _spent(one: Loop) -> str:
    held = f" (held back by its limit for {one.throttled:.0%})" if one.throttled > HELD_BACK else ""
    return f"ran {one.ran:.0%} of the time and waited {one.waited:.0%} for a processor{held}"


def _most(units: Iterable[Loop], by: Callable[[Loop], float]) -> Loop | None:
    return max(units, key=by, default=None)
