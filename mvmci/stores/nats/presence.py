"""Presence in a key-value bucket in memory, and what a reader may conclude from silence.

A unit says every second that it is there, and at once when what it holds changes; but only a few times,
until as many quiet seconds have gone by: under load it is one word a second all the same. The control
plane hears every word as it is said. All others look into the bucket, and only for whom they have to do with:
were they to hear each other, words would grow with the square of the units.

A reader counts silence on its own clock alone: no two clocks are compared. For when a word was said that
it did not hear, it has its own words in the same bucket: what stands before one of them was said before it.
It trusts what it hears or reads only while its own announcements go through. After a gap (it was suspended
or cut off, the broker was away or has lost the bucket) nobody is dead: every wait starts anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from mvmci.errors import MvmciError, StoreUnavailable, TicketRefused
from mvmci.jobs.journal import Lease
from mvmci.store import About, Member
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import ApiError, Link, Stored, Unsubscribe
from mvmci.stores.nats.parser import Incoming
from mvmci.system.tasks import at_most, cancel
from mvmci.wire import OLDEST, WIRE, Level, is_understood

ANNOUNCEMENTS_PER_GONE = 4  # one a second, for the default of four seconds
ANNOUNCE_PAUSE_S = 0.1  # many claims within it are said at once
SPARE_WORDS = 5  # that a unit says at once; each quiet second gives one back
LEASES_KNOWN_MAX = 100_000
REMEMBERED_MIN = 64  # incarnations, before a look whether some can be forgotten
GONE_FOR_GOOD = float("-inf")  # when one was last heard that said that it leaves
READ_EVERY_S = 0.2  # so often, at most, the whole bucket is read
OWN_WORDS_MAX = 64  # remembered, for more than ten seconds
FORGET_S = 600.0  # for so long a unit that fell silent is known to be gone, and not merely unknown
FAREWELL_S = 1.0
NEWER = "newer"  # the state of a unit whose words are not understood
FIRST_WORD_S = 0.25  # who comes as the broker makes the bucket may never be answered

_ALL = ("*", "*")
_members = msgspec.json.Decoder(Member)


@dataclass
class _Heard:
    member: Member
    at: float  # by the reader's clock, or before
    seq: int = 0  # of that word in the bucket, if it was read there


class _AboutNewer(msgspec.Struct, frozen=True):
    """What is read of a unit whose words are not understood."""

    role: str = ""
    host: str = ""
    pid: int = 0
    version: str = ""
    wire: int = 0


class _Newer(msgspec.Struct, frozen=True):
    wire: int = 0
    about: Any = None  # a newer level may give it another form


_newer = msgspec.json.Decoder(_Newer)


def _read(data: bytes, unit: str, incarnation: str) -> Member | None:
    """What a unit says; None where that makes no sense. Of one that is newer no more is known than that it
    is there, and what it is."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        member = _members.decode(data)
        if member.is_readable:
            return member
    try:
        word = _newer.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if is_understood(word.wire):
        return None
    told: dict[str, Any] = {}
    with contextlib.suppress(msgspec.ValidationError):
        told = msgspec.structs.asdict(msgspec.convert(word.about, _AboutNewer))
    about = About(**told, state=NEWER, trouble="it is newer than this mvmci")
    return Member(unit=unit, incarnation=incarnation, about=about, wire=word.wire)


class NatsPresence:
    """The port `mvmci.store.Presence`.

    One that does not `announce` is no member. One that `maintains` makes the bucket where it is missing.
    One that `listens` hears every word; the others ask.
    """

    def __init__(
        self,
        link: Link,
        layout: Layout,
        unit: str,
        *,
        level: Level,
        clock: Callable[[], float],
        gone_s: float,
        maintains: bool,
        announce: bool,
        listens: bool,
    ) -> None:
        self.unit = unit
        self.incarnation = secrets.token_hex(8)
        self._link = link
        self._layout = layout
        self._clock = clock
        self._gone_s = gone_s
        self._every_s = gone_s / ANNOUNCEMENTS_PER_GONE
        self._maintains = maintains
        self._announces = announce
        self._listens = listens
        self._level = level
        self._about = About(wire=WIRE, oldest=OLDEST)
        self._holds: dict[str, int] = {}
        self._keeps: dict[str, None] = {}  # in the order of their coming
        self._waits: dict[str, str] = {}
        self._heard: dict[tuple[str, str], _Heard] = {}  # by unit and incarnation
        self._first_seen: dict[tuple[str, str], float] = {}  # leases, by job and run
        self._remembered_max = REMEMBERED_MIN
        self._said_at = float("-inf")
        self._own_words: deque[tuple[float, int]] = deque(maxlen=OWN_WORDS_MAX)  # when they were in, and seq
        self._first_seq = 0  # of our own words in this bucket; 0: there is none yet
        self._reading = asyncio.Lock()
        self._read_at: dict[tuple[str, str], float] = {}  # as `_heard`; of the whole bucket, by `_ALL`
        self._blind = False  # whether the last look into the bucket failed
        self._bucket_there = False
        self._changed = asyncio.Event()
        self._pressing = asyncio.Event()  # a change that somebody waits for
        self._unsubscribe: Unsubscribe | None = None
        self._announcer: asyncio.Task[None] | None = None

    async def open(self) -> None:
        if self._listens:
            self._unsubscribe = await self._link.subscribe(self._layout.member("*", "*"), self._hear)
        self._link.on_reconnect.append(self._came_back)
        if self._announces:
            await self._announce(FIRST_WORD_S)
            if self._said_at == float("-inf"):
                self._changed.set()  # once more, soon
        if self._listens:
            await self._read_all()
        if self._announces:
            self._announcer = asyncio.create_task(self._announce_always(), name=f"presence of {self.unit}")

    async def close(self) -> None:
        if self._announcer is not None:
            await cancel(self._announcer)
            await self._leave()
        if self._unsubscribe is not None:
            await self._unsubscribe()

    async def _leave(self) -> None:
        try:
            async with asyncio.timeout(FAREWELL_S):
                await self._link.request(self._layout.member(self.unit, self.incarnation))
        except (TimeoutError, MvmciError):
            pass  # silence says the same, only later

    async def add_job(self, job: str, epoch: int) -> None:
        self._check()
        self._holds[job] = epoch
        self._changed.set()

    async def remove_job(self, job: str) -> None:
        self._check()
        self._holds.pop(job, None)
        self._waits.pop(job, None)
        self._changed.set()

    async def add_hint(self, job: str, waits: str = "") -> None:
        self._check()
        self._keeps[job] = None
        await self.explain(job, waits)

    async def remove_hint(self, job: str) -> None:
        self._check()
        self._keeps.pop(job, None)
        await self.explain(job, "")

    def in_hand(self) -> int:
        """How many jobs this unit sees to, as holder or with their hints."""
        return max(len(self._holds), len(self._keeps))

    async def explain(self, job: str, waits: str) -> None:
        self._check()
        if waits:
            self._waits[job] = waits
        else:
            self._waits.pop(job, None)
        self._changed.set()

    async def describe(self, about: About) -> None:
        self._check()
        self._about = about
        self._say_soon()

    async def live(self, job: str, lease: Lease) -> bool:
        self._check()
        if lease.incarnation == self.incarnation:
            return self._holds.get(job) == lease.epoch
        if not self._listens:
            await self._read(lease.unit, lease.incarnation)
        now = self._clock()
        if self._deaf(now):
            return True
        heard = self._heard.get((lease.unit, lease.incarnation))
        if heard is not None and now - heard.at >= self._gone_s:
            return False  # it is silent, however new the lease is to this reader
        if now - self._see(job, lease, now) < self._gone_s:
            return True
        if heard is None:
            return False
        return f"{job}@{lease.epoch}" in heard.member.holds or not heard.member.is_readable

    async def find(self, unit: str, incarnation: str) -> Member | None:
        self._check()
        if not self._listens:
            await self._read_again((unit, incarnation), self._every_s)  # it says no more than that
        heard, deaf = self._heard.get((unit, incarnation)), self._deaf(self._clock())
        if heard is None:
            return Member(unit=unit, incarnation=incarnation) if deaf else None
        return heard.member if self._is_there(heard) else None

    async def members(self) -> list[Member]:
        self._check()
        if not self._listens:
            await self._read_again(_ALL, READ_EVERY_S)
        there: dict[str, list[Member]] = {}
        for heard in self._heard.values():
            if self._is_there(heard):
                there.setdefault(heard.member.unit, []).append(heard.member)
        # Of a unit that was started again its last word may still stand there; of copies, all run.
        return [
            one
            for several in there.values()
            for one in several
            if one is several[-1] or one.is_beside(several[-1])
        ]

    def _is_there(self, heard: _Heard) -> bool:
        now = self._clock()
        return heard.at > GONE_FOR_GOOD and (self._deaf(now) or now - heard.at < self._gone_s)

    async def _read_again(self, what: tuple[str, str], every_s: float) -> None:
        """Look for a unit or for all, unless that was just done: many may want to know the same."""
        async with self._reading:
            now = asyncio.get_running_loop().time()
            if now - self._read_at.get(what, float("-inf")) >= every_s:
                self._read_at[what] = now
                await (self._read_all() if what == _ALL else self._read(*what))

    async def _read_all(self) -> None:
        with self._looking():
            async for stored in self._link.read(self._layout.members, self._layout.member("*", "*")):
                self._note(stored)

    async def _read(self, unit: str, incarnation: str) -> None:
        own, other = self._layout.member(self.unit, self.incarnation), self._layout.member(unit, incarnation)
        said = self._last_seq()
        with self._looking():
            found = await self._link.lasts(self._layout.members, (own, other))
            self._recognise(found[own].seq if own in found else 0, said)
            if other in found:
                self._note(found[other])
            elif (unit, incarnation) not in self._heard:
                self._take_in(_Heard(Member(unit=unit, incarnation=incarnation), self._said_by(0)))

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        """Where the bucket cannot be read, what was known goes on to hold."""
        try:
            yield
            self._blind = False
        except StoreUnavailable:
            self._blind = True

    def _said_by(self, seq: int) -> float:
        """By when a word was said that stands there in the bucket: before that one of our own, at least."""
        return next((at for at, own in self._own_words if own > seq), self._clock())

    def _see(self, job: str, lease: Lease, now: float) -> float:
        """When this reader first saw the lease."""
        if (job, lease.run) not in self._first_seen and len(self._first_seen) >= LEASES_KNOWN_MAX:
            self._first_seen.pop(next(iter(self._first_seen)))
        return self._first_seen.setdefault((job, lease.run), now)

    def _deaf(self, now: float) -> bool:
        """Whether it is this reader that is cut off, as far as it can tell."""
        return (self._blind and not self._listens) or self._cut_off(now)

    def _cut_off(self, now: float) -> bool:
        return self._announces and now - self._said_at > self._gone_s / 2

    def _last_seq(self) -> int:
        """Of our own last word."""
        return self._own_words[-1][1] if self._own_words else 0

    def _recognise(self, seq: int, said: int) -> None:
        """Our own last word stood at `said`: if it is not there, others may have none yet in this bucket."""
        if seq < said:
            self._start_anew()

    def _came_back(self) -> None:
        """The broker may have restarted: the bucket is gone, and others have yet to find that out."""
        self._bucket_there = False
        self._start_anew()

    def _start_anew(self) -> None:
        self._first_seen.clear()
        self._own_words.clear()
        self._first_seq = 0
        now = self._clock()
        for heard in self._heard.values():
            heard.member = msgspec.structs.replace(heard.member, first=0, last=0)  # in an older bucket
            heard.at = max(heard.at, now) if heard.at > GONE_FOR_GOOD else heard.at
            heard.seq = 0
        self._say_soon()

    def _say_soon(self) -> None:
        self._changed.set()
        self._pressing.set()

    def _note(self, stored: Stored) -> None:
        word = Incoming(subject=stored.subject, data=stored.data)
        self._hear(word, self._said_by(stored.seq), stored.seq)

    def _hear(self, word: Incoming, at: float | None = None, seq: int = 0) -> None:
        """A unit speaks for itself alone: the broker lets it write under its own name only."""
        unit, incarnation = self._layout.member_of(word.subject)
        if not word.data:  # its last: it leaves
            self._take_in(_Heard(Member(unit=unit, incarnation=incarnation), GONE_FOR_GOOD, seq))
            return
        member = _read(word.data, unit, incarnation)
        if member is not None and (member.unit, member.incarnation) == (unit, incarnation):
            self._take_in(_Heard(member, self._clock() if at is None else at, seq))

    def _take_in(self, heard: _Heard) -> None:
        who = heard.member.unit, heard.member.incarnation
        known = self._heard.get(who)
        if known is not None and 0 < heard.seq <= known.seq:
            return  # it has said nothing since
        self._heard.pop(who, None)  # the last that spoke stands last
        self._heard[who] = heard
        if len(self._heard) > self._remembered_max:  # every restart is another incarnation
            now, read_at = self._clock(), self._read_at
            self._heard = {key: heard for key, heard in self._heard.items() if now - heard.at < FORGET_S}
            self._read_at = {key: at for key, at in read_at.items() if key == _ALL or key in self._heard}
            self._remembered_max = max(REMEMBERED_MIN, 2 * len(self._heard))

    async def _announce_always(self) -> None:
        pause_s = min(ANNOUNCE_PAUSE_S, self._every_s)
        spare = SPARE_WORDS
        while True:
            await asyncio.sleep(pause_s)
            await at_most(self._every_s - pause_s, (self._changed if spare else self._pressing).wait())
            spare = max(spare - 1, 0) if self._changed.is_set() else min(spare + 1, SPARE_WORDS)
            await self._announce()

    async def _announce(self, wait_s: float | None = None) -> None:
        """Say who is here and what it holds. That the broker is away is no failure of ours."""
        self._changed.clear()
        self._pressing.clear()
        holds = tuple(f"{job}@{epoch}" for job, epoch in self._holds.items())
        member = Member(
            unit=self.unit,
            incarnation=self.incarnation,
            holds=holds,
            keeps=tuple(self._keeps),
            waits=dict(self._waits),
            about=self._about,
            first=self._first_seq,
            last=self._last_seq(),
            wire=self._level.spoken,
        )
        try:
            if self._maintains:
                await self._make_bucket()
            own, data = self._layout.member(self.unit, self.incarnation), msgspec.json.encode(member)
            within_s = self._gone_s / 2 if wait_s is None else wait_s
            seq = int((await self._link.request(own, data, wait_s=within_s))["seq"])
        except TicketRefused:
            return  # the link is over, and whoever watches it ends this unit
        except StoreUnavailable:
            self._bucket_there = False  # others may hear or read nothing either
            return
        now = self._clock()
        if self._cut_off(now):
            self._start_anew()
        self._recognise(seq, self._last_seq())
        self._said_at = now
        self._own_words.append((now, seq))
        self._first_seq = self._first_seq or seq

    async def _make_bucket(self) -> None:
        """A broker that restarts has lost it. The control plane makes it; the others go on saying."""
        if not self._bucket_there:
            try:
                await self._link.api(f"STREAM.CREATE.{self._layout.members}", **self._layout.members_stream())
            except ApiError:
                pass  # it is there with other settings
            self._bucket_there = True

    def _check(self) -> None:
        """The announcer must not die unnoticed: others would take this unit's jobs."""
        announcer = self._announcer
        if announcer is not None and announcer.done() and not announcer.cancelled():
            raise MvmciError(f"{self.unit} can no longer say that it is there") from announcer.exception()
