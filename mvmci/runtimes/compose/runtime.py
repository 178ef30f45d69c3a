"""Units as containers of Docker Compose, in a folder that is rendered inside of the cluster's own.

    <cluster>/compose/             `mvmci.runtimes.compose.render`
    <cluster>/compose/plan.json    the units that are kept running

Docker keeps containers running, also over a restart of the machine; what they are is looked up there each
time. Compose only starts: whatever has to end, because it goes or is to be another, is stopped by us
before, in the order of roles, and told twice: to finish, and when its grace is over to let go of its jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from mvmci.cluster.deployment import LOCAL_HOST, ROLES, Place, Role, Unit
from mvmci.errors import EXIT_REFUSED, StoreUnavailable, Usage
from mvmci.runtime import GRACE_S, Ground, State, UnitStatus
from mvmci.runtimes.compose import docker, render
from mvmci.runtimes.compose.docker import Container
from mvmci.trust.authority import Authority

FRESH_S = 0.3  # how long what was seen of containers holds
LOOK_EVERY_S = 1.0
HURRY_S = 5  # from the second SIGTERM to SIGKILL
GRACE = "1d"  # of a unit: we count, and cut it short when it is time
REASON_CHARS_MAX = 300
_STATES: dict[str, State] = {"created": "starting", "running": "starting", "paused": "starting"}


class Containers:
    """The port `mvmci.runtime.Runtime`."""

    apart = True

    def __init__(self, root: Path, cluster: str) -> None:
        self._home = root / cluster
        self._folder = self._home / "compose"
        self._project = render.project_of(cluster)
        self._ground: Ground | None = None
        self._anew: set[str] = set()  # units whose containers are to use a newer ticket
        self._leaving: set[str] = set()  # the ids of those that are being stopped
        self._seen: tuple[float, list[Container]] = (float("-inf"), [])

    def check(self) -> None:
        docker.check()
        render.check_program()
        ours = ""
        with contextlib.suppress(StoreUnavailable):
            ours = render.owner_of(Authority.load(self._home))
        for what, owner in docker.owners(self._project).items():
            if owner != ours or not ours:
                raise Usage(
                    f"the compose project {self._project} is there, and is not this cluster's: it has "
                    f"the {what}",
                    hint="give this cluster another name, or remove the other project: "
                    f"`docker compose -p {self._project} down`, with --volumes to lose its data",
                )

    def place(self, unit: Unit) -> Place:
        port = render.API_PORT
        return Place(listen=f"0.0.0.0:{port}", address=f"{render.service_name(unit.name)}:{port}")

    def planned(self) -> tuple[Unit, ...]:
        return self._orders() if self._containers() else ()

    def units(self) -> list[UnitStatus]:
        planned = {unit.name: unit for unit in self._orders()}
        found = [self._status(one, planned) for one in self._containers()]
        order = {name: place for place, name in enumerate(planned)}
        return sorted(found, key=lambda one: (order.get(one.name, len(order)), one.name))

    async def lay_down(self, ground: Ground) -> None:
        self._ground, self._anew = ground, set(ground.refused)
        rendered = self._render(ground.plan.units)
        if not await docker.has_image(rendered.image):
            await docker.check()(self._folder, "build", next(iter(rendered.marks)))  # one for all

    async def apply(self, units: Sequence[Unit], *, attached: bool = False) -> None:
        del attached  # Docker keeps them running, and whoever ends us brings them down first
        marks = self._render(units).marks if self._ground is not None else None
        going = [one for one in self._containers(fresh=True) if self._goes(one, units, marks)]
        await self._stop(going, GRACE_S)
        if not self._containers(fresh=True):
            await docker.remove_networks(self._project)  # compose makes none another that is there
        self._anew.clear()
        self._keep(units)
        if self._ground is not None:
            await docker.check()(self._folder, "up", "-d", "--no-build")
        self._forget_seen()

    async def ended(self) -> None:
        while await asyncio.to_thread(lambda: self._containers(fresh=True)):  # noqa: ASYNC110 (Docker's)
            await asyncio.sleep(LOOK_EVERY_S)

    async def stop(self, grace_s: float = GRACE_S) -> bool:
        there = self._containers(fresh=True)
        await self._stop(there, grace_s)
        await docker.remove_networks(self._project)
        self._plan.unlink(missing_ok=True)
        return bool(there)

    async def forget(self) -> None:
        await docker.remove_data(self._project)

    # What is there.

    @property
    def _plan(self) -> Path:
        return self._folder / "plan.json"

    def _orders(self) -> tuple[Unit, ...]:
        try:
            return msgspec.json.decode(self._plan.read_bytes(), type=tuple[Unit, ...])
        except (OSError, msgspec.DecodeError):
            return ()

    def _keep(self, units: Sequence[Unit]) -> None:
        data = msgspec.json.encode(tuple(units))
        if not self._plan.exists() or self._plan.read_bytes() != data:
            self._plan.write_bytes(data)

    def _containers(self, *, fresh: bool = False) -> list[Container]:
        at, seen = self._seen
        if fresh or time.monotonic() - at > FRESH_S:
            seen = docker.containers(self._project)
            self._seen = (time.monotonic(), seen)
        return seen

    def _forget_seen(self) -> None:
        self._seen = (float("-inf"), [])

    def _status(self, one: Container, planned: dict[str, Unit]) -> UnitStatus:
        name = _unit(one)
        state: State = _STATES.get(one.state, "down")
        code = one.exit_code if state == "down" else None
        if state == "starting" and one.restarts and one.health != "healthy":
            code = docker.last_exit(one.id)
            if code == EXIT_REFUSED:  # Docker starts it again and again, and it will be refused again
                state = "down"
        if one.id in self._leaving:
            state = "draining"
        elif state == "starting" and _role(one) == "balancer" and one.health == "healthy":
            state = "ready"
        return UnitStatus(
            name=name,
            role=_role(one),
            host=planned[name].host if name in planned else LOCAL_HOST,
            state=state,
            pid=one.pid or None,
            restarts=one.restarts,
            last_exit=code,
            reason=_reason(one) if state == "down" else "",
            since=_ms(one.since),
            hostname=one.hostname,
        )

    # What is to be there.

    def _render(self, units: Sequence[Unit]) -> render.Rendered:
        """Write the folder, for `units`."""
        ground = self._ground
        assert ground is not None
        roles = {unit.role for unit in ground.plan.units if unit.name in ground.refused}
        mine = ground.broker is not None
        return render.render(
            self._folder,
            ground.authority,
            render.Wanted(
                cluster=ground.authority.cluster,
                units=tuple(units),
                queues=ground.topology.workers.queues,
                login=render.inside(ground.authority) if mine else ground.login,
                broker=ground.broker,
                compose=ground.topology.compose,
                grace=GRACE,
                grace_s=int(GRACE_S),
                new_tickets=frozenset(roles),
            ),
        )

    def _goes(self, one: Container, units: Sequence[Unit], marks: dict[str, str] | None) -> bool:
        """Whether a container is to be no more, or another one. Without `marks` nothing is to be another."""
        name = _unit(one)
        if name not in {unit.name for unit in units}:
            return True
        if marks is None:
            return False
        return name in self._anew or marks.get(one.service) != one.labels.get(render.MARK)

    async def _stop(self, containers: Collection[Container], grace_s: float) -> None:
        """Stop and remove them, in the reverse order of their start."""
        self._leaving |= {one.id for one in containers}
        for role in reversed(ROLES):
            ids = [one.id for one in containers if _role(one) == role]
            if ids:
                await docker.stop(ids, grace_s, HURRY_S)
                self._forget_seen()


def _unit(one: Container) -> str:
    """The unit that a container is."""
    return one.labels.get(render.UNIT) or f"{one.service}-{one.number}"


def _role(one: Container) -> Role:
    told = one.labels.get(render.ROLE, "")
    return next((role for role in ROLES if role == told), "worker")


def _reason(one: Container) -> str:
    """The last error that it printed, or how it ended."""
    errors = [line for line in docker.last_words(one.id) if line.startswith("Error: ")]
    said = errors[-1].removeprefix("Error: ") if errors else f"ended with exit code {one.exit_code}"
    return said[:REASON_CHARS_MAX]


def _ms(rfc3339: str) -> int:
    """Docker's times have nanoseconds, which Python does not read."""
    try:
        at = datetime.datetime.fromisoformat(f"{rfc3339[:19]}+00:00")
    except ValueError:
        return 0
    return max(0, int(at.timestamp() * 1000))
