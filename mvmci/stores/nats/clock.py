"""The time of day by the broker's clock, which is the only one that all units of a cluster share.

What one host writes of time (when a sleep is over, when a job began) is read by others, and a host's
own clock may be wrong or jump. So a unit asks the broker what time it is, and counts on from there by a
clock that nobody sets. Until it has an answer, it takes the host's own.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

from mvmci.errors import MvmciError
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import Link
from mvmci.system.clock import boottime_ns
from mvmci.system.tasks import cancel

_ASK_EVERY_S = 60.0
_ASK_AGAIN_S = 0.5  # while nothing is known
ROUND_NS_MAX = 1_000_000_000  # an answer that took longer says little
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Clock:
    """The broker's clock, as one connection knows it."""

    def __init__(self, link: Link, layout: Layout) -> None:
        self._link = link
        self._layout = layout
        self._ahead_ns = time.time_ns() - boottime_ns()
        self._known = False
        self._asking: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Ask now, and from now on."""
        await self._try()
        self._asking = asyncio.create_task(self._ask_always(), name="clock")

    async def close(self) -> None:
        await cancel(self._asking)

    def now_ms(self) -> int:
        """Milliseconds since 1970."""
        return (self._ahead_ns + boottime_ns()) // 1_000_000

    async def _ask_always(self) -> None:
        while True:
            await asyncio.sleep(_ASK_EVERY_S if self._known else _ASK_AGAIN_S)
            await self._try()

    async def _try(self) -> None:
        try:
            await self._ask()
        except MvmciError:
            pass  # what is known still holds

    async def _ask(self) -> None:
        before = boottime_ns()
        answer = await self._link.api(f"STREAM.INFO.{self._layout.blobs}")
        after = boottime_ns()
        if after - before < ROUND_NS_MAX:
            since = datetime.fromisoformat(answer["ts"]) - _EPOCH
            self._ahead_ns = since // timedelta(microseconds=1) * 1000 - (before + after) // 2
            self._known = True
