"""Retention: what may be forgotten, and when.

    a job that ended `jobs_ms` ago         only its `done` is kept: a tombstone for its id
    a tombstone as old again               removed
    a blob that no journal names           removed, once nobody has touched it for `UNNAMED_BLOB_S`
    an upload that was broken off          removed, once it has not moved for `UPLOAD_AGE_MS`

Logs have an age in their stream. Several control planes may do this at once, and any of them may die in
the middle: every step leaves a store that is right, and is taken again.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from mvmci.cluster.witness import Removal
from mvmci.errors import NotFound, StoreUnavailable, VersionsDiffer
from mvmci.jobs.job import DIGEST_PATTERN
from mvmci.jobs.journal import Done, Entry, Journal, Result, Spec, records_of
from mvmci.roles.witness import Watch
from mvmci.store import UNNAMED_BLOB_S
from mvmci.stores.nats import Cluster

PASSES_PER_AGE = 10
PASS_S_MIN, PASS_S_MAX = 1.0, 3600.0
REMOVALS_AT_ONCE = 128  # jobs, of which the witness is told together
SWEEP_EVERY_S = 6 * 3600.0
UPLOADS_EVERY_S = 15.0
UPLOAD_AGE_MS = 120_000  # one who sends gives up after less without an answer

log = logging.getLogger(__name__)
_DIGEST = re.compile(DIGEST_PATTERN.encode())


@dataclass
class Retention:
    """Forgets what one cluster need not keep. Ages are in ms; `now_ms` is since 1970."""

    cluster: Cluster
    watch: Watch  # which has to know what goes, and while something is lost nothing does
    jobs_ms: Callable[[], int]
    now_ms: Callable[[], int]
    blob_age_ms: int = UNNAMED_BLOB_S * 1000
    upload_age_ms: int = UPLOAD_AGE_MS
    _seen_to: int = -1  # the newest message of the blobs, if every upload up to there was told of
    _forgotten_to: int = 0  # the sequence up to which ended jobs are tombstones already

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_always(self.forget, self._forget_every_s), name="forget jobs")
            tasks.create_task(_always(self.sweep, lambda: SWEEP_EVERY_S), name="sweep blobs")
            tasks.create_task(_always(self.clear_uploads, lambda: UPLOADS_EVERY_S), name="clear uploads")

    def _forget_every_s(self) -> float:
        return min(max(self.jobs_ms() / 1000 / PASSES_PER_AGE, PASS_S_MIN), PASS_S_MAX)

    async def forget(self) -> None:
        """Make tombstones of jobs that ended long ago, and remove those that are as old again."""
        now, age_ms = self.now_ms(), self.jobs_ms()
        removals: list[Removal] = []
        async for job, entry, ended_at in self.cluster.journals.ends():
            if self.watch.loss is not None:
                self._forgotten_to = 0  # sequences may be used again
                return
            if not _is_readable(entry):
                continue  # nobody can say what it is: a person may want to look, or a newer build
            # By the broker's word: whoever wrote the end may have said any time, to be forgotten at once.
            if ended_at + age_ms > now:
                break  # they lie in the order of their ends
            if ended_at + 2 * age_ms <= now:
                removals += await self._removal(job, entry, whole=True)
            elif entry.seq > self._forgotten_to:
                removals += await self._removal(job, entry, whole=False)
                self._forgotten_to = entry.seq
            if len(removals) == REMOVALS_AT_ONCE:
                await self.watch.remove(removals)
                removals.clear()
        if removals:
            await self.watch.remove(removals)

    async def _removal(self, job: str, end: Entry, *, whole: bool) -> list[Removal]:
        """What goes of `job`: all that is there now, or what stands before its `end`.

        Nothing where that is no end, but a message that readers ignore, or that stands behind a newer one.
        """
        there = await self.cluster.journals.read(job)
        journal = Journal(job)
        journal.absorb(there)
        if journal.end != end.seq and journal.state.corrupt is None:
            return []
        limit = there[-1].seq + 1 if whole else end.seq
        count = sum(entry.seq < limit for entry in there)
        return [Removal(job, limit, count)] if count else []

    async def sweep(self) -> None:
        """Remove blobs that nothing names and nobody touched for long.

        What was there is looked up first: a blob that comes while journals are read is not on the list.
        """
        if self.watch.loss is not None:
            return  # the journals that name them may be what is missing
        old = await self.cluster.blobs.older_than(self.blob_age_ms)
        try:
            named = await self._named() if old else set()
        except VersionsDiffer as newer:
            log.info("no blob is removed: %s", newer.message)  # what it names is not known
            return
        kept = {blob.chunks for blob in old if blob.name in named}
        stale = [blob for blob in old if blob.name not in named and blob.chunks not in kept]
        if stale:
            async with self.watch.sweeping():
                for blob in stale:
                    await self.cluster.blobs.remove(blob)
        log.info("removed %d unreferenced blobs of %d old ones", len(stale), len(old))

    async def clear_uploads(self) -> None:
        """Remove what came of uploads that were refused, interrupted or cut off: it takes up room at once."""
        blobs = self.cluster.blobs
        newest = await blobs.last_seq()
        if newest == self._seen_to:
            return
        abandoned, moving = await blobs.abandoned(self.upload_age_ms)
        if abandoned:
            async with self.watch.sweeping():
                for chunks in abandoned:
                    await blobs.remove(chunks)
            log.info("removed %d files of uploads that were broken off", len(abandoned))
        self._seen_to = -1 if moving else newest

    async def _offers(self) -> Iterable[bytes]:
        """What says which program the cluster offers to machines that joined."""
        return (await self.cluster.config.all("program")).values()

    async def _named(self) -> set[str]:
        """Every blob that a journal or an offer names, and those that a tree or a list of artifacts names.

        Raises VersionsDiffer where a message may name what this build does not see.
        """
        named = {digest for value in await self._offers() for digest in _digests(value)}
        lists: set[str] = set()
        async for _, entry in self.cluster.store.journals.all():
            # By their look, so that a blob which a field names that is not known here is kept as well.
            named |= _digests(entry.data)
            for record in records_of(entry):
                if isinstance(record, Spec | Result) and record.tree is not None:
                    lists.add(record.tree)
                elif isinstance(record, Done) and record.artifacts.blob is not None:
                    lists.add(record.artifacts.blob)
        for digest in lists:
            try:
                named |= _digests(await self.cluster.store.blobs.get(digest))
            except NotFound:
                pass  # it was damaged; what it named can no longer be found by anybody
        return named


def _is_readable(entry: Entry) -> bool:
    try:
        return bool(records_of(entry))
    except VersionsDiffer:
        return False


def _digests(data: bytes) -> set[str]:
    return {found.decode() for found in _DIGEST.findall(data)}


async def _always(step: Callable[[], Awaitable[None]], every_s: Callable[[], float]) -> None:
    while True:
        try:
            await step()
        except StoreUnavailable as away:
            log.info("cannot remove what is old: %s; will retry", away.message)
        since = time.monotonic()
        while time.monotonic() - since < every_s():  # noqa: ASYNC110 (`up` may make it less meanwhile)
            await asyncio.sleep(PASS_S_MIN)
