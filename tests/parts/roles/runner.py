"""A worker in a process of its own, to be killed at any instant.

python -m tests.parts.roles.runner URL CLUSTER UNIT ROOT [HELD]

With HELD, it holds ends back for ever, and says `held` once so many are.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from mvmci.engines import open_embedded
from mvmci.roles.worker import Worker
from mvmci.stores import nats as stores
from mvmci.stores.nats import dial_cluster
from mvmci.stores.nats.append import GroupCommit
from tests.parts.roles.conftest import ALLOW


class Holding(GroupCommit):
    """One for which it always pays to wait for more ends."""

    many = 0

    def _send(self, held: bool = False) -> None:
        if not self.many or held:
            super()._send(held)
            return
        may_delay = [append for append in self._pending if append.may_delay]
        self._pending = [append for append in self._pending if not append.may_delay]
        super()._send()
        self._pending += may_delay
        if len(may_delay) >= self.many:
            print("held", flush=True)


async def main(url: str, name: str, unit: str, root: str, held: str = "0") -> None:
    Holding.many = int(held)
    stores.GroupCommit = Holding  # type: ignore[misc]
    cluster = await dial_cluster(url, name, unit)
    engine = open_embedded(cluster.store, Path(root), allow=lambda: ALLOW, slots=4)
    print("ready", flush=True)
    await Worker(cluster.store, engine, queues=("default",), slots=4).run()


asyncio.run(main(*sys.argv[1:]))
