"""What a user sees of a job: its output as it comes, in order, nothing twice; how it stands and ended."""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Self

import click
import msgspec

from mvmci.cli.options import Place
from mvmci.errors import EXIT_FAILED, EXIT_INTERNAL, EXIT_TIMED_OUT, StoreUnavailable
from mvmci.journal import Journal, State, status
from mvmci.store import Chunk, Member, Store, load_text
from mvmci.summary import Summary, payloads, summarise

STDOUT, STDERR = 1, 2
LATE_S = 10.0  # output that its end has overtaken comes so much later at most
AGAIN_S = 0.5  # before the logs of a store that is away are asked for again
EXITS = {"succeeded": 0, "failed": EXIT_FAILED, "cancelled": EXIT_FAILED, "timed_out": EXIT_TIMED_OUT}


class Writer:
    """Writes to descriptors on a thread of its own: a reader that has stopped stops nobody else.

    The thread is a daemon, and nothing is buffered on the way, so a write that is stuck for good does
    not keep the process from ending either.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[int, bytes, Callable[[BaseException | None], None]]]
        self._jobs = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="output").start()

    async def write(self, fd: int, data: bytes) -> None:
        """Write all of `data`. Raises OSError; a reader that has gone is a BrokenPipeError."""
        loop = asyncio.get_running_loop()
        written: asyncio.Future[None] = loop.create_future()

        def tell(failure: BaseException | None) -> None:
            if not written.done():
                written.set_exception(failure) if failure else written.set_result(None)

        def done(failure: BaseException | None) -> None:
            with suppress(RuntimeError):  # nobody waits any more: the loop is closed
                loop.call_soon_threadsafe(tell, failure)

        self._jobs.put((fd, data, done))
        await written

    def _run(self) -> None:
        while True:
            fd, data, done = self._jobs.get()
            try:
                while data:
                    data = data[os.write(fd, data) :]
                done(None)
            except OSError as failure:
                done(failure)


class Printer:
    """Writes chunks to two descriptors, and drops what it has written.

    They are those of one `attempt`; else of the newest, from the one that is numbered `since`.
    """

    def __init__(self, stdout: int, stderr: int, *, since: int = 0, attempt: int | None = None) -> None:
        self.news = asyncio.Event()
        self._streams = {"stdout": stdout, "stderr": stderr}
        self._only = attempt
        self._since = since
        self._next: dict[int, int] = {}
        self._writer = Writer()

    async def show(self, chunks: Iterable[Chunk]) -> None:
        """Write those of `chunks` that are new."""
        for chunk in chunks:
            if self._wants(chunk):
                # Noted first: once it is handed over it will be written, even if we are cancelled here.
                self._next[chunk.attempt] = chunk.number + 1
                await self._writer.write(self._streams[chunk.stream], chunk.data)
                self.news.set()
        await self._writer.write(STDERR, b"")  # behind what a cancelled call has left to be written

    def _wants(self, chunk: Chunk) -> bool:
        if chunk.number < self._next.get(chunk.attempt, 0):
            return False
        if self._only is not None:
            return chunk.attempt == self._only
        if chunk.attempt > self._since:
            if self._next:
                click.echo(f"attempt {chunk.attempt}: it starts over", err=True)
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


class Watch:
    """Shows a job's output while it is entered. What became of that is raised when it is left."""

    def __init__(self, store: Store, job: str, printer: Printer) -> None:
        self._store = store
        self._job = job
        self._printer = printer

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
                        await self._printer.show([chunk])
            except StoreUnavailable:
                await asyncio.sleep(AGAIN_S)

    async def until(self, event: Awaitable[None]) -> None:
        """Wait for `event`, or until nobody can be shown anything any more."""
        waiting = asyncio.ensure_future(event)
        try:
            await asyncio.wait([waiting, self._following], return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                self._following.result()
            await waiting
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    async def rest(self, state: State, wait_s: float = LATE_S) -> None:
        """Show what an ended job has printed and is not here yet; say so if some of it does not come."""
        give_up = time.monotonic() + wait_s
        while self._printer.missing(state) and time.monotonic() < give_up and not self._following.done():
            self._printer.news.clear()
            hearing = asyncio.ensure_future(self._printer.news.wait())
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
        seen = self._printer.complete(state)
        # In both cases this returns only when all of it was written, and not merely handed over.
        await self._printer.show(() if seen else await self._store.logs.read(self._job))
        lost = self._printer.missing(state)
        if lost:  # its holder died right after the end, or they were forgotten
            assert state.done is not None
            click.echo(f"warning: {lost} pieces of the output of {state.done.chunks} are lost", err=True)


def last_attempt(state: State) -> int:
    """The attempt whose output counts: a workflow's replays are one."""
    return state.epoch if state.spec is not None and state.spec.kind == "command" else 0


def standard_streams(*, all_on_stderr: bool = False) -> tuple[int, int]:
    """Where a guest's streams go: onto ours, or both onto stderr when stdout is for JSON."""
    sys.stdout.flush()
    return (STDERR if all_on_stderr else STDOUT), STDERR


# ---- How a job stands, and how it ended


async def summary_of(store: Store, journal: Journal, place: Place) -> Summary:
    """The summary of a job, its payloads read from where they lie, and why it does not go on."""
    result, response = [await load_text(store.blobs, payload) for payload in payloads(journal)]
    summary = summarise(journal, result=result, response=response)
    reason = summary.reason or await _why(store, journal, summary, place)
    return msgspec.structs.replace(summary, reason=reason)


async def _why(store: Store, journal: Journal, summary: Summary, place: Place) -> str:
    """Why a job that has not ended does not go on, as far as that can be seen from here."""
    lease = journal.state.lease
    if summary.status == "running" and lease is not None:
        if await store.presence.live(journal.job, lease):
            return ""
        if place.local:
            return f"its process is gone; `mvmci run --id {journal.job} …` goes on"
        return f"{lease.unit} is gone; another worker takes it"
    if summary.status == "queued" and not place.local:
        return waiting(summary.queue or "", await store.presence.members())
    return ""


def waiting(queue: str, members: Sequence[Member]) -> str:
    """Why a job of `queue` has not begun; empty if a worker has room for it."""
    workers = [one for one in members if one.about.role == "worker" and queue in one.about.queues]
    ready = [one for one in workers if one.about.state == "ready"]
    if not workers:
        return f"waiting: no worker takes from queue {queue}"
    if not ready:
        return "waiting: workers draining"
    if all(len(one.holds) >= one.about.slots for one in ready):
        return "waiting: workers busy"
    return ""


async def report(store: Store, journal: Journal, place: Place, *, as_json: bool) -> int:
    """Print how a job ended, and its result; the exit code that tells it."""
    summary = await summary_of(store, journal, place)
    if as_json:
        click.echo(msgspec.json.encode(summary))
    elif summary.result is not None:
        click.echo(bytes(summary.result))
    return tell_end(journal)


def tell_end(journal: Journal) -> int:
    """Say on stderr how a job ended, unless it succeeded; the exit code that tells it."""
    name, reason = status(journal.state)
    if name != "succeeded":
        click.echo(f"{journal.job} {name}: {reason}", err=True)
    return EXITS.get(name, EXIT_INTERNAL)
