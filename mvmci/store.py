"""Where journals, hints, logs, blobs and presence live: five ports, and one object that holds them.

`stores/folder.py` keeps everything in a folder, for one machine; `stores/nats/` keeps it in JetStream, for a
cluster. One suite in `tests/contracts` runs over all of them. A store knows
nothing of records: journals are bytes in order, and only the compare-and-set makes them safe.
"""

from __future__ import annotations

import hashlib
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import msgspec

from mvmci.errors import NotFound
from mvmci.jobs.job import INLINE_BYTES_MAX, Count, Payload, Time
from mvmci.jobs.journal import Entry, Lease, MessageKind
from mvmci.wire import OLDEST, Level, is_understood

CHUNK_BYTES_MAX = 64 << 10
MESSAGE_BYTES_MAX = 1 << 20  # nats-server's default limit, and ours for every store


class Journals(Protocol):
    """The messages of every job, in order. The only truth about a job."""

    async def read(self, job: str, after: int = 0) -> list[Entry]:
        """All messages of `job` with a sequence over `after`, in order; none if there is no such job.

        Raises StoreUnavailable.
        """

    async def first(self, job: str, seq: int) -> Entry | None:
        """The first message of `job`, if its sequence is `seq`: one look, however many jobs there are.

        Raises StoreUnavailable.
        """

    async def append(
        self,
        job: str,
        kind: MessageKind,
        queue: str,
        data: bytes,
        *,
        expect: int,
        may_delay: bool = False,
    ) -> int:
        """Store `data` as the job's next message if its last has sequence `expect`, and return the new one.

        `expect` is 0 for a job that has none; else the last is that of `queue`, where a store tells queues
        apart: who may write for another queue only cannot keep this job's messages out. Once this returns,
        the message survives a power cut. One that is `may_delay` may wait a moment for others, so that they
        become durable together.

        Raises Conflict when the last is another (nothing was stored), NoAnswer when nobody can say
        whether it was stored, StoreFull when there is no room.
        """

    def follow(self, job: str, after: int = 0) -> AsyncGenerator[Entry, None]:
        """The messages of `job` with a sequence over `after`, then each as it comes. Never ends by itself.

        Raises StoreUnavailable when the store is away for longer than an answer may take.
        """

    def jobs(self) -> AsyncIterator[str]:
        """The ids of all jobs, in no order. Raises StoreUnavailable."""

    def all(self) -> AsyncIterator[tuple[str, Entry]]:
        """The messages of all jobs, each with its job's id: those of one job in order. Raises as `jobs`.

        One long read instead of many short ones.
        """

    def newest(self) -> AsyncGenerator[tuple[str, list[Entry]], None]:
        """All jobs but those that were forgotten, each with all its messages: the newest first.

        They are as they were when this was called, or newer. Raises as `jobs`.
        """


class Delivery(Protocol):
    """One hint, handed to one puller."""

    job: str
    spec_entry: Entry | None  # the job's own spec, where the hint is that, delivered for the first time

    async def ack(self) -> None:
        """The hint has done its work. An acknowledgement proves nothing: a lapsed one is accepted too."""

    async def keep(self) -> None:
        """The hint is still at work: do not hand it out again before another `HINT_LAPSE_S`."""

    async def redeliver(self, wait_s: float) -> None:
        """Hand it out again, to anybody, after `wait_s`."""


HINT_LAPSE_S = 30.0
UNNAMED_BLOB_S = 24 * 3600  # for so long a blob is kept that no journal names, since somebody counted on it


class Hints(Protocol):
    """Words that a job wants looking at. Any of them may be lost without harm, or come twice."""

    async def ready(self, queue: str, job: str) -> int:
        """Say that `job` wants looking at; a newer word replaces an older one. Returns its sequence."""

    async def timer(self, queue: str, job: str, at_ms: int) -> None:
        """Say `ready` at a time (ms since 1970), to the second; a newer timer replaces an older one."""

    async def pull(self, queue: str, *, wait_s: float) -> Delivery | None:
        """The next hint of `queue`: a new job's spec, or a `ready`. Waits at most `wait_s`, then None.

        A hint that is neither acknowledged nor kept comes again after `HINT_LAPSE_S`.
        """


class Chunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A piece of output. Numbers count from 0 in each attempt; a replay repeats them."""

    attempt: Count  # the epoch for a command; 0 for a workflow, whose replays are one attempt
    number: Count
    stream: Literal["stdout", "stderr"]
    data: bytes
    at: Time


class Logs(Protocol):
    """What jobs print, in numbered chunks. Bounded by age and size; readers drop what they have seen."""

    async def append(self, job: str, queue: str, chunks: Sequence[Chunk]) -> None:
        """Add `chunks`. They are kept as soon as the store can, not necessarily synced on return."""

    async def read(self, job: str) -> list[Chunk]:
        """All chunks of `job`, in the order of their arrival."""

    def follow(self, job: str) -> AsyncGenerator[Chunk, None]:
        """The chunks of `job`, those that are there first, then each as it comes. Never ends by itself."""


@dataclass(frozen=True)
class Source:
    """Bytes that are to be kept: how many, and how to open them, at their beginning."""

    size: int
    open: Callable[[], BinaryIO]


class Blobs(Protocol):
    """Bytes by the SHA-256 of what they are, written `sha256:<64 hex digits>`. Never changed.

    What keeps bytes raises StoreFull where there is no room for them.
    """

    async def put(self, data: bytes) -> str:
        """Keep `data` and return its digest. Keeping it again is free."""

    async def put_file(self, path: Path) -> str:
        """Keep the bytes of the file at `path` and return their digest."""

    async def put_all(self, sources: Mapping[str, Source]) -> set[str]:
        """Keep these, each under its digest: all of them, or none that was not there before.

        Returns the digests of those that turned out to be other bytes; then none is kept. Where they do
        not fit nothing is sent at all.
        """

    async def has(self, digest: str) -> bool:
        """Whether the blob is there, whole."""

    async def missing(self, digests: Collection[str]) -> set[str]:
        """Those of `digests` that are not there: one question for many."""

    async def get(self, digest: str) -> bytes:
        """The bytes, checked against their digest. Raises NotFound."""

    async def fetch(self, digest: str, to: Path) -> None:
        """Write the bytes to a new file at `to`, checked against their digest. Raises NotFound."""


class About(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a unit tells of itself, for people who look.

    A `state` that is neither "ready" nor "draining" is of a newer build: it is there, and takes no jobs.
    """

    role: str = ""
    host: str = ""
    pid: int = 0
    slots: int = 0
    queues: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    isolation: str = ""
    version: str = ""
    engine: str = ""  # the `ClusterSettings.engine` that it uses now; workers have one
    state: str = "ready"
    trouble: str = ""  # why it can run no job now
    drained: bool = False  # it was told so by `mvmci drain`, and stays so when it is started again
    wire: int = 0  # the newest level that it understands (`mvmci.wire`)
    oldest: int = OLDEST  # and the oldest
    build: str = ""  # what tells its program from another one of the same version


class Member(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A unit that is there, the jobs that it holds, `id@epoch`, and those whose hints it keeps.

    `waits` says of jobs that it keeps why they cannot begin yet. `first` and `last` are the places of its
    first word and of the one before this one in the order of all units' words; 0 is not known. `wire` is
    the level at which it says so.
    """

    unit: str
    incarnation: str
    holds: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    waits: dict[str, str] = {}
    about: About = About()
    first: int = 0
    last: int = 0
    wire: int = 0

    def is_beside(self, other: Member) -> bool:
        """Whether two incarnations of a unit run at the same time, as copies of one identity do: each has
        spoken since the other began to."""
        return 0 < self.first < other.last and 0 < other.first < self.last

    @property
    def jobs(self) -> set[str]:
        """The ids of the jobs that it holds."""
        return {held.partition("@")[0] for held in self.holds}

    @property
    def is_readable(self) -> bool:
        """Whether all that it says is understood here; else it may hold any job."""
        return is_understood(self.wire)


def copies(members: Iterable[Member]) -> dict[str, str]:
    """The units whose identity was copied, as more than one process runs under it, and where these are."""
    by_unit: dict[str, list[Member]] = {}
    for one in members:
        by_unit.setdefault(one.unit, []).append(one)
    return {
        unit: " and on ".join(sorted(f"{one.about.host} (process {one.about.pid})" for one in several))
        for unit, several in by_unit.items()
        if any(one.is_beside(several[-1]) for one in several[:-1])
    }


class Presence(Protocol):
    """Who is there, and which jobs they are at work on."""

    unit: str
    incarnation: str  # new for each process

    async def add_job(self, job: str, epoch: int) -> None:
        """Say that this unit is about to hold `job` at `epoch`, before its lease is written.

        Raises LockHeld where the store itself knows another live holder.
        """

    async def remove_job(self, job: str) -> None:
        """This unit no longer holds `job`."""

    async def add_hint(self, job: str, waits: str = "") -> None:
        """Say that this unit keeps a hint of `job`, and why it `waits`, if it does."""

    async def remove_hint(self, job: str) -> None:
        """This unit no longer keeps a hint of `job`."""

    async def explain(self, job: str, waits: str) -> None:
        """Say of `job`, which this unit holds or keeps, why it `waits`; empty: it does no more."""

    async def describe(self, about: About) -> None:
        """Say what this unit is."""

    async def live(self, job: str, lease: Lease) -> bool:
        """Whether the holder that wrote `lease` may still be at work on `job`.

        Never wrong for long: False comes at the latest some `GONE_S` after its process died and this
        reader came, counted on its own clock. A wrong False costs an attempt, never a promise.
        """

    async def find(self, unit: str, incarnation: str) -> Member | None:
        """That unit, in that incarnation, as it said itself a second or two ago; None once it is gone.

        Of one that cannot be read of now, as long as it may be there, no more than the name is known.
        """

    async def members(self) -> list[Member]:
        """All units that are there, each as the last of its processes that spoke says.

        Of an identity that was copied, each of those that run beside each other.
        """


GONE_S = 4.0


@dataclass(frozen=True)
class Store:
    """One place with all five, and how to leave it."""

    journals: Journals
    hints: Hints
    logs: Logs
    blobs: Blobs
    presence: Presence
    close: Callable[[], Awaitable[None]]  # lets go of everything; what was written stays
    level: Level = field(default_factory=Level)  # at which is written there


class ClusterSettings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a cluster is and allows: the key `settings` of its CONFIG, which every unit reads.

    `wire` is the level at which all write (`mvmci.wire`): control planes raise it, and nobody lowers it.
    """

    allow_http: tuple[str, ...] = ()
    allow_exec: tuple[str, ...] = ()
    jobs_ms: int = 7 * 86_400_000  # how long ended jobs are kept
    logs_ms: int = 2 * 86_400_000
    store_bytes: int = 10 << 30  # of all streams together
    queues: tuple[str, ...] = ("default",)  # of the topology; tickets may add others
    min_isolation: str = "process"
    isolation: str = "reuse"
    engine: str = "embedded"  # how workers reach one: "embedded", "broker", or a URL, http(s)://host:port
    public_engine: bool = False  # that URL is of a balancer of the user's own: who that is, a public CA says
    wire: int = 0


async def load_text(blobs: Blobs, payload: Payload) -> str:
    """The text of a payload, wherever it lies. Raises NotFound."""
    if payload.blob is not None:
        try:
            return (await blobs.get(payload.blob)).decode()
        except UnicodeDecodeError:
            raise NotFound(f"there is no text in the blob {payload.blob[:80]}") from None
    return payload.text or ""


async def keep_text(blobs: Blobs, text: str) -> Payload:
    """A payload of `text`: in place, or as a blob if it is long."""
    data = text.encode()
    if len(data) > INLINE_BYTES_MAX:
        return Payload(blob=await blobs.put(data))
    return Payload(text=text)


def digest_of(data: bytes) -> str:
    """The name of a blob."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
