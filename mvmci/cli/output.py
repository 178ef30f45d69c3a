"""A job's output, as a reader of the logs sees it: in order, nothing twice."""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

import click

from mvmci.journal import State
from mvmci.store import Chunk, Store

STDOUT, STDERR = 1, 2


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
    """Writes the chunks of attempt `since` and later to two descriptors, and drops what it has written."""

    def __init__(self, stdout: int, stderr: int, *, since: int) -> None:
        self._streams = {"stdout": stdout, "stderr": stderr}
        self._since = since
        self._next: dict[int, int] = {}
        self._writer = Writer()

    async def show(self, chunks: Iterable[Chunk]) -> None:
        """Write those of `chunks` that are new."""
        for chunk in chunks:
            if chunk.attempt >= self._since and chunk.number >= self._next.get(chunk.attempt, 0):
                # Noted first: once it is handed over it will be written, even if we are cancelled here.
                self._next[chunk.attempt] = chunk.number + 1
                await self._writer.write(self._streams[chunk.stream], chunk.data)
        await self._writer.write(STDERR, b"")  # behind what a cancelled call has left to be written

    def warn(self, state: State) -> None:
        """Say so if an ended job printed more than was there to show: its holder died right after the end."""
        seen = self._next.get(last_attempt(state), 0)
        if state.done is not None and seen < state.done.chunks:
            lost = state.done.chunks - seen
            click.echo(f"warning: {lost} pieces of the output of {state.done.chunks} are lost", err=True)


def last_attempt(state: State) -> int:
    """The attempt whose output counts: a workflow's replays are one."""
    return state.epoch if state.spec is not None and state.spec.kind == "command" else 0


def standard_streams(*, all_on_stderr: bool = False) -> tuple[int, int]:
    """Where a guest's streams go: onto ours, or both onto stderr when stdout is for JSON."""
    sys.stdout.flush()
    return (STDERR if all_on_stderr else STDOUT), STDERR


async def follow(store: Store, job: str, printer: Printer) -> None:
    """Show the job's output as it comes, until cancelled."""
    async for chunk in store.logs.follow(job):
        await printer.show([chunk])


async def stop(task: asyncio.Task[None]) -> None:
    """Cancel `task` and wait for its end; what it failed with is raised."""
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        if not task.cancelled():
            raise
