"""How many bytes may be on their way to the broker, or asked of it, at a time: as many as pass in a moment.

Whatever goes over a connection waits for what went before it: pings, answers, the words that a unit is
there. On a fast line megabytes are on their way at a time, and that costs nobody anything; on a slow one
they would be half a minute, and the connection be taken for dead. So it begins with little, and how
long that took says how much is next.
"""

from __future__ import annotations

import asyncio

BYTES_FIRST = 256 << 10
BYTES_MIN = 128 << 10
BYTES_MAX = 4 << 20
QUICK_S = 0.25  # what took less may be twice as much
SLOW_S = 1.0  # and what took more, half


class Window:
    """`size` is how many bytes may be under way now; `moved_at` when the last of them arrived.

    Times are by the loop's clock.
    """

    def __init__(self) -> None:
        self.size = BYTES_FIRST
        self.moved_at = float("-inf")
        self._changed_at = float("-inf")
        self._out = 0
        self._room = asyncio.Event()

    async def reserve(self, size: int) -> float:
        """Wait until `size` bytes more may be under way, and return since when they are.

        What is larger than all goes alone.
        """
        while self._out and self._out + size > self.size:
            self._room.clear()
            await self._room.wait()
        self._out += size
        return asyncio.get_running_loop().time()

    def release(self, size: int, begun: float | None) -> None:
        """Those bytes have arrived, which were under way since `begun`; or, with None, they were given up.

        What began before the last change says nothing of how it does now.
        """
        self._out -= size
        self._room.set()
        if begun is None:
            return
        now = self.moved_at = asyncio.get_running_loop().time()
        if begun < self._changed_at or QUICK_S <= now - begun <= SLOW_S:
            return
        self._changed_at = now
        self.size = max(self.size // 2, BYTES_MIN) if now - begun > SLOW_S else min(self.size * 2, BYTES_MAX)
