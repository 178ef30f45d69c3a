"""An executor in a process of its own, to be killed at any instant.

python -m tests.parts.roles.executor URL CLUSTER UNIT ROOT
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from mvmci.engines import open_embedded
from mvmci.engines.server import Executor, serve_requests
from mvmci.store import About
from mvmci.stores.nats import dial_cluster
from tests.parts.roles.conftest import ALLOW


async def main(url: str, name: str, unit: str, root: str) -> None:
    cluster = await dial_cluster(url, name, unit)
    engine = open_embedded(cluster.store, Path(root), allow=lambda: ALLOW, slots=4)
    await cluster.store.presence.describe(About(role="executor", slots=4))
    executor = Executor(engine, cluster.store, slots=4)
    print("ready", flush=True)
    await serve_requests(executor, cluster.link, cluster.layout)


asyncio.run(main(*sys.argv[1:]))
