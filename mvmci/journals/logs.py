"""The output of a job for one who looks: each piece once, in order, and all of it before it is over.

A `Viewer` decides which pieces its reader is to see and passes them on; a `OutputWatch` brings it those that
are there and each as it comes, across changes of holder and a store that is away for a while.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterable
from contextlib import aclosing
from types import TracebackType
from typing import Self

from mvmci.errors import StoreUnavailable
from mvmci.jobs.journal import State
from mvmci.store import Chunk, Store
from mvmci.system.tasks import cancel

LATE_S = 10.0  # output that its end has overtaken comes so much later at most
FOLLOW_AGAIN_S = 0.5  # before the logs of a store that is away are asked for again


class Viewer:
    """Passes on the chunks that one reader is to see, and drops what it has passed on.

    They are those of one `attempt`; else of the newest, from the one that is numbered `since`. A subclass
    says where they go.
    """

    def __init__(self, *, since: int = 0, attempt: int | None = None) -> None:
        self.news = asyncio.Event()
        self._only = attempt
        self._since = since
        self._next: dict[int, int] = {}

    async def write(self, chunk: Chunk) -> None:
        """Pass on one chunk; what was begun is finished even if this is cancelled, or never goes on."""
        raise NotImplementedError

    async def flush(self) -> None:
        """Wait for what cancelled writes have left to be written."""

    def tell(self, sentence: str) -> None:
        """Something that the reader ought to know, beside the output."""

    async def show(self, chunks: Iterable[Chunk]) -> None:
        """Pass on those of `chunks` that are new."""
        for chunk in chunks:
            if self._wants(chunk):
                # Noted first: once it is handed over it will be written, even if we are cancelled here.
                self._next[chunk.attempt] = chunk.number + 1
                await self.write(chunk)
                self.news.set()
        await self.flush()

    def _wants(self, chunk: Chunk) -> bool:
        if chunk.number < self._next.get(chunk.attempt, 0):
            return False
        if self._only is not None:
            return chunk.attempt == self._only
        if chunk.attempt > self._since:
            if self._next:
                self.tell(f"attempt {chunk.attempt}: it starts over")
            self._since = chunk.attempt
        return chunk.attempt == self._since

    def missing(self, state: State) -> int:
        """How many pieces of an ended job's output are known to exist and were not seen."""
        last = last_attempt(state)
        if state.done is None or self._only not in (None, last):
            return 0
        return max(0, state.done.chunks - self._next.get(last, 0))

    def complete(self, state: State) -> bool:
        """Whether all of an ended job's output is known to have been seen."""
        counted = state.done is not None and state.done.chunks > 0
        return counted and self._only in (None, last_attempt(state)) and not self.missing(state)


class OutputWatch:
    """Shows a job's output while it is entered. What became of that is raised when it is left."""

    def __init__(self, store: Store, job: str, viewer: Viewer) -> None:
        self._store = store
        self._job = job
        self._viewer = viewer

    async def __aenter__(self) -> Self:
        self._following = asyncio.create_task(self._follow())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._following.cancel()
        try:
            await self._following
        except asyncio.CancelledError:
            if not self._following.cancelled():
                raise

    async def _follow(self) -> None:
        while True:
            try:
                async with aclosing(self._store.logs.follow(self._job)) as chunks:
                    async for chunk in chunks:
                        await self._viewer.show([chunk])
            except StoreUnavailable:
                await asyncio.sleep(FOLLOW_AGAIN_S)

    async def until(self, event: Awaitable[None]) -> None:
        """Wait for `event`, or until nobody can be shown anything any more."""
        waiting = asyncio.ensure_future(event)
        try:
            await asyncio.wait([waiting, self._following], return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                self._following.result()
            await waiting
        finally:
            await cancel(waiting)

    async def rest(self, state: State, wait_s: float = LATE_S) -> None:
        """Show what an ended job has printed and is not here yet; say so if some of it does not come."""
        give_up = time.monotonic() + wait_s
        while self._viewer.missing(state) and time.monotonic() < give_up and not self._following.done():
            self._viewer.news.clear()
            hearing = asyncio.ensure_future(self._viewer.news.wait())
            try:
                await asyncio.wait(
                    [hearing, self._following],
                    timeout=give_up - time.monotonic(),
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                hearing.cancel()
        if self._following.done():
            return
        seen = self._viewer.complete(state)
        # In both cases this returns only when all of it was written, and not merely handed over.
        await self._viewer.show(() if seen else await self._store.logs.read(self._job))
        lost = self._viewer.missing(state)
        if lost:  # its holder died right after the end, or they were forgotten
            assert state.done is not None
            self._viewer.tell(f"warning: {lost} pieces of the output of {state.done.chunks} are lost")


def last_attempt(state: State) -> int:
    """The attempt whose output counts: a workflow's replays are one."""
    return state.epoch if state.spec is not None and state.spec.kind == "command" else 0


def late_s(state: State, now_ms: int) -> float:
    """How long the rest of the output of an ended job may still be on its way."""
    since_s = (now_ms - state.done.at) / 1000 if state.done else LATE_S
    return min(max(LATE_S - since_s, 0.0), LATE_S)
