"""The journal: the ordered records of one job, and all that can be said from them alone.

A journal is a row of messages; a message is a list of records that became durable together. Each
message carries the SHA-256 of the bytes of the one before it, and one of itself, so a changed, missing
or foreign message is noticed. Status is folded from the records and stored nowhere else.

    message 1   [spec]                           by the client
    message 2   [lease, intent 0]                by the holder of epoch 1
    message 3   [result 0, intent 1]
    message 4   [lease]                          by the holder of epoch 2: intent 1 was interrupted
    message 5   [result 2, done]                 no record follows a `done`

Whoever may write to a journal may write anything there. So each message is *taken in* or *ignored*, by a
rule that every reader has, `misfit`: who wrote it, as what, and whether it may stand there. One that is
ignored changes nothing but behind what the next message goes, and that only on the job's own queue.

A message whose id says a level that this build does not know (`mvmci.wire`) is *newer*: nothing from there on
is taken in, or written. What that rests on, envelope, chain and hashes, is the same at every level.

This module owns the records, the fold, the chain, that rule, and the verdict on a refused write
(docs/protocol.md §2). It knows no store, no engine and no clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec

from mvmci.errors import JournalCorrupt, VersionsDiffer
from mvmci.jobs import effect
from mvmci.jobs.job import Count, End, Id, Kind, Limits, Name, Payload, Reason, Status, Text, Time, Words
from mvmci.jobs.times import Times
from mvmci.wire import HINT, difference, is_understood, level_of

# `end` is a `done` by somebody who holds no job.
MessageKind = Literal["spec", "run", "cancel", "done", "end"]
OUTSIDE = "_"  # begins the name of a writer who holds no job; no unit's begins so
BENCH_BY = "bench"  # who submits the load of `mvmci bench`
PROOF_BY = "up"  # who submits the job that does nothing, by which `up` sees that a cluster works


class Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="record", omit_defaults=True):
    """Base of all records. `at` is by its writer's clock."""

    at: Time


class Spec(Record, frozen=True, kw_only=True, tag="spec"):
    """What was asked for. The first record, once."""

    id: Id
    queue: Id  # who holds the job writes to subjects with it in their names
    kind: Kind
    module: Name  # digest
    name: Name  # of the module's file; argv[0] of a command
    component: bool
    input: Payload = Payload()
    args: Words = ()
    env: Annotated[tuple[tuple[Text, Text], ...], msgspec.Meta(max_length=1 << 18)] = ()
    stdin: Name | None = None  # digest
    tree: Name | None = None  # digest of the workspace's manifest
    artifacts: Words = ()
    limits: Limits = Limits()
    seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    by: Name


class Lease(Record, frozen=True, kw_only=True, tag="lease"):
    """A holder takes the job. `run` is new for every taking, also by the same process.

    `why` is "first", "recovered" or "resumed"; whatever is not "resumed" is an attempt.
    """

    epoch: Count
    unit: Id
    incarnation: Id
    run: Name
    why: Name
    worker: Name = ""  # who sent the job to an engine of another unit


class Intent(Record, frozen=True, kw_only=True, tag="intent"):
    """The holder is about to perform effect `index`. `request` is absent when it was too large."""

    index: Count
    kind: Name
    digest: Name
    idempotent: bool = False
    request: effect.Fields | None = None


class Result(Record, frozen=True, kw_only=True, tag="result"):
    """Effect `index` ended: its answer, or the blob that holds it. `tree` is the workspace, if used."""

    index: Count
    value: effect.Fields | None = None
    blob: Name | None = None
    tree: Name | None = None


class Released(Record, frozen=True, kw_only=True, tag="released"):
    """The holder lets go on purpose: to "sleep" `until` a time, or to "drain", as whatever else counts."""

    why: Name
    until: Time = 0
    times: Times | None = None  # of this run, without this write


class Response(Record, frozen=True, kw_only=True, tag="response"):
    """The early answer of a workflow: JSON."""

    value: Payload


class Progress(Record, frozen=True, kw_only=True, tag="progress"):
    """How far a workflow says that it is."""

    done: Count
    total: Count
    message: Text


class Cancel(Record, frozen=True, kw_only=True, tag="cancel"):
    """Somebody wants the job to end."""

    by: Name


class Done(Record, frozen=True, kw_only=True, tag="done"):
    """The end. The last record, once."""

    status: End
    reason: Reason = ""
    exit_code: Annotated[int, msgspec.Meta(ge=-(1 << 31), le=(1 << 32) - 1)] | None = None
    result: Payload = Payload()
    artifacts: Payload = Payload()  # a list of `Artifact`
    chunks: Count = 0  # of output, by the last attempt
    times: Times | None = None  # of this run, without this write


AnyRecord = Spec | Lease | Intent | Result | Released | Response | Progress | Cancel | Done


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message: an id of its own, and its records."""

    id: Name
    records: tuple[AnyRecord, ...]


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """A message as it is written: the hash of the one before, and one over all of itself.

    The first makes a chain; the second vouches for the last message, which nothing follows yet.
    """

    prev: Name
    sum: Name
    id: Name
    records: msgspec.Raw


class Origin(NamedTuple):
    """What a store vouches for of a message, whatever its bytes say: as what it was written, and by whom."""

    kind: str
    queue: str
    unit: str


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A message as a store keeps it: its sequence, which only grows, and its bytes.

    `origin` is None where a store knows none: in a folder everything is written by its owner. `stored` is
    when it was, in ns since 1970 by the store's own clock; 0 where that is not told.
    """

    seq: int
    data: bytes
    origin: Origin | None = None
    stored: int = 0


class Ignored(msgspec.Struct, frozen=True, kw_only=True):
    """A message that no reader takes in: where it stands, by whom it is, and why."""

    seq: int
    after: int  # so many records
    origin: Origin | None
    why: str


_encoder = msgspec.json.Encoder()
_envelopes = msgspec.json.Decoder(Envelope)
_records = msgspec.json.Decoder(tuple[AnyRecord, ...])


class State(msgspec.Struct):
    """What the records say so far. The fields change only in `fold`."""

    spec: Spec | None = None
    lease: Lease | None = None
    attempts: int = 0  # leases that were not a resumption
    lost: int = 0  # leases whose predecessor neither released nor ended, since the last result
    released: Released | None = None  # by the holder of `lease`
    results: int = 0
    tree: str | None = None
    response: Payload | None = None
    progress: Progress | None = None
    cancel: Cancel | None = None
    started_at: int | None = None
    times: Times = Times()  # of all runs that ended or let go
    asleep_ms: int = 0
    done: Done | None = None
    corrupt: str | None = None
    newer: str | None = None  # that there is more, which this build does not understand

    @property
    def epoch(self) -> int:
        """The number of the newest holder, 0 before the first."""
        return self.lease.epoch if self.lease else 0

    @property
    def held(self) -> bool:
        """Whether a holder took the job and neither let go nor ended it. It may be dead."""
        return self.lease is not None and self.released is None and self.done is None

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen. A cancel is the end at once where no holder is at work."""
        withdrawn = self.cancel is not None and not self.held and self.newer is None
        return self.done is not None or self.corrupt is not None or withdrawn

    @property
    def deadline_ms(self) -> int | None:
        """When the job's time is up, counted from its first lease; None before that."""
        if self.spec is None or self.started_at is None:
            return None
        return self.started_at + self.spec.limits.timeout_ms


def fold(state: State, record: AnyRecord) -> None:
    """Take one more record into `state`."""
    match record:
        case Spec():
            state.spec = record
            state.tree = record.tree
        case Lease():
            if state.held:
                state.lost += 1
            if record.why != "resumed":
                state.attempts += 1
            if state.started_at is None:
                state.started_at = record.at
            _wake(state, record.at)
            state.lease, state.released = record, None
        case Result():
            state.results += 1
            state.lost = 0
            state.tree = record.tree or state.tree
        case Released():
            state.released = record
            if record.times is not None:
                state.times += record.times
        case Response():
            state.response = state.response or record.value
        case Progress():
            state.progress = record
        case Cancel():
            state.cancel = state.cancel or record
        case Done():
            _wake(state, record.at)
            state.done = record
            if record.times is not None:
                state.times += record.times
        case Intent():
            pass


def _wake(state: State, at: int) -> None:
    """Count the sleep that ends then, if it is one: its time is up, or the job was cancelled."""
    if state.released is not None and state.released.why == "sleep":
        state.asleep_ms += max(0, min(at, state.released.until) - state.released.at)


def status(state: State) -> tuple[Status, str]:
    """The job's status and its reason: how far it is known, where there is more that is newer."""
    if state.corrupt is not None:
        return "errored", f"journal corrupt: {state.corrupt}"
    name, reason = _status(state)
    return name, state.newer or reason


def _status(state: State) -> tuple[Status, str]:
    if state.done is not None:
        return state.done.status, state.done.reason
    if state.ended:
        assert state.cancel is not None
        return "cancelled", f"cancelled by {state.cancel.by}"
    if state.held:
        return "running", ""
    if state.released is not None and state.released.why == "sleep":
        return "suspended", "sleep"
    return "queued", "drained" if state.released is not None else ""


def misfit(
    state: State, records: Sequence[AnyRecord], *, kind: str, queue: str | None, unit: str | None
) -> str:
    """Why a message with `records` may not stand next in a journal of `state`; empty if it may.

    The job has not ended, and the message is of its queue: that needs no reading, and is looked at before.
    `kind`, `queue` and `unit` are as what, where and by whom it was written; the last two are None where
    a store does not tell. A `spec` is one Spec, the first; a `cancel` one Cancel; all else is its holder's,
    or an end that needs none.
    """
    if state.spec is None or kind == "spec":
        if state.spec is not None:
            return "there is a spec before it"
        first = records[0]
        if kind != "spec" or len(records) > 1 or not isinstance(first, Spec):
            return "it is not one spec"
        return "" if queue in (None, first.queue) else "it is of another queue"
    if kind == "cancel":
        return "" if len(records) == 1 and isinstance(records[0], Cancel) else "it is not one cancel"
    if kind != ("done" if isinstance(records[-1], Done) else "run"):
        return f"it was not to be written as {kind[:10]!r}"
    return _misfit_of_holder(state, records, unit)


def _misfit_of_holder(state: State, records: Sequence[AnyRecord], unit: str | None) -> str:
    """The same of what a holder writes, and of an end that somebody else writes."""
    lease, held = state.lease, state.held
    for place, record in enumerate(records):
        theirs = held and lease is not None and unit in (None, lease.unit)
        match record:
            case Spec() | Cancel():
                return "it is not a holder's"
            case Lease():
                if place or state.ended or record.epoch != state.epoch + 1:
                    return "its lease could not be had"
                if unit not in (None, record.unit):
                    return "its lease is in the name of another unit"
                lease, held = record, True
            case Done() if not theirs:
                return (
                    "" if len(records) == 1 and _needs_no_holder(state, record) else "it is not its holder's"
                )
            case Done():
                if place < len(records) - 1:
                    return "it goes on after its end"
                if state.cancel is not None and record.status != "cancelled":
                    return "a cancel stands before it"
            case _ if not theirs:
                return "it is not its holder's"
            case Released():
                held = False
    return ""


def _needs_no_holder(state: State, done: Done) -> bool:
    """Whether that is an end which follows from the journal alone, so that a control plane may write it."""
    if done != Done(at=done.at, status=done.status, reason=done.reason):
        return False  # only a holder knows of results
    if done.status == "cancelled":
        return state.cancel is not None
    late = state.deadline_ms is not None and done.at >= state.deadline_ms
    return done.status == "timed_out" and state.cancel is None and late


class Journal:
    """One job as its reader knows it, and where its next message goes.

    `tail` is the sequence of the last message (0 for none), `expect` that behind which the next one goes:
    of the last on the job's own queue. `head` is the hash of the last that was taken in; `end` is the
    sequence of that which holds the end. `began` and `ended` are when the first message and the end were
    stored, as `Entry.stored`. A lone `done` is the tombstone of a job that was forgotten, and is
    exempt from the chain.
    """

    def __init__(self, job: str) -> None:
        self.job = job
        self.tail = 0
        self.expect = 0
        self.head = ""
        self.end = 0
        self.began = self.ended = 0
        self.records: list[AnyRecord] = []
        self.ignored: list[Ignored] = []
        self.state = State()
        self.ids: set[str] = set()

    def absorb(self, entries: Iterable[Entry]) -> list[Message]:
        """Take in `entries`, which follow what is known, and return the messages that are not ignored.

        A break of the chain is kept in `state.corrupt`, and what is newer in `state.newer`; nothing after
        it is taken in.
        """
        messages = []
        for entry in entries:
            if self.state.corrupt is not None or self.state.newer is not None:
                break
            try:
                found = self.judge(entry)
            except JournalCorrupt as corrupt:
                self.state.corrupt = corrupt.message
                break
            except VersionsDiffer as newer:
                self.state.newer = newer.message
                break
            if isinstance(found, str):
                self.tail = entry.seq
                if self._is_of_queue(entry.origin):
                    self.expect = entry.seq
                after, origin = len(self.records), entry.origin
                self.ignored.append(Ignored(seq=entry.seq, after=after, origin=origin, why=found))
                continue
            self.extend(entry, found.id, found.records)
            messages.append(found)
        return messages

    @property
    def queued_us(self) -> int | None:
        """How long an ended job waited in its queue, in µs; None where that cannot be told.

        By the store's clock alone, less all that its holders had it in hand and the time that it slept. With
        it comes what nobody can write down of himself: the last write, and the time of holders that died.
        """
        state = self.state
        if state.spec is None or not self.began or not self.ended or not state.times.total:
            return None
        return max(0, (self.ended - self.began) // 1000 - state.asleep_ms * 1000 - state.times.total)

    def check_readable(self) -> None:
        """Raises VersionsDiffer where there is more than this build understands."""
        if self.state.newer is not None:
            raise VersionsDiffer(self.state.newer, hint=HINT)

    def _is_of_queue(self, origin: Origin | None) -> bool:
        """Whether the broker counts a message from there among those that a writer expects."""
        spec = self.state.spec
        return origin is None or spec is None or (origin.queue == spec.queue and origin.unit != "")

    def extend(self, entry: Entry, message_id: str, records: Sequence[AnyRecord]) -> None:
        """Take in the message of `entry`, which is known to stand next: what `encode` made, once stored."""
        self.began = self.began if self.tail else entry.stored
        self.tail = self.expect = entry.seq
        self.head = hashlib.sha256(entry.data).hexdigest()
        self.ids.add(message_id)
        self.records += records
        for record in records:
            fold(self.state, record)
        if self.state.done is not None:
            self.end, self.ended = entry.seq, entry.stored

    def judge(self, entry: Entry) -> Message | str:
        """The message of `entry`, if that is to be taken in next; else why every reader ignores it.

        Raises JournalCorrupt for what may have been a holder's, and for a first message that is no spec of
        this job: where bytes may have been changed nobody can say how the job went on. Raises VersionsDiffer
        for what is of a level that this build does not know.
        """
        state, origin = self.state, entry.origin
        if state.done is not None:
            return "the job had ended"
        if state.spec is not None and origin is not None and origin.queue != state.spec.queue:
            return "it is of another queue"
        try:
            message = self._link(entry)
        except JournalCorrupt:
            if state.spec is not None and origin is not None and not _may_hold(origin):
                return "it cannot be read, or does not follow the one before it"
            raise
        except VersionsDiffer:
            if state.spec is not None and origin is not None and origin.kind == "spec":
                return "there is a spec before it"
            raise
        kind, queue, unit = origin or (kind_of(message.records), None, None)
        if self.tail == 0 and entry.seq > 1 and kind == "done" and isinstance(message.records[-1], Done):
            return message  # what stood before it was forgotten
        why = misfit(state, message.records, kind=kind, queue=queue, unit=unit or None)
        if why and state.spec is None:
            raise JournalCorrupt(f"message {entry.seq} of {self.job} is not the spec of that job")
        return why or message

    def _link(self, entry: Entry) -> Message:
        """The message of `entry`, if it can be read and follows what is known. Raises as `judge`."""
        at = f"message {entry.seq} of {self.job}"
        try:
            envelope = _envelopes.decode(entry.data)
            level = level_of(envelope.id)
            records = _records.decode(envelope.records) if is_understood(level) else None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise JournalCorrupt(f"{at} cannot be read") from None
        if envelope.sum != _sum(envelope.prev, envelope.id, envelope.records) or records == ():
            raise JournalCorrupt(f"{at} was changed")
        if records is None:
            if envelope.prev != self.head and (self.tail or entry.seq == 1):
                raise JournalCorrupt(f"{at} does not follow the one before it")
            raise VersionsDiffer(difference(level, at), hint=HINT)
        tombstone = self.tail == 0 and entry.seq > 1 and isinstance(records[-1], Done)
        if envelope.prev != self.head and not tombstone:
            raise JournalCorrupt(f"{at} does not follow the one before it")
        if self.tail == 0 and isinstance(records[0], Spec) and records[0].id != self.job:
            raise JournalCorrupt(f"{at} is not the spec of that job")
        return Message(id=envelope.id, records=records)

    def encode(self, records: Sequence[AnyRecord], message_id: str) -> bytes:
        """The bytes of a message with `records` that would follow what is known."""
        body = _encoder.encode(records)
        total = _sum(self.head, message_id, body)
        return _encoder.encode(Envelope(prev=self.head, sum=total, id=message_id, records=msgspec.Raw(body)))


def _may_hold(origin: Origin) -> bool:
    return origin.kind in ("run", "done") and not origin.unit.startswith(OUTSIDE)


def records_of(entry: Entry) -> tuple[AnyRecord, ...]:
    """The records of one message, whatever stands before it; none if it cannot be read.

    Raises VersionsDiffer where it is of a level that this build does not know.
    """
    try:
        envelope = _envelopes.decode(entry.data)
        if not is_understood(level := level_of(envelope.id)):
            raise VersionsDiffer(difference(level, f"message {entry.seq}"), hint=HINT)
        return _records.decode(envelope.records)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()


def _sum(prev: str, message_id: str, body: bytes | msgspec.Raw) -> str:
    return hashlib.sha256(f"{prev} {message_id} ".encode() + bytes(body)).hexdigest()


def kind_of(records: Sequence[AnyRecord]) -> MessageKind:
    """The kind of a message, by its records: it is part of the subject that a message is stored under."""
    match records[-1]:
        case Done():
            return "done"
        case Spec():
            return "spec"
        case Cancel():
            return "cancel"
        case _:
            return "run"


Verdict = Literal["fenced", "written", "reread", "retry"]


def verdict(journal: Journal, news: Sequence[Message], *, run: str, epoch: int, message_id: str) -> Verdict:
    """What a refused or unanswered write of holder `run` at `epoch` comes to.

    `journal` has absorbed `news`, everything after the sequence that the write expected. The order of
    the questions carries the promise (docs/protocol.md §2): fencing and a foreign end come before "is my
    message there", or a deposed holder would go on; and that message is no end of mine unless the end
    stands in it.
    """
    state = journal.state
    mine = message_id in journal.ids
    leased = state.lease is not None and state.lease.run == run
    if state.spec is None or state.corrupt is not None or state.newer is not None:
        return "fenced"
    if state.lease is not None and not leased and state.lease.epoch >= epoch:
        return "fenced"
    my_end = any(message.id == message_id and state.done in message.records for message in news)
    if state.ended and not (mine if state.done is None else my_end):
        return "fenced"
    if mine:
        return "written"
    added = any(not isinstance(record, Cancel) for message in news for record in message.records)
    if not leased and added:
        return "reread"
    return "retry"
