"""Replay: what a workflow asked for is matched to what its journal says.

Requests are matched by position, kind and digest. A recorded one is answered from the journal; the
first that has no record goes live. Time and chance come from the journal and the seed, so that they
are the same on every replay and cost nothing to record. The matcher knows no engine and no store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from mvmci.errors import Nondeterminism
from mvmci.jobs import effect
from mvmci.jobs.journal import AnyRecord, Intent, Lease, Result

SHOWN_CHARS_MAX = 200


class Recorded(msgspec.Struct, frozen=True):
    """The answer is in the journal, or in the blob that it names. `at` is the time that it carries."""

    index: int
    at: int
    value: effect.Answer | None
    blob: str | None
    tree: str | None


class Live(msgspec.Struct, frozen=True):
    """Nothing is recorded: perform it. `intent` stands if it was begun before and may be done again."""

    index: int
    intent: Intent | None


class RecordedEffect(msgspec.Struct):
    """One effect of the journal: its intent, and how it ended if it did."""

    intent: Intent
    result: Result | None = None
    interrupted_at: int | None = None


def steps(records: Iterable[AnyRecord]) -> list[RecordedEffect]:
    """The effects of a journal, in order.

    An intent without a result before a newer lease was interrupted, at the time of that lease;
    nothing needs to be written for it to stay so. An idempotent one stays open instead.
    """
    found: list[RecordedEffect] = []
    for record in records:
        match record:
            case Intent():
                found.append(RecordedEffect(record))
            case Result():
                found[record.index].result = record
            case Lease() if found:
                last = found[-1]
                if last.result is None and last.interrupted_at is None and not last.intent.idempotent:
                    last.interrupted_at = record.at
            case _:
                pass
    return found


class Replay:
    """The matcher of one run of a workflow."""

    def __init__(self, records: Iterable[AnyRecord]) -> None:
        self._steps = steps(records)
        self._next = 0

    @property
    def live(self) -> bool:
        """Whether everything recorded was consumed: what comes now happens for the first time."""
        return self._next >= len(self._steps)

    def ask(self, request: effect.Request) -> Recorded | Live:
        """How the workflow's next request is to be answered. Raises Nondeterminism on a mismatch."""
        index = self._next
        self._next += 1
        if index >= len(self._steps):
            return Live(index, None)
        step = self._steps[index]
        asked = (effect.kind(request), effect.digest(request))
        if (step.intent.kind, step.intent.digest) != asked:
            expected = show(step.intent.request) if step.intent.request else step.intent.kind
            raise Nondeterminism(f"nondeterminism: effect {index}: expected {expected}, got {show(request)}")
        if step.result is not None:
            result = step.result
            return Recorded(index, result.at, result.value, result.blob, result.tree)
        if step.interrupted_at is not None:
            return Recorded(index, step.interrupted_at, effect.Error(why="interrupted"), None, None)
        return Live(index, step.intent)

    def finish(self) -> None:
        """The workflow ended. Raises Nondeterminism if effects are left over."""
        if not self.live:
            left = self._steps[self._next].intent
            expected = show(left.request) if left.request else left.kind
            raise Nondeterminism(f"nondeterminism: effect {self._next}: expected {expected}, got the end")


def show(request: effect.Request) -> str:
    """One line that a person can tell a request by."""
    match request:
        case effect.Http():
            text = f"http {request.method} {request.url}"
        case effect.Exec():
            text = f"exec {' '.join(request.argv)}"
        case _:
            text = f"sleep {request.ms} ms"
    return text if len(text) <= SHOWN_CHARS_MAX else text[: SHOWN_CHARS_MAX - 1] + "…"


class VirtualClock:
    """A workflow's time: that of the last record it consumed, plus a tick of 1 ms for every look."""

    def __init__(self, now_ms: int) -> None:
        self._now_ms = now_ms

    def consume(self, at_ms: int) -> None:
        """A record of time `at_ms` was consumed. Time never goes back."""
        self._now_ms = max(self._now_ms, at_ms)

    def now(self) -> int:
        """Milliseconds since 1970."""
        self._now_ms += 1
        return self._now_ms - 1


class Chance:
    """A workflow's random numbers: a keyed hash of a counter, from the seed in the spec."""

    def __init__(self, seed: int) -> None:
        self._key = (seed & (2**64 - 1)).to_bytes(8, "little")
        self._count = 0

    def next(self) -> int:
        """An unsigned 64-bit number."""
        self._count += 1
        drawn = hashlib.blake2b(self._count.to_bytes(8, "little"), key=self._key, digest_size=8)
        return int.from_bytes(drawn.digest(), "little")
