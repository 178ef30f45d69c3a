"""The journal: the ordered records of one job, and all that can be said from them alone.

A journal is a row of messages; a message is a list of records that became durable together. Each
message carries the SHA-256 of the bytes of the one before it, and one of itself, so a changed, missing
or foreign message is noticed. Status is folded from the records and stored nowhere else.

    message 1   [spec]                           by the client
    message 2   [lease, intent 0]                by the holder of epoch 1
    message 3   [result 0, intent 1]
    message 4   [lease]                          by the holder of epoch 2: intent 1 was interrupted
    message 5   [result 2, done]                 no record follows a `done`

This module owns the records, the fold, the chain and the verdict on a refused write (docs/protocol.md §2).
It knows no store, no engine and no clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from mvmci.errors import JournalCorrupt
from mvmci.jobs import effect
from mvmci.jobs.job import End, Id, Kind, Limits, Payload, Status

MessageKind = Literal["spec", "run", "cancel", "done"]
PROOF_BY = "up"  # who submits the job that does nothing, by which `up` sees that a cluster works


class Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="record", omit_defaults=True):
    """Base of all records. `at` is milliseconds since 1970 by its writer's clock."""

    at: int


class Spec(Record, frozen=True, kw_only=True, tag="spec"):
    """What was asked for. The first record, once."""

    id: Id
    queue: Id  # who holds the job writes to subjects with it in their names
    kind: Kind
    module: str  # digest
    name: str  # of the module's file; argv[0] of a command
    component: bool
    input: Payload = Payload()
    args: tuple[str, ...] = ()
    env: effect.Pairs = ()
    stdin: str | None = None  # digest
    tree: str | None = None  # digest of the workspace's manifest
    artifacts: tuple[str, ...] = ()
    limits: Limits = Limits()
    seed: int
    by: str


class Lease(Record, frozen=True, kw_only=True, tag="lease"):
    """A holder takes the job. `run` is new for every taking, also by the same process."""

    epoch: int
    unit: Id
    incarnation: Id
    run: str
    why: Literal["first", "recovered", "resumed"]
    worker: str = ""  # who sent the job to an engine of another unit


class Intent(Record, frozen=True, kw_only=True, tag="intent"):
    """The holder is about to perform effect `index`. `request` is absent when it was too large."""

    index: int
    kind: str
    digest: str
    idempotent: bool = False
    request: effect.Fields | None = None


class Result(Record, frozen=True, kw_only=True, tag="result"):
    """Effect `index` ended: its answer, or the blob that holds it. `tree` is the workspace, if used."""

    index: int
    value: effect.Fields | None = None
    blob: str | None = None
    tree: str | None = None


class Released(Record, frozen=True, kw_only=True, tag="released"):
    """The holder lets go on purpose: to sleep `until` a time, or because it drains."""

    why: Literal["sleep", "drain"]
    until: int = 0


class Response(Record, frozen=True, kw_only=True, tag="response"):
    """The early answer of a workflow: JSON."""

    value: Payload


class Progress(Record, frozen=True, kw_only=True, tag="progress"):
    """How far a workflow says that it is."""

    done: int
    total: int
    message: str


class Cancel(Record, frozen=True, kw_only=True, tag="cancel"):
    """Somebody wants the job to end."""

    by: str


class Done(Record, frozen=True, kw_only=True, tag="done"):
    """The end. The last record, once."""

    status: End
    reason: str = ""
    exit_code: int | None = None
    result: Payload = Payload()
    artifacts: Payload = Payload()  # a list of `Artifact`
    chunks: int = 0  # of output, by the last attempt


AnyRecord = Spec | Lease | Intent | Result | Released | Response | Progress | Cancel | Done


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message: an id of its own, and its records."""

    id: str
    records: tuple[AnyRecord, ...]


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """A message as it is written: the hash of the one before, and one over all of itself.

    The first makes a chain; the second vouches for the last message, which nothing follows yet.
    """

    prev: str
    sum: str
    id: str
    records: msgspec.Raw


class Origin(NamedTuple):
    """What a store vouches for of a message, whatever its bytes say: as what it was written, and by whom."""

    kind: str
    queue: str
    unit: str


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A message as a store keeps it: its sequence, which only grows, and its bytes.

    `origin` is None where a store knows none: in a folder everything is written by its owner.
    """

    seq: int
    data: bytes
    origin: Origin | None = None


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
    done: Done | None = None
    corrupt: str | None = None

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
        withdrawn = self.cancel is not None and not self.held
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
            state.lease, state.released = record, None
        case Result():
            state.results += 1
            state.lost = 0
            state.tree = record.tree or state.tree
        case Released():
            state.released = record
        case Response():
            state.response = state.response or record.value
        case Progress():
            state.progress = record
        case Cancel():
            state.cancel = state.cancel or record
        case Done():
            state.done = record
        case Intent():
            pass


def status(state: State) -> tuple[Status, str]:
    """The job's status and its reason."""
    if state.corrupt is not None:
        return "errored", f"journal corrupt: {state.corrupt}"
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


class Journal:
    """One job as its reader knows it, and where its next message goes.

    `tail` is the sequence of the last message (0 for none) and `head` its hash. A lone `done` is the
    tombstone of a job that was forgotten, and is exempt from the chain.
    """

    def __init__(self, job: str) -> None:
        self.job = job
        self.tail = 0
        self.head = ""
        self.records: list[AnyRecord] = []
        self.state = State()
        self.ids: set[str] = set()

    def absorb(self, entries: Iterable[Entry]) -> list[Message]:
        """Take in `entries`, which follow what is known, and return their messages.

        A break of the chain is kept in `state.corrupt`; nothing after it is taken in.
        """
        messages = []
        for entry in entries:
            if self.state.corrupt is not None:
                break
            try:
                message = self._link(entry)
            except JournalCorrupt as corrupt:
                self.state.corrupt = corrupt.message
                break
            self.extend(entry, message.id, message.records)
            messages.append(message)
        return messages

    def extend(self, entry: Entry, message_id: str, records: Sequence[AnyRecord]) -> None:
        """Take in the message of `entry`, which is known to stand next: what `encode` made, once stored."""
        self.tail, self.head = entry.seq, hashlib.sha256(entry.data).hexdigest()
        self.ids.add(message_id)
        self.records += records
        for record in records:
            fold(self.state, record)

    def _link(self, entry: Entry) -> Message:
        """The message of `entry`, if it may stand next. Raises JournalCorrupt."""
        at = f"message {entry.seq} of {self.job}"
        try:
            envelope = _envelopes.decode(entry.data)
            records = _records.decode(envelope.records)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise JournalCorrupt(f"{at} cannot be read") from None
        if envelope.sum != _sum(envelope.prev, envelope.id, envelope.records) or not records:
            raise JournalCorrupt(f"{at} was changed")
        message = Message(id=envelope.id, records=records)
        if self.tail == 0 and entry.seq > 1 and isinstance(records[-1], Done):
            return message  # what stood before it was forgotten
        if envelope.prev != self.head:
            raise JournalCorrupt(f"{at} does not follow the one before it")
        if self.tail == 0 and not (isinstance(records[0], Spec) and records[0].id == self.job):
            raise JournalCorrupt(f"{at} is not the spec of that job")
        if self.state.done is not None:
            raise JournalCorrupt(f"{at} stands after the end")
        return message

    def encode(self, records: Sequence[AnyRecord], message_id: str) -> bytes:
        """The bytes of a message with `records` that would follow what is known."""
        body = _encoder.encode(records)
        total = _sum(self.head, message_id, body)
        return _encoder.encode(Envelope(prev=self.head, sum=total, id=message_id, records=msgspec.Raw(body)))


def records_of(entry: Entry) -> tuple[AnyRecord, ...]:
    """The records of one message, whatever stands before it; none if it cannot be read."""
    try:
        return _records.decode(_envelopes.decode(entry.data).records)
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
    if state.spec is None or state.corrupt is not None:
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
