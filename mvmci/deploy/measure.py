"""Asking the units of a cluster for their metrics, and its broker for its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

import msgspec

from mvmci.cluster.metrics import UnitMetrics
from mvmci.stores.nats import Cluster
from mvmci.stores.nats.parser import Incoming

WITHIN_S = 2.0

_encode = msgspec.json.Encoder().encode
_told = msgspec.json.Decoder(UnitMetrics)


class Asker:
    """One who asks all units at once, and takes what they tell."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._found: dict[str, UnitMetrics] = {}
        self._more = asyncio.Event()

    async def ask(
        self, units: Collection[str], *, watch_s: float = 0.0, within_s: float = WITHIN_S
    ) -> dict[str, UnitMetrics]:
        """What `units` tell, each by its name; who has not told within `within_s` is left out.

        They watch what has to be watched for another `watch_s`. Raises StoreUnavailable.
        """
        self._found.clear()
        await self._cluster.link.publish(self._cluster.layout.measure(), _encode({"watch_s": watch_s}))
        try:
            async with asyncio.timeout(within_s):
                while not self._found.keys() >= set(units):
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            pass
        return {unit: found for unit, found in self._found.items() if unit in units}

    def hear(self, word: Incoming) -> None:
        """Take what a unit tells: only of itself, as its subject says."""
        try:
            metrics = _told.decode(word.data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return  # of another build
        unit, incarnation = self._cluster.layout.member_of(word.subject)
        self._found[unit] = msgspec.structs.replace(metrics, unit=unit, incarnation=incarnation)
        self._more.set()


@asynccontextmanager
async def asking(cluster: Cluster) -> AsyncIterator[Asker]:
    """An asker, whose connection is that of an administrator. Raises StoreUnavailable."""
    asker = Asker(cluster)
    leave = await cluster.link.subscribe(cluster.layout.measured("*", "*"), asker.hear)
    try:
        yield asker
    finally:
        await leave()
