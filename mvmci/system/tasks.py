"""Tasks in the background, and work in threads, that a caller who is cancelled does not leave behind.

A thread cannot be cancelled. One that is left works on with the descriptors of its caller, whose
numbers may then mean other files: so the caller goes only once the work has ended, and long loops
look whether anybody still wants them to go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")

_local = threading.local()


async def cancel(*tasks: asyncio.Future[Any] | None) -> None:
    """Cancel `tasks` and wait until they have ended, however they did."""
    there = [task for task in tasks if task is not None]
    for task in there:
        task.cancel()
    if there:
        await asyncio.gather(*there, return_exceptions=True)


async def all_of(*work: Awaitable[T]) -> list[T]:
    """The results of all, or the first failure: after all have ended, as they share something."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return cast("list[T]", results)


async def at_most(within_s: float | None, work: Awaitable[object]) -> None:
    """Await `work`, and let it go after `within_s`. (`asyncio.wait_for` could lose a cancellation.)"""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await work


async def readable(fd: int) -> None:
    """Until there is something to read from `fd`, or its end; until the process of a pidfd has ended."""
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


class TaskSet:
    """Tasks of one owner that may end at any time. Nothing else would keep them from being collected."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T], name: str | None = None) -> asyncio.Task[T]:
        """Begin `work`."""
        task = asyncio.create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def close(self) -> None:
        """Cancel those that run, and wait for them."""
        await cancel(*self.tasks)


class Abandoned(Exception):
    """Nobody waits for the result of this thread any more."""


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of `function`; a caller who is cancelled waits until the thread is done with it."""
    stop = threading.Event()
    work = functools.partial(_run, stop, functools.partial(function, *args, **kwargs))
    return await to_its_end(asyncio.get_running_loop().run_in_executor(None, work), stop.set)


async def to_its_end(work: Awaitable[T], stop: Callable[[], None] = lambda: None) -> T:
    """The result of `work`, which also ends where the caller is cancelled; then `stop` is called."""
    future = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop()
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                continue  # told a second time, it is as impossible as before
        if not future.cancelled():
            future.exception()  # looked at: the caller has no use for it
        raise


def go_on() -> None:
    """For long loops in functions that `in_thread` may run. Raises Abandoned once nobody waits."""
    stop: threading.Event | None = getattr(_local, "stop", None)
    if stop is not None and stop.is_set():
        raise Abandoned


def _run(stop: threading.Event, function: Callable[[], T]) -> T:
    _local.stop = stop
    try:
        return function()
    finally:
        _local.stop = None
