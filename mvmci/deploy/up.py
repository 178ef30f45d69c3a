"""A cluster as its file says: what `up` does.

`Up` executes the actions of a `Plan`, and no others: what is stopped or started again is stopped, what
starts is given its files and started, what the cluster is and allows is written down. Then it waits until
each unit is *seen* in presence and a real job has run. When it cannot finish it says how far it came, and
the same again goes on from there.

Where workers move to another engine, that one comes first, then its name in the settings, which each
worker follows when it has drained; what they left goes last. So there is always an engine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import platform
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from mvmci import __version__
from mvmci.cluster.broker import ANY_PORT
from mvmci.cluster.changes import Action, Observed, steps
from mvmci.cluster.deployment import EMBEDDED, SERVING, Deployment, UnitConfig
from mvmci.cluster.identity import Identity, Login, Ticket, decode_ticket, encode_ticket
from mvmci.cluster.topology import Topology, host_and_port
from mvmci.cluster.witness import RECOVER
from mvmci.deploy.plan import Plan, broker_of, broker_warnings, configs_of, make_plan, settings_of
from mvmci.deploy.state import VERSION, ClusterState, Facts
from mvmci.deploy.status import ClusterStatus, UnitRow, rows
from mvmci.errors import (
    MvmciError,
    PartlyApplied,
    StoreFull,
    StoreLost,
    StoreUnavailable,
    TicketRefused,
    VersionsDiffer,
)
from mvmci.jobs.journal import PROOF_BY, status
from mvmci.jobs.nothing import NOTHING, nothing
from mvmci.journals.client import mint_id, submit, until_ended
from mvmci.journals.reader import load
from mvmci.roles import broker
from mvmci.runtime import Provisioning, Runtime
from mvmci.store import Member, Store
from mvmci.stores import open_cluster
from mvmci.system.clock import wall_clock_ms
from mvmci.system.files import write_private
from mvmci.system.ports import choose_port, is_loopback, outward_address
from mvmci.system.processes import runs_zipapp
from mvmci.system.tasks import cancel
from mvmci.trust.authority import Authority

if TYPE_CHECKING:  # the connection takes long to import: units start meanwhile
    from mvmci.stores.nats import Cluster

READY_S = 60.0
BATCH = 0.2
_LOOK_EVERY_S = 0.03  # at presence; how units are, their runtime tells by itself
CRASHES_MAX = 5  # of a unit that was never ready
TICKET_S = 3600.0
PROOF_MS = 30_000
FULL_FOR_S = 1.0  # a cluster is busy and well that is so at two looks
_TAIL_BYTES = 4096
_TAIL_S = 10.0  # a host may be of no help


class Overtaken(MvmciError):
    """What a plan was made from is no longer so: by somebody else's `up`, or a unit has ended by itself."""


class Up:
    """One `up`: what it does, and whom it tells."""

    def __init__(
        self,
        plan: Plan,
        *,
        say: Callable[[str], None],
        show: Callable[[Sequence[UnitRow]], None],
        attached: bool = False,
        within_s: float = READY_S,
        batch: float = BATCH,
    ) -> None:
        self._plan = plan
        self._state = plan.state
        self._runtime = plan.state.runtime(plan.runtime)
        self._say = say
        self._show = show  # the units, whenever something became of them
        self.begun = False  # whether something may have been changed
        self.adopts = False  # whether something of the cluster ran before, which is not ours to stop
        self._attached = attached  # a cluster that it starts is stopped when this process dies
        self._within_s = within_s
        self._batch = batch  # the share of hosts on which units start again at the same time
        self.proved = False  # whether a job has run
        self._waits = ""  # why the job that is to prove it has not run yet
        self._seen: list[Observed] = []
        self._members: Sequence[Member] | None = None
        self._rows: Sequence[UnitRow] = ()
        self._broker_at: str | None = None
        self._crashed_before: dict[str, int] = {}
        self._touched: set[str] = set()  # the units to which something is being done
        self._watching: asyncio.Task[None] | None = None
        self._authority: Authority | None = None
        self._configs: list[UnitConfig] = []
        self._later = [action for action in plan.actions if action.after_move]

    async def run(self) -> ClusterStatus:
        """Do it.

        Raises LockHeld, Overtaken, Usage, StoreUnavailable, TicketRefused, VersionsDiffer, and later on
        PartlyApplied.
        """
        plan, state = self._plan, self._state
        with state.lock():
            if await make_plan(state.root, plan.file, plan.runtime, state=state) != plan:
                raise Overtaken(f"{state.cluster} has changed meanwhile")
            self._runtime = state.runtime(plan.runtime)
            before = await self._runtime.observe()
            self.adopts = bool(before)
            try:
                async with asyncio.timeout(self._within_s) as self._limit:
                    await self._apply(before)
            except TimeoutError:
                waits = f", and {self._waits}" if self._waits else ""
                raise await self._partly(f"this is so after {self._within_s:g} s{waits}") from None
            except MvmciError as error:
                if not self.begun:
                    raise
                raise await self._partly(error.message, error.hint) from error
            finally:
                await self._watch_no_more()
            state.keep_applied(plan.text, plan.deployment)
            for note in self._runtime.notes:
                if note not in plan.notes:
                    self._say(note)
            if away := self._runtime.away:
                why = "; ".join(f"nothing is done on {host}: {why}" for host, why in sorted(away.items()))
                hint = "the same command finishes it once they can be reached; a host that is dead for good"
                raise await self._partly(why, f"{hint} is `state: lost`")
        return ClusterStatus(
            cluster=state.cluster,
            access=plan.topology.access,
            runtime=plan.runtime,
            units=list(self._rows),
        )

    async def _apply(self, before: Sequence[Observed]) -> None:
        plan = self._plan
        for action in plan.actions:
            if action.kind == "wait" and action.unit and action.unit.role == "broker" and not before:
                raise StoreUnavailable(action.why, hint="the broker is to run there")
        authority, facts = make_keys(
            self._state, plan.topology, plan.deployment, plan.external, self._runtime, plan.runtime
        )
        self._authority, who = authority, plan.external or authority
        self._configs = configs_of(plan.deployment, plan.topology, self._runtime, before, who, facts.broker)
        hosts = {one.unit.host for one in plan.actions if one.unit is not None and one.touches}
        hosts |= {one.host for one in before if one.name in _named(plan.actions)}
        async with AsyncExitStack() as locked:
            with self._untimed():  # the program may be on its way to the hosts
                hosts |= {*self._runtime.absent(), *self._runtime.returned()}
                lock = self._runtime.lock(hosts, authority.owner)
                await locked.enter_async_context(lock)
            if before and (was := self._state.facts()) is not None:
                await self._check_level(authority.admin(was.login))
            self.begun = True
            self._state.keep_facts(facts)
            self._runtime.give_up(authority)
            await self._change(before, facts)

    async def _change(self, before: Sequence[Observed], facts: Facts) -> None:
        """The same, once nobody else is at work on the cluster's hosts."""
        from mvmci.trust.registry import push_accounts

        plan, authority = self._plan, self._authority
        assert authority is not None
        now = [action for action in plan.actions if not action.after_move]
        first, *then = steps(now, self._batch)
        self._touched = {one.name for one in before} & _named(now)
        if before:
            await self._stop(first)
        self._touched = _named(now)
        await self._start(first)
        async with self._joined(authority.admin(facts.login)) as cluster:
            if plan.external is None:
                system = authority.system_login(facts.login)
                for warning in await broker_warnings(plan, cluster.link.login, system):
                    self._say(warning)
            await self._make(cluster, moves=bool(before))
            if plan.external is None:
                await push_accounts(cluster.config, authority, facts.login)
            await self._start_again(cluster, first, then)
            await self._move(cluster)
            job = mint_id()
            proving = asyncio.create_task(self._prove(cluster.store, job), name="prove")
            try:
                await self._until_ready(cluster)
                await self._until_proved(cluster, proving, job)
            finally:
                await cancel(proving)
            facts = msgspec.structs.replace(self._reached(facts), file=str(plan.file.absolute()))
            self._state.keep_facts(facts)
            self._broker_at = facts.outside.urls[0]
            self._update()
            await self._write_ticket(authority, facts, cluster)
            await self._offer_program(authority, cluster)
        await self._runtime.forget(self._runtime.absent())

    async def _check_level(self, identity: Identity) -> None:
        """See that units of this build can go on where those that run now are. Raises VersionsDiffer."""
        with suppress(StoreUnavailable):
            cluster = await open_cluster(identity, announce=False)
            try:
                await cluster.config.settings()
            finally:
                await cluster.close()

    # The actions.

    async def _start_again(
        self, cluster: Cluster, first: Sequence[Action], then: Sequence[Sequence[Action]]
    ) -> None:
        """Do the steps behind the `first`, each once all units before it are well. Raises MvmciError."""
        begun = [*first]
        there: set[str] = set()  # the hosts of the last step, as it began
        for step in then:
            await self._until_well(cluster, begun)
            self._check_none_left(there)
            there = {action.unit.host for action in step if action.unit is not None}
            there -= self._runtime.away.keys()
            await self._stop(step)
            await self._start(step)
            begun += step

    def _check_none_left(self, hosts: set[str]) -> None:
        """Raises MvmciError where one went away as its units were started again: what they are now may be the
        reason, and no other host is to follow it."""
        if lost := sorted(hosts & self._runtime.away.keys()):
            why = "; ".join(self._runtime.away[host] for host in lost)
            raise MvmciError(
                f"{', '.join(lost)} went away as units there were started again: {why}",
                hint="see why; the same command then leaves out who is away, and goes on",
            )

    async def _stop(self, actions: Sequence[Action]) -> None:
        """Stop the units that are to be no more, or are to be started; of these, one may be down for good."""
        await self._watch()
        if changed := _named(actions):
            with self._untimed():  # they have their grace, and are then ended
                await self._runtime.stop(changed)

    async def _start(self, actions: Sequence[Action]) -> None:
        """Give units their files and start them."""
        starting = [config for config in self._configs if config.unit.name in _named(actions)]
        assert self._authority is not None
        provisioning = Provisioning(
            authority=self._authority,
            topology=self._plan.topology,
            wanted=self._configs,
            starting=starting,
        )
        with self._untimed():  # images may be built
            await self._runtime.provision(provisioning)
        self._crashed_before = {one.name: one.restarts for one in await self._runtime.observe()}
        if starting:
            await self._runtime.start(starting, attached=self._attached and not self.adopts)
        await self._watch()

    @contextmanager
    def _untimed(self) -> Iterator[None]:
        """Let `within` count anew after this, which comes to its end by itself."""
        self._limit.reschedule(None)
        try:
            yield
        finally:
            self._limit.reschedule(asyncio.get_running_loop().time() + self._within_s)

    @asynccontextmanager
    async def _joined(self, identity: Identity) -> AsyncIterator[Cluster]:
        """The cluster, as soon as its broker answers."""
        cluster = None
        while cluster is None:
            try:
                cluster = await open_cluster(identity, announce=False)
            except StoreUnavailable:
                self._look(None)
                await asyncio.sleep(_LOOK_EVERY_S)
        try:
            yield cluster
        finally:
            await cluster.close()

    async def _make(self, cluster: Cluster, *, moves: bool) -> None:
        """The streams, and what the cluster is and allows; all but its engine, where workers `moves`."""
        with suppress(StoreUnavailable):  # there may be none yet; those of a newer build are not made as ours
            await cluster.config.settings()
        settings = settings_of(self._plan.topology, self._plan.deployment.engine)
        await cluster.maintain(settings)
        there = await cluster.config.settings()
        if moves and there is not None:
            settings = msgspec.structs.replace(settings, engine=there.engine)
        await cluster.config.put_settings(settings)

    async def _move(self, cluster: Cluster) -> None:
        """Bring the workers to the engine of the plan, and stop what they used before."""
        deployment, out = self._plan.deployment, self._out_of_reach()
        late = _named(self._later) | out
        serving = {unit.name for unit in deployment.units if unit.role in SERVING} - late
        workers = {unit.name for unit in deployment.units if unit.role == "worker"} - out
        while not serving <= {row.name for row in self._rows if row.is_settled}:
            await asyncio.sleep(_LOOK_EVERY_S)
            self._look(await cluster.store.presence.members())
        await cluster.config.put_settings(settings_of(self._plan.topology, deployment.engine))
        there: set[str] = set()
        while not workers <= there:
            await asyncio.sleep(_LOOK_EVERY_S)
            members = await cluster.store.presence.members()
            self._look(members)
            there = {one.unit for one in members if (one.about.engine or EMBEDDED) == deployment.engine}
        if self._later:
            later, self._later = self._later, []
            await self._stop(later)
            await self._start(later)

    async def _until_well(self, cluster: Cluster, actions: Sequence[Action]) -> None:
        """Until the units of these that run now are seen at work. Raises MvmciError when one will not be."""
        names = {one.unit.name for one in self._configs} & _named(actions)
        while True:
            self._look(await cluster.store.presence.members())
            ours = {row.name for row in self._rows if row.is_settled}
            if names - self._out_of_reach() <= ours:
                return
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _until_ready(self, cluster: Cluster) -> None:
        """Until every unit of the deployment is seen at work or drained by the verb, and no other is left."""
        while True:
            self._look(await cluster.store.presence.members())
            out = self._out_of_reach()
            wanted = {unit.name for unit in self._plan.deployment.units} - out
            ours = [row for row in self._rows if row.name in wanted]
            leaving = {one.name for one in self._seen} - wanted - out
            if not leaving and all(row.is_settled for row in ours):
                for row in ours:
                    if row.state != "ready":
                        self._say(f"{row.name} is drained: `mvmci drain {row.name} --undo` lets it take jobs")
                return
            loss = await cluster.config.loss()
            if loss is not None:
                raise StoreLost(f"{self._state.cluster}: {loss.sentence}", hint=RECOVER)
            await asyncio.sleep(_LOOK_EVERY_S)

    def _out_of_reach(self) -> set[str]:
        """The units to which nothing can be done, as a host is away."""
        away = self._runtime.away
        return {
            *(unit.name for unit in self._plan.deployment.units if unit.host in away),
            *(one.name for one in self._seen if one.host in away),
        }

    # How it goes.

    async def _watch(self) -> None:
        """See how the units are, from now on. It begins anew, so that nothing is believed that is older."""
        await self._watch_no_more()
        first = asyncio.Event()

        async def watch() -> None:
            try:
                async for seen in self._runtime.watch():
                    self._seen = seen
                    self._update()
                    first.set()
            finally:
                first.set()

        self._watching = asyncio.create_task(watch(), name="watch")
        await first.wait()

    async def _watch_no_more(self) -> None:
        await cancel(self._watching)

    def _update(self) -> None:
        """Take in what is seen, and show it. Before presence is heard, only of what is done to units."""
        wanted, here = self._plan.deployment.units, socket.gethostname()
        self._rows = rows(
            wanted,
            self._seen,
            self._members,
            here=here,
            now_ms=wall_clock_ms(),
            broker_at=self._broker_at,
            hosts=self._runtime.hosts(),
        )
        known = self._members is not None
        states = ("starting", "ready", "draining", "down") if self._configs else ("draining", "down")
        self._show(
            [row for row in self._rows if known or (row.name in self._touched and row.state in states)]
        )

    def _look(self, members: Sequence[Member] | None) -> None:
        """See how the units are. Raises MvmciError when one of them will not come."""
        if self._watching is not None and self._watching.done():
            self._watching.result()
        self._members = members
        self._update()
        late = _named(self._later)
        for one in self._seen:
            if one.name in late:
                continue
            crashes = one.restarts - self._crashed_before.get(one.name, 0)
            if one.refused:
                raise MvmciError(f"{one.name} was refused: {one.reason}")
            if one.outdated:
                raise MvmciError(f"{one.name} does not fit the cluster: {one.reason}")
            if one.state == "down" and crashes >= CRASHES_MAX:
                raise MvmciError(f"{one.name} went down {crashes} times: {one.reason}")

    async def _until_proved(self, cluster: Cluster, proving: asyncio.Task[None], job: str) -> None:
        """Until the job has run, or waits behind others that fill every engine: those prove it as well."""
        full = False
        while not proving.done():
            await asyncio.wait((proving,), timeout=FULL_FOR_S)
            members = [] if proving.done() else await cluster.store.presence.members()
            for why in (member.waits[job] for member in members if job in member.waits):
                self._waits = f"a job that does nothing waits: {why}"
            was_full, full = full, _is_full(members, self._plan.deployment.engine, job)
            if drained := _all_drained(members, self._plan.deployment.engine, self._plan.topology.queues[0]):
                self._say(
                    f"every {drained} is drained: {job}, which does nothing, waits for one to take jobs"
                )
                return
            if was_full and full:
                self._say(f"every slot is taken: {job}, which does nothing, waits behind other jobs")
                return
        await proving
        self.proved = True

    async def _prove(self, store: Store, job: str) -> None:
        """Run a job that does nothing. Raises MvmciError when it did not."""
        queue = self._plan.topology.queues[0]
        spec = nothing(job, queue=queue, at=wall_clock_ms(), by=PROOF_BY, timeout_ms=PROOF_MS)
        await store.blobs.put(NOTHING)
        await submit(store, spec)
        journal = await load(store, spec.id)
        await until_ended(store, journal)
        name, reason = status(journal.state)
        if name != "succeeded":
            raise MvmciError(f"a job that does nothing, {spec.id}, {name}: {reason}")

    def _reached(self, facts: Facts) -> Facts:
        """`facts`, with where other machines reach the broker: as the file says, else wherever it listens:
        first at the address that this machine has for others."""
        if facts.broker is None or is_loopback(facts.broker.listen):
            return facts
        if places := self._plan.topology.broker.advertised:
            return msgspec.structs.replace(facts, urls=_urls_at(places, facts.broker.port))
        folder = self._state.folder / broker.FOLDER
        pids = [one.pid for one in self._seen if one.role == "broker" and one.pid]
        told = [url for pid in pids for url in broker.read_ports(folder, pid).get("nats", ())]
        far = [url for url in told if _is_far(url)]
        urls = sorted(far or told, key=lambda url: urlsplit(url).hostname != outward_address())
        return msgspec.structs.replace(facts, urls=tuple(urls))

    async def _write_ticket(self, authority: Authority, facts: Facts, cluster: Cluster) -> None:
        """Have a ticket for a worker lie there: the last one, as long as half of its time is left. One that
        would let in as something else is revoked."""
        from mvmci.trust.registry import make_ticket, read_tickets, revoke_ticket, state_of

        queues, outside = self._plan.topology.queues, facts.outside
        there = self._last_ticket()
        record = (await read_tickets(cluster.config)).get(there.id) if there is not None else None
        if there is not None and record is not None and state_of(record) == "open":
            login = there.login
            fits = (there.queues, login.urls, login.ca) == (tuple(queues), outside.urls, outside.ca)
            if fits and there.expires_at - wall_clock_ms() > TICKET_S * 1000 / 2:
                return
            if not fits:
                await revoke_ticket(cluster.config, authority, facts.login, there.id)
        ticket = await make_ticket(
            cluster.config, authority, outside, role="worker", queues=queues, ttl_s=TICKET_S
        )
        write_private(self._state.ticket, f"{encode_ticket(ticket)}\n".encode())

    async def _offer_program(self, authority: Authority, cluster: Cluster) -> None:
        """Let machines that joined have this program, where there are any."""
        from mvmci.trust import program

        if authority.external is not None or not runs_zipapp() or not await program.is_wanted(cluster.config):
            return
        file, machine = Path(sys.argv[0]), platform.machine()
        try:
            await program.offer(
                cluster, authority, file, machine=machine, version=__version__, at=wall_clock_ms()
            )
        except StoreFull as full:
            self._say(f"machines that joined cannot get this program by `mvmci upgrade`: {full.message}")

    def _last_ticket(self) -> Ticket | None:
        try:
            return decode_ticket(self._state.ticket.read_text())
        except (OSError, UnicodeDecodeError, TicketRefused, VersionsDiffer):
            return None

    async def _last_line(self, name: str) -> str:
        """What a unit printed last."""
        said = b""
        with suppress(MvmciError, OSError, TimeoutError):
            async with asyncio.timeout(_TAIL_S):
                async for piece in self._runtime.log(name, last=_TAIL_BYTES):
                    said = (said + piece)[-_TAIL_BYTES:]
        lines = said.decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    async def _partly(self, why: str, hint: str | None = None) -> PartlyApplied:
        """How far it came, and why not further."""
        if not self._rows:
            self._update()
        ready = ", ".join(row.name for row in self._rows if row.state == "ready")
        missing = [row for row in self._rows if row.state != "ready"]
        not_ready = ", ".join(f"{row.name} is {row.state}" for row in missing)
        words = await self._last_line(missing[0].name) if missing else ""
        said = f"; {missing[0].name} said last: {words}" if words else ""
        return PartlyApplied(
            f"{self._state.cluster} is up in part: {ready or 'nothing'} is ready"
            f"{f', {not_ready}' if not_ready else ''}; {why}",
            hint=f"{hint or 'the same command goes on from here'}{said}",
        )


def make_keys(
    state: ClusterState,
    found: Topology,
    deployment: Deployment,
    external: Login | None,
    runtime: Runtime,
    name: str,
) -> tuple[Authority, Facts]:
    """The keys of a cluster whose folder is locked, and where its broker is to be. Those that are there stay.

    `name` is that of its `runtime`.
    """
    write_private(state.folder / "version", VERSION.encode())
    if external is not None:
        authority = Authority.of_external(state.folder, external)
        facts = Facts(login=Login(urls=external.urls), runtime=name)
    else:
        authority, settings = Authority.create(state.folder), broker_of(found, state.facts(), runtime)
        if settings.port == ANY_PORT:  # one that no unit has
            listens = [unit.listen.rpartition(":")[2] for unit in deployment.units if unit.listen]
            taken = [int(port) for port in listens if port.isdecimal()]
            port = choose_port(f"{state.folder}/{broker.FOLDER}", settings.listen, taken=taken)
            settings = msgspec.structs.replace(settings, port=port)
        urls = [runtime.dial_here(unit, settings) for unit in deployment.units if unit.role == "broker"]
        login = authority.login(urls, tls=any(url.startswith("tls://") for url in urls))
        facts = Facts(login=login, broker=settings, runtime=name)
    return authority, facts


def _named(actions: Sequence[Action]) -> set[str]:
    """The units to which something is done."""
    return {action.unit.name for action in actions if action.unit is not None and action.touches}


def _all_drained(members: Sequence[Member], engine: str, queue: str) -> str:
    """The role without which no job of `queue` runs, where all that could run it are drained by the verb."""
    for role in ("worker",) if engine == EMBEDDED else ("worker", "executor"):
        able = (one.about for one in members if role == "executor" or queue in one.about.queues)
        states = [about.drained for about in able if about.role == role]
        if states and all(states):
            return role
    return ""


def _is_full(members: Sequence[Member], engine: str, job: str) -> bool:
    """Whether every engine that workers use has its slots full of jobs other than `job`."""
    role = "worker" if engine == EMBEDDED else "executor"
    engines = [one for one in members if one.about.role == role]
    return bool(engines) and all(len(one.jobs - {job}) >= one.about.slots for one in engines)


def _urls_at(places: Sequence[str], port: int) -> tuple[str, ...]:
    """Where a broker is dialled that is advertised at `places`, each with `port` unless it says one."""
    return tuple(f"tls://{one}" if host_and_port(one)[1] else f"tls://{one}:{port}" for one in places)


def _is_far(url: str) -> bool:
    """Whether other machines can dial it: some addresses mean something on this one only."""
    try:
        address = ipaddress.ip_address(urlsplit(url).hostname or "")
    except ValueError:
        return True  # a name
    return not (address.is_loopback or address.is_link_local)
