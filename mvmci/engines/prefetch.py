"""Prefetch: who may run now, and whether it pays to hold more in hand than may run.

While jobs are so short that fetching one takes longer than running it, a worker or an executor takes
some ahead. One that then waits for its turn after all is handed back: somebody else may be free.
"""

from __future__ import annotations

import asyncio
import time

AHEAD_MAX = 32  # in hand beyond what may run at once, while jobs are short
SHORT_S = 0.01  # the mean length of a turn below which they are
TURN_S = 0.1  # after so long in hand without a turn, a job goes back
MEAN_OVER = 16  # turns


class Prefetch:
    """At most `count` turns at once."""

    def __init__(self, count: int) -> None:
        self.free = count
        self.jobs_are_short = asyncio.Event()  # whether it pays to take jobs ahead
        self._waiting = 0
        self._mean_s = SHORT_S
        self._permits = asyncio.Semaphore(count)

    @property
    def accepting(self) -> bool:
        """Whether one more would have its turn now, or soon."""
        return self.free > 0 or (self.jobs_are_short.is_set() and self._waiting < AHEAD_MAX)

    async def take(self) -> Permit | None:
        """A turn, now or soon; None if it does not come accepting: jobs are not so short after all."""
        if self._permits.locked():
            self._waiting += 1
            try:
                async with asyncio.timeout(TURN_S):
                    await self._permits.acquire()
            except TimeoutError:
                self._mean_s = 2 * SHORT_S
                self.jobs_are_short.clear()
                return None
            finally:
                self._waiting -= 1
        else:
            await self._permits.acquire()
        self.free -= 1
        return Permit(self)

    def _ended(self, took_s: float) -> None:
        self.free += 1
        self._permits.release()
        self._mean_s += (took_s - self._mean_s) / MEAN_OVER
        if self._mean_s < SHORT_S:
            self.jobs_are_short.set()
        else:
            self.jobs_are_short.clear()


class Permit:
    """Somebody's turn. It ends once, however often that is said."""

    def __init__(self, turns: Prefetch) -> None:
        self._turns: Prefetch | None = turns
        self._began = time.monotonic()

    def end(self) -> None:
        if self._turns is not None:
            turns, self._turns = self._turns, None
            turns._ended(time.monotonic() - self._began)
