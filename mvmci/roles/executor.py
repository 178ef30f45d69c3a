"""The executor as a unit: an engine, and the ways by which others reach it, the broker and HTTP."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from mvmci.api import serve_http
from mvmci.cluster.identity import Identity
from mvmci.cluster.metrics import SCRAPE_S, UnitMetrics
from mvmci.engines.server import Executor, serve_requests
from mvmci.roles.meter import Meter
from mvmci.roles.unit import (
    HostOptions,
    Role,
    about_unit,
    allowed,
    given_token,
    join,
    open_host_engine,
    read_settings,
    run_unit,
    with_programs,
)
from mvmci.store import ClusterSettings
from mvmci.stores.nats import Cluster
from mvmci.system.ports import is_address, is_loopback, own_addresses
from mvmci.trust.certificate import Certificate


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions(HostOptions):
    """How an executor was started. It answers HTTP at `listen`, host and port, if that is given."""

    listen: tuple[str, int] | None = None

    @property
    def outside(self) -> bool:
        """Whether other machines can reach it over HTTP."""
        return self.listen is not None and not is_loopback(self.listen[0])


async def run_executor(options: ExecutorOptions) -> NoReturn:
    """Be an executor until cancelled. Raises as `join` and `run_unit`, Usage for `listen`."""
    identity, path = await join(options, "executor")
    certificate = None
    if options.outside and identity.login.has_name:
        assert options.listen is not None
        certificate = certificate_for(path.parent, options.listen[0])
    if options.outside and not options.token:
        options = replace(options, token=given_token(options))
    open_role = functools.partial(_open_role, identity, options, certificate)
    await run_unit(identity, path, open_role, grace_ms=options.grace_ms, certificate=certificate)


def certificate_for(folder: Path, listen: str) -> Certificate:
    """That of who listens there: at that address, or under that name, or at all that this host has."""
    host = socket.gethostname()
    if is_address(listen) and not ipaddress.ip_address(listen).is_unspecified:
        return Certificate(folder, (host,), lambda: (listen,))
    return Certificate(folder, (host,) if is_address(listen) else (listen, host), own_addresses)


@asynccontextmanager
async def _open_role(
    identity: Identity, options: ExecutorOptions, certificate: Certificate | None, cluster: Cluster
) -> AsyncIterator[Role]:
    allow = allowed(await read_settings(cluster))

    def trouble(why: str) -> None:
        executor.rest(bool(why))
        role.tell_trouble(why)

    engine, isolation = await open_host_engine(cluster, options, lambda: allow, trouble)
    executor = Executor(engine, cluster.store, slots=options.slots)
    meter = Meter(cluster, "executor", counts=executor.metrics)

    def read_unit() -> UnitMetrics:
        meter.watch(SCRAPE_S)
        return meter.metrics()

    async def run() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(serve_requests(executor, cluster.link, cluster.layout), name="serve the broker")
            tasks.create_task(meter.run(), name="meter")
            if options.listen is not None:
                http = serve_http(
                    executor,
                    cluster,
                    *options.listen,
                    token=options.token,
                    queues=identity.queues,
                    folder=options.root / "incoming",
                    certificate=certificate,
                    unit=read_unit,
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
