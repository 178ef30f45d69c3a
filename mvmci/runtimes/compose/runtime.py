"""Units as containers of Docker Compose, in a folder that is rendered inside of the cluster's own.

    <cluster>/compose/             `mvmci.runtimes.compose.render`

Docker keeps containers running, also over a restart of the machine; what they are, and what they were
started with, is looked up there each time. Compose only starts the services that it is told; whatever has
to end is stopped by us, in the order of roles, and told twice: to finish, and when its grace is over to let
go of its jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import AsyncGenerator, Collection, Sequence
from pathlib import Path

import msgspec

from mvmci.cluster.broker import BrokerSettings
from mvmci.cluster.changes import Observed, UnitState, in_stopping_order
from mvmci.cluster.deployment import LOCAL_HOST, ROLES, Place, RoleName, Unit, UnitConfig
from mvmci.cluster.topology import Topology
from mvmci.errors import FOR_GOOD, NotFound, StoreUnavailable, Usage
from mvmci.runtime import GRACE_S, OfThisMachine, Provisioning, why_ended
from mvmci.runtimes.compose import docker, render
from mvmci.runtimes.compose.docker import Container
from mvmci.system.processes import program_file
from mvmci.system.tasks import at_most, cancel
from mvmci.trust.authority import Authority

_LOOK_EVERY_S = 1.0  # at the latest: a word of what happened may come between two looks
_HURRY_S = 15  # from the second SIGTERM to SIGKILL: longer than a native program has
_STATES: dict[str, UnitState] = {"created": "starting", "running": "starting", "paused": "starting"}
_ENDED = ("created", "exited", "dead")  # Docker does not start them by itself


class Containers(OfThisMachine):
    """The port `mvmci.runtime.Runtime`."""

    apart = True

    def __init__(self, root: Path, cluster: str) -> None:
        self._state = root / cluster
        self._folder = self._state / "compose"
        self._project = render.project_of(cluster)
        self._leaving: set[str] = set()  # the ids of those that are being stopped

    async def check(self) -> None:
        await asyncio.to_thread(docker.check_docker)
        program_file()
        ours = ""
        with contextlib.suppress(StoreUnavailable):
            ours = render.owner_of(Authority.load(self._state))
        for what, owner in (await docker.owners(self._project)).items():
            if owner != ours or not ours:
                raise Usage(
                    f"the compose project {self._project} is there, and is not this cluster's: it has "
                    f"the {what}",
                    hint="give this cluster another name, or remove the other project: "
                    f"`docker compose -p {self._project} down`, with --volumes to lose its data",
                )

    async def place(self, unit: Unit) -> Place:
        port = render.API_PORT
        return Place(listen=f"0.0.0.0:{port}", address=f"{render.service_name(unit.name)}:{port}")

    def dial(self, unit: Unit, broker: BrokerSettings) -> str:
        return f"tls://{render.BROKER}:{render.BROKER_PORT}"

    def adds(self, topology: Topology, unit: Unit) -> tuple[tuple[str, str], ...]:
        section = msgspec.to_builtins(topology.compose)
        keys = [key for key in section if key != "memory" or unit.role in render.JOINING]
        return tuple((f"compose.{key}", msgspec.json.encode(section[key]).decode()) for key in keys)

    async def observe(self) -> list[Observed]:
        found = [await self._seen(one) for one in await docker.containers(self._project)]
        return sorted(found, key=lambda one: (ROLES.index(one.role), len(one.name), one.name))

    async def watch(self) -> AsyncGenerator[list[Observed], None]:
        changed = asyncio.Event()

        async def listen() -> None:
            async for _ in docker.events(self._project):
                changed.set()

        listening = asyncio.create_task(listen())
        before = None
        try:
            while True:
                changed.clear()
                seen = await self.observe()
                if seen != before:
                    before = seen
                    yield seen
                await at_most(_LOOK_EVERY_S, changed.wait())
        finally:
            await cancel(listening)

    async def provision(self, provisioning: Provisioning) -> None:
        topology = provisioning.topology
        wanted = render.Wanted(
            cluster=topology.cluster,
            units=tuple(provisioning.wanted),
            queues=topology.queues,
            compose=topology.compose,
        )
        starting = {one.unit.name for one in provisioning.starting}
        images = render.render(self._folder, provisioning.authority, wanted, starting)
        for image, service in images.items():
            if not await docker.has_image(image):
                await docker.check_docker()(self._folder, "build", service)

    async def start(self, units: Sequence[UnitConfig], *, attached: bool = False) -> None:
        del attached  # Docker keeps them running, and whoever ends us brings them down first
        running = {_unit(one): one for one in await docker.containers(self._project)}
        if not running:
            await docker.remove_networks(self._project)  # compose makes none another that is there
        other = [
            one for unit in units if (one := running.get(unit.unit.name)) is not None and _config(one) != unit
        ]
        await self._stop(other, GRACE_S)
        names = [render.service_name(one.unit.name) for one in units]
        if names:
            start = ("up", "-d", "--no-build", "--no-recreate", "--no-deps")
            await docker.check_docker()(self._folder, *start, *names)

    async def stop(self, names: Collection[str] | None = None, grace_s: float = GRACE_S) -> bool:
        there = await docker.containers(self._project)
        going = [one for one in there if names is None or _unit(one) in names]
        await self._stop(going, grace_s)
        if len(going) == len(there):
            await docker.remove_networks(self._project)
        return bool(going)

    async def log(
        self, name: str, *, follow: bool = False, last: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        there = {_unit(one): one for one in await docker.containers(self._project)}
        if name not in there:
            raise NotFound(
                f"no unit {name} of {self._state.name} has a container here",
                hint=f"there are {', '.join(sorted(there)) or 'none: `mvmci up FILE` starts them'}",
            )
        async with contextlib.aclosing(docker.logs(there[name].id, follow=follow, last=last)) as pieces:
            async for piece in pieces:
                yield piece

    async def forget(self, hosts: Collection[str] | None = None) -> None:
        if hosts is None or LOCAL_HOST in hosts:
            await docker.remove_data(self._project)

    async def _seen(self, one: Container) -> Observed:
        config = _config(one)
        state: UnitState = _STATES.get(one.state, "down")
        code = one.exit_code if state == "down" else None
        if state == "starting" and one.restarts and one.health != "healthy":
            code = await docker.last_exit(one.id)
            if code in FOR_GOOD:  # Docker starts it again and again, and it will end so again
                state = "down"
        given_up = one.state in _ENDED or (state == "down" and code in FOR_GOOD)
        if one.id in self._leaving:
            state, given_up = "draining", False
        elif state == "starting" and _role(one) == "balancer" and one.health == "healthy":
            state = "ready"
        return Observed(
            name=_unit(one),
            role=_role(one),
            host=config.unit.host if config is not None else LOCAL_HOST,
            state=state,
            config=config,
            pid=one.pid or None,
            restarts=one.restarts,
            last_exit=code,
            reason=await _reason(one) if given_up or state == "down" else "",
            since=_ms(one.since),
            hostname=one.hostname,
            given_up=given_up,
        )

    async def _stop(self, containers: Collection[Container], grace_s: float) -> None:
        """Stop and remove them, in the reverse order of their start."""
        self._leaving |= {one.id for one in containers}
        for role in in_stopping_order(_role(one) for one in containers):
            ids = [one.id for one in containers if _role(one) == role]
            await docker.stop(ids, grace_s, _HURRY_S)


def _unit(one: Container) -> str:
    """The unit that a container is."""
    return one.labels.get(render.UNIT) or f"{one.service}-{one.number}"


def _role(one: Container) -> RoleName:
    told = one.labels.get(render.ROLE, "")
    return next((role for role in ROLES if role == told), "worker")


def _config(one: Container) -> UnitConfig | None:
    """What it was started with; None for one that people started, or another version."""
    try:
        return msgspec.json.decode(one.labels.get(render.CONFIG, ""), type=UnitConfig)
    except msgspec.DecodeError:
        return None


async def _reason(one: Container) -> str:
    """Why it ended, as far as it said."""
    if one.state == "created":
        return "it was never started"
    return why_ended(await docker.last_words(one.id), f"ended with exit code {one.exit_code}")


def _ms(rfc3339: str) -> int:
    """Docker's times have nanoseconds, which Python does not read."""
    try:
        at = datetime.datetime.fromisoformat(f"{rfc3339[:19]}+00:00")
    except ValueError:
        return 0
    return max(0, int(at.timestamp() * 1000))
