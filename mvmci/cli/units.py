"""The verbs that are units of a cluster: worker, executor, and those that `up` starts beside them.

Each runs until it is stopped. SIGTERM or Ctrl-C drains a worker, within --grace. The second one cuts that
short: jobs are handed back as they are. The third does not even wait for that.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from mvmci import __version__
from mvmci.cli.options import (
    HOST_FOLDER,
    Duration,
    cluster_option,
    examples,
    find_cluster,
    option,
    run_async,
    state_option,
)
from mvmci.errors import StoreUnavailable, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mvmci.cluster.identity import Identity, UnitRole
    from mvmci.engine import Engine
    from mvmci.engines.embedded.engine import Embedded
    from mvmci.jobs.allow import Allow
    from mvmci.store import About, ClusterSettings
    from mvmci.stores.nats import Cluster

GRACE = "30s"
CACHE_BYTES = 2 << 30
API_PORT = 27288
TOKEN_CHARS_MIN = 16
CONNECT_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # the last is repeated
SWITCH_S = 30.0  # for jobs to finish in before another engine is used; a grace may be longer
ENROL_PAUSE_S = 0.5
READY_FILE = "MVMCI_READY_FILE"  # names a file that is touched as long as the cluster answers
READY_EVERY_S = 2.0
GARBAGE_MIN = 10_000  # objects more than before, until the collector looks at them
OBEY_EVERY_S = 10.0  # a word that something changed may be lost

log = logging.getLogger("mvmci")

grace_option = option("--grace", type=Duration(), default=GRACE, show_default=True, help="To finish in.")
token_option = option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Holds the word that executors want to hear over HTTP. Make it mode 600.",
)
isolation_options = (
    option(
        "--min-isolation",
        type=click.Choice(["process", "filtered", "confined", "isolated"]),
        default="process",
        show_default=True,
        help="Refuse to run below it.",
    ),
    option("--isolation", type=click.Choice(["reuse", "per-job"]), default="reuse", show_default=True),
)
join_option = option(
    "--join", metavar="TICKET|@FILE|-", help="Enrol with a ticket, unless this was done before."
)
slots_option = option(
    "--slots", type=click.IntRange(1, 1024), help="Jobs at once. As many as processors, if absent."
)
name_option = option("--name", metavar="NAME", help="The unit's name. Of this host, if absent.")
replica_option = option(
    "--replica-of",
    metavar="SERVICE",
    help="This is one of several containers of that compose service, and named by its number.",
)
patient_option = option("--patient", is_flag=True, help="Wait for a cluster that is not there yet.")
config_option = option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="What `mvmci up` or `render` gave this unit.",
    hidden=True,
)


@click.command(
    "worker",
    epilog=examples(
        "mvmci worker --join @ticket            add this machine to a cluster",
        "mvmci worker --join @ticket --slots 8 --label arch=amd64",
        "mvmci worker                           again, under the name that it got",
    ),
)
@join_option
@name_option
@replica_option
@patient_option
@config_option
@slots_option
@option("--queue", "queues", multiple=True, help="Queues to take jobs from. Those of the ticket, if absent.")
@option("--label", "labels", metavar="K=V", multiple=True, help="What is special about this machine.")
@isolation_options[0]
@isolation_options[1]
@token_option
@grace_option
@cluster_option
@state_option
def worker_verb(state: Path, cluster: str | None, join: str | None, name: str | None, **options: Any) -> int:
    """Take jobs from a cluster and run them here, until stopped."""
    _log_to_stderr()
    return _run(_worker(state, cluster, join, name, options))


async def _worker(
    state: Path, cluster: str | None, join: str | None, name: str | None, options: dict[str, Any]
) -> int:
    identity, path = await _identity(state, cluster, name, join, options, role="worker")
    async with _joined(identity) as found:
        await _work(found, identity, path, state / HOST_FOLDER, options)
    return 0


async def _identity(
    state: Path,
    cluster: str | None,
    name: str | None,
    join: str | None,
    options: dict[str, Any],
    *,
    role: UnitRole,
) -> tuple[Identity, Path]:
    """Who this unit is, and where that is kept. Raises as `identity_of`."""
    from mvmci.trust.enrol.client import host_name, identity_of, identity_path
    from mvmci.trust.provision import MemberConfig, read

    if options["config"] is not None:
        given = read(options["config"], MemberConfig)
        path = identity_path(state, given.identity.cluster, given.identity.unit)
        return given.settled(path), path
    if name is None and options["replica_of"] is not None:
        from mvmci.runtimes.compose.replica import replica_name

        name = await asyncio.to_thread(replica_name, options["replica_of"], host_name())
    while True:
        try:
            return await identity_of(state, cluster, name, role=role, join=join, find=find_cluster)
        except StoreUnavailable as away:
            if not options["patient"]:
                raise
            log.info("%s; trying again", away.message)
        await asyncio.sleep(ENROL_PAUSE_S)


async def _work(
    cluster: Cluster, identity: Identity, path: Path, root: Path, options: dict[str, Any]
) -> None:
    import msgspec

    from mvmci.roles.control_plane import read_settings
    from mvmci.roles.worker import Worker
    from mvmci.trust.enrol.client import renew_always

    settings = await read_settings(cluster)
    allow = _allow(settings)
    slots = options["slots"] or os.cpu_count() or 1
    queues = options["queues"] or identity.queues or settings.queues
    token = _token(options["token_file"])

    async def open_engine(settings: ClusterSettings) -> tuple[Engine, str]:
        """The engine that the cluster wants its workers to use, and the isolation if it is this worker's."""
        from mvmci.engines import open_remote

        if settings.engine == "embedded":
            return await _open_embedded(cluster, root, lambda: allow, slots, options)
        return await open_remote(cluster, settings.engine, token), ""

    async def follow(settings: ClusterSettings, about: About) -> About:
        """Go over to the engine that the cluster wants its workers to use."""
        nonlocal allow
        allow = _allow(settings)
        if settings.engine != about.engine:
            log.info("going over from engine %s to %s", about.engine, settings.engine)
            await cluster.store.presence.describe(msgspec.structs.replace(about, state="draining"))
            engine, isolation = await open_engine(settings)
            await worker.switch(engine, within_s=min(SWITCH_S, options["grace"] / 1000))
            about = msgspec.structs.replace(about, engine=settings.engine, isolation=isolation)
        return about

    engine, isolation = await open_engine(settings)
    worker = Worker(cluster.store, engine, queues=queues, slots=slots)
    try:
        about = _about(
            identity,
            slots=slots,
            queues=tuple(queues),
            labels=dict(_label(text) for text in options["labels"]),
            engine=settings.engine,
            isolation=isolation,
        )
        await _until_stopped(
            cluster,
            worker.run(),
            _obey(cluster, about, worker, follow),
            renew_always(cluster.link, identity, path),
            drain=worker.drain,
            grace_ms=options["grace"],
        )
    finally:
        await worker.engine.close()


async def _open_embedded(
    cluster: Cluster, root: Path, allow: Callable[[], Allow], slots: int, options: dict[str, Any]
) -> tuple[Embedded, str]:
    """An engine of this process, whose blobs are kept on this host, and its isolation."""
    from mvmci.engines import open_embedded
    from mvmci.stores.cached import CachedBlobs

    blobs = CachedBlobs(cluster.store.blobs, root / "blobs", bytes_max=CACHE_BYTES)
    engine = open_embedded(
        replace(cluster.store, blobs=blobs),
        root,
        allow=allow,
        slots=slots,
        min_isolation=options["min_isolation"],
        reuse=options["isolation"] == "reuse",
        notice=log.info,
        now_ms=cluster.clock.now_ms,
    )
    try:
        return engine, await engine.prepare()
    except BaseException:
        await engine.close()
        raise


def _allow(settings: ClusterSettings) -> Allow:
    from mvmci.jobs.allow import Allow

    return Allow(http=settings.allow_http, exec=settings.allow_exec)


def _token(file: Path | None) -> str:
    """What is asked for at, or shown to, the HTTP door of executors; empty for none. Raises Usage."""
    if file is None:
        return ""
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise Usage(f"{file}, which --token-file names, cannot be read: {why}") from None
    if len(token) < TOKEN_CHARS_MIN:
        raise Usage(
            f"the token in {file} has less than {TOKEN_CHARS_MIN} characters",
            hint="`openssl rand -hex 32` makes a good one",
        )
    return token


class _Drains(Protocol):
    """A role that can be told to take no more jobs: a worker, an executor."""

    async def drain(self) -> None: ...

    def resume(self) -> None: ...


async def _obey(
    cluster: Cluster,
    about: About,
    role: _Drains,
    follow: Callable[[ClusterSettings, About], Awaitable[About]],
) -> None:
    """Follow what the cluster wants and allows, and whether this unit is to drain."""
    import msgspec

    from mvmci.roles.control_plane import read_settings

    unit = cluster.store.presence.unit

    changed = asyncio.Event()
    cluster.link.on_reconnect.append(changed.set)
    for key in ("settings", f"drain.{unit}"):
        await cluster.config.watch(key, lambda _: changed.set())
    draining: asyncio.Task[None] | None = None
    await cluster.store.presence.describe(about)
    while True:
        changed.clear()
        with suppress(StoreUnavailable):
            settings = await read_settings(cluster)
            about = await follow(settings, about)
            wanted = await cluster.config.get(f"drain.{unit}") is not None
            if wanted and draining is None:
                log.info("draining: another word is awaited before new jobs are taken")
                draining = asyncio.create_task(role.drain(), name="drain")
            elif not wanted and draining is not None:
                draining.cancel()
                draining = None
                role.resume()
                log.info("taking jobs again")
            state = "draining" if draining is not None else "ready"
            await cluster.store.presence.describe(msgspec.structs.replace(about, state=state))
        with suppress(TimeoutError):
            async with asyncio.timeout(OBEY_EVERY_S):
                await changed.wait()


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise Usage(f"--label {text!r} is not of the form K=V")
    return key, value


@click.command(
    "executor",
    epilog=examples(
        "mvmci executor --join @ticket --slots 8     through the broker: no port is opened",
        "mvmci executor --listen 127.0.0.1:27288     over HTTP as well, for this machine",
        "mvmci executor --listen 0.0.0.0:27288 --token-file token",
    ),
)
@join_option
@name_option
@replica_option
@patient_option
@config_option
@slots_option
@option(
    "--listen", metavar="HOST[:PORT]", help=f"Answer HTTP there as well. The port is {API_PORT}, if absent."
)
@isolation_options[0]
@isolation_options[1]
@token_option
@grace_option
@cluster_option
@state_option
def executor_verb(
    state: Path, cluster: str | None, join: str | None, name: str | None, **options: Any
) -> int:
    """Be an engine for workers that have none of their own, until stopped."""
    _log_to_stderr()
    return _run(_executor(state, cluster, join, name, options))


async def _executor(
    state: Path, cluster: str | None, join: str | None, name: str | None, options: dict[str, Any]
) -> int:
    token = _token(options["token_file"])
    listen = _listen(options["listen"], token) if options["listen"] else None
    identity, path = await _identity(state, cluster, name, join, options, role="executor")
    async with _joined(identity) as found:
        await _execute(found, identity, path, state / HOST_FOLDER, options, listen, token)
    return 0


async def _execute(
    cluster: Cluster,
    identity: Identity,
    path: Path,
    root: Path,
    options: dict[str, Any],
    listen: tuple[str, int] | None,
    token: str,
) -> None:
    from mvmci.engines.server import Executor, serve_requests
    from mvmci.roles.control_plane import read_settings
    from mvmci.trust.enrol.client import renew_always

    settings = await read_settings(cluster)
    allow = _allow(settings)
    slots = options["slots"] or os.cpu_count() or 1
    engine, isolation = await _open_embedded(cluster, root, lambda: allow, slots, options)
    executor = Executor(engine, cluster.store, slots=slots)

    async def follow(settings: ClusterSettings, about: About) -> About:
        nonlocal allow
        allow = _allow(settings)
        return about

    try:
        about = _about(identity, slots=slots, isolation=isolation)
        doors = [serve_requests(executor, cluster.link, cluster.layout)]
        if listen is not None:
            from mvmci.api import serve_http

            incoming = root / "incoming"
            doors.append(
                serve_http(executor, cluster, *listen, token=token, queues=identity.queues, folder=incoming)
            )
        await _until_stopped(
            cluster,
            *doors,
            _obey(cluster, about, executor, follow),
            renew_always(cluster.link, identity, path),
            drain=executor.drain,
            grace_ms=options["grace"],
        )
    finally:
        await engine.close()


def _listen(text: str, token: str) -> tuple[str, int]:
    """Where to answer HTTP. Raises Usage."""
    from mvmci.system.ports import is_loopback

    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = text, str(API_PORT)
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65_535:
        raise Usage(
            f"--listen {text!r} is not of the form HOST:PORT", hint=f"for example 127.0.0.1:{API_PORT}"
        )
    if not token and not is_loopback(host):
        raise Usage(
            f"--listen {text} can be reached from other machines, and needs --token-file",
            hint="`(umask 077; openssl rand -hex 32 > token)` makes one; workers get the same file",
        )
    return host, int(port)


@click.command(
    "control-plane",
    epilog=examples("mvmci control-plane --cluster demo      `mvmci up` starts it; several may run"),
)
@name_option
@config_option
@grace_option
@cluster_option
@state_option
def control_plane_verb(
    state: Path, cluster: str | None, name: str | None, config: Path | None, grace: int
) -> int:
    """Keep a cluster's streams, enrol machines, find jobs that were left behind, forget old ones."""
    _log_to_stderr()
    return _run(_control_plane(state, cluster, name, config, grace))


async def _control_plane(
    state: Path, cluster: str | None, name: str | None, config: Path | None, grace_ms: int
) -> int:
    from mvmci.roles.control_plane import ControlPlane
    from mvmci.trust.enrol.client import identity_path, renew_always
    from mvmci.trust.enrol.server import EnrolmentServer
    from mvmci.trust.provision import ControlPlaneConfig, make_known, read

    given = read(config or _given(state, cluster, name or "control-plane-1"), ControlPlaneConfig)
    authority, path = given.authority(), identity_path(state, given.cluster, given.unit)
    identity = given.identity(path)
    async with _joined(identity, maintains=True) as found:
        await make_known(found, given)
        control = ControlPlane(found, clock_ms=found.clock.now_ms)
        enrolment = EnrolmentServer(found, authority)
        await enrolment.start()
        try:
            await found.store.presence.describe(_about(identity))
            renewing = renew_always(found.link, identity, path)
            await _until_stopped(found, control.run(), renewing, drain=_nothing, grace_ms=grace_ms)
        finally:
            await enrolment.close()
    return 0


async def _nothing() -> None:
    """A control plane holds nothing that would have to be let go."""


@click.command("broker", epilog=examples("mvmci broker --cluster demo      `mvmci up` starts it"))
@config_option
@cluster_option
@state_option
def broker_verb(state: Path, cluster: str | None, config: Path | None) -> int:
    """Become the cluster's broker: nats-server, with the configuration that `mvmci up` has laid down."""
    from mvmci.roles.broker import FOLDER, become
    from mvmci.trust.provision import BrokerConfig, read

    given = read(config or _given(state, cluster, "broker-1"), BrokerConfig)
    become(state / given.cluster / FOLDER, given.settings, given.guard())


def _given(state: Path, cluster: str | None, name: str) -> Path:
    """What `up` gave a unit of this machine. Raises StoreUnavailable."""
    cluster = find_cluster(state, cluster)
    file = state / cluster / "units" / name / "config.json"
    if not file.exists():
        raise StoreUnavailable(
            f"cluster {cluster} has no {name} on this machine", hint="`mvmci up` starts one"
        )
    return file


@click.command(
    "balancer",
    epilog=examples(
        "mvmci balancer --cluster demo --listen 127.0.0.1:8000 --backend a=127.0.0.1:8001    `up` starts it"
    ),
)
@name_option
@option("--listen", metavar="HOST:PORT", required=True, help="Where workers dial.")
@option("--backend", "backends", metavar="NAME=HOST:PORT", multiple=True, required=True, help="An executor.")
@cluster_option
@state_option
def balancer_verb(
    state: Path, cluster: str | None, name: str | None, listen: str, backends: tuple[str, ...]
) -> int:
    """Become a balancer in front of executors: haproxy, which this machine must have."""
    from mvmci.jobs.job import check_id
    from mvmci.roles.balancer import exec_balancer

    name = check_id(name or "balancer", "unit's name")
    exec_balancer(state / find_cluster(state, cluster) / "units" / name, listen, backends)


@asynccontextmanager
async def _joined(identity: Identity, *, maintains: bool = False) -> AsyncIterator[Cluster]:
    """The cluster, waited for while its broker is away."""
    cluster = await _connect(identity, maintains)
    log.info("%s has joined %s", identity.unit, identity.cluster)
    told = os.environ.get(READY_FILE)
    telling = asyncio.create_task(_tell_ready(cluster, Path(told)), name="tell ready") if told else None
    try:
        yield cluster
    finally:
        if telling is not None:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
        await cluster.close()


async def _tell_ready(cluster: Cluster, file: Path) -> None:
    """Touch `file` while the cluster answers: whoever watches a container looks at its time."""
    while True:
        with suppress(StoreUnavailable):
            if await cluster.config.get("settings") is not None:
                file.touch()
        await asyncio.sleep(READY_EVERY_S)


async def _connect(identity: Identity, maintains: bool) -> Cluster:
    from mvmci.stores import open_cluster

    pauses = list(reversed(CONNECT_PAUSES_S))
    while True:
        try:
            return await open_cluster(identity, maintains=maintains)
        except StoreUnavailable as away:
            log.info("%s; trying again", away.message)
        await asyncio.sleep(pauses.pop() if len(pauses) > 1 else pauses[0])


def _run(unit: Coroutine[Any, Any, int]) -> int:
    """Run a unit, on a loop that spends less on each of many small things than the standard library's."""
    import uvloop

    return run_async(unit, cancels=2, loop=uvloop.new_event_loop)


def _keep_what_is_loaded() -> None:
    """What is there before the first job stays: the collector need not look at it time and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_MIN)


async def _until_stopped(
    cluster: Cluster,
    *parts: Coroutine[Any, Any, None],
    drain: Callable[[], Awaitable[None]],
    grace_ms: int,
) -> None:
    """Run `parts` until a signal comes, one of them fails, or the credential is refused; then drain."""
    _keep_what_is_loaded()
    refused = asyncio.create_task(cluster.link.refused.wait())
    running = [asyncio.ensure_future(part) for part in parts]
    failing = asyncio.gather(*running)
    try:
        either: list[asyncio.Future[Any]] = [refused, failing]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if refused.done():
            assert cluster.link.failure is not None
            raise cluster.link.failure
        await failing
    except asyncio.CancelledError:
        log.info("draining, for at most %.0f s", grace_ms / 1000)
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_ms / 1000):
                await drain()
        raise
    finally:
        for task in (refused, *running):
            task.cancel()
        await asyncio.gather(refused, failing, *running, return_exceptions=True)


def _about(identity: Identity, **more: Any) -> About:
    from mvmci.store import About

    return About(role=identity.role, host=socket.gethostname(), pid=os.getpid(), version=__version__, **more)


def _log_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=os.environ.get("MVMCI_LOG", "INFO").upper(),
        format="%(asctime)s %(levelname)s %(message)s",
    )
