"""What a user sees of a job on a terminal: its output as it comes, and how it ended."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import click
import msgspec

from mvmci.cli.options import Location
from mvmci.cli.streams import STDERR, STDOUT, OutputLost, ReaderGone, write_all
from mvmci.errors import EXIT_FAILED, EXIT_INTERNAL, EXIT_TIMED_OUT, StoreUnavailable
from mvmci.jobs.journal import Journal, status
from mvmci.journals.logs import Viewer
from mvmci.journals.status import reason_of, summary_of
from mvmci.store import Chunk, Store
from mvmci.system.tasks import cancel
from mvmci.system.text import one_line

STANDING_EVERY_S = 1.0
EXITS = {"succeeded": 0, "failed": EXIT_FAILED, "cancelled": EXIT_FAILED, "timed_out": EXIT_TIMED_OUT}


class DescriptorWriter:
    """Writes to descriptors on a thread of its own: a reader that has stopped stops nobody else.

    The thread is a daemon, and nothing is buffered on the way, so a write that is stuck for good does
    not keep the process from ending either.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[int, bytes, Callable[[BaseException | None], None]]]
        self._jobs = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="output").start()

    async def write(self, fd: int, data: bytes) -> None:
        """Write all of `data`. Raises OutputLost, ReaderGone."""
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
                write_all(fd, data)
                done(None)
            except (OutputLost, ReaderGone) as failure:
                done(failure)


class Printer(Viewer):
    """Writes chunks to two descriptors."""

    def __init__(self, stdout: int, stderr: int, *, since: int = 0, attempt: int | None = None) -> None:
        super().__init__(since=since, attempt=attempt)
        self._streams = {"stdout": stdout, "stderr": stderr}
        self._writer = DescriptorWriter()

    async def write(self, chunk: Chunk) -> None:
        await self._writer.write(self._streams[chunk.stream], chunk.data)

    async def flush(self) -> None:
        await self._writer.write(STDERR, b"")

    def tell(self, sentence: str) -> None:
        click.echo(one_line(sentence), err=True)


def standard_streams(*, all_on_stderr: bool = False) -> tuple[int, int]:
    """Where a guest's streams go: onto ours, or both onto stderr when stdout is for JSON."""
    sys.stdout.flush()
    return (STDERR if all_on_stderr else STDOUT), STDERR


@asynccontextmanager
async def telling(store: Store, journal: Journal, place: Location) -> AsyncIterator[None]:
    """While it is entered, say on stderr why the job does not go on, and how far it is, when that changes.

    Somebody else keeps `journal` up to date.
    """
    task = asyncio.create_task(_tell_standing(store, journal, place))
    try:
        yield
    finally:
        await cancel(task)


async def _tell_standing(store: Store, journal: Journal, place: Location) -> None:
    told = before = ""
    while True:
        await asyncio.sleep(STANDING_EVERY_S)
        reason, now, progress = "", "", journal.state.progress
        with suppress(StoreUnavailable):
            reason = await reason_of(store, journal, local=place.local)
        if reason and reason == before:  # what is so for a moment only is not worth a line
            now = reason
        elif progress is not None and sys.stderr.isatty():
            now = f"{progress.done}/{progress.total} {progress.message}"
        if now not in ("", told):
            click.echo(f"{journal.job}: {one_line(now)}", err=True)
            told = now
        before = reason


async def report(store: Store, journal: Journal, place: Location, *, as_json: bool) -> int:
    """Print how a job ended, and its result; the exit code that tells it."""
    summary = await summary_of(store, journal, local=place.local)
    if as_json:
        click.echo(msgspec.json.encode(summary))
    elif summary.result is not None:
        click.echo(bytes(summary.result))
    return tell_end(journal)


def tell_end(journal: Journal) -> int:
    """Say on stderr how a job ended, unless it succeeded; the exit code that tells it."""
    name, reason = status(journal.state)
    if name != "succeeded":
        click.echo(f"{journal.job} {name}: {one_line(reason)}", err=True)
    return EXITS.get(name, EXIT_INTERNAL)
