"""The job's messages as the broker holds them, or as a holder knows them.

They are read by mvmci's own `Journal`, `status` and `steps`, so that the model believes of a row of messages
what the program believes. Rows that begin alike share their nodes in a tree: two equal rows are one object,
which is cheap to compare and judged once.
"""

from __future__ import annotations

from itertools import pairwise

from mvmci.errors import JournalCorrupt
from mvmci.jobs.job import Limits
from mvmci.jobs.journal import (
    AnyRecord,
    Cancel,
    Done,
    Entry,
    Intent,
    Journal,
    Lease,
    Message,
    Result,
    Spec,
    State,
    status,
)
from mvmci.jobs.replay import RecordedEffect, steps

JOB = "job"
QUEUE = "q"
SLEEP_MS = 60_000
INTERRUPTED = "interrupted"

FORGER = "forger"  # who writes what he may not

CORRUPT = "the journal is corrupt"
TWICE_RECORDED = "a record stands there twice"
CANCEL_IGNORED = "a cancel stands there, and another end"
SLEPT_EARLY = "a sleep ended early"
OTHER_REQUEST = "a replay asks for something else than is recorded"
FORGED = "what somebody else wrote counts as its holder's"


def spec(attempts: int) -> Spec:
    """A workflow whose time is never up."""
    return Spec(
        at=0,
        id=JOB,
        queue=QUEUE,
        kind="workflow",
        module="sha256:" + "0" * 64,
        name="m",
        component=True,
        limits=Limits(attempts=attempts, timeout_ms=1_000 * SLEEP_MS),
        seed=0,
        by="client",
    )


class Believing(Journal):
    """A reader who takes in whatever follows the chain."""

    def judge(self, entry: Entry) -> Message:
        if self.state.done is not None:
            raise JournalCorrupt("it stands after the end")
        return self._link(entry)


class Log:
    """A row of messages, and all that follows from it alone, for a `reader`.

    `view` is what a workflow is told of its effects when it is replayed; `ended` is the status of a job that
    has ended, else empty; `faults` are the promises that the row itself breaks.
    """

    def __init__(self, entries: tuple[Entry, ...] = (), reader: type[Journal] = Journal) -> None:
        self.entries = entries
        self.reader = reader
        self.tail = entries[-1].seq if entries else 0
        self.journal = reader(JOB)
        self.messages: list[Message] = self.journal.absorb(entries)
        self.state: State = self.journal.state
        self.steps: list[RecordedEffect] = steps(self.journal.records)
        self.view = view_of(self.steps)
        self.ended = status(self.state)[0] if self.state.ended else ""
        self.faults = _faults(self)
        self._next: dict[Entry, Log] = {}

    def append(self, entry: Entry) -> Log:
        """This row and `entry`, whether or not that may stand there."""
        if entry not in self._next:
            self._next[entry] = Log((*self.entries, entry), self.reader)
        return self._next[entry]

    def read_on(self, there: Log) -> tuple[Log, list[Message]]:
        """What a reader of `there` knows who knew this row, and the messages that were new to it."""
        known = self
        for entry in there.entries:
            if entry.seq > self.tail:
                known = known.append(entry)
        return known, known.messages[len(self.messages) :]


def view_of(found: list[RecordedEffect], *, again: bool = False) -> tuple[str, ...]:
    """The answers up to the first effect that is to be performed: `again`, if it was interrupted."""
    view = []
    for step in found:
        if step.result is not None:
            view.append(step.result.blob or "")
        elif step.interrupted_at is not None and not again:
            view.append(INTERRUPTED)
        else:
            break
    return tuple(view)


def digest(view: tuple[str, ...]) -> str:
    """A request is made from the answers to those before it."""
    return " ".join(view)


def _faults(log: Log) -> tuple[str, ...]:
    records = log.journal.records
    epochs = [record.epoch for record in records if isinstance(record, Lease)]
    indices = [(type(one), one.index) for one in records if isinstance(one, Intent | Result)]
    cancelled = next((at for at, one in enumerate(records) if isinstance(one, Cancel)), len(records))
    found = {
        CORRUPT: log.state.corrupt is not None,
        TWICE_RECORDED: len(set(indices)) < len(indices) or any(a >= b for a, b in pairwise(epochs)),
        CANCEL_IGNORED: any(
            isinstance(one, Done) and one.status != "cancelled" for one in records[cancelled:]
        ),
        SLEPT_EARLY: any(_early(step) for step in log.steps),
        FORGED: any(_forged(one) for one in records),
        OTHER_REQUEST: any(
            step.intent.digest != digest(log.view[: step.intent.index])
            for step in log.steps
            if step.intent.index <= len(log.view)
        ),
    }
    return tuple(fault for fault, there in found.items() if there)


def _forged(record: AnyRecord) -> bool:
    match record:
        case Done(reason=by) | Result(blob=by) | Lease(unit=by):
            return by == FORGER
        case _:
            return False


def _early(step: RecordedEffect) -> bool:
    until = step.intent.at + SLEEP_MS
    return step.intent.kind == "sleep" and step.result is not None and step.result.at < until
