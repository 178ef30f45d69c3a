"""Cluster files, each brought up as a cluster of its own beside those of the user, and down again.

    <root>/_bench/lock         who measures: two at once would measure each other
                 /<name>.yaml  a candidate's file, as it is measured
                 /<name>/      its state directory

All have as many workers as are measured at most. Of these, `Staged.set_workers` lets so many take jobs: to
drain workers takes milliseconds, and `up` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from mvmci.bench.client import Client, listening
from mvmci.bench.profiles import QUEUE
from mvmci.bench.report import CONTROL, Candidate
from mvmci.cluster.deployment import Unit
from mvmci.cluster.metrics import BrokerMetrics
from mvmci.cluster.topology import ExecutorsSection, Topology
from mvmci.deploy.measure import Asker, ask_broker, asking
from mvmci.deploy.operate import down, open_admin
from mvmci.deploy.plan import hosts_of_file, make_plan, read_file
from mvmci.deploy.state import ClusterState
from mvmci.deploy.up import Up
from mvmci.errors import MvmciError, NotYet, Usage
from mvmci.stores.nats import Cluster
from mvmci.system.files import private_folder, write_private
from mvmci.system.lock import hold
from mvmci.trust.authority import Authority

FOLDER = "_bench"  # in the state directory
READY_S = 600.0  # for dozens of workers, on a machine that is busy
HEARD_S_MAX = 120.0  # for workers to begin or to end taking jobs
SPARE = 2  # times the slots that could be taken: what balances orders does not do it evenly
SLOTS_MAX = 1024
ANY_ADDRESS, BROKER_PORT = "0.0.0.0", 4222  # noqa: S104 (as `up` has them on hosts)
JOBS_A_SLOT = 2  # that a closed loop keeps open
_LOOK_EVERY_S = 0.03
_OTHER_LETTERS = re.compile("[^a-z0-9]+")  # than those of a cluster's name


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """How a file is measured: with up to `workers` of `slots` each. Slots of executors do not bind, unless
    the file is measured `as_is`. Jobs may ask for `http`, besides what the file allows."""

    workers: int
    slots: int
    http: Sequence[str] = ()
    as_is: bool = False
    place: int = 0  # among those that are up at once: on hosts, each has a broker's port of its own


def read_candidates(files: Sequence[Path], *, slots: int | None) -> tuple[dict[str, Topology], int]:
    """What the files say, by the names of candidates, and the slots that workers of all of them have.

    They are named by their files, or by the folders of files of one name, as `mvmci init` writes them.
    Without one of access `per-worker` there is one more, `control`: the first with an engine in each worker.
    `slots` are those of the files where they agree, and 2 where they do not. Raises BadTopology, Usage.
    """
    found: dict[str, Topology] = {}
    stems = Counter(file.stem for file in files)
    for file in files:
        stem = file.stem if stems[file.stem] == 1 else file.absolute().parent.name
        name = _OTHER_LETTERS.sub("-", stem.lower()).strip("-") or "file"
        if name in found:
            raise Usage(
                f"two files are named {stem}", hint="a report names candidates by their files or folders"
            )
        found[name] = _rooted(read_file(file)[1], file)
    if len({(one.runtime, tuple(one.hosts)) for one in found.values()}) > 1:
        raise Usage(
            "files of several runtimes, or with different hosts, cannot be compared",
            hint="measure them one at a time, or on the same hosts",
        )
    if slots is None:
        told = {group.slots for one in found.values() for group in one.groups}
        slots = told.pop() if len(told) == 1 else None
    if all(one.access != CONTROL for one in found.values()):
        if "control" in found:
            raise Usage(
                "a file without access `per-worker` cannot be named control",
                hint="that is the name of what all are measured beside",
            )
        first = next(iter(found.values()))
        found["control"] = msgspec.structs.replace(first, access=CONTROL, plugin=None, executors=None)
    return found, slots or 2


def _rooted(found: Topology, file: Path) -> Topology:
    """The same, where its files are found from anywhere."""
    folder = file.absolute().parent

    def at(path: str | None) -> str | None:
        return None if path is None else str(folder / Path(path).expanduser())

    broker = msgspec.structs.replace(found.broker, credentials=at(found.broker.credentials))
    return msgspec.structs.replace(
        found, plugin=at(found.plugin), broker=broker, hosts=hosts_of_file(found, file)
    )


def as_measured(found: Topology, cluster: str, wanted: Wanted) -> tuple[Topology, list[str]]:
    """`found` as it is measured, as a cluster named `cluster`, and in what it is another than its file."""
    group, changed = found.groups[0], []
    workers = msgspec.structs.replace(
        group, hosts=tuple({host: None for one in found.groups for host in one.hosts}), queues=(QUEUE,)
    )
    if not wanted.as_is:
        workers = msgspec.structs.replace(workers, slots=wanted.slots)
    if workers.slots != group.slots:
        changed.append(f"workers.slots: {workers.slots} instead of {group.slots or 'one a processor'}")
    executors = found.executors if found.access == CONTROL else found.executors or ExecutorsSection()
    if executors is not None and not wanted.as_is:
        slots = min(SLOTS_MAX, SPARE * wanted.workers * wanted.slots)
        changed.append(f"executors.slots: {slots} instead of {executors.slots or 'one a processor'}")
        executors = msgspec.structs.replace(executors, slots=slots)
    if len(found.groups) > 1:
        changed.append(f"workers: one group instead of {len(found.groups)}")
    allow = msgspec.structs.replace(found.allow, http=(*found.allow.http, *wanted.http))
    broker = found.broker
    if found.runtime == "ssh" and broker.url is None:
        port = (broker.port or BROKER_PORT) + 1 + wanted.place
        broker = msgspec.structs.replace(broker, listen=f"{broker.address or ANY_ADDRESS}:{port}")
        changed.append(f"broker.listen: port {port}")
    return (
        msgspec.structs.replace(
            found,
            cluster=cluster,
            broker=broker,
            workers=msgspec.structs.replace(workers, count=wanted.workers),
            executors=executors,
            allow=allow,
        ),
        changed,
    )


def text_of(found: Topology) -> bytes:
    """A cluster file that says `found`: JSON is YAML."""
    return msgspec.json.format(msgspec.json.encode(_without_none(msgspec.to_builtins(found))), indent=2)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return value


@dataclass(kw_only=True)
class Staged:
    """A candidate that is up. `workers` of its `most` take jobs."""

    candidate: Candidate
    state: ClusterState
    cluster: Cluster
    client: Client
    asker: Asker
    most: int
    workers: int
    file: Path | None = None  # as it is measured; None: somebody else's cluster, which stays as it is
    topology: Topology | None = None
    drained: set[str] = field(default_factory=set)
    present: set[str] | None = None  # of somebody else's cluster: its units that are there, and take jobs

    @property
    def name(self) -> str:
        """The candidate's."""
        return self.candidate.name

    @property
    def is_local(self) -> bool:
        """Whether all of it runs on this machine, below this process."""
        return self.candidate.runtime == "local" and self.file is not None

    @property
    def jobs_at_once(self) -> int:
        """How many jobs a closed loop keeps open, so that no slot ever waits for one."""
        return JOBS_A_SLOT * self.workers * self.candidate.slots

    @property
    def executors(self) -> set[str]:
        """Its executors."""
        return {unit.name for unit in self.units if unit.role == "executor"}

    @property
    def engines(self) -> set[str]:
        """The units in which guests run."""
        found = self.executors or {unit.name for unit in self.units if unit.role == "worker"}
        return found if self.present is None else found & self.present

    @property
    def units(self) -> Sequence[Unit]:
        """All that was brought up."""
        return self.state.applied_deployment().units

    @property
    def beside_broker(self) -> set[str]:
        """The units on the broker's host."""
        hosts = {unit.host for unit in self.units if unit.role == "broker"}
        return {unit.name for unit in self.units if unit.host in hosts}

    async def broker(self) -> BrokerMetrics | None:
        """What the broker tells; None of one that is not ours. Raises StoreUnavailable."""
        facts, authority = self.state.facts(), Authority.load(self.state.folder)
        if facts is None or authority.external is not None:
            return None
        return await ask_broker(authority.system_login(facts.login))

    async def stored_bytes(self) -> int:
        """What the broker keeps of it. Raises StoreUnavailable."""
        return sum(used for used, _ in (await self.cluster.room()).values())

    async def set_workers(self, count: int) -> None:
        """Let `count` workers take jobs, and wait until the others have none. Raises StoreUnavailable,
        NotYet.

        All go on to in a cluster that is not ours to change.
        """
        if self.file is None:
            return
        units = [unit.name for unit in self.units if unit.role == "worker"]
        wanted = set(units[count:])
        config = self.cluster.config
        await asyncio.gather(
            *(config.put(f"drain.{unit}", b"{}") for unit in wanted - self.drained),
            *(config.delete(f"drain.{unit}") for unit in self.drained - wanted),
        )
        self.drained, self.workers = wanted, count
        end = time.monotonic() + HEARD_S_MAX
        while not self._have_heard(await self.cluster.store.presence.members(), set(units)):
            if time.monotonic() > end:
                raise NotYet(
                    f"{self.name}: after {HEARD_S_MAX:.0f} s other workers take jobs than {count} of "
                    f"{len(units)}",
                    hint="one may have died, or have a job that does not end",
                )
            await asyncio.sleep(_LOOK_EVERY_S)

    def _have_heard(self, members: Sequence[Any], units: set[str]) -> bool:
        there = {one.unit: one for one in members if one.unit in units}
        return there.keys() == units and all(
            one.about.state == ("draining" if name in self.drained else "ready")
            and not (name in self.drained and (one.holds or one.keeps))
            for name, one in there.items()
        )

    async def change(self, topology: Topology) -> None:
        """Make it what another `topology` says, as `up` does, but for its words: of workers that are drained
        it says how to let them take jobs. Raises what `up` does."""
        assert self.file is not None
        self.topology = topology
        await _up(self.state, self.file, topology, lambda _: None)


@contextlib.asynccontextmanager
async def staged(
    root: Path, found: dict[str, Topology], files: dict[str, Path], wanted: Wanted, say: Callable[[str], None]
) -> AsyncIterator[list[Staged]]:
    """All candidates, up. Raises LockHeld, and what `up` does."""
    folder, run = root / FOLDER, secrets.token_hex(3)
    private_folder(folder)
    with hold(folder / ".lock", "measures here", "wait until it has ended"):
        try:
            await _sweep(folder, say)
            async with contextlib.AsyncExitStack() as stack:
                up = []
                for place, (name, one) in enumerate(found.items()):
                    beside = "" if name in files else ", to compare the others with"
                    workers = f"{wanted.workers} worker{'s' * (wanted.workers > 1)}"
                    say(f"bringing {name} up ({one.access}{beside}), with {workers}")
                    own = msgspec.structs.replace(wanted, place=place)
                    entered = _staged(folder, f"bench-{run}-{name}", name, one, files.get(name), own, say)
                    up.append(await stack.enter_async_context(entered))
                yield up
        finally:
            if not _left(folder):  # else what could not be taken down is, by the next bench
                shutil.rmtree(folder)


@contextlib.asynccontextmanager
async def _staged(
    folder: Path,
    cluster_name: str,
    name: str,
    found: Topology,
    origin: Path | None,
    wanted: Wanted,
    say: Callable[[str], None],
) -> AsyncIterator[Staged]:
    topology, changed = as_measured(found, cluster_name[:63].rstrip("-"), wanted)
    file = folder / f"{name}.yaml"
    async with ClusterState(folder / name, topology.cluster) as state:
        private_folder(state.root)
        try:
            await _up(state, file, topology, say)
            async with (
                open_admin(state) as cluster,
                asking(cluster) as asker,
                listening(Client(cluster)) as client,
            ):
                units = state.applied_deployment().units
                yield Staged(
                    candidate=candidate_of(name, origin, found, topology, changed, units),
                    topology=topology,
                    state=state,
                    file=file,
                    cluster=cluster,
                    client=client,
                    asker=asker,
                    most=wanted.workers,
                    workers=wanted.workers,
                )
        finally:
            if state.folder.exists():
                await down(state, purge=True, say=say)


def candidate_of(
    name: str,
    origin: Path | None,
    found: Topology,
    measured: Topology,
    changed: Sequence[str],
    units: Sequence[Unit],
) -> Candidate:
    """What a report says of the file that says `found`, and is measured as `measured` with these `units`."""
    executors = measured.executors
    return Candidate(
        name=name,
        file=str(origin or ""),
        access=found.access,
        runtime=found.runtime,
        hosts=_hosts(units),
        workers=sum(group.count for group in found.groups),
        slots=measured.groups[0].slots or os.cpu_count() or 1,
        executors=0 if executors is None else executors.count,
        executor_slots=0 if executors is None else executors.slots or 0,
        changed=changed,
    )


def _hosts(units: Sequence[Unit]) -> list[str]:
    """Those where jobs are taken and guests run."""
    return sorted({unit.host for unit in units if unit.role in ("worker", "executor")})


@contextlib.asynccontextmanager
async def joined(state: ClusterState) -> AsyncIterator[Staged]:
    """A cluster that is up, as it is. Raises StoreUnavailable, TicketRefused, Usage."""
    async with (
        state,
        open_admin(state) as cluster,
        asking(cluster) as asker,
        listening(Client(cluster)) as client,
    ):
        members = await cluster.store.presence.members()
        told = {one.unit: one.about for one in members}
        takers = {unit for unit, one in told.items() if one.role == "worker" and QUEUE in one.queues}
        workers = [told[unit] for unit in takers]
        executors = [one for one in told.values() if one.role == "executor"]
        if not workers:
            raise Usage(f"no worker of {state.cluster} takes jobs of the queue {QUEUE}")
        applied, facts = state.applied(), state.facts()
        candidate = Candidate(
            name=state.cluster,
            access=applied.access if applied is not None else "",
            runtime=facts.runtime if facts is not None else "",
            hosts=_hosts(state.applied_deployment().units),
            workers=len(workers),
            slots=max(1, round(sum(one.slots for one in workers) / len(workers))),
            executors=len(executors),
            executor_slots=max((one.slots for one in executors), default=0),
        )
        yield Staged(
            candidate=candidate,
            state=state,
            cluster=cluster,
            client=client,
            asker=asker,
            most=len(workers),
            workers=len(workers),
            present={unit for unit in told if unit in takers or told[unit].role == "executor"},
        )


async def _up(state: ClusterState, file: Path, topology: Topology, say: Callable[[str], None]) -> None:
    write_private(file, text_of(topology))
    plan = await make_plan(state.root, file, state=state)
    up = Up(plan, say=say, show=lambda _: None, attached=True, within_s=READY_S)
    await up.run()


def _left(folder: Path) -> list[Path]:
    """The state of clusters that were not taken down."""
    return sorted(folder.glob("*/bench-*"))


async def _sweep(folder: Path, say: Callable[[str], None]) -> None:
    """Take down what a bench that was killed left: what ran on this machine died with it, the rest did not.

    What cannot be now stays for the next bench.
    """
    for left in _left(folder):
        say(f"removing {left.name}, which an earlier bench left")
        try:
            async with ClusterState(left.parent, left.name) as state:
                await down(state, purge=True, say=say)
        except MvmciError as failure:
            say(f"warning: {left.name} stays: {failure.message}")
