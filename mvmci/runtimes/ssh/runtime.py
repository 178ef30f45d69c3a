"""Units on hosts that are reached over ssh: on each, what `local` is on this machine.

A fan-out. What is seen of a host comes of one command that needs nothing there but a Python (`facts`).
Whatever changes something brings the program there first, and asks an agent of it, `mvmci host`, over one
channel a host that stays open. A host that cannot be reached stands in `away`, with the reason, and nothing
is done there. One that is lost is not even asked, until the file has it present again.

    <cluster>/hosts.json    the hosts on which something of the cluster may be: how each is reached, its units
    <cluster>/ports.json    where units listen that others dial, once it was chosen
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from pathlib import Path

import msgspec

from mvmci.cluster.broker import BrokerSettings
from mvmci.cluster.changes import HostRow, Observed, in_stopping_order
from mvmci.cluster.deployment import ROLES, Place, RoleName, Unit, UnitConfig
from mvmci.cluster.topology import HostSection, Topology
from mvmci.errors import HostAway, HostRefused, MvmciError, NotFound, StoreUnavailable, Usage
from mvmci.runtime import GRACE_S, Provisioning, why_ended
from mvmci.runtimes.local.agent import (
    Begin,
    Forget,
    Key,
    Keys,
    Lock,
    Log,
    Observe,
    Provide,
    Unlock,
    Wanted,
    check_owner,
)
from mvmci.runtimes.local.messages import Report, Start, Stop, Watch
from mvmci.runtimes.local.runtime import SUPERVISOR
from mvmci.runtimes.ssh.client import AgentClient
from mvmci.runtimes.ssh.connection import Connections
from mvmci.runtimes.ssh.host import HostFacts, ask, seen_by, unfit
from mvmci.runtimes.ssh.put import put_program
from mvmci.runtimes.ssh.records import HostRecords, read_by_name
from mvmci.runtimes.ssh.user_config import ignored
from mvmci.system.files import write_private
from mvmci.system.lock import this_one
from mvmci.system.ports import is_address
from mvmci.system.processes import program_digest, program_file
from mvmci.system.tasks import all_of, at_most, cancel
from mvmci.trust.authority import Authority
from mvmci.trust.provision import make_config, revoke_public

ANY_ADDRESS = "0.0.0.0"  # noqa: S104 (who comes there needs a credential, over TLS)
ANY_ADDRESS_6 = "::"
_PORTS: dict[RoleName, int] = {
    "broker": 4222,
    "executor": 27288,
    "balancer": 27188,
}  # the first that is tried
AWAY_S = 30.0  # until one that is away is tried again: to find that out takes long
COMMAND_S = 300.0  # for a command that is run to its end: its program may unpack itself first, a disk be slow
SENDING_MAX = 5  # hosts at a time that the program is sent to: over a slow line, each has to get it in time
_LOOK_EVERY_S = 2.0  # at hosts on which nothing is being done
ROUTE = ("address", "port", "user", "key", "jump", "host_key", "python")  # what leads to a host and its agent
_CACHE = "_cache"  # in a host's directory, beside its clusters: what programs unpack


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `mvmci doctor`."""

    name: str
    ok: bool = True
    found: str
    hint: str | None = None


class Ssh:
    """The port `mvmci.runtime.Runtime` on `hosts`, those of the cluster's file. They get `program`."""

    apart = True
    broker_listen, broker_port = ANY_ADDRESS, _PORTS["broker"]

    def __init__(
        self,
        root: Path,
        cluster: str,
        hosts: Mapping[str, HostSection],
        program: Path | None = None,
        *,
        accept_new: bool = False,
    ) -> None:
        self.root = root
        self.cluster = cluster
        self.folder = root / cluster
        self.away: Mapping[str, str] = {}
        self.notes: Sequence[str] = ()
        self._program = program or program_file()
        self._digest = program_digest(["", str(self._program)])
        self._records = HostRecords(self.folder / "hosts.json")
        self._ports = read_by_name(self.folder / "ports.json", int)
        self._present = {name for name, host in hosts.items() if host.state == "present"}
        self._hosts = {name: hosts.get(name, one.section) for name, one in self._records.items()}
        self._hosts |= {name: hosts[name] for name in self._present}
        self._lost = {name for name, section in self._hosts.items() if section.state == "lost"}
        self._absent = {name for name in self._records if name in hosts} - self._present - self._lost
        given_up = {name for name, one in self._records.items() if one.section.state == "lost"}
        self._returned = given_up - self._lost
        self._connections = Connections(
            self._hosts, folder=Path("/"), recorded=self.folder / "known_hosts", accept_new=accept_new
        )
        self._facts: dict[str, HostFacts] = {}
        self._refused: dict[str, HostRefused] = {}  # of those that are away
        self._at_work = False  # somebody has the lock
        self._just_seen: list[Observed] | None = None  # by `check`, until somebody asks
        self._agents: dict[str, AgentClient] = {}
        self._tried: dict[str, float] = {}  # when a host was found to be away
        self._starting: dict[str, asyncio.Lock] = {}  # of agents
        self._following: dict[str, asyncio.Task[None]] = {}  # what agents tell
        self._sending = asyncio.Semaphore(SENDING_MAX)
        self._open = contextlib.AsyncExitStack()
        self._changed = asyncio.Event()  # something was started or stopped by us, since `watch` looked

    # ---- Looking

    async def check(self) -> None:
        self.notes = [*ignored({name: self._hosts[name] for name in self._present}), *self._kept_keys()]
        self._just_seen = await self.observe()
        refused = [self._refused[host] for host in sorted(self._present & self._refused.keys())]
        if refused:
            raise HostRefused("\n".join(one.message for one in refused), hint=refused[0].hint)
        if self._present and self._present <= set(self.away):
            raise StoreUnavailable("; ".join(self.away.values()), hint="no host of the file can be reached")
        problems = [
            f"{name}: {why}"
            for name in sorted(self._present & self._facts.keys())
            for why in (*unfit(self._facts[name], self._digest), *self._left_behind(name))
        ]
        problems += self._doubled()
        if problems:
            raise Usage("\n".join(problems))

    def _left_behind(self, host: str) -> Iterator[str]:
        """Why units would run on under a supervisor that nobody looks for any more."""
        known, facts, section = self._records.get(host), self._facts[host], self._hosts[host]
        if known is None or host in self._returned:  # which is emptied first
            return
        if known.units and known.directory not in ("", facts.directory.path):
            there = f"in {known.directory}, and not in {facts.directory.path}"
            yield f"its units are {there}: `mvmci down` before that changes"
        elif facts.is_running and known.section.service != section.service:
            there = f"by `service: {known.section.service}`, and not {section.service}"
            yield f"its units are kept running {there}: `mvmci down` before that changes"

    def _doubled(self) -> Iterator[str]:
        """Why what is done for one host would be done to another: they are one under two names."""
        for one in sorted(self._present):
            for other in self._also_called(one):
                if other in self._lost:
                    yield (
                        f"{one} is where {other} was, which is lost: call it {other}, `state: present`, and "
                        "what is there of the time before is removed first"
                    )
                elif other in self._absent or (other in self._present and one < other):
                    yield f"{one} and {other} are one place: give each a `directory` of its own"
                elif other not in self._present and self._records[other].units:
                    yield f"{one} is where {other} was, and has its units: `mvmci down` before that changes"

    def _also_called(self, host: str) -> list[str]:
        """The other names of the place that is `host`, as far as their sections tell."""

        def place(name: str) -> tuple[object, ...]:
            section = self._hosts[name]
            return self._address(name), section.port, section.jump, section.user, section.directory

        return sorted(name for name in self._hosts.keys() - {host} if place(name) == place(host))

    async def observe(self) -> list[Observed]:
        just_seen, self._just_seen = self._just_seen, None
        if just_seen is not None:
            return just_seen
        with_units = {name for name in self._asked() if self._records[name].units}
        looked_at = self._present | self._absent | with_units
        found: dict[str, list[Observed]] = {}

        async def look(host: str) -> None:
            try:
                seen = await self._seen(host)
                found[host] = [] if host in self._returned else seen  # others have the names of those
            except MvmciError as error:
                await self._mark_away(host, error)
            else:
                self._regain(host)

        await all_of(*(look(host) for host in looked_at if not self._stays_away(host)))
        found |= {host: self._left_on(host) for host in looked_at & self.away.keys()}
        seen = [msgspec.structs.replace(one, host=host) for host in found for one in found[host]]
        return sorted(seen, key=lambda one: (ROLES.index(one.role), len(one.name), one.name))

    def _stays_away(self, host: str) -> bool:
        """Whether a host that was away is not tried again: just now; or at all while we are at work, as it
        lacks what was done meanwhile."""
        recently = time.monotonic() - self._tried.get(host, -AWAY_S) < AWAY_S
        return host in self.away and (self._at_work or recently)

    def _left_on(self, host: str) -> list[Observed]:
        """The units on a host, as far as we know."""
        why = self.away.get(host, "")
        units = self._records.units(host).items()
        return [Observed(name=name, role=role, host=host, reason=why) for name, role in units]

    async def _seen(self, host: str) -> list[Observed]:
        """The units on a host. Raises MvmciError."""
        if host in self._agents:
            return (await self._agents[host].ask(Observe(), Report)).units
        self._facts[host] = await self._ask(host)
        return seen_by(self._facts[host])

    async def _ask(self, host: str, *ports: str) -> HostFacts:
        """What a host has, and whether one can listen at these of its ports. Raises MvmciError."""
        section, connection = self._hosts[host], await self._connections.connect(host)
        return await ask(
            connection, self.cluster, directory=section.directory, python=section.python, ports=ports
        )

    async def _mark_away(self, host: str, error: MvmciError) -> None:
        """Keep in mind that a host cannot be reached, and why."""
        self.away = {**self.away, host: error.message}
        self._tried[host] = time.monotonic()
        if isinstance(error, HostRefused):
            self._refused[host] = error
        else:
            self._refused.pop(host, None)
        agent = self._agents.pop(host, None)
        if agent is not None:
            await agent.close()

    def _regain(self, host: str) -> None:
        """Keep in mind that it can be reached."""
        self.away = {one: why for one, why in self.away.items() if one != host}
        self._refused.pop(host, None)

    async def watch(self) -> AsyncGenerator[list[Observed], None]:
        before: list[Observed] | None = None
        while True:
            self._changed.clear()
            for host, agent in self._agents.items():
                if host not in self._following or self._following[host].done():
                    self._following[host] = asyncio.create_task(self._listen(agent), name=f"watch {host}")
            seen = await self.observe()
            if seen != before:
                before = seen
                yield seen
            await at_most(_LOOK_EVERY_S, self._changed.wait())

    async def _listen(self, agent: AgentClient) -> None:
        """Look again whenever an agent tells something, for as long as it does: it is asked for that once."""
        with contextlib.suppress(MvmciError):  # `observe` finds out
            async for _ in agent.follow(Watch(), Report):
                self._changed.set()

    def hosts(self) -> list[HostRow]:
        return [self._row(name) for name in sorted({*self._facts, *self.away})]

    def _row(self, name: str) -> HostRow:
        section = self._hosts[name]
        row = HostRow(name=name, address=f"{_bracketed(self._address(name))}:{section.port}")
        if name in self.away:
            return msgspec.structs.replace(row, away=self.away[name])
        facts = self._facts[name]
        return msgspec.structs.replace(
            row,
            skew_s=round(facts.skew_s, 3),
            skew_error_s=round(facts.skew_error_s, 3),
            python=facts.python.version if facts.python is not None else None,
            system=f"{facts.kernel} {facts.machine}",
            directory=facts.directory.path,
            programs=facts.programs,
        )

    async def examine(self) -> dict[str, list[Check]]:
        """What `mvmci doctor` finds on each host. Nothing is changed there."""
        await self.observe()
        found: dict[str, list[Check]] = {}

        async def look(host: str) -> None:
            facts = self._facts[host]
            problems = [Check(name="host", ok=False, found=why) for why in unfit(facts, self._digest)]
            who = f"{facts.user} at {self._row(host).address}"
            clock = f"{facts.skew_s:+.2f} s (± {facts.skew_error_s:.2f}) from this machine's"
            checks = [Check(name="ssh", found=who), Check(name="clock", found=clock), *problems]
            if self._digest in facts.programs:
                checks += await self._doctor(host, facts)
            elif not problems:
                checks.append(Check(name="program", found="not there yet: `mvmci up` brings it"))
            found[host] = checks

        await self._on_each(self._facts, look)
        found |= {host: [Check(name="ssh", ok=False, found=why)] for host, why in self.away.items()}
        return dict(sorted(found.items()))

    async def _doctor(self, host: str, facts: HostFacts) -> list[Check]:
        """What the program that is there finds."""
        connection, directory = await self._connections.connect(host), facts.directory.path
        async with connection.within(COMMAND_S, "ends no `mvmci doctor`"):
            ran = await connection.run([*self._command(facts), "doctor", "--json", "--state", directory])
        try:
            return msgspec.json.decode(ran.out, type=list[Check])
        except msgspec.DecodeError:
            why = why_ended(ran.err.decode(errors="replace").splitlines(), f"ended with code {ran.code}")
            return [Check(name="program", ok=False, found=why)]

    def _command(self, facts: HostFacts) -> list[str]:
        """How our program is started on a host, once it is there."""
        python, directory = facts.python.path if facts.python else "python3", facts.directory.path
        program = f"{directory}/bin/{self._digest}.pyz"
        return ["env", f"SHIV_ROOT={directory}/{_CACHE}", python, "-I", program]

    # ---- Places

    async def place(self, unit: Unit) -> Place:
        address = self._address(unit.host)
        listen = ANY_ADDRESS_6 if ":" in address else ANY_ADDRESS
        port = self._ports.get(unit.name)
        if port is None:
            taken = {*self._ports.values(), *self._listening(unit.host)}
            port = next(port for port in range(_PORTS[unit.role], 65_536) if port not in taken)
            self._ports[unit.name] = port
        elif not self._runs(unit):
            await self.check_port(unit, listen, port)
        return Place(listen=f"{_bracketed(listen)}:{port}", address=f"{_bracketed(address)}:{port}")

    async def check_port(self, unit: Unit, address: str, port: int) -> None:
        if unit.host in self.away or self._runs(unit):
            return
        place = f"{_bracketed(address)}:{port}"
        why = (await self._ask(unit.host, place)).ports.get(place)
        if why:
            raise Usage(
                f"{unit.name} cannot listen at {place} on {unit.host}: {why}",
                hint="stop what listens there, or name another place in `broker.listen`"
                if unit.role == "broker"
                else "stop what listens there",
            )

    def dial(self, unit: Unit, broker: BrokerSettings) -> str:
        return f"tls://{_bracketed(self._address(unit.host))}:{broker.port}"

    def dial_here(self, unit: Unit, broker: BrokerSettings) -> str:
        return self.dial(unit, broker)

    def adds(self, topology: Topology, unit: Unit) -> tuple[tuple[str, str], ...]:
        return ()

    def _address(self, host: str) -> str:
        return self._hosts[host].address or host

    def _listening(self, host: str) -> Collection[int]:
        return self._facts[host].listening if host in self._facts else ()

    def _runs(self, unit: Unit) -> bool:
        facts = self._facts.get(unit.host)
        return facts is not None and any(one.name == unit.name and one.pid for one in seen_by(facts))

    # ---- Changing

    @contextlib.asynccontextmanager
    async def lock(self, hosts: Collection[str] | None, owner: str) -> AsyncIterator[None]:
        hosts = self._asked() if hosts is None else hosts
        for host in hosts:
            self._check_owner(host, owner)
        ask = Lock(who=f"{this_one()} on {socket.gethostname()}", owner=owner)
        for host in {*hosts, *self.rerouted()} - self._returned:
            self._know(host)
        locked: list[str] = []
        self._at_work = True

        async def take(host: str) -> None:
            await (await self._agent(host)).tell(ask)
            locked.append(host)
            if host in self._returned:
                await self._empty(host, ask)

        async def leave(host: str) -> None:
            await self._agents[host].tell(Unlock())

        try:
            await self._on_each(hosts, take)
            yield
        finally:
            self._at_work = False
            await self._on_each([host for host in locked if host in self._agents], leave)

    async def _empty(self, host: str, lock: Lock) -> None:
        """Have nothing on a host of the time before it was given up. Only then it is one of ours again."""
        agent = await self._agent(host)
        await agent.ask(Stop(), bool)
        await agent.tell(Forget())
        await agent.tell(Unlock())
        await agent.tell(lock)  # it was one of the files
        self._returned.discard(host)
        self._records.clear(host, self._hosts[host], self._facts[host].directory.path)

    def _check_owner(self, host: str, owner: str) -> None:
        """Raises Usage where another cluster of this name is there. Nothing was changed anywhere yet."""
        if host not in self._facts:
            return
        facts = self._facts[host]
        try:
            check_owner(facts.owner, owner, self.cluster, facts.directory.path)
        except Usage as error:
            raise Usage(f"{host}: {error.message}", hint=error.hint) from None

    async def provision(self, provisioning: Provisioning) -> None:
        await self._on_units(provisioning.starting, functools.partial(self._provide, provisioning))

    async def _provide(self, provisioning: Provisioning, host: str, units: Sequence[UnitConfig]) -> None:
        """Have these units' keys made on their host, and lay down their files."""
        agent = await self._agent(host)
        wanted = (Wanted(name=one.unit.name, role=one.unit.role, generation=one.generation) for one in units)
        told = await agent.ask(Keys(units=tuple(wanted)), list[Key])
        try:
            files = self._files(provisioning.authority, host, zip(units, told, strict=True))
        except ValueError as error:
            raise MvmciError(f"mvmci on {host} said something else than its units' keys: {error}") from None
        self._know(host, keys={one.unit.name: key.public for one, key in zip(units, told, strict=True)})
        await agent.tell(Provide(files=files))

    def _files(
        self, authority: Authority, host: str, units: Iterable[tuple[UnitConfig, Key]]
    ) -> dict[str, bytes]:
        """The files of these units, without the secret half of their keys. Raises ValueError for what is no
        key."""
        address, record, files = self._address(host), self._records.get(host), {}
        names, addresses = ((), (address,)) if is_address(address) else ((address,), ())
        for one, key in units:
            data = make_config(
                one,
                authority,
                key.there if record is not None and one.unit.name in record.last else b"",
                keys_in=authority.folder,
                public=key.public,
                names=names,
                addresses=addresses,
            )
            if data is not None:  # else it is a balancer on a broker of the user's own
                files[one.unit.name] = data
        return files

    async def start(self, units: Sequence[UnitConfig], *, attached: bool = False) -> None:
        async def begin(host: str, these: Sequence[UnitConfig]) -> None:
            agent = await self._agent(host)
            self._know(host, units={one.unit.name: one.unit.role for one in these})
            self._records.move({one.unit.name for one in these}, host)
            told = await agent.ask(Begin(start=Start(units=tuple(these)), attached=attached), str)
            if told and (note := f"{host}: {told}") not in self.notes:
                self.notes = [*self.notes, note]

        write_private(self.folder / "ports.json", msgspec.json.encode(self._ports))
        await self._on_units(units, begin)
        self._changed.set()

    async def stop(self, names: Collection[str] | None = None, grace_s: float = GRACE_S) -> bool:
        seen = [one for one in await self.observe() if one.host not in self.away]
        going = [one for one in seen if names is None or one.name in names]
        all_going = [*going, *self._asleep(names, {(one.host, one.name) for one in seen})]
        for role in in_stopping_order(one.role for one in all_going):
            by_host: dict[str, list[str]] = {}
            for one in all_going:
                if one.role == role:
                    by_host.setdefault(one.host, []).append(one.name)
            await self._on_each(by_host, functools.partial(self._end, by_host, grace_s))
            self._changed.set()
        return bool(going)

    def _asleep(
        self, names: Collection[str] | None, awake: Collection[tuple[str, str]]
    ) -> Iterator[Observed]:
        """What does not run on a host that is there, and comes with its next boot: its supervisor was killed,
        or was not begun yet."""
        for host in self._asked() - self.away.keys():
            for one in self._left_on(host):
                if (host, one.name) not in awake and (names is None or one.name in names):
                    yield one

    async def _end(self, by_host: Mapping[str, Sequence[str]], grace_s: float, host: str) -> None:
        """Stop these units of a host, and forget that it has them."""
        agent = await self._agent(host)
        await agent.ask(Stop(names=tuple(by_host[host]), grace_s=grace_s), bool)
        self._know(host, gone=by_host[host])

    def absent(self) -> list[str]:
        return sorted(self._absent - set(self.away))

    def rerouted(self) -> list[str]:
        def route(section: HostSection) -> list[object]:
            return [getattr(section, field) for field in ROUTE]

        there = sorted(self._present & self._records.keys() - self._returned)
        return [host for host in there if route(self._records[host].section) != route(self._hosts[host])]

    def lost(self) -> Mapping[str, Mapping[str, RoleName]]:
        known = {host: self._records[host] for host in sorted(self._lost)}
        return {host: one.units for host, one in known.items() if one.section.state != "lost"}

    def _kept_keys(self) -> Iterator[str]:
        """Of hosts that are to be given up, whose keys cannot be revoked: builds before this kept none."""
        for host, units in self.lost().items():
            names = units.keys() - self._records[host].keys
            if names:
                yield (
                    f"the keys of {', '.join(sorted(names))} on {host}, which is lost, were not written down "
                    f"and stay good: `mvmci revoke {host}` before this cuts them off"
                )

    def give_up(self, authority: Authority) -> None:
        for host in self.lost():
            one = self._records[host]
            for public in one.keys.values():
                revoke_public(authority, public)
            self._records.clear(host, self._hosts[host], one.directory)

    def returned(self) -> list[str]:
        return sorted(self._returned - set(self.away))

    def left(self) -> list[str]:
        there = {host: self._records[host].directory for host in sorted(self._lost)}
        return [
            f"{host} is lost, and was not asked: what mvmci keeps in {directory} stays there, and its units "
            f"start if it comes back; `mvmci host --cluster {self.cluster} --state {directory} --forget`, "
            f"called there, stops and removes them ({directory}/bin has the program)"
            for host, directory in there.items()
            if directory
        ]

    async def forget(self, hosts: Collection[str] | None = None) -> None:
        async def clear(host: str) -> None:
            await (await self._agent(host)).tell(Forget())
            await self._agents.pop(host).close()
            await self._clear(host)
            self._records.remove(host)
            self._absent.discard(host)
            self._regain(host)  # whoever watched it meanwhile got no answer

        await self._on_each(self._asked() if hosts is None else hosts, clear)

    async def _clear(self, host: str) -> None:
        """Remove what all clusters of a host share, where no other is left. Raises MvmciError."""
        connection, directory = await self._connections.connect(host), self._facts[host].directory.path
        async with connection.within(COMMAND_S, f"does not remove {directory}"):
            ran = await connection.run(["sh", "-c", _CLEAR, "sh", directory])
        if ran.code:
            why = why_ended(ran.err.decode(errors="replace").splitlines(), f"code {ran.code}")
            raise MvmciError(f"{directory} on {host} cannot be removed: {why}")

    async def log(
        self, name: str, *, follow: bool = False, last: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        seen = await self.observe()
        there = (*seen, *(one for known in self._asked() for one in self._left_on(known)))
        host = next((one.host for one in there if one.name == name), None) or self._supervised(name)
        if host is None:
            raise NotFound(
                f"no unit {name} of {self.cluster} is kept running on its hosts",
                hint=f"there are {', '.join(one.name for one in seen) or 'none'}; "
                f"`{SUPERVISOR}@HOST` starts those of a host",
            )
        if host in self.away:
            raise StoreUnavailable(self.away[host])
        agent = await self._agent(host)
        what = SUPERVISOR if name.startswith(f"{SUPERVISOR}@") else name
        ask = Log(name=what, follow=follow, last=last)
        async with contextlib.aclosing(agent.follow(ask, bytes)) as pieces:
            async for piece in pieces:
                yield piece

    def _supervised(self, name: str) -> str | None:
        """The host whose supervisor is meant."""
        what, _, host = name.partition("@")
        return host if what == SUPERVISOR and host in self._hosts.keys() - self._lost else None

    async def close(self) -> None:
        """Leave all hosts. Units that were started with `attached` are stopped."""
        await cancel(*self._following.values())
        for agent in self._agents.values():
            await agent.close()
        self._agents.clear()
        await self._open.aclose()
        await self._connections.close()

    # ---- On many hosts at once

    async def _on_units(
        self, units: Sequence[UnitConfig], work: Callable[[str, Sequence[UnitConfig]], Awaitable[None]]
    ) -> None:
        """Do `work` with the units of each host. Raises MvmciError; where a host is away, only if its units
        are those without which there is no cluster."""
        by_host: dict[str, list[UnitConfig]] = {}
        for one in units:
            by_host.setdefault(one.unit.host, []).append(one)

        async def on(host: str) -> None:
            await work(host, by_host[host])

        await self._on_each(by_host, on)
        for host in by_host.keys() & self.away.keys():
            if any(one.unit.role == "broker" for one in by_host[host]):
                raise StoreUnavailable(self.away[host], hint="the broker is to run there")

    async def _on_each(self, hosts: Iterable[str], work: Callable[[str], Awaitable[None]]) -> None:
        """Do `work` on each host that can be reached. One that goes is `away` then. Raises MvmciError."""

        async def on(host: str) -> None:
            try:
                await work(host)
            except HostAway as error:
                await self._mark_away(host, error)

        await all_of(*(on(host) for host in hosts if host not in self.away))

    async def _agent(self, host: str) -> AgentClient:
        """The agent of a host. Its program is brought there first."""
        async with self._starting.setdefault(host, asyncio.Lock()):
            if host not in self._agents:
                connection, facts = await self._connections.connect(host), await self._facts_of(host)
                directory, python = facts.directory.path, facts.python.path if facts.python else "python3"
                is_there = self._digest in facts.programs
                async with contextlib.nullcontext() if is_there else self._sending:
                    await put_program(connection, self._program, self._digest, directory, python=python)
                command = [*self._command(facts), "host", "--cluster", self.cluster, "--state", directory]
                command += ["--service", self._hosts[host].service]
                channel = await self._open.enter_async_context(connection.channel(command))
                self._agents[host] = AgentClient(host, channel)
            return self._agents[host]

    async def _facts_of(self, host: str) -> HostFacts:
        if host not in self._facts:
            await self._seen(host)
        return self._facts[host]

    def _know(
        self,
        host: str,
        *,
        units: Mapping[str, RoleName] = {},
        gone: Collection[str] = (),
        keys: Mapping[str, str] = {},
    ) -> None:
        """Keep in mind, before it is so, that something may be on a host: which units, and their keys."""
        if host not in self._records:
            for name in self._also_called(host):  # its name until now, at which nothing runs
                self._records.remove(name)
        directory = self._facts[host].directory.path if host in self._facts else ""
        self._records.know(host, self._hosts[host], directory, units=units, gone=gone, keys=keys)

    def _asked(self) -> set[str]:
        """The hosts on which something may be, but those that are lost."""
        return self._records.keys() - self._lost


# Removes a host's directory where no cluster is left in it, and nothing but what every cluster shares. The
# directory itself may be a mount, or its parent another user's: then it stays, and is empty.
_CLEAR = """
cd -- "$1" || exit 0
for one in $(ls -A); do case $one in bin|_cache|_host) ;; *) exit 0;; esac; done
rm -rf -- bin _cache _host || exit
cd / && rmdir -- "$1" 2>/dev/null || true
"""


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
