"""What ends a job from outside: its time, its output, its workspace, its processes.

Each limit is a task that raises when it is reached; `first` runs a guest beside them, and whatever
ends first decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from mvmci.config.quantity import format_size
from mvmci.errors import Fenced
from mvmci.journals.holder import Holder
from mvmci.store import CHUNK_BYTES_MAX, Chunk

T = TypeVar("T")


class LimitReached(Exception):
    """The guest went beyond one of its limits; `reason` starts with the limit's name."""

    def __init__(self, limit: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = f"{limit}: {sentence}"


AT_ONCE = "at once"
"""What `CancelledError` says to a guest whose guard leaves it no time to end by itself."""


class TimedOut(Exception):
    """The job's time is up."""


async def first(guest: Awaitable[T], *guards: Awaitable[object]) -> T:
    """The result of `guest`, unless a guard raises before it ends. What has not ended is cancelled.

    The guest runs in the caller's task, which a guard interrupts as `asyncio.timeout` does; a guard that
    is a future costs no task either.

    Where several have ended, a guard's exception counts before the guest's result.
    """
    task = asyncio.current_task()
    assert task is not None
    cancelling = task.cancelling()
    interrupted = over = False

    def look(guard: asyncio.Future[object]) -> None:
        nonlocal interrupted
        if not (interrupted or over) and (guard.cancelled() or guard.exception() is not None):
            interrupted = True
            hurried = not guard.cancelled() and isinstance(guard.exception(), LimitReached | Fenced)
            task.cancel(AT_ONCE if hurried else None)

    watched = [asyncio.ensure_future(guard) for guard in guards]
    for guard in watched:
        guard.add_done_callback(look)
    try:
        return await guest
    finally:
        over = True
        if interrupted:
            task.uncancel()
        foreign = task.cancelling() > cancelling  # somebody else ends this task, perhaps as well
        ended = [guard for guard in watched if guard.done()]
        for guard in watched:
            guard.cancel()
        if any(not guard.done() for guard in watched):
            await asyncio.gather(*watched, return_exceptions=True)
        if not foreign:
            for guard in ended:
                guard.result()


class Deadline:
    """A job's time. `over` raises TimedOut once it is up; it begins to run when `begin` says so."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._now_ms = now_ms

    def begin(self, deadline_ms: int) -> None:
        """It is up at `deadline_ms`, since 1970. Called again, it says the same."""
        left_ms = deadline_ms - self._now_ms()
        if self.over.done():
            return
        if left_ms <= 0:
            self.over.set_exception(TimedOut())
        else:
            timer = self.over.get_loop().call_later(left_ms / 1000, self.begin, deadline_ms)
            self.over.add_done_callback(lambda _: timer.cancel())


class Output:
    """Numbers and counts what a guest prints, and gives it to the holder, who holds it back."""

    def __init__(
        self,
        holder: Holder,
        *,
        attempt: int,
        bytes_max: int,
        now_ms: Callable[[], int],
        published: int = 0,
    ) -> None:
        self._holder = holder
        self._attempt = attempt
        self._bytes_max = bytes_max
        self._now_ms = now_ms
        self._published = published  # pieces that an earlier holder of a workflow gave out
        self._bytes = 0
        self._number = 0

    async def write(self, stream: str, data: bytes) -> None:
        """Pass on `data`. Raises LimitReached after passing on what the limit allows."""
        allowed = data[: self._bytes_max - self._bytes]
        self._bytes += len(allowed)
        for start in range(0, len(allowed), CHUNK_BYTES_MAX):
            piece = allowed[start : start + CHUNK_BYTES_MAX]
            number, self._number = self._number, self._number + 1
            if number < self._published:
                continue
            await self._holder.print(
                Chunk(
                    attempt=self._attempt,
                    number=number,
                    stream="stdout" if stream == "stdout" else "stderr",
                    data=piece,
                    at=self._now_ms(),
                )
            )
        if len(allowed) < len(data):
            raise LimitReached("output", f"more than {format_size(self._bytes_max)}")
