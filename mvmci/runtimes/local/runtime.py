"""Units as processes of this machine, under a supervisor that outlives the `up` that started it.

Units that others dial listen on the loopback, at ports that are chosen once and kept in `ports.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mvmci.cluster.broker import LOOPBACK, BrokerSettings
from mvmci.cluster.changes import Observed
from mvmci.cluster.deployment import Place, Unit, UnitConfig
from mvmci.errors import LockHeld, MvmciError, NotFound, Usage
from mvmci.roles import broker
from mvmci.roles.balancer import find_haproxy
from mvmci.runtime import GRACE_S, OfThisMachine, Provisioning
from mvmci.runtimes.local.messages import (
    LINE_BYTES_MAX,
    Desired,
    Replace,
    Report,
    Start,
    Stop,
    SupervisorFiles,
    SupervisorProcess,
    SupervisorRequest,
    Watch,
    desired_by,
    keep_desired,
    read_desired,
    socket_address,
)
from mvmci.runtimes.local.service import Kind, Service, after_boot, boot_script, services
from mvmci.system.files import private_opener, write_private
from mvmci.system.linux import stoppable
from mvmci.system.lock import hold
from mvmci.system.ports import check_port, choose_port
from mvmci.system.processes import (
    KEPT,
    clean_environment,
    has_ended,
    open_alive,
    program_digest,
    this_program,
)
from mvmci.system.tasks import at_most, in_thread, readable
from mvmci.trust.provision import in_making_order, make_config

if TYPE_CHECKING:
    from mvmci.cluster.topology import Topology

_READY = b"ready\n"
_WORDS_BYTES_MAX = 2000
SUPERVISOR = "supervisor"  # whose log can be read like that of a unit
_PIECE_BYTES = 1 << 16
_FOLLOW_EVERY_S = 0.2
_ASK_AGAIN_S = 0.05
_BEGIN_S_MAX = 60.0  # from the lock until it can be asked, on a machine that is busy
_LOOK_AGAIN_S = 1.0
# Of our environment, what decides which programs, certificates and unpacked files units find.
_TOLD = ("PATH", "PYTHONPATH", "SHIV_ROOT", "SSL_CERT_DIR", "SSL_CERT_FILE", "XDG_CACHE_HOME")

_reports = msgspec.json.Decoder(Report)


class Local(OfThisMachine):
    """The port `mvmci.runtime.Runtime`. `program` is how the supervisor and the units of a `start` are
    started: as this one was, if it is empty. `service` is what starts the supervisor after a boot."""

    apart = False

    def __init__(
        self, root: Path, cluster: str, program: Sequence[str] = (), *, service: Kind = "none"
    ) -> None:
        self.root = root
        self.cluster = cluster
        self.files = SupervisorFiles(root / cluster)
        self._program = tuple(program or this_program())
        self._service = None if service == "none" else Service(service, root, cluster)
        self._chosen: dict[str, int] = {}  # ports of units that were never started
        self._started = asyncio.Event()  # by us, since `watch` looked

    @property
    def after_boot(self) -> str:
        """What a user has to do so that units come back after a boot, if anything."""
        return after_boot("none" if self._service is None else self._service.kind, self.files.boot_script)

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
        with self._supervisor() as (_, pidfd), contextlib.suppress(FileNotFoundError):
            if pidfd is not None:  # from its file: one that is stopped does not answer
                return _reports.decode(self.files.units.read_bytes()).units
        return []

    async def watch(self) -> AsyncGenerator[list[Observed], None]:
        while True:
            self._started.clear()
            with self._supervisor() as (_, pidfd):
                if pidfd is not None:
                    async for report in self._ask(pidfd, Watch()):
                        yield report.units
            yield []
            await self._until_started()

    async def _until_started(self) -> None:
        """Until a supervisor is there: by us, or because systemd or somebody else started one."""
        while True:
            await at_most(_LOOK_AGAIN_S, self._started.wait())
            self._started.clear()
            with self._supervisor() as (_, pidfd):
                if pidfd is not None:
                    return

    async def provision(self, provisioning: Provisioning) -> None:
        """What each unit is given, beside its log."""
        authority = provisioning.authority
        for config in in_making_order(provisioning.starting):
            file = self.files.config(config.unit.name)
            there = file.read_bytes() if file.exists() else b""
            data = make_config(config, authority, there, keys_in=authority.folder)
            if data is not None and data != there:
                write_private(file, data)

    async def start(self, units: Sequence[UnitConfig], *, attached: bool = False) -> None:
        self._keep_ports(units)
        request = Start(units=tuple(units), program=self._program)
        service = None if attached else self._service
        if not attached:
            await self._write_starter()
        if await self._tell(request):
            return
        for other in services(self.root, self.cluster):
            if other != service:  # what was wanted before
                await asyncio.to_thread(other.remove)
        if service is not None:
            await self._start_service(service, request)
        else:
            await self._start_supervisor(request, attached)
        self._started.set()

    async def _write_starter(self) -> None:
        """Have a boot find what starts these units, by this program."""
        if self._service is not None:
            await asyncio.to_thread(self._service.write, self._program, self._environment())
            self.files.boot_script.unlink(missing_ok=True)
        else:
            script = boot_script(self._program, self.root, self.cluster, self._environment())
            write_private(self.files.boot_script, script.encode())

    async def _tell(self, request: Start) -> bool:
        """Have the supervisor that runs do it, of the same program as its units; False where none does."""
        with self._supervisor() as (process, pidfd):
            if pidfd is not None and process.digest:
                await self._replace(process, pidfd)
                async for _ in self._ask(pidfd, request):
                    return True
            elif pidfd is not None:
                return await self._tell_anew(request)
        return False

    async def _replace(self, process: SupervisorProcess, pidfd: int) -> None:
        """See that the supervisor is of the program of the units that it is to start. Raises MvmciError."""
        digest = program_digest(self._program)
        if digest == process.digest:
            return
        async for report in self._ask(pidfd, Replace(program=self._program, digest=digest)):
            if report.error:
                raise MvmciError(
                    f"the units' supervisor cannot go over to {self._program[-1]}: {report.error}",
                    hint="what runs goes on as it was",
                )

    async def _tell_anew(self, request: Start) -> bool:
        """Do it by a new supervisor: the one that runs is of a build that could not be replaced."""
        there = {one.name: one.config for one in await self.observe() if one.config is not None}
        await self.stop()
        wanted = there | {config.unit.name: config for config in request.units}
        await self.start(tuple(wanted.values()))
        return True

    def _environment(self) -> dict[str, str]:
        """What a service has to be told that a child of ours has from us. It stands there for all to read."""
        ours = clean_environment(self.root)
        return {key: ours[key] for key in (*KEPT, *_TOLD) if key in ours}

    async def _start_service(self, service: Service, request: Start) -> None:
        """Start it with `request`: one that systemd starts by itself at the same moment is told of it."""
        with open(self.files.own_log, "ab", opener=private_opener) as log:  # noqa: ASYNC230 (a local file)
            before = log.tell()
        keep_desired(self.files, desired_by(request, self._program))
        try:
            await asyncio.to_thread(service.start)
        except MvmciError as error:
            raise MvmciError(error.message, hint=self._words(before) or error.hint) from None
        if not await self._tell(request):
            raise MvmciError(f"{service.name} ended as it was started", hint=self._words(before) or None)

    def _words(self, before: int) -> str:
        """What a supervisor said last, whose log had `before` bytes when it was started."""
        return self.files.own_log.read_bytes()[before:][-_WORDS_BYTES_MAX:].decode(errors="replace").strip()

    async def stop(self, names: Collection[str] | None = None, grace_s: float = GRACE_S) -> bool:
        with self._supervisor() as (_, pidfd):
            if pidfd is None:
                if not await self._forget(names):
                    return await self.stop(names, grace_s)
                await self._remove_starters()
                return False
            before = {one.name for one in await self.observe()}
            left: list[Observed] = []
            request = Stop(names=None if names is None else (*names,), grace_s=grace_s)
            async for report in self._ask(pidfd, request):
                left = report.units
            if not left:
                await readable(pidfd)
                await self._remove_starters()
            return names is None or bool(before & set(names))

    async def _remove_starters(self) -> None:
        """Where nothing is wanted any more, leave nothing that a boot would start."""
        if not self.files.desired.exists():
            self.files.boot_script.unlink(missing_ok=True)
            for service in services(self.root, self.cluster):
                await asyncio.to_thread(service.remove)

    async def _forget(self, names: Collection[str] | None) -> bool:
        """Have no boot start these: a supervisor that was killed could not write it down. False: one was
        about to begin, and can be asked now. Raises LockHeld of one that never can."""
        end = time.monotonic() + _BEGIN_S_MAX
        busy, hint = (
            f"keeps the units of {self.cluster}, and cannot be asked",
            "end that process, then try again",
        )
        while self.files.desired.exists():
            try:
                with hold(self.files.lock, busy, hint):
                    there = read_desired(self.files).units if names is not None else ()
                    gone = set(names or ())
                    kept = tuple(one for one in there if one.config.unit.name not in gone)
                    keep_desired(self.files, Desired(units=kept))
                    return True
            except LockHeld:
                if time.monotonic() > end:
                    raise
            with self._supervisor() as (_, pidfd):
                if pidfd is not None:
                    return False
            await asyncio.sleep(_ASK_AGAIN_S)
        return True

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
    def _supervisor(self) -> Iterator[tuple[SupervisorProcess, int | None]]:
        """The one that runs, and its pidfd; None if none does, whatever a file says."""
        try:
            process = msgspec.json.decode(self.files.supervisor.read_bytes(), type=SupervisorProcess)
        except (FileNotFoundError, msgspec.DecodeError):
            yield SupervisorProcess(pid=0, started=0), None
            return
        pidfd = open_alive(process)
        try:
            yield process, pidfd
        finally:
            if pidfd is not None:
                os.close(pidfd)

    async def _ask(self, pidfd: int, request: SupervisorRequest) -> AsyncGenerator[Report, None]:
        """What the supervisor answers; nothing if it ends. One that is cut off, because that becomes another
        program at this moment, asks again: what was asked twice is done once."""
        answered = False
        while not has_ended(pidfd):
            async with contextlib.aclosing(self._ask_once(request)) as reports:
                async for report in reports:
                    answered = True
                    yield report
            if answered and not isinstance(request, Watch):
                return
            await at_most(_ASK_AGAIN_S, readable(pidfd))

    async def _ask_once(self, request: SupervisorRequest) -> AsyncGenerator[Report, None]:
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
        command = [*self._program, "supervise", "--cluster", self.cluster]
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
        # To its end, also for who is interrupted: who then stops it has to find it.
        if await in_thread(_hand_over, process, msgspec.json.encode(first)):
            return
        code = await in_thread(process.wait)
        raise MvmciError(
            f"the units' supervisor ended with exit code {code}", hint=self._words(before) or None
        )


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _hand_over(process: subprocess.Popen[bytes], data: bytes) -> bool:
    """Tell a new supervisor what it begins with; whether it has, and is no longer ours to wait for."""
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdout as said:
        with contextlib.suppress(BrokenPipeError), process.stdin as told:
            told.write(data)
        if said.readline() != _READY:
            return False
    process.returncode = 0
    return True
