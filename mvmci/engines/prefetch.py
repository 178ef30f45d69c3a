"""Prefetch: who may run now, and whether it pays to hold more in hand than may run.

While jobs are so short that fetching one takes longer than running it, a worker or an executor takes
some ahead. One that then waits for its permit after all is handed back: somebody else may be free.
"""

from __future__ import annotations

import asyncio
import time

AHEAD_MAX = 32  # in hand beyond what may run at once, while jobs are short
SHORT_S = 0.01  # the mean time with a permit below which they are
TURN_S = 0.1  # after so long in hand without a permit, a job goes back
AHEAD_OF_SLOT = 8  # a slot gets to so many within TURN_S, also if each takes nearly SHORT_S
_MEAN_OVER = 16  # jobs


class Prefetch:
    """Lets at most `count` jobs run at once."""

    def __init__(self, count: int) -> None:
        self.free = count
        self.ahead_max = min(AHEAD_MAX, AHEAD_OF_SLOT * count)
        self.jobs_are_short = asyncio.Event()  # whether it pays to take jobs ahead
        self._waiting = 0
        self._mean_s = SHORT_S
        self._slots = asyncio.Semaphore(count)
        self._taken = self.most_taken = 0  # slots; the one that was left last is taken first
        self._taken_ns = 0  # summed over slots, until `_counted_at`
        self._counted_at = time.monotonic_ns()

    @property
    def accepting(self) -> bool:
        """Whether one more job could run now, or soon."""
        return self.free > 0 or (self.jobs_are_short.is_set() and self._waiting < self.ahead_max)

    @property
    def slot_us(self) -> int:
        """For how long slots were taken so far, summed over them."""
        self._count(0)
        return self._taken_ns // 1000

    def _count(self, more: int) -> None:
        now = time.monotonic_ns()
        self._taken_ns += self._taken * (now - self._counted_at)
        self._counted_at = now
        self._taken += more
        self.most_taken = max(self.most_taken, self._taken)
        self.free -= more

    def permit(self) -> Permit:
        """For one job that came in."""
        return Permit(self)

    async def _acquire(self) -> bool:
        if self._slots.locked():
            self._waiting += 1
            try:
                async with asyncio.timeout(TURN_S):
                    await self._slots.acquire()
            except TimeoutError:
                self._mean_s = 2 * SHORT_S
                self.jobs_are_short.clear()
                return False
            finally:
                self._waiting -= 1
        else:
            await self._slots.acquire()
        self._count(1)
        return True

    def _release(self, took_s: float) -> None:
        self._count(-1)
        self._slots.release()
        self._mean_s += (took_s - self._mean_s) / _MEAN_OVER
        if self._mean_s < SHORT_S:
            self.jobs_are_short.set()
        else:
            self.jobs_are_short.clear()


class Permit:
    """One job's leave to run: asked for once, given back once, however often that is said."""

    def __init__(self, prefetch: Prefetch) -> None:
        self.ended = asyncio.Event()  # this job stands in nobody's way any more
        self._prefetch = prefetch
        self._began: float | None = None

    async def take(self) -> bool:
        """Whether the job may run, now or soon; if not, jobs are not so short after all."""
        if await self._prefetch._acquire():
            self._began = time.monotonic()
        return self._began is not None

    def end(self) -> None:
        """The job needs it no more."""
        if not self.ended.is_set():
            self.ended.set()
            if self._began is not None:
                self._prefetch._release(time.monotonic() - self._began)
