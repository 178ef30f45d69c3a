"""A process that runs jobs from JetStream to their end, to be killed at any instant.

python -m tests.faults.runner URL CLUSTER UNIT ROOT ALLOWED_URL JOB...
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from mvmci.engines.embedded.engine import Embedded
from mvmci.engines.embedded.host import Host
from mvmci.jobs.allow import Allow
from tests.conftest import open_nats

GONE_S = 1.0
LOOK_AGAIN_S = 0.1


async def main(url: str, cluster: str, unit: str, root: str, allowed: str, *jobs: str) -> None:
    store = await open_nats(url, cluster, unit, gone_s=GONE_S)
    allow = Allow(http=(f"{allowed}/*",), exec=("tee", "cat"))
    engine = Embedded(Host(store=store, root=Path(root), allow=lambda: allow), slots=len(jobs))

    async def see_through(job: str) -> None:
        while True:
            step = await engine.run(job)
            if step.kind == "ended":
                return
            await asyncio.sleep(LOOK_AGAIN_S)  # another process holds it, or is taken to

    print("ready", flush=True)
    try:
        await asyncio.gather(*map(see_through, jobs))
    finally:
        await engine.close()
        await store.close()


asyncio.run(main(*sys.argv[1:]))
