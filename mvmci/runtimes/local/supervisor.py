"""The process that keeps a cluster's units running on this machine.

It owns `supervisor.json` (who it is), `supervisor.sock` (where it is asked), `supervisor.log` (which units
began and ended), `units.json` (what became of the units) and the `log` of each unit. It does what it is told
to the units that are named, and compares nothing. It promises that there is one of it per cluster; that a
unit that crashed is started again, after a pause that doubles with every crash; that a stop goes from the
workers to the broker; and that no unit outlives it, however it ends. With its last unit that is stopped it
ends, so that the next one is of the program that starts it. Whether a unit does its work, and one that is
stopped by SIGSTOP, is not its business: presence tells.

    stdin           a `Start`: what it begins with
    SIGTERM         stop all; once more: at once
    supervisor.sock one line of JSON, a `SupervisorRequest`, and `Report`s back, a line each: `start` when it
                    is under way, `stop` when they are gone, `watch` now and whenever something changed
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mvmci.cluster.changes import Observed, in_stopping_order
from mvmci.cluster.deployment import ROLES, UnitConfig
from mvmci.errors import FOR_GOOD
from mvmci.jobs.summary import rfc3339
from mvmci.roles import broker
from mvmci.runtime import GRACE_S, why_ended
from mvmci.system.clock import wall_clock_ms
from mvmci.system.files import private_folder, private_opener, sweep, write_private
from mvmci.system.linux import dying_with_us
from mvmci.system.lock import hold
from mvmci.system.processes import heeded, this_process

LINE_BYTES_MAX = 64 << 20  # of a request or report, which holds every unit
LOG_BYTES_MAX = 16 << 20
_TAIL_BYTES = 4096
PORT_ANSWER_S = 0.2  # of a port of this machine
ANSWER_PAUSE_S = 0.05

log = logging.getLogger(__name__)


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """Keep these running. One that runs, and was started with the same, is left alone."""

    units: tuple[UnitConfig, ...]


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """Stop these, or all. Where all are asked while they leave, they get no more grace."""

    names: tuple[str, ...] | None = None
    grace_s: float = GRACE_S


class Watch(msgspec.Struct, frozen=True, kw_only=True, tag="watch"):
    """Tell how they are, for as long as somebody listens."""


SupervisorRequest = Start | Stop | Watch


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a supervisor tells; also `units.json`."""

    units: list[Observed]


_requests: msgspec.json.Decoder[SupervisorRequest] = msgspec.json.Decoder(SupervisorRequest)


@dataclass(frozen=True)
class Pace:
    """How long things take; tests are in more of a hurry."""

    first_pause_s: float = 0.1  # between a crash and the next start; doubles with every crash
    longest_pause_s: float = 10.0
    healthy_s: float = 30.0  # a process that lived as long has not crashed because of the one before
    hurry_s: float = 15.0  # from the second SIGTERM to SIGKILL: longer than a native program has
    look_every_s: float = 5.0  # at the size of the logs


class SupervisorFiles:
    """Where the supervisor of a cluster keeps what."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.supervisor = folder / "supervisor.json"
        self.socket = folder / "supervisor.sock"
        self.units = folder / "units.json"
        self.lock = folder / "supervisor.lock"
        self.own_log = folder / "supervisor.log"
        self.logs = folder / "units"

    def log(self, name: str) -> Path:
        """What the unit printed. `log.1` beside it is what came before."""
        return self.logs / name / "log"

    def config(self, name: str) -> Path:
        """What the unit is given; see `mvmci.trust.provision`."""
        return self.logs / name / "config.json"


@contextlib.contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """`path` as the address of a socket, which may have 107 bytes only, however deep the folder is."""
    folder = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def write(path: Path, value: Any) -> None:
    """Write `value` as JSON. No power cut is to be survived: with the processes, it would mean nothing."""
    write_private(path, msgspec.json.encode(value), synced=False)


async def supervise(
    folder: Path,
    first: Start,
    program: Sequence[str],
    env: Mapping[str, str],
    *,
    ready: Callable[[], None],
    pace: Pace = Pace(),
) -> None:
    """Keep the units of a cluster running, from the `first` on, until none is left. Raises LockHeld.

    `program` is what a unit's role and options are put behind; `ready` is called once requests count.
    """
    files = SupervisorFiles(folder)
    lock = hold(files.lock, f"already runs the units in {folder}", "`mvmci down` stops it")
    with lock, socket_address(files.socket) as address:
        files.socket.unlink(missing_ok=True)
        async with asyncio.TaskGroup() as tasks:
            supervisor = Supervisor(files, program, env, pace, tasks)
            for signum in heeded(
                signal.SIGTERM, signal.SIGINT
            ):  # before there is anything that it would leave
                asyncio.get_running_loop().add_signal_handler(
                    signum, lambda: tasks.create_task(supervisor.stop(None, GRACE_S))
                )
            supervisor.start(first.units)
            server = await asyncio.start_unix_server(supervisor.answer, address, limit=LINE_BYTES_MAX)
            write(files.supervisor, this_process())
            ready()
            await supervisor.run()
            server.close()
        for path in (files.units, files.supervisor, files.socket):
            path.unlink(missing_ok=True)
        for place in (folder, *folder.glob("*/"), *files.logs.glob("*/")):
            sweep(place)


class Supervisor:
    """All units of one cluster."""

    def __init__(
        self,
        files: SupervisorFiles,
        program: Sequence[str],
        env: Mapping[str, str],
        pace: Pace,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.files = files
        self.program = program
        self.env = env
        self.pace = pace
        self.tasks = tasks
        self.units: dict[str, UnitProcess] = {}
        self._watchers: set[asyncio.Event] = set()
        self._ended = asyncio.Event()
        self._quiet = False  # while many change at once

    async def run(self) -> None:
        """Until all units were stopped, because a request or a signal said so."""
        bounding = self.tasks.create_task(self._bound_logs())
        await self._ended.wait()
        bounding.cancel()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Do what one connection asks for."""
        with contextlib.suppress(ConnectionError, msgspec.DecodeError):
            request = _requests.decode(await reader.readline())
            if isinstance(request, Watch):
                await self._report_always(writer)
            elif self._ended.is_set():
                return  # too late: another supervisor has to be started
            elif isinstance(request, Start):
                self.start(request.units)
            else:
                await self.stop(request.names, request.grace_s)
            await self._report(writer)
        writer.close()

    def start(self, configs: Sequence[UnitConfig]) -> None:
        """Keep `configs` running."""
        self._quiet = True
        for config in configs:
            there = self.units.get(config.unit.name)
            if there is not None:
                there.want(config)
            else:
                unit = self.units[config.unit.name] = UnitProcess(config, self)
                self.tasks.create_task(unit.run(), name=config.unit.name)
        self._quiet = False
        self.tell()

    async def stop(self, names: Collection[str] | None, grace_s: float) -> None:
        """Stop these units, or all, and wait until they are gone."""
        leaving = [unit for unit in self.units.values() if names is None or unit.seen.name in names]
        if names is None and any(unit.wanted is None for unit in leaving):
            for unit in leaving:
                unit.hurry()
        for role in in_stopping_order(unit.seen.role for unit in leaving):
            these = [unit for unit in leaving if unit.seen.role == role]
            self._quiet = True
            for unit in these:
                unit.leave(grace_s)
            self._quiet = False
            self.tell()
            await asyncio.gather(*(unit.settled.wait() for unit in these))
        if not self.units:
            self._ended.set()

    def tell(self) -> None:
        """Say what became of the units. A full disk keeps nobody from running.

        Not in the middle of a request: whoever hears that it is under way may believe all that is told.
        """
        if self._quiet:
            return
        with contextlib.suppress(OSError):
            write(self.files.units, self._told())
        for changed in self._watchers:
            changed.set()

    def _told(self) -> Report:
        def place(seen: Observed) -> tuple[int, int, str]:
            return ROLES.index(seen.role), len(seen.name), seen.name  # `worker-10` behind `worker-9`

        return Report(units=sorted((unit.seen for unit in self.units.values()), key=place))

    async def _report(self, writer: asyncio.StreamWriter) -> None:
        writer.write(msgspec.json.encode(self._told()) + b"\n")
        await writer.drain()

    async def _report_always(self, writer: asyncio.StreamWriter) -> None:
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while True:
                changed.clear()
                await self._report(writer)
                await changed.wait()
        finally:
            self._watchers.discard(changed)

    async def _bound_logs(self) -> None:
        while True:
            await asyncio.sleep(self.pace.look_every_s)
            for file in (self.files.own_log, *map(self.files.log, self.units)):
                with contextlib.suppress(OSError):
                    _bound(file)


class UnitProcess:
    """One unit: its processes, one after the other, and its log."""

    def __init__(self, config: UnitConfig, supervisor: Supervisor) -> None:
        self.wanted: UnitConfig | None = config
        unit = config.unit
        self.seen = Observed(name=unit.name, role=unit.role, host=unit.host, config=config)
        self.settled = asyncio.Event()  # it has gone, or is wanted again
        self._supervisor = supervisor
        self._pace = supervisor.pace
        self._log = supervisor.files.log(unit.name)
        self._news = asyncio.Event()  # its process has ended, or somebody wants something of it
        self._grace_s = GRACE_S
        self._hurried = False
        self._said_in = [self._log]  # where its process says what is wrong
        if unit.role == "broker":
            self._said_in.append(supervisor.files.folder / broker.FOLDER / broker.LOG)
        self._said_before: dict[Path, int] = {}  # the sizes of these when its process was started

    def want(self, config: UnitConfig) -> None:
        """Run with `config` from now on, also if it was given up."""
        if self.wanted != config and self.seen.pid is not None:
            self._say(state="draining")
        self.wanted = config
        self.seen = msgspec.structs.replace(self.seen, given_up=False)
        self._hurried = False
        self.settled.set()
        self._news.set()

    def leave(self, grace_s: float) -> None:
        """Run no more; what is at work has `grace_s` to see to its jobs."""
        self.wanted = None
        self._grace_s = grace_s
        self.settled.clear()
        if self.seen.pid is not None:
            self._say(state="draining")
        self._news.set()

    def hurry(self) -> None:
        """Cut short what grace it has."""
        self._hurried = True
        self._news.set()

    async def run(self) -> None:
        """Until it is wanted no more."""
        crashes = 0
        while (config := self.wanted) is not None:
            began = time.monotonic()
            code = await self._live(config)
            if self.wanted != config:
                crashes = 0
                continue
            crashes = 1 if time.monotonic() - began >= self._pace.healthy_s else crashes + 1
            await self._pause(config, code, crashes)
        del self._supervisor.units[self.seen.name]
        self._supervisor.tell()
        self.settled.set()

    async def _live(self, config: UnitConfig) -> int:
        """One process of the unit, from start to end, by itself or because it is wanted no more."""
        unit = config.unit
        told = {"role": unit.role, "host": unit.host, "config": config}
        try:
            process = self._start(config)
        except OSError as error:
            self._say(**told, state="down", pid=None, reason=f"it cannot be started: {error.strerror}")
            return -1
        log.info("%s is started: process %d", unit.name, process.pid)
        pidfd = os.pidfd_open(process.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, self._news.set)
        looking = None
        try:
            self._say(**told, state="starting", pid=process.pid, reason="", given_up=False)
            if unit.role == "balancer" and unit.listen is not None:
                looking = self._supervisor.tasks.create_task(self._until_it_answers(unit.listen))
            await self._until(lambda: self.wanted != config or process.poll() is not None)
            if process.poll() is None:
                await self._end(process)
        finally:
            if looking is not None:
                looking.cancel()
            loop.remove_reader(pidfd)
            os.close(pidfd)
        code = process.wait()
        log.info("%s %s", unit.name, _how(code))
        self._say(
            state="down",
            pid=None,
            last_exit=code,
            given_up=code in FOR_GOOD,
            reason=why_ended(self._last_words(), _how(code)),
        )
        return code

    async def _until_it_answers(self, listen: str) -> None:
        """Say that a balancer is ready, which does not do so itself."""
        host, _, port = listen.rpartition(":")
        while True:
            with contextlib.suppress(OSError, ValueError, TimeoutError):
                async with asyncio.timeout(PORT_ANSWER_S):
                    _, writer = await asyncio.open_connection(host, int(port))
                writer.close()
                break
            await asyncio.sleep(ANSWER_PAUSE_S)
        if self.seen.state == "starting":
            self._say(state="ready")

    def _start(self, config: UnitConfig) -> subprocess.Popen[bytes]:
        supervisor, unit = self._supervisor, config.unit
        given = supervisor.files.config(unit.name)
        who = ["--config", str(given)]
        if unit.role == "balancer":  # it is given nothing, and has a folder
            who = ["--cluster", supervisor.files.folder.name, "--name", unit.name]
        private_folder(self._log.parent)
        with open(self._log, "ab", opener=private_opener) as log:
            self._said_before = {path: _size(path) for path in self._said_in}
            return subprocess.Popen(
                [*supervisor.program, unit.role, *who, *unit.options],
                env=supervisor.env,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=dying_with_us(),
            )

    async def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Ask, ask again, and then do not ask."""

        def ended() -> bool:
            return process.poll() is not None

        process.terminate()
        process.send_signal(signal.SIGCONT)  # one that is stopped has a right to go as well
        await self._until(lambda: ended() or self._hurried, self._grace_s)
        process.terminate()
        await self._until(ended, self._pace.hurry_s)
        process.kill()
        await self._until(ended)

    async def _pause(self, config: UnitConfig, code: int, crashes: int) -> None:
        """Between a crash and the next start."""
        pause_s = min(self._pace.longest_pause_s, self._pace.first_pause_s * 2 ** min(crashes - 1, 30))
        then = "it is not started again" if self.seen.given_up else f"it is started again in {pause_s:g} s"
        self._note(f"{config.unit.name} {_how(code)}; {then}")
        if self.seen.given_up:
            await self._until(lambda: self.wanted != config or not self.seen.given_up)
        else:
            await self._until(lambda: self.wanted != config, pause_s)
        if self.wanted == config:
            self._say(restarts=self.seen.restarts + 1)

    async def _until(self, done: Callable[[], bool], wait_s: float | None = None) -> None:
        """Until `done()`, at which every news makes us look, or the time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while not done():
                    self._news.clear()
                    await self._news.wait()

    def _say(self, **changes: Any) -> None:
        before = self.seen
        self.seen = msgspec.structs.replace(before, **changes)
        if self.seen.state != before.state:
            self.seen = msgspec.structs.replace(self.seen, since=wall_clock_ms())
        self._supervisor.tell()

    def _note(self, text: str) -> None:
        now = rfc3339(wall_clock_ms())
        with contextlib.suppress(OSError), open(self._log, "ab", opener=private_opener) as file:
            file.write(f"{now} INFO {text}\n".encode())

    def _last_words(self) -> Iterator[str]:
        """The last lines that this process printed, or put into a log of its own."""
        for path in self._said_in:
            with contextlib.suppress(OSError), path.open("rb") as log:
                size, before = log.seek(0, os.SEEK_END), self._said_before.get(path, 0)
                log.seek(max(before if size >= before else 0, size - _TAIL_BYTES))
                yield from log.read().decode(errors="replace").splitlines()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _how(code: int) -> str:
    """How a process ended, to stand behind its name."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _bound(log: Path) -> None:
    """Keep a log from growing without end: what is too much is moved aside, once.

    The process has the file open, so it is emptied and not replaced. Lines of the instant in between are
    lost.
    """
    if not log.exists() or log.stat().st_size <= LOG_BYTES_MAX:
        return
    try:
        shutil.copy2(log, log.with_name(f"{log.name}.1"))
    finally:
        os.truncate(log, 0)
