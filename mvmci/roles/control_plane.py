"""The control plane: makes and keeps what a cluster needs on its broker, enrols, reconciles, forgets.

It keeps nothing of its own but a witness of what must be there: it can be killed at any time, several may
run at once, and each is right again as soon as it has read the streams.

    maintain      streams, buckets and consumers, also those that a broker has lost
    enrolment     machines that come with a ticket; credentials that are about to expire
    reconciler    jobs that nobody is looking at
    retention     what may be forgotten
    watch         whether all that was acknowledged is still there
    level         at which all write: the next one, when all understand it
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NoReturn

import msgspec

from mvmci.errors import StoreUnavailable
from mvmci.roles.leveller import Leveller
from mvmci.roles.meter import Meter
from mvmci.roles.reconciler import Reconciler
from mvmci.roles.retention import Retention
from mvmci.roles.unit import Role, UnitOptions, about_unit, read_settings, run_unit
from mvmci.roles.witness import FILE, Watch
from mvmci.store import ClusterSettings, Member, copies
from mvmci.stores.nats import Cluster
from mvmci.system.clock import wall_clock_ms
from mvmci.trust.enrol.server import EnrolmentServer
from mvmci.trust.known import find_config, identity_path
from mvmci.trust.provision import ControlPlaneConfig, make_known, read_config

_LOOK_EVERY_S = 2.0

log = logging.getLogger(__name__)


class ControlPlane:
    """One control plane of `cluster`."""

    def __init__(
        self, cluster: Cluster, witness: Path | None = None, *, clock_ms: Callable[[], int] = wall_clock_ms
    ) -> None:
        self.cluster = cluster
        self.settings = ClusterSettings()
        self.reconciler = Reconciler(cluster, now_ms=clock_ms, paused=lambda: self.watch.loss is not None)
        self.watch = Watch(cluster, witness, open_jobs=self.reconciler.open_jobs, now_ms=clock_ms)
        self.retention = Retention(cluster, self.watch, lambda: self.settings.jobs_ms, clock_ms)
        self.leveller = Leveller(cluster)
        self._maintained: tuple[ClusterSettings, list[str]] | None = None
        self._look = asyncio.Event()
        self._copied: set[str] = set()  # the units whose identities are known to run twice

    async def run(self) -> None:
        """Until cancelled."""
        self.cluster.link.on_reconnect.append(self._look.set)
        self.settings = await read_settings(self.cluster)
        await self.maintain()
        self.watch.make_config = self._make_config
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.watch.run(), name="watch")
            tasks.create_task(self._maintain_always(), name="maintain")
            tasks.create_task(self.reconciler.run(), name="reconcile")
            tasks.create_task(self.retention.run(), name="forget")
            tasks.create_task(Meter(self.cluster, "control-plane").run(), name="meter")

    async def _maintain_always(self) -> None:
        for key in ("settings", "unit.*"):
            await self.cluster.config.watch(key, lambda _: self._look.set())
        while True:
            self._look.clear()
            try:
                self.settings = await read_settings(self.cluster)
                await self.maintain()
                members = await self.cluster.store.presence.members()
                self._name_copies(members)
                await self.leveller.look(members)
            except StoreUnavailable as away:
                log.info("cannot maintain the streams: %s; will retry", away.message)
            try:
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await self._look.wait()
            except TimeoutError:
                pass

    async def _make_config(self) -> None:
        """The store was lost under us, with what the cluster is: that we know. Raises StoreUnavailable."""
        await self.cluster.maintain(self.settings, self.settings.queues)
        await self.cluster.config.put_settings(self.settings)

    def _name_copies(self, members: Iterable[Member]) -> None:
        """Say once of an identity that was copied where it runs."""
        copied = copies(members)
        for unit in copied.keys() - self._copied:
            log.warning(
                "the identity of %s was copied, and runs on %s; `mvmci revoke %s`, and join each by a ticket",
                unit,
                copied[unit],
                unit,
            )
        self._copied = set(copied)

    async def maintain(self) -> None:
        """Make what is missing, and bring up to date what is there. Raises StoreUnavailable, Usage."""
        cluster, settings = self.cluster, self.settings
        queues = await self._queues()
        wanted = (settings, queues)
        if wanted != self._maintained or await cluster.lacks(queues):
            await cluster.maintain(settings, queues)
            self._maintained = wanted

    async def _queues(self) -> list[str]:
        """Those of the topology, and those that enrolled units pull from."""
        units = (await self.cluster.config.all("unit")).values()
        return sorted(
            {*self.settings.queues, *(queue for unit in units for queue in _units.decode(unit).queues)}
        )


class _Unit(msgspec.Struct):
    """What is of interest here of a unit that enrolled."""

    queues: tuple[str, ...] = ()


_units = msgspec.json.Decoder(_Unit)


async def run_control_plane(options: UnitOptions) -> NoReturn:
    """Be a control plane until cancelled. Raises as `run_unit`, and Usage for what it was given."""
    name = options.name or "control-plane-1"
    file = options.config or find_config(options.state, options.cluster, name)
    given = read_config(file, ControlPlaneConfig)
    path = identity_path(options.state, given.cluster, given.unit)
    open_role = functools.partial(_open_role, given, path.with_name(FILE))
    await run_unit(given.identity(path), path, open_role, grace_ms=options.grace_ms, maintains=True)


@asynccontextmanager
async def _open_role(given: ControlPlaneConfig, witness: Path, cluster: Cluster) -> AsyncIterator[Role]:
    control = ControlPlane(cluster, witness, clock_ms=cluster.clock.now_ms)
    with suppress(StoreUnavailable):  # it is looked again
        await control.watch.look()  # before anything that is missing is made anew
    await make_known(cluster, given)
    enrolment = EnrolmentServer(cluster, given.signer(), given.trusted(), certifier=given.certifier())
    await enrolment.start()
    try:
        yield Role(about=about_unit("control-plane"), run=control.run)
    finally:
        await enrolment.close()
