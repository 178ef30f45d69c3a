"""The store of a cluster: JetStream, on a broker that syncs every write.

`dial_cluster` is the way in. Nobody outside of this folder names a stream or asks JetStream: who looks
after a cluster says what it wants of it.

    maintain    Cluster.maintain, Cluster.lacks       streams, buckets and consumers
    tail        Cluster.journals: tail, ends          what is written to all jobs
    purge       Cluster.journals.purge, Cluster.blobs what may be forgotten
    settings    Cluster.config                        what the cluster is and allows
    witness     Cluster.look, Cluster.config          what must be there, and what was lost

    layout      every name and setting          journals, logs, hints, blobs, presence    the five ports
    link        the connection; imports nats    append    compare-and-set, group commit
    parser      a short cut past the library's  config    a small key-value bucket
    streams     what there is on the broker     clock     what time it is

Journals, logs and blobs are read by paged direct gets. Presence is heard, or read, as it comes: it
promises nothing. Promised: an append that returned is on disk (if the broker syncs: `mvmci.roles.broker`
sees to it), a read sees every append that returned before it (one replica), and nothing waits without an
end.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from mvmci.cluster.identity import Login
from mvmci.cluster.metrics import Histogram
from mvmci.cluster.witness import Seen
from mvmci.store import GONE_S, HINT_LAPSE_S, ClusterSettings, Store
from mvmci.stores.nats import streams
from mvmci.stores.nats.append import GroupCommit
from mvmci.stores.nats.blobs import NatsBlobs
from mvmci.stores.nats.clock import Clock
from mvmci.stores.nats.config import DELETED, Config, deleted
from mvmci.stores.nats.hints import NatsHints
from mvmci.stores.nats.journals import NatsJournals
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import EVERYTHING, Link
from mvmci.stores.nats.logs import NatsLogs
from mvmci.stores.nats.presence import NatsPresence
from mvmci.stores.nats.rows import Row, nanoseconds
from mvmci.wire import Level

Part = Literal["jobs", "blobs", "logs", "config"]


@dataclass(frozen=True)
class Cluster:
    """A cluster on its broker: its store, and what only a cluster has."""

    layout: Layout
    link: Link
    store: Store
    journals: NatsJournals  # those of the store, of which who looks after the cluster asks more
    hints: NatsHints  # the same
    blobs: NatsBlobs  # the same
    config: Config
    clock: Clock
    writes: Histogram  # of journals, until they were on disk

    async def maintain(self, settings: ClusterSettings, queues: Iterable[str] = ()) -> None:
        """Make what is missing on the broker, and bring up to date what is there, for these queues as well.

        Again is free. Raises StoreUnavailable, Usage when the broker will not have it so.
        """
        await streams.maintain(self.link, self.layout, settings, {*settings.queues, *queues})

    async def lacks(self, queues: Iterable[str]) -> bool:
        """Whether something that `maintain` makes is not there. Raises StoreUnavailable."""
        return await streams.lacks(self.link, self.layout, queues)

    async def look(self, stream: Part) -> Seen | None:
        """How one of its streams is; None where it is not there. Raises StoreUnavailable."""
        return await streams.look(self.link, getattr(self.layout, stream))

    async def rows(self, part: Part, after: int) -> AsyncIterator[Row]:
        """The messages of a stream over a sequence, as a back-up keeps them. Raises StoreUnavailable."""
        async for stored in self.link.read(getattr(self.layout, part), EVERYTHING, after):
            at = nanoseconds(stored.headers["Nats-Time-Stamp"])
            headers = DELETED if deleted(stored) else b""
            yield Row(stored.seq, at, stored.subject, headers, stored.data)

    async def room(self) -> dict[str, tuple[int, int]]:
        """The bytes that journals and blobs take, and those that they may. Raises StoreUnavailable."""
        parts = {"journals": self.layout.jobs, "blobs": self.layout.blobs}
        return {part: await streams.room(self.link, stream) for part, stream in parts.items()}

    async def forget_member(self, unit: str) -> None:
        """Let nobody see a unit any more that was cut off before it could say that it leaves.

        Raises StoreUnavailable.
        """
        await self.link.api(f"STREAM.PURGE.{self.layout.members}", filter=self.layout.member(unit, "*"))

    async def mentioned(self) -> set[str]:
        """The jobs that output, hints and units tell of, whether they have a journal or not.

        Raises StoreUnavailable.
        """
        layout = self.layout
        logs = await streams.subjects(self.link, layout.logs, layout.log("*", "*"))
        hints = await streams.subjects(self.link, layout.hints, layout.ready("*", "*"))
        held = (member.jobs | set(member.keeps) for member in await self.store.presence.members())
        return {layout.job_of_log(one) for one in logs}.union((one.split(".")[3] for one in hints), *held)

    async def close(self) -> None:
        """Leave. What was written stays."""
        await self.store.close()


async def remove(login: Login | str, cluster: str) -> None:
    """Delete every stream of `cluster` with all that is in them. Raises StoreUnavailable, TicketRefused."""
    async with _linked(login, f"{cluster}/remove") as link:
        await streams.delete_streams(link, Layout(cluster))


async def shortcomings(login: Login) -> list[str]:
    """What the broker of `login` lacks for a cluster. Raises StoreUnavailable, TicketRefused."""
    async with _linked(login, "check") as link:
        return await streams.missing_features(link)


@asynccontextmanager
async def _linked(login: Login | str, name: str) -> AsyncIterator[Link]:
    link = Link(login, name)
    await link.open()
    try:
        yield link
    finally:
        await link.close()


async def dial_cluster(
    login: Login | str,
    cluster: str,
    unit: str,
    *,
    maintains: bool = False,
    announce: bool = True,
    listens: bool = False,
    clock: Callable[[], float] = time.monotonic,
    hint_lapse_s: float = HINT_LAPSE_S,
    gone_s: float = GONE_S,
) -> Cluster:
    """`cluster` as a new incarnation of `unit` sees it. `clock` counts others' silence, in s.

    Who `maintains` may make what is missing there; who does not `announce` is no member, and only looks;
    who `listens` hears every unit, and the others ask when they have to know.
    Raises StoreUnavailable, TicketRefused.
    """
    layout = Layout(cluster)
    link = Link(login, f"{cluster}/{unit}")
    await link.open()
    hints = NatsHints(link, layout, hint_lapse_s, maintains=maintains)
    level = Level()
    presence = NatsPresence(
        link,
        layout,
        unit,
        level=level,
        clock=clock,
        gone_s=gone_s,
        maintains=maintains,
        announce=announce,
        listens=listens,
    )
    commit = GroupCommit(link, presence.in_hand)
    time_of_day = Clock(link, layout)

    async def close() -> None:
        await presence.close()
        await time_of_day.close()
        await hints.close()
        await commit.close()
        await link.close()

    try:
        await presence.open()
        if announce:  # who only looks writes nothing that others would read as a time
            await time_of_day.open()
    except BaseException:
        await close()
        raise
    config = Config(link, layout, level)
    journals, blobs = NatsJournals(link, layout, commit, config, unit), NatsBlobs(link, layout)
    store = Store(journals, hints, NatsLogs(link, layout), blobs, presence, close, level)
    return Cluster(layout, link, store, journals, hints, blobs, config, time_of_day, commit.took)
