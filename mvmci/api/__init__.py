"""The HTTP API of an executor: jobs for whoever has `curl`, and runs for workers.

`app` is the application and how it is served, `jobs` the routes about jobs, `engine` the one for workers,
`bodies` what comes in, `answers` what goes out, `metrics` what is counted, `openapi` what describes it.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mvmci.api.engine import JobRunner
    from mvmci.cluster.metrics import UnitMetrics
    from mvmci.stores.nats import Cluster
    from mvmci.trust.certificate import Certificate

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
    certificate: Certificate | None = None,
    unit: Callable[[], UnitMetrics] | None = None,
) -> None:
    """Answer HTTP at `host` until cancelled. With a `token`, whoever asks must have it. With a `certificate`,
    it is HTTPS, and begins when there is one.

    `queues` are those that the executor may write to; none is all of them. `folder` holds modules on their
    way in; one of the system's temporary ones, if absent. `unit` is what its unit tells of itself.
    Raises Usage.
    """
    from mvmci.api.app import Api, serve_api

    if certificate is not None:
        await certificate.there.wait()

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
            unit=unit,
        )
        context = certificate.context if certificate is not None else None
        async with serve_api(api, host, port, context) as bound:
            log.info("the HTTP%s API listens on %s:%d", "S" if context is not None else "", host, bound)
            await asyncio.Event().wait()
