"""Presence in a key-value bucket in memory, and what a reader may conclude from silence.

A unit says every second that it is there, and at once when what it holds changes; but only a few times,
until as many quiet seconds have gone by. Under load it is one word a second all the same: every unit
hears every other, so words are what grows with the square of the units. A reader hears them as they are
said, and counts silence on its own clock alone: no two clocks are compared. It trusts its ears only
while its own announcements go through. After a gap (it was suspended or cut off, the broker was away or
has lost the bucket) nobody is dead: every wait starts anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from mvmci.errors import MvmciError, StoreUnavailable, TicketRefused
from mvmci.journal import Lease
from mvmci.store import About, Member
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import Link, Refused, Reply, Unsubscribe

ANNOUNCEMENTS_PER_GONE = 4  # one a second, for the default of four seconds
ANNOUNCE_PAUSE_S = 0.1  # many claims within it are said at once
SPARE_WORDS = 5  # that a unit says at once; each quiet second gives one back
LEASES_KNOWN_MAX = 100_000
REMEMBERED_MIN = 64  # incarnations, before a look whether some can be forgotten
GONE_FOR_GOOD = float("-inf")  # when one was last heard that said that it leaves
FORGET_S = 600.0  # for so long a unit that fell silent is known to be gone, and not merely unknown
FAREWELL_S = 1.0
FIRST_WORD_S = 0.25  # who comes as the broker makes the bucket may never be answered
LEFT = "Mvmci-Left"  # header: the incarnation that leaves

_members = msgspec.json.Decoder(Member)


@dataclass
class _Heard:
    member: Member
    at: float


class Presence:
    """The port `mvmci.store.Presence`.

    One that does not `announce` only listens. One that `maintains` makes the bucket where it is missing.
    """

    def __init__(
        self,
        link: Link,
        layout: Layout,
        unit: str,
        *,
        clock: Callable[[], float],
        gone_s: float,
        maintains: bool,
        announce: bool,
    ) -> None:
        self.unit = unit
        self.incarnation = secrets.token_hex(8)
        self._link = link
        self._layout = layout
        self._clock = clock
        self._gone_s = gone_s
        self._maintains = maintains
        self._announces = announce
        self._about = About()
        self._holds: dict[str, int] = {}
        self._keeps: dict[str, str] = {}  # and why they wait
        self._heard: dict[str, _Heard] = {}  # by incarnation
        self._first_seen: dict[tuple[str, str], float] = {}  # leases, by job and run
        self._remembered_max = REMEMBERED_MIN
        self._said_at = float("-inf")
        self._bucket_there = False
        self._changed = asyncio.Event()
        self._pressing = asyncio.Event()  # a change that somebody waits for
        self._unsubscribe: Unsubscribe | None = None
        self._announcer: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._unsubscribe = await self._link.subscribe(self._layout.member("*"), self._hear)
        self._link.on_reconnect.append(self._came_back)
        if self._announces:
            await self._announce(FIRST_WORD_S)
            if self._said_at == float("-inf"):
                self._changed.set()  # once more, soon
        try:
            async for stored in self._link.read(self._layout.members, self._layout.member("*")):
                self._hear(Reply(subject=stored.subject, data=stored.data, headers=stored.headers))
        except StoreUnavailable:
            pass  # who is there will say so
        if self._announces:
            self._announcer = asyncio.create_task(self._announce_always(), name=f"presence of {self.unit}")

    async def close(self) -> None:
        if self._announcer is not None:
            self._announcer.cancel()
            await asyncio.gather(self._announcer, return_exceptions=True)
            await self._leave()
        if self._unsubscribe is not None:
            await self._unsubscribe()

    async def _leave(self) -> None:
        headers = {"KV-Operation": "DEL", LEFT: self.incarnation}
        try:
            async with asyncio.timeout(FAREWELL_S):
                await self._link.request(self._layout.member(self.unit), headers=headers)
        except (TimeoutError, StoreUnavailable, TicketRefused):
            pass  # silence says the same, only later

    async def claim(self, job: str, epoch: int) -> None:
        self._check()
        self._holds[job] = epoch
        self._changed.set()

    async def drop(self, job: str) -> None:
        self._check()
        self._holds.pop(job, None)
        self._changed.set()

    async def keep(self, job: str, waits: str = "") -> None:
        self._check()
        self._keeps[job] = waits
        self._changed.set()

    async def let_go(self, job: str) -> None:
        self._check()
        self._keeps.pop(job, None)
        self._changed.set()

    def in_hand(self) -> int:
        """How many jobs this unit sees to, as holder or with their hints."""
        return max(len(self._holds), len(self._keeps))

    async def tell(self, about: About) -> None:
        self._check()
        self._about = about
        self._say_soon()

    async def live(self, job: str, lease: Lease) -> bool:
        self._check()
        if lease.incarnation == self.incarnation:
            return self._holds.get(job) == lease.epoch
        now = self._clock()
        if self._deaf(now):
            return True
        heard = self._heard.get(lease.incarnation)
        if heard is not None and now - heard.at >= self._gone_s:
            return False  # it was there and is silent, however new the lease is to this reader
        if now - self._see(job, lease, now) < self._gone_s:
            return True
        return heard is not None and f"{job}@{lease.epoch}" in heard.member.holds

    async def members(self) -> list[Member]:
        self._check()
        now = self._clock()
        there = self._deaf(now)
        return [heard.member for heard in self._heard.values() if there or now - heard.at < self._gone_s]

    def _see(self, job: str, lease: Lease, now: float) -> float:
        """When this reader first saw the lease."""
        if len(self._first_seen) >= LEASES_KNOWN_MAX:
            self._first_seen.pop(next(iter(self._first_seen)))
        return self._first_seen.setdefault((job, lease.run), now)

    def _deaf(self, now: float) -> bool:
        """Whether it is this reader that is cut off, as far as it can tell."""
        return self._announces and now - self._said_at > self._gone_s / 2

    def _came_back(self) -> None:
        """The broker may have restarted: the bucket is gone, and others have yet to find that out."""
        self._bucket_there = False
        self._start_anew()

    def _start_anew(self) -> None:
        self._first_seen.clear()
        now = self._clock()
        for heard in self._heard.values():
            heard.at = max(heard.at, now) if heard.at > GONE_FOR_GOOD else heard.at
        self._say_soon()

    def _say_soon(self) -> None:
        self._changed.set()
        self._pressing.set()

    def _hear(self, word: Reply) -> None:
        """A unit speaks for itself alone: the broker lets it write under its own name only."""
        speaker = word.subject.rpartition(".")[2]
        if LEFT in word.headers:
            left = self._heard.get(word.headers[LEFT])
            if left is not None and left.member.unit == speaker:
                left.at = GONE_FOR_GOOD
            return
        try:
            member = _members.decode(word.data)
        except msgspec.DecodeError:
            return  # a newer version's; it is as good as silent to us
        if member.unit != speaker:
            return
        now = self._clock()
        self._heard[member.incarnation] = _Heard(member, now)
        if len(self._heard) > self._remembered_max:
            self._forget(now)

    def _forget(self, now: float) -> None:
        """Let go of those that were silent for long: every restart is another incarnation."""
        self._heard = {key: heard for key, heard in self._heard.items() if now - heard.at < FORGET_S}
        self._remembered_max = max(REMEMBERED_MIN, 2 * len(self._heard))

    async def _announce_always(self) -> None:
        every_s = self._gone_s / ANNOUNCEMENTS_PER_GONE
        pause_s = min(ANNOUNCE_PAUSE_S, every_s)
        spare = SPARE_WORDS
        while True:
            await asyncio.sleep(pause_s)
            await _until(self._changed if spare else self._pressing, every_s - pause_s)
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
            waits={job: why for job, why in self._keeps.items() if why},
            about=self._about,
        )
        try:
            if self._maintains:
                await self._make_bucket()
            await self._say(member, self._gone_s / 2 if wait_s is None else wait_s)
        except TicketRefused:
            return  # the link is over, and whoever watches it ends this unit
        except StoreUnavailable:
            self._bucket_there = False  # readers listen on the same subject, so silence may mean just that
            return
        now = self._clock()
        if self._deaf(now):
            self._start_anew()
        self._said_at = now

    async def _make_bucket(self) -> None:
        """A broker that restarts has lost it. The control plane makes it; the others go on saying."""
        if not self._bucket_there:
            try:
                await self._link.api(f"STREAM.CREATE.{self._layout.members}", **self._layout.members_stream())
            except Refused:
                pass  # it is there with other settings
            self._bucket_there = True

    async def _say(self, member: Member, wait_s: float) -> None:
        await self._link.request(self._layout.member(self.unit), msgspec.json.encode(member), wait_s=wait_s)

    def _check(self) -> None:
        """The announcer must not die unnoticed: others would take this unit's jobs."""
        announcer = self._announcer
        if announcer is not None and announcer.done() and not announcer.cancelled():
            raise MvmciError(f"{self.unit} can no longer say that it is there") from announcer.exception()


async def _until(event: asyncio.Event, within_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await event.wait()
