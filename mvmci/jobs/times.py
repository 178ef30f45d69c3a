"""Where the time of a job goes: durations alone, each by one clock, so no two hosts' clocks are compared.

What a unit does for a job is one row of parts, and a moment counts for one of them: the innermost that is
under way. What a hint waited for in its queue is in none of them. It is what the broker's two stamps, of the
first message and of the end, are apart, less all parts and the time asleep; with it comes the last write,
which nobody can write down before it is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import add
from typing import Annotated, Literal, get_args

import msgspec

Part = Literal["order", "slot", "compile", "layout", "guest", "effects", "writes"]
PARTS: tuple[Part, ...] = get_args(Part)  # in the order of `Times`, but for the way
PHASES = {  # as people read it, in the order of time: its phases, and the words for their parts
    "wait": {"queue": "queue", "order": "engine", "way": "transit", "slot": "slot"},
    "compile": {"compile": "code"},
    "run": {"layout": "files", "guest": "job", "effects": "effects"},
    "record": {"writes": "writes"},
}
WORDS = {  # a part by itself: `wait: queue`, `compile`
    part: f"{phase}: {word}" if len(words) > 1 else phase
    for phase, words in PHASES.items()
    for part, word in words.items()
}
Micros = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class Times(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Of the runs of a job, in µs.

    order     from the hint until the job was offered to the engine that took it
    way       from there until it was taken; 0 where the engine is the worker's own, or on another machine:
              then it is in the queue's
    slot      from there until it had a slot: the journal was read, the code was at hand
    compile   getting the code: from the cache, or by compiling
    layout    laying out the workspace
    guest     the guest itself, and what it wrote
    effects   performing effects
    writes    waiting until records were on disk, without the last
    """

    order: Micros = 0
    way: Micros = 0
    slot: Micros = 0
    compile: Micros = 0
    layout: Micros = 0
    guest: Micros = 0
    effects: Micros = 0
    writes: Micros = 0

    def __add__(self, other: Times) -> Times:
        return Times(*map(add, msgspec.structs.astuple(self), msgspec.structs.astuple(other)))

    @property
    def total(self) -> int:
        """All of it."""
        return sum(msgspec.structs.astuple(self))


def in_phases(parts: Mapping[str, float | None]) -> dict[str, float]:
    """What each phase took, of how long each part took."""
    return {phase: sum(parts.get(part) or 0 for part in words) for phase, words in PHASES.items()}


def in_words(parts: Mapping[str, float | None], shown: Callable[[float], str]) -> str:
    """What took some time: `wait 3.6ms (queue 3.4ms, slot 0.2ms), compile 0.4ms, run 5ms (job 5ms)`."""
    return ", ".join(
        f"{phase} {shown(took)}{_of_phase(PHASES[phase], parts, shown)}"
        for phase, took in in_phases(parts).items()
        if took
    )


def _of_phase(
    words: Mapping[str, str], parts: Mapping[str, float | None], shown: Callable[[float], str]
) -> str:
    told = [f"{word} {shown(took)}" for part, word in words.items() if (took := parts.get(part))]
    return f" ({', '.join(told)})" if len(words) > 1 else ""


class Moment(msgspec.Struct, frozen=True, array_like=True):
    """A moment by a machine's monotonic clock, in ns: comparable within one start of that machine alone."""

    boot: Annotated[str, msgspec.Meta(max_length=36)]
    at: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]

    def us_until(self, later: Moment) -> int:
        """How long it is to `later`; 0 where two clocks would have to be compared."""
        return max(0, later.at - self.at) // 1000 if self.boot == later.boot else 0


class Stopwatch:
    """Divides one run among its parts, by a monotonic clock of ns.

    It begins with `order`, or with `slot` where what was before is known, in µs.
    """

    __slots__ = ("_clock", "_ns", "_part", "_since", "_way")

    def __init__(self, clock: Callable[[], int], order: int | None = None, way: int = 0) -> None:
        self._clock = clock
        self._part: Part = "order" if order is None else "slot"
        self._since = clock()
        self._ns: dict[Part, int] = dict.fromkeys(PARTS, 0)
        self._ns["order"] = (order or 0) * 1000
        self._way = way

    def begin(self, part: Part) -> Part:
        """Time counts for `part` from now on; the part before."""
        now, before = self._clock(), self._part
        self._ns[before] += now - self._since
        self._part, self._since = part, now
        return before

    def part(self, part: Part) -> Meanwhile:
        """Time counts for `part` meanwhile, and then for that before it."""
        return Meanwhile(self, part)

    def times(self) -> Times:
        """What each part took so far."""
        self.begin(self._part)
        order, *others = (ns // 1000 for ns in self._ns.values())
        return Times(order, self._way, *others)


class Meanwhile:
    """The block of `Stopwatch.part`. (One of `contextlib` takes three times as long, several times a job.)"""

    __slots__ = ("_before", "_part", "_stopwatch")

    def __init__(self, stopwatch: Stopwatch, part: Part) -> None:
        self._stopwatch = stopwatch
        self._part = part

    def __enter__(self) -> None:
        self._before = self._stopwatch.begin(self._part)

    def __exit__(self, *error: object) -> None:
        self._stopwatch.begin(self._before)
