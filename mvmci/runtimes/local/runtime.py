"""Units as processes of this machine, under a supervisor that outlives the `up` that started it.

Units that others dial listen on the loopback, at ports that are chosen once and kept in `ports.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from pathlib import Path

import msgspec

from mvmci.cluster.broker import LOOPBACK, BrokerSettings
from mvmci.cluster.changes import Observed
from mvmci.cluster.deployment import Place, Unit, UnitConfig
from mvmci.cluster.topology import Topology
from mvmci.errors import MvmciError, NotFound, Usage
from mvmci.roles import broker
from mvmci.roles.balancer import find_haproxy
from mvmci.runtime import GRACE_S, OfThisMachine, Provisioning
from mvmci.runtimes.local.supervisor import (
    LINE_BYTES_MAX,
    Report,
    Start,
    Stop,
    SupervisorFiles,
    SupervisorRequest,
    Watch,
    socket_address,
)
from mvmci.system.files import private_opener, write_private
from mvmci.system.linux import stoppable
from mvmci.system.ports import check_port, choose_port
from mvmci.system.processes import Known, clean_environment, open_alive, this_program
from mvmci.system.tasks import readable
from mvmci.trust.provision import make_config

_READY = b"ready\n"
_WORDS_BYTES_MAX = 2000
SUPERVISOR = "supervisor"  # whose log can be read like that of a unit
_PIECE_BYTES = 1 << 16
_FOLLOW_EVERY_S = 0.2

_reports = msgspec.json.Decoder(Report)


class Local(OfThisMachine):
    """The port `mvmci.runtime.Runtime`. `program` is how the supervisor is started, and units by it."""

    apart = False

    def __init__(self, root: Path, cluster: str, program: Sequence[str] = ()) -> None:
        self.root = root
        self.cluster = cluster
        self.files = SupervisorFiles(root / cluster)
        self._program = program
        self._chosen: dict[str, int] = {}  # ports of units that were never started
        self._started = asyncio.Event()  # by us, since `watch` looked

    async def check(self) -> None:
        """This machine is here."""

    async def place(self, unit: Unit) -> Place:
        if unit.role == "balancer":
            find_haproxy()
        kept = self._ports()
        port = kept.get(unit.name) or self._chosen.get(unit.name)
        if port is None:
            taken = {*kept.values(), *self._chosen.values()}
            port = choose_port(f"{self.files.folder}/{unit.name}", taken=taken)
            self._chosen[unit.name] = port
        elif not any(one.name == unit.name and one.pid for one in await self.observe()):
            self._check_port(unit.name, port)
        return Place(listen=f"{LOOPBACK}:{port}", address=f"{LOOPBACK}:{port}")

    def dial(self, unit: Unit, broker: BrokerSettings) -> str:
        return self.dial_here(unit, broker)

    def adds(self, topology: Topology, unit: Unit) -> tuple[tuple[str, str], ...]:
        return ()

    async def observe(self) -> list[Observed]:
        with self._supervisor() as pidfd, contextlib.suppress(FileNotFoundError):
            if pidfd is not None:  # from its file: one that is stopped does not answer
                return _reports.decode(self.files.units.read_bytes()).units
        return []

    async def watch(self) -> AsyncGenerator[list[Observed], None]:
        while True:
            self._started.clear()
            with self._supervisor() as pidfd:
                if pidfd is not None:
                    async for report in self._ask(Watch()):
                        yield report.units
                    await readable(pidfd)
            yield []
            await self._started.wait()

    async def provision(self, provisioning: Provisioning) -> None:
        """What each unit is given, beside its log."""
        authority = provisioning.authority
        for config in provisioning.starting:
            file = self.files.config(config.unit.name)
            there = file.read_bytes() if file.exists() else b""
            data = make_config(config, authority, there, keys_in=authority.folder)
            if data is not None and data != there:
                write_private(file, data)

    async def start(self, units: Sequence[UnitConfig], *, attached: bool = False) -> None:
        self._keep_ports(units)
        with self._supervisor() as pidfd:
            if pidfd is not None:
                async with contextlib.aclosing(self._ask(Start(units=tuple(units)))) as answers:
                    async for _ in answers:
                        return
                await readable(pidfd)  # its last unit has just ended
        await self._start_supervisor(Start(units=tuple(units)), attached)
        self._started.set()

    async def stop(self, names: Collection[str] | None = None, grace_s: float = GRACE_S) -> bool:
        with self._supervisor() as pidfd:
            if pidfd is None:
                return False
            before = {one.name for one in await self.observe()}
            left: list[Observed] = []
            async for report in self._ask(Stop(names=None if names is None else (*names,), grace_s=grace_s)):
                left = report.units
            if not left:
                await readable(pidfd)
            return names is None or bool(before & set(names))

    async def log(
        self, name: str, *, follow: bool = False, last: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        files = self._logs(name)
        read = {file: 0 if last is None else max(0, _size(file) - last) for file in files}
        while True:
            for file in files:
                with contextlib.suppress(FileNotFoundError), file.open("rb") as log:
                    if log.seek(0, os.SEEK_END) < read[file]:
                        read[file] = 0  # it was emptied
                    log.seek(read[file])
                    while data := log.read(_PIECE_BYTES):
                        read[file] += len(data)
                        yield data
            if not follow:
                return
            files = [file for file in files if not file.name.endswith(".1")]
            await asyncio.sleep(_FOLLOW_EVERY_S)

    def _logs(self, name: str) -> list[Path]:
        """The files with what a unit printed, the oldest first. Raises NotFound."""
        log = self.files.own_log if name == SUPERVISOR else self.files.log(name)
        if not log.exists():
            kept = sorted(path.parent.name for path in self.files.logs.glob("*/log"))
            raise NotFound(
                f"no unit {name} of {self.cluster} is kept running on this machine",
                hint=f"there are {', '.join(kept)}, and {SUPERVISOR}, which starts them"
                if kept
                else "a unit that was started by hand logs to where it was started",
            )
        server = [self.files.folder / broker.FOLDER / broker.LOG] if name.startswith("broker") else []
        return [log.with_name(f"{log.name}.1"), log, *server]

    async def forget(self, hosts: Collection[str] | None = None) -> None:
        """They leave nothing elsewhere."""

    @contextlib.contextmanager
    def _supervisor(self) -> Iterator[int | None]:
        """The pidfd of the one that runs; None if none does, whatever a file says."""
        try:
            known = msgspec.json.decode(self.files.supervisor.read_bytes(), type=Known)
        except (FileNotFoundError, msgspec.DecodeError):
            yield None
            return
        pidfd = open_alive(known)
        try:
            yield pidfd
        finally:
            if pidfd is not None:
                os.close(pidfd)

    async def _ask(self, request: SupervisorRequest) -> AsyncGenerator[Report, None]:
        """What the supervisor answers; nothing if it ends."""
        try:
            with socket_address(self.files.socket) as address:
                reader, writer = await asyncio.open_unix_connection(address, limit=LINE_BYTES_MAX)
        except OSError:
            return
        try:
            writer.write(msgspec.json.encode(request) + b"\n")
            while line := await reader.readline():
                yield _reports.decode(line)
        except ConnectionError:
            return
        finally:
            writer.close()

    @property
    def _ports_file(self) -> Path:
        return self.files.folder / "ports.json"

    def _ports(self) -> dict[str, int]:
        """The ports that units were once started at."""
        try:
            return msgspec.json.decode(self._ports_file.read_bytes(), type=dict[str, int])
        except (OSError, msgspec.DecodeError):
            return {}

    def _keep_ports(self, units: Sequence[UnitConfig]) -> None:
        kept = self._ports()
        told = {one.unit.name: (one.unit.listen or "").rpartition(":")[2] for one in units}
        ports = kept | {name: int(port) for name, port in told.items() if port.isdecimal()}
        if ports != kept:
            write_private(self._ports_file, msgspec.json.encode(ports))

    def _check_port(self, name: str, port: int) -> None:
        try:
            check_port(LOOPBACK, port)
        except Usage as error:
            hint = f"stop what listens there, or remove {self._ports_file}: another is then chosen"
            raise Usage(f"{name} cannot listen where it did: {error.message}", hint=hint) from None

    async def _start_supervisor(self, first: Start, attached: bool) -> None:
        """Start one, and wait until it can be asked."""
        command = [*(self._program or this_program()), "supervise", "--cluster", self.cluster]
        command += ["--attached", str(os.getpid())] if attached else []
        log = self.files.own_log
        with open(log, "ab", opener=private_opener) as stderr:  # noqa: ASYNC230 (a local file)
            before = stderr.tell()
            # By this very thread: with `--attached`, the supervisor ends when the thread that made it does.
            process = subprocess.Popen(  # noqa: ASYNC220 (it stays)
                command,
                env=clean_environment(self.root),
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=stoppable,
            )
        if await asyncio.to_thread(_hand_over, process, msgspec.json.encode(first)):
            process.returncode = 0  # not ours to wait for
            return
        code = await asyncio.to_thread(process.wait)
        words = log.read_bytes()[before:][-_WORDS_BYTES_MAX:].decode(errors="replace")
        raise MvmciError(f"the units' supervisor ended with exit code {code}", hint=words.strip() or None)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _hand_over(process: subprocess.Popen[bytes], data: bytes) -> bool:
    """Tell a new supervisor what it begins with; whether it has."""
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdout as said:
        with contextlib.suppress(BrokenPipeError), process.stdin as told:
            told.write(data)
        return said.readline() == _READY
