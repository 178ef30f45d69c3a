"""Replay: what a workflow asked for is matched to what its journal says.

Requests are matched by position, kind and digest. A recorded one is answered from the journal; the
first that has no record goes live. The matcher knows no engine and no store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from mvmci.errors import Nondeterminism
from mvmci.jobs import effect
from mvmci.jobs.journal import AnyRecord, Intent, Lease, Result

_SHOWN_CHARS_MAX = 200


class Recorded(msgspec.Struct, frozen=True):
    """The answer is in the journal, or in the blob that it names. `at` is the time that it carries."""

    index: int
    at: int
    value: effect.Fields | None
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
            case Result() if record.index < len(found):  # a tombstone has results whose intents are gone
                found[record.index].result = record
            case Lease() if found:
                last = found[-1]
                if last.result is None and last.interrupted_at is None and not last.intent.idempotent:
                    last.interrupted_at = record.at
            case _:
                pass
    return found


class Replay:
    """The matcher of one run of a workflow. `show` puts a recorded request into words."""

    def __init__(self, records: Iterable[AnyRecord], show: Callable[[Intent], str]) -> None:
        self._show = show
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
        if (step.intent.kind, step.intent.digest) != (request.kind, request.digest()):
            expected, got = self._show(step.intent), clip(request.line())
            raise Nondeterminism(f"nondeterminism: effect {index}: expected {expected}, got {got}")
        if step.result is not None:
            result = step.result
            return Recorded(index, result.at, result.value, result.blob, result.tree)
        if step.interrupted_at is not None:
            return Recorded(index, step.interrupted_at, effect.Error(why="interrupted").fields(), None, None)
        return Live(index, step.intent)

    def finish(self) -> None:
        """The workflow ended. Raises Nondeterminism if effects are left over."""
        if not self.live:
            expected = self._show(self._steps[self._next].intent)
            raise Nondeterminism(f"nondeterminism: effect {self._next}: expected {expected}, got the end")


def clip(text: str) -> str:
    """As much of `text` as a person needs."""
    return text if len(text) <= _SHOWN_CHARS_MAX else text[: _SHOWN_CHARS_MAX - 1] + "…"
