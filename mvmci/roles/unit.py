"""A unit of a cluster: the life that a worker, an executor and a control plane have in common.

    join       who it is: kept on this machine, or got for a ticket
    connect    to the broker, which is waited for
    announce   what it is, in presence
    run        its role; follow the settings and whether it is to drain; renew its credential
    stop       drain within the grace, hand back what is left, leave

It runs until it is cancelled, its role fails, or its credential is refused. The first cancellation drains
it; the second cuts that short, and jobs are handed back as they are.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import platform
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from mvmci import __version__
from mvmci.cluster.identity import Identity, UnitRole
from mvmci.config.quantity import format_duration
from mvmci.engines import open_embedded
from mvmci.engines.embedded.engine import Embedded
from mvmci.errors import StoreUnavailable, TicketRefused, VersionsDiffer
from mvmci.jobs.allow import Allow
from mvmci.store import About, ClusterSettings
from mvmci.stores import open_cluster
from mvmci.stores.cached import CachedBlobs
from mvmci.stores.nats import Cluster
from mvmci.system.files import private_folder
from mvmci.system.lock import hold
from mvmci.system.processes import program_digest
from mvmci.system.tasks import at_most, cancel
from mvmci.trust.certificate import Certificate
from mvmci.trust.enrol.client import identity_of, renew_always
from mvmci.trust.known import identity_path
from mvmci.trust.program import find_offer
from mvmci.trust.provision import MemberConfig, read_config
from mvmci.wire import OLDEST, WIRE

JOIN_PAUSE_S = 0.5
CONNECT_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # the last is repeated
SETTINGS_WAIT_S = 0.2
PROGRAM_EVERY_S = 300.0  # at what the cluster offers
_LOOK_EVERY_S = 10.0  # at the settings: a word that they changed may be lost
READY_FILE = "MVMCI_READY_FILE"  # names a file that is touched as long as the cluster answers
READY_EVERY_S = 2.0
BUILD_CHARS = 12  # of the digest by which builds are told apart
GARBAGE_MIN = 10_000  # objects more than before, until the collector looks at them
CACHE_BYTES = 2 << 30
TAKE_JOBS = ("worker", "executor")
STORE_LACKS = "the store lacks records: see `mvmci recover`"  # why they take none then
ANOTHER = "stop that one first, or start another unit under a --name of its own, with a ticket"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class UnitOptions:
    """How a unit was started: where it keeps who it is, how it comes to be somebody, how it stops.

    `config` is the file that `up` or `render` gave it. Who is `patient` waits for a cluster that is not
    there yet. A drain lasts `grace_ms` at the most.
    """

    state: Path
    cluster: str | None = None
    name: str | None = None
    config: Path | None = None
    join: str | None = None
    patient: bool = False
    grace_ms: int


@dataclass(frozen=True, kw_only=True)
class HostOptions(UnitOptions):
    """The same of a unit on whose host jobs may run. `root` holds slots, compiled code and blobs."""

    root: Path
    slots: int
    min_isolation: str = "process"
    reuse: bool = True
    token: str = ""  # that executors ask for over HTTP; empty for none


async def _nothing(*_: object) -> None:
    """What a role does that has no jobs of its own."""


@dataclass(kw_only=True)
class Role:
    """What a unit does. `about` is what others see of it."""

    about: About
    run: Callable[[], Coroutine[Any, Any, None]]  # until cancelled
    apply_settings: Callable[[ClusterSettings], Awaitable[None]] = _nothing  # may change `about`
    drain: Callable[[], Coroutine[Any, Any, None]] = _nothing  # ends when nothing is in work
    resume: Callable[[], None] = lambda: None
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # set when `about` is another
    stopping: bool = False  # it drains because it ends

    def tell_trouble(self, why: str) -> None:
        """Have others see why no job can run here; empty once one can."""
        if why:
            log.warning("no jobs are taken: %s", why)
        else:
            log.info("taking jobs again: guests can run here")
        self.about = msgspec.structs.replace(self.about, trouble=why)
        self.changed.set()


def new_event_loop() -> asyncio.AbstractEventLoop:
    """One that spends less on each of many small things than the standard library's."""
    import uvloop

    return uvloop.new_event_loop()


async def join(options: UnitOptions, role: UnitRole) -> tuple[Identity, Path]:
    """Who a worker or an executor is, and where that is kept. Raises as `identity_of`."""
    if options.config is not None:
        given = read_config(options.config, MemberConfig)
        path = identity_path(options.state, given.identity.cluster, given.identity.unit)
        return given.settled(path), path
    while True:
        try:
            return await identity_of(
                options.state, options.cluster, options.name, role=role, join=options.join
            )
        except StoreUnavailable as away:
            if not options.patient:
                raise
            log.info("%s; will retry", away.message)
        await asyncio.sleep(JOIN_PAUSE_S)


def given_token(options: UnitOptions) -> str:
    """The token for HTTP in what `up` gave a worker or an executor; empty where there is none."""
    return read_config(options.config, MemberConfig).token if options.config is not None else ""


def about_unit(role: UnitRole, **more: Any) -> About:
    """What a unit tells of itself; `more` is what its role adds."""
    return About(
        role=role,
        host=socket.gethostname(),
        pid=os.getpid(),
        version=__version__,
        wire=WIRE,
        oldest=OLDEST,
        build=program_digest()[:BUILD_CHARS],
        **more,
    )


def allowed(settings: ClusterSettings) -> Allow:
    """What the cluster allows workflows."""
    return Allow(http=settings.allow_http, exec=settings.allow_exec)


async def open_host_engine(
    cluster: Cluster, options: HostOptions, allow: Callable[[], Allow], trouble: Callable[[str], None]
) -> tuple[Embedded, str]:
    """An engine of this process, whose blobs are kept on this host, and its isolation.

    `trouble` hears why it can run no job, and "" once it can again. Raises IsolationUnavailable, HostUnfit.
    """
    blobs = CachedBlobs(cluster.store.blobs, options.root / "blobs", bytes_max=CACHE_BYTES)
    engine = open_embedded(
        replace(cluster.store, blobs=blobs),
        options.root,
        allow=allow,
        slots=options.slots,
        min_isolation=options.min_isolation,
        reuse=options.reuse,
        notice=log.info,
        trouble=trouble,
        now_ms=cluster.clock.now_ms,
    )
    try:
        return engine, await engine.prepare()
    except BaseException:
        await engine.close()
        raise


def with_programs(about: About, engine: object, allow: Allow) -> About:
    """`about`, whose isolation tells where programs that are allowed could read our keys."""
    level = about.isolation.partition(",")[0]
    exposed = bool(allow.exec) and isinstance(engine, Embedded) and not engine.parts_programs
    return msgspec.structs.replace(
        about, isolation=f"{level}, keys exposed to programs" if exposed else level
    )


async def run_unit(
    identity: Identity,
    path: Path,
    open_role: Callable[[Cluster], AbstractAsyncContextManager[Role]],
    *,
    grace_ms: int,
    maintains: bool = False,
    certificate: Certificate | None = None,
) -> NoReturn:
    """Be the unit `identity`, which is kept at `path`, until cancelled. Who `maintains` makes the streams. A
    `certificate` is got and renewed.

    Raises TicketRefused when the credential is refused, LockHeld when another process of this machine is
    that unit, VersionsDiffer when the cluster speaks at a level that this build does not understand (what
    is in work is seen to its end before, within the grace), and what ends the role.
    """
    with hold(private_folder(path.parent) / "lock", f"is {identity.unit} already", ANOTHER):
        await _run_only(
            identity, path, open_role, grace_ms=grace_ms, maintains=maintains, certificate=certificate
        )


async def _run_only(
    identity: Identity,
    path: Path,
    open_role: Callable[[Cluster], AbstractAsyncContextManager[Role]],
    *,
    grace_ms: int,
    maintains: bool,
    certificate: Certificate | None,
) -> NoReturn:
    cluster = await connect(identity, maintains=maintains)
    try:
        with suppress(StoreUnavailable):  # whoever needs the settings waits for them
            await cluster.config.settings()  # before anything is written at a level that is none any more
        log.info("%s has joined %s", identity.unit, identity.cluster)
        async with open_role(cluster) as role:
            await cluster.store.presence.describe(role.about)
            # What is there before the first job stays: the collector need not look at it time and again.
            gc.collect()
            gc.freeze()
            gc.set_threshold(GARBAGE_MIN)

            async def drain() -> None:
                role.stopping = True
                await cluster.store.presence.describe(msgspec.structs.replace(role.about, state="draining"))
                await role.drain()

            await _run_parts(
                role.run(),
                watch_config(cluster, role),
                renew_always(cluster.link, identity, path, certificate),
                _until_refused(cluster),
                _touch_ready_file(cluster),
                _tell_of_program(cluster, identity),
                drain=drain,
                grace_ms=grace_ms,
            )
    finally:
        await cluster.close()


async def connect(identity: Identity, *, maintains: bool = False) -> Cluster:
    """The cluster, waited for while its broker is away. Raises TicketRefused."""
    pauses = chain(CONNECT_PAUSES_S, repeat(CONNECT_PAUSES_S[-1]))
    while True:
        try:
            return await open_cluster(identity, maintains=maintains)
        except StoreUnavailable as away:
            log.info("%s; will retry", away.message)
        await asyncio.sleep(next(pauses))


async def _run_parts(
    *parts: Coroutine[Any, Any, None], drain: Callable[[], Awaitable[None]], grace_ms: int
) -> NoReturn:
    """Run `parts` until one fails, which is raised, or until cancelled: then `drain` within the grace.

    So too where the cluster becomes newer than this build: what is in work is still understood by all.
    """
    running = [asyncio.create_task(part) for part in parts]
    try:
        await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
        failure = next(found for task in running if task.done() and (found := task.exception()) is not None)
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
        if isinstance(failure, VersionsDiffer):
            log.info("%s: draining for at most %s", failure.message, format_duration(grace_ms))
            await at_most(grace_ms / 1000, drain())
        raise failure
    except asyncio.CancelledError:
        log.info("stopping: draining for at most %s", format_duration(grace_ms))
        await at_most(grace_ms / 1000, drain())
        raise
    finally:
        await cancel(*running)


async def watch_config(cluster: Cluster, role: Role) -> NoReturn:
    """Follow what the cluster wants and allows, and whether this unit is to drain; tell in presence."""
    presence = cluster.store.presence
    drain_key = f"drain.{presence.unit}"
    changed = role.changed
    cluster.link.on_reconnect.append(changed.set)
    for key in ("settings", drain_key):
        await cluster.config.watch(key, lambda _: changed.set())
    draining: asyncio.Task[None] | None = None
    try:
        while True:
            changed.clear()
            with suppress(StoreUnavailable):
                await role.apply_settings(await read_settings(cluster))
                lost = role.about.role in TAKE_JOBS and await cluster.config.loss() is not None
                asked = await cluster.config.get(drain_key) is not None
                wanted = lost or asked
                if wanted and draining is None:
                    verb, why = ("recover", ": the store lacks records") if lost else ("drain --undo", "")
                    log.info("draining: no new jobs until `mvmci %s`%s", verb, why)
                    draining = asyncio.create_task(role.drain(), name="drain")
                elif not wanted and draining is not None:
                    await cancel(draining)
                    draining = None
                    role.resume()
                    log.info("taking jobs again")
                kept_out = draining is not None or role.stopping or role.about.trouble
                state = "draining" if kept_out else "ready"
                trouble = role.about.trouble or (STORE_LACKS if lost else "")
                now = msgspec.structs.replace(role.about, state=state, drained=asked, trouble=trouble)
                await presence.describe(now)
            await at_most(_LOOK_EVERY_S, changed.wait())
    finally:
        await cancel(draining)


async def _tell_of_program(cluster: Cluster, identity: Identity) -> None:
    """Say in the log when the cluster offers another program than this one."""
    told = f"sha256:{program_digest()}"
    while identity.login.jwt:
        with suppress(StoreUnavailable, TicketRefused):
            offer = await find_offer(cluster.config, identity, platform.machine())
            if offer is not None and offer.digest != told:
                told = offer.digest
                log.warning("the cluster runs another build, %s (%s): `mvmci upgrade`", offer.version, told)
        await asyncio.sleep(PROGRAM_EVERY_S)


async def read_settings(cluster: Cluster) -> ClusterSettings:
    """What the cluster is and allows; waited for while nobody has said it. Raises TicketRefused."""
    while True:
        try:
            found = await cluster.config.settings()
            if found is not None:
                return found
        except StoreUnavailable as away:
            log.info("cannot read the settings: %s; will retry", away.message)
        await asyncio.sleep(SETTINGS_WAIT_S)


async def _until_refused(cluster: Cluster) -> NoReturn:
    await cluster.link.refused.wait()
    assert cluster.link.failure is not None
    raise cluster.link.failure


async def _touch_ready_file(cluster: Cluster) -> None:
    """While the cluster answers: whoever watches a container looks at the file's time."""
    file = os.environ.get(READY_FILE)
    while file:
        with suppress(StoreUnavailable):
            if await cluster.config.get("settings") is not None:
                Path(file).touch()
        await asyncio.sleep(READY_EVERY_S)
