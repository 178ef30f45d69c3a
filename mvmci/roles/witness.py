"""The watch over the streams: what was acknowledged and is not there any more is never passed over.

A nats-server that finds a bad record cuts the rest of its block off, and says nothing to anybody. So the
control plane compares the streams with what a witness remembers: at its start, after each reconnect, and
`EVERY_S` apart. There are two, since the one in CONFIG lies on the disk that it watches:

    CONFIG: witness                      compared with JOBS and BLOBS, and with every purge
    <unit>/witness.json                  the same, and what CONFIG itself was

Neither knows what was appended since it was last written, `EVERY_S` before at most.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from mvmci.cluster.witness import JOBS_MAX, Loss, Removal, Seen, Witness, config_losses, losses
from mvmci.errors import Conflict, StoreUnavailable
from mvmci.stores.nats import Cluster
from mvmci.stores.nats.config import LOSS, SETTINGS
from mvmci.system.clock import wall_clock_ms
from mvmci.system.files import write_private
from mvmci.system.tasks import in_thread

EVERY_S = 0.5
FILE = "witness.json"

log = logging.getLogger(__name__)


class Watch:
    """Watches the streams of `cluster`; `file` is the witness beside us. `loss` is set while there is one.

    `open_jobs` are the jobs that are known to have a spec, and its sequence. `make_config` makes CONFIG anew
    once it is gone, for all to read there what was lost.
    """

    make_config: Callable[[], Awaitable[None]] | None = None

    def __init__(
        self,
        cluster: Cluster,
        file: Path | None = None,
        *,
        open_jobs: Callable[[], Iterable[tuple[str, int]]] = tuple,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self.loss: Loss | None = None
        self._cluster = cluster
        self._file = file
        self._open_jobs = open_jobs
        self._now_ms = now_ms
        self._kept: Witness | None = _read(file)
        self._unwritten = False
        self._lock = asyncio.Lock()
        self._sweeping = asyncio.Lock()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.look()
            except StoreUnavailable as away:
                log.info("cannot look whether all records are there: %s; will retry", away.message)
            await asyncio.sleep(EVERY_S)

    async def look(self) -> None:
        """Compare, and say what is missing; if nothing is, let the witnesses know what is there now.

        Raises StoreUnavailable.
        """
        async with self._lock:
            await self._look()

    async def _look(self) -> None:
        config = await self._cluster.look("config")
        if self.loss is not None and self.make_config is not None and await self._lacks_settings(config):
            await self.make_config()
        before, _ = (None, 0) if config is None else await self._cluster.config.witness()
        jobs, blobs = await self._cluster.look("jobs"), await self._cluster.look("blobs")
        after, revision = (None, 0) if config is None else await self._cluster.config.witness()
        accepted = after is not None and after.accepted > (self._kept.accepted if self._kept else 0)
        if self.loss is not None and not accepted:
            await self._tell(self.loss)  # whoever has lost CONFIG may have forgotten
            return
        told = [] if accepted else self._missing(config, before, after, jobs, blobs)
        told = told or self._said(before, after, jobs, blobs)
        if told:
            await self._lose(told, before)
            return
        self.loss = None if config is None else await self._cluster.config.loss()  # another's word
        if self.loss is None and jobs is not None and blobs is not None and config is not None:
            await self._remember(jobs, blobs, after, revision)

    async def _lacks_settings(self, config: Seen | None) -> bool:
        """Whoever maintains the streams may have made CONFIG anew, which is then empty."""
        return config is None or await self._cluster.config.get(SETTINGS) is None

    def _missing(
        self,
        config: Seen | None,
        before: Witness | None,
        after: Witness | None,
        jobs: Seen | None,
        blobs: Seen | None,
    ) -> list[str]:
        """What the streams lack of what the file knows. Purges are counted in CONFIG, if that is whole."""
        kept, names = self._kept, self._names()
        if kept is None or kept.config is None:
            return []
        told = config_losses(kept.config, config, names["config"])
        if not told and before is None:
            told.append(f"{names['config']} has no witness, and had one")
        counts = after if after is not None and not told else kept
        return told + losses(kept, counts, jobs, blobs, names)

    def _said(
        self, before: Witness | None, after: Witness | None, jobs: Seen | None, blobs: Seen | None
    ) -> list[str]:
        """What the streams lack of what CONFIG knows."""
        if before is None or after is None:
            return []
        return losses(before, after, jobs, blobs, self._names())

    def _names(self) -> dict[str, str]:
        layout = self._cluster.layout
        return {"jobs": layout.jobs, "blobs": layout.blobs, "config": layout.config}

    async def _lose(self, told: Sequence[str], before: Witness | None) -> None:
        """Say it everywhere: from now on nothing is taken, and nothing begins."""
        last = max(one.jobs.last for one in (before, self._kept) if one is not None)
        self.loss = Loss(at=self._now_ms(), what=tuple(told), last=last)
        for one in told:
            log.error("records were lost: %s", one)
        log.error("no job is taken and none begins, until `mvmci recover`")
        self.loss = msgspec.structs.replace(self.loss, jobs=tuple(await self._gone()))
        await self._tell(self.loss)

    async def _gone(self) -> list[str]:
        """The open jobs that were known and are not there any more, `JOBS_MAX` of them."""
        gone: list[str] = []
        for job, seq in list(self._open_jobs()):
            if len(gone) < JOBS_MAX and await self._cluster.store.journals.first(job, seq) is None:
                gone.append(job)
        return gone

    async def _tell(self, loss: Loss) -> None:
        if await self._cluster.config.loss() is None:
            await self._cluster.config.put(LOSS, msgspec.json.encode(loss))
            await self._cluster.config.tell()

    async def _remember(self, jobs: Seen, blobs: Seen, there: Witness | None, revision: int) -> None:
        """Write down what is there, where that is news; a witness that somebody else wrote is as good."""
        if there is None:
            there = Witness(jobs=jobs, accepted=self._kept.accepted if self._kept else 0)
        if there.removals:  # of one who died over it, or who is at it now: twice is once
            await self._finish(there, revision)
            return
        now = msgspec.structs.replace(there, jobs=jobs, blobs=blobs if not there.sweeping else there.blobs)
        if now != there or not revision:
            try:
                await self._cluster.config.put_witness(now, expect=revision)
            except Conflict:
                return
        config = await self._cluster.look("config")
        kept = msgspec.structs.replace(now, config=config)
        if self._file is not None and kept != self._kept:
            try:
                await in_thread(write_private, self._file, msgspec.json.encode(kept))
            except OSError as error:
                if not self._unwritten:
                    log.warning(
                        "the witness %s cannot be written: %s; will retry", self._file, error.strerror
                    )
                self._unwritten = True
                return
            self._unwritten = False
        self._kept = kept

    async def remove(self, removals: Sequence[Removal]) -> None:
        """Purge messages of jobs, which the witness knows of before the first of them is gone.

        Raises StoreUnavailable; what was begun is finished by whoever looks next.
        """
        async with self._lock:
            there, revision = await self._cluster.config.witness()
            if there is not None and there.removals:
                await self._finish(there, revision)
                there, revision = await self._cluster.config.witness()
            if there is None:
                return  # nobody has looked yet
            begun = msgspec.structs.replace(there, removals=tuple(removals))
            try:
                revision = await self._cluster.config.put_witness(begun, expect=revision)
            except Conflict:
                return  # another control plane is at it
            await self._finish(begun, revision)

    async def _finish(self, begun: Witness, revision: int) -> None:
        for removal in begun.removals:
            await self._cluster.journals.purge(removal)
        jobs = begun.jobs
        left = msgspec.structs.replace(jobs, messages=jobs.last - begun.removed_max)
        try:
            await self._cluster.config.put_witness(
                msgspec.structs.replace(begun, jobs=left, removals=()), expect=revision
            )
        except Conflict:
            pass  # another has finished it

    @asynccontextmanager
    async def sweeping(self) -> AsyncIterator[None]:
        """While messages of BLOBS are removed."""
        unit = self._cluster.store.presence.unit
        async with self._sweeping:
            await self._set_sweeping(lambda others: (*others, unit))
            yield  # who fails over it says so until its next sweep
            await self._set_sweeping(lambda others: others)

    async def _set_sweeping(self, change: Callable[[tuple[str, ...]], tuple[str, ...]]) -> None:
        unit = self._cluster.store.presence.unit
        async with self._lock:
            while (found := await self._cluster.config.witness())[0] is not None:
                there, revision = found
                assert there is not None
                others = tuple(one for one in there.sweeping if one != unit)
                blobs = await self._cluster.look("blobs") or there.blobs
                now = msgspec.structs.replace(there, sweeping=change(others), blobs=blobs)
                try:
                    await self._cluster.config.put_witness(now, expect=revision)
                    return
                except Conflict:
                    pass  # another control plane has looked meanwhile


def _read(file: Path | None) -> Witness | None:
    """The witness in `file`; one that is not there or damaged knows nothing, and the other speaks."""
    if file is None:
        return None
    try:
        return msgspec.json.decode(file.read_bytes(), type=Witness)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError):
        log.warning("%s cannot be read: what the broker lost before now is known to CONFIG alone", file)
        return None
