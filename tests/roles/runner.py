"""A worker in a process of its own, to be killed at any instant.

python -m tests.roles.runner URL CLUSTER UNIT ROOT
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from mvmci.engines import open_embedded
from mvmci.stores.nats import open_cluster
from mvmci.worker import Worker
from tests.roles.conftest import ALLOW


async def main(url: str, name: str, unit: str, root: str) -> None:
    cluster = await open_cluster(url, name, unit)
    engine = open_embedded(cluster.store, Path(root), allow=ALLOW, slots=4)
    print("ready", flush=True)
    await Worker(cluster.store, engine, queues=("default",), slots=4).run()


asyncio.run(main(*sys.argv[1:]))
