"""A workflow's time and chance: they come from the journal and the seed, the same on every replay."""

from __future__ import annotations

import hashlib


class VirtualClock:
    """A workflow's time: that of the last record it consumed, plus a tick of 1 ms for every look."""

    def __init__(self, now_ms: int) -> None:
        self._now_ms = now_ms

    def consume(self, at_ms: int) -> None:
        """A record of time `at_ms` was consumed. Time never goes back."""
        self._now_ms = max(self._now_ms, at_ms)

    def now(self) -> int:
        """Milliseconds since 1970."""
        self._now_ms += 1
        return self._now_ms - 1


class Chance:
    """A workflow's random numbers: a keyed hash of a counter, from the seed in the spec."""

    def __init__(self, seed: int) -> None:
        self._key = (seed & (2**64 - 1)).to_bytes(8, "little")
        self._count = 0

    def next(self) -> int:
        """An unsigned 64-bit number."""
        self._count += 1
        drawn = hashlib.blake2b(self._count.to_bytes(8, "little"), key=self._key, digest_size=8)
        return int.from_bytes(drawn.digest(), "little")
