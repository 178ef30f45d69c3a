"""The executor as a unit: an engine, and the ways by which others reach it, the broker and HTTP."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NoReturn

from mvmci.api import serve_http
from mvmci.cluster.identity import Identity
from mvmci.engines.server import Executor, serve_requests
from mvmci.roles.unit import (
    HostOptions,
    Role,
    about_unit,
    allowed,
    join,
    open_host_engine,
    read_settings,
    run_unit,
    with_programs,
)
from mvmci.store import ClusterSettings
from mvmci.stores.nats import Cluster


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions(HostOptions):
    """How an executor was started. It answers HTTP at `listen`, host and port, if that is given."""

    listen: tuple[str, int] | None = None


async def run_executor(options: ExecutorOptions) -> NoReturn:
    """Be an executor until cancelled. Raises as `join` and `run_unit`, Usage for `listen`."""
    identity, path = await join(options, "executor")
    open_role = functools.partial(_open_role, identity, options)
    await run_unit(identity, path, open_role, grace_ms=options.grace_ms)


@asynccontextmanager
async def _open_role(identity: Identity, options: ExecutorOptions, cluster: Cluster) -> AsyncIterator[Role]:
    allow = allowed(await read_settings(cluster))

    def trouble(why: str) -> None:
        executor.rest(bool(why))
        role.tell_trouble(why)

    engine, isolation = await open_host_engine(cluster, options, lambda: allow, trouble)
    executor = Executor(engine, cluster.store, slots=options.slots)

    async def run() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(serve_requests(executor, cluster.link, cluster.layout), name="serve the broker")
            if options.listen is not None:
                http = serve_http(
                    executor,
                    cluster,
                    *options.listen,
                    token=options.token,
                    queues=identity.queues,
                    folder=options.root / "incoming",
                )
                tasks.create_task(http, name="serve HTTP")

    async def apply_settings(settings: ClusterSettings) -> None:
        nonlocal allow
        allow = allowed(settings)
        role.about = with_programs(role.about, engine, allow)

    role = Role(
        about=about_unit("executor", slots=options.slots, isolation=isolation),
        run=run,
        apply_settings=apply_settings,
        drain=executor.drain,
        resume=executor.resume,
    )
    try:
        yield role
    finally:
        await engine.close()
