"""A job's output, as a reader of the logs sees it: in order, nothing twice."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from typing import BinaryIO

import click

from mvmci.journal import State
from mvmci.store import Chunk, Store


class Printer:
    """Writes the chunks of attempt `since` and later to two streams, and drops what it has written."""

    def __init__(self, stdout: BinaryIO, stderr: BinaryIO, *, since: int) -> None:
        self._streams = {"stdout": stdout, "stderr": stderr}
        self._since = since
        self._next: dict[int, int] = {}

    def show(self, chunks: Iterable[Chunk]) -> None:
        """Write those of `chunks` that are new."""
        for chunk in chunks:
            if chunk.attempt >= self._since and chunk.number >= self._next.get(chunk.attempt, 0):
                self._next[chunk.attempt] = chunk.number + 1
                stream = self._streams[chunk.stream]
                stream.write(chunk.data)
                stream.flush()

    def warn(self, state: State) -> None:
        """Say so if an ended job printed more than was there to show: its holder died right after the end."""
        seen = self._next.get(last_attempt(state), 0)
        if state.done is not None and seen < state.done.chunks:
            lost = state.done.chunks - seen
            click.echo(f"warning: {lost} pieces of the output of {state.done.chunks} are lost", err=True)


def last_attempt(state: State) -> int:
    """The attempt whose output counts: a workflow's replays are one."""
    return state.epoch if state.spec is not None and state.spec.kind == "command" else 0


def standard_streams(*, all_on_stderr: bool = False) -> tuple[BinaryIO, BinaryIO]:
    """Where a guest's streams go: onto ours, or both onto stderr when stdout is for JSON."""
    return (sys.stderr.buffer if all_on_stderr else sys.stdout.buffer), sys.stderr.buffer


async def follow(store: Store, job: str, printer: Printer) -> None:
    """Show the job's output as it comes, until cancelled."""
    async for chunk in store.logs.follow(job):
        printer.show([chunk])


async def stop(task: asyncio.Task[None]) -> None:
    """Cancel `task` and wait for its end; what it failed with is raised."""
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        if not task.cancelled():
            raise
