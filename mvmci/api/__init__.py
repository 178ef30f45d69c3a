"""The HTTP API of an executor: jobs for whoever has `curl`, and runs for workers.

`app` is the application and how it is served, `jobs` the routes about jobs, `engine` the one for workers,
`bodies` what comes in, `answers` what goes out, `metrics` what is counted, `openapi` what describes it.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mvmci.api.engine import JobRunner
    from mvmci.stores.nats import Cluster

log = logging.getLogger(__name__)


async def serve_http(
    executor: JobRunner,
    cluster: Cluster,
    host: str,
    port: int,
    *,
    token: str = "",
    queues: tuple[str, ...] = (),
    folder: Path | None = None,
) -> None:
    """Answer HTTP at `host` until cancelled. With a `token`, whoever asks must have it.

    `queues` are those that the executor may write to; none is all of them. `folder` holds modules on their
    way in; one of the system's temporary ones, if absent. Raises Usage.
    """
    from mvmci.api.app import Api, serve_api

    def away() -> str:
        return "" if cluster.link.is_up else "the broker is away"

    with tempfile.TemporaryDirectory(prefix="mvmci-") as temporary:
        api = Api(
            store=cluster.store,
            executor=executor,
            folder=folder or Path(temporary),
            now_ms=cluster.clock.now_ms,
            queues=queues,
            token=token,
            away=away,
        )
        async with serve_api(api, host, port) as bound:
            log.info("the HTTP API listens on %s:%d", host, bound)
            await asyncio.Event().wait()
