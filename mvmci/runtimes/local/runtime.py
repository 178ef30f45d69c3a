"""Units as processes of this machine, under a supervisor that outlives the `up` that started it.

Units that others dial listen on the loopback, at ports that are chosen once and kept in `ports.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from mvmci.cluster.broker import LOOPBACK
from mvmci.cluster.deployment import Place, Unit
from mvmci.errors import MvmciError, Usage
from mvmci.roles.balancer import find_haproxy
from mvmci.roles.broker import lay_down
from mvmci.runtime import GRACE_S, Ground, UnitStatus
from mvmci.runtimes.local.supervisor import Desired, Observed, SupervisorFiles, write
from mvmci.system.files import private_opener, write_private
from mvmci.system.ports import check_port, choose_port
from mvmci.system.processes import Known, clean_environment, has_ended, open_alive, this_program

READY = b"ready\n"
WORDS_BYTES_MAX = 2000
LOOK_EVERY_S = 0.01
ANSWER_S = 0.2  # of a port of this machine


class Local:
    """The port `mvmci.runtime.Runtime`. `program` is how the supervisor is started, and units by it."""

    def __init__(self, root: Path, cluster: str, program: Sequence[str] = ()) -> None:
        self.root = root
        self.cluster = cluster
        self.files = SupervisorFiles(root / cluster)
        self._program = program
        self._chosen: dict[str, int] = {}  # ports of units that were never started

    apart = False

    def check(self) -> None:
        """This machine is here."""

    def place(self, unit: Unit) -> Place:
        if unit.role == "balancer":
            find_haproxy()
        kept = self._ports()
        port = kept.get(unit.name) or self._chosen.get(unit.name)
        if port is None:
            taken = {*kept.values(), *self._chosen.values()}
            port = choose_port(f"{self.files.folder}/{unit.name}", taken=taken)
            self._chosen[unit.name] = port
        elif not any(one.name == unit.name and one.pid for one in self.units()):
            self._check_port(unit.name, port)
        return Place(listen=f"{LOOPBACK}:{port}", address=f"{LOOPBACK}:{port}")

    def planned(self) -> tuple[Unit, ...]:
        with self._supervisor() as pidfd, contextlib.suppress(FileNotFoundError):
            if pidfd is not None:
                return self.files.orders().units
        return ()

    def units(self) -> list[UnitStatus]:
        with self._supervisor() as pidfd, contextlib.suppress(FileNotFoundError):
            if pidfd is not None:
                listens = {unit.name: unit.listen for unit in self.files.orders().units}
                return [_seen(one, listens.get(one.name)) for one in self._told().units]
        return []

    async def lay_down(self, ground: Ground) -> None:
        """The broker's settings, and the identity of each unit."""
        if ground.broker is not None:
            lay_down(self.files.folder, ground.broker)
        for unit in ground.plan.units:
            if unit.role != "broker" and unit.role != "balancer":
                path = self.files.logs / unit.name / "identity.json"
                if unit.name in ground.refused:  # its key was revoked
                    path.unlink(missing_ok=True)
                ground.authority.identity(unit.name, unit.role, _queues(unit), ground.login, path)

    async def apply(self, units: Sequence[Unit], *, attached: bool = False) -> None:
        self._keep_ports(units)
        orders = Desired(cluster=self.cluster, units=tuple(units), number=time.time_ns())
        write(self.files.plan, orders)
        with self._supervisor() as pidfd:
            if pidfd is not None:
                signal.pidfd_send_signal(pidfd, signal.SIGHUP)
                while not has_ended(pidfd):
                    if self._told().number == orders.number:
                        return
                    await asyncio.sleep(LOOK_EVERY_S)
        await self._start(attached)

    async def ended(self) -> None:
        with self._supervisor() as pidfd:
            if pidfd is not None:
                await _wait(pidfd)

    async def stop(self, grace_s: float = GRACE_S) -> bool:
        with self._supervisor() as pidfd:
            if pidfd is None:
                return False
            with contextlib.suppress(FileNotFoundError):
                write(self.files.plan, msgspec.structs.replace(self.files.orders(), grace_s=grace_s))
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            await _wait(pidfd)
            return True

    async def forget(self) -> None:
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

    def _told(self) -> Observed:
        return msgspec.json.decode(self.files.units.read_bytes(), type=Observed)

    @property
    def _ports_file(self) -> Path:
        return self.files.folder / "ports.json"

    def _ports(self) -> dict[str, int]:
        """The ports that units were once started at."""
        try:
            return msgspec.json.decode(self._ports_file.read_bytes(), type=dict[str, int])
        except (OSError, msgspec.DecodeError):
            return {}

    def _keep_ports(self, units: Sequence[Unit]) -> None:
        kept = self._ports()
        told = {unit.name: (unit.listen or "").rpartition(":")[2] for unit in units}
        ports = kept | {name: int(port) for name, port in told.items() if port.isdecimal()}
        if ports != kept:
            write_private(self._ports_file, msgspec.json.encode(ports))

    def _check_port(self, name: str, port: int) -> None:
        try:
            check_port(LOOPBACK, port)
        except Usage as error:
            hint = f"stop what listens there, or remove {self._ports_file}: another is then chosen"
            raise Usage(f"{name} cannot listen where it did: {error.message}", hint=hint) from None

    async def _start(self, attached: bool) -> None:
        """Start a supervisor, and wait until it listens."""
        command = [*(self._program or this_program()), "supervise", "--cluster", self.cluster]
        command += ["--attached", str(os.getpid())] if attached else []
        log = self.files.folder / "supervisor.log"
        with open(log, "wb", opener=private_opener) as stderr:  # noqa: ASYNC230 (a local file)
            # By this very thread: with `--attached`, the supervisor ends when the thread that made it does.
            process = subprocess.Popen(  # noqa: ASYNC220 (it stays)
                command,
                env=clean_environment(self.root),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        assert process.stdout is not None
        with process.stdout as said:
            if await asyncio.to_thread(said.readline) == READY:
                process.returncode = 0  # not ours to wait for
                return
        code = await asyncio.to_thread(process.wait)
        words = log.read_text(errors="replace")[-WORDS_BYTES_MAX:]
        raise MvmciError(f"the units' supervisor ended with exit code {code}", hint=words.strip() or None)


def _seen(status: UnitStatus, listen: str | None) -> UnitStatus:
    """`status`; of a balancer, which does not speak for itself, ready once its port answers."""
    if status.role != "balancer" or status.state != "starting" or listen is None:
        return status
    host, _, port = listen.rpartition(":")
    try:
        socket.create_connection((host, int(port)), ANSWER_S).close()
    except (OSError, ValueError):
        return status
    return msgspec.structs.replace(status, state="ready")


def _queues(unit: Unit) -> list[str]:
    """Those that a worker or an executor is told to take jobs from."""
    prefix = "--queue="
    return [option.removeprefix(prefix) for option in unit.options if option.startswith(prefix)]


async def _wait(pidfd: int) -> None:
    """Until the process has ended."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
