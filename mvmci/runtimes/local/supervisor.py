"""The process that keeps a cluster's units running on this machine.

It owns `supervisor.json` (who it is), `supervisor.sock` (where it is asked), `supervisor.log` (which units
began and ended), `units.json` (what became of the units), `desired.json` (what was asked for) and the `log`
of each unit. It does what it is told to the units that are named, and compares nothing. It promises that
there is one of it per cluster; that a unit that crashed is started again, after a pause that doubles with
every crash, and by the program that it was asked for with; that a stop goes from the workers to the broker;
and that no unit outlives it, however it ends. With its last unit that is stopped it ends. Whether a unit
does its work, and one that is stopped by SIGSTOP, is not its business: presence tells.

    stdin           a `Start`: what it begins with. With `--resume`, that is `desired.json`, as after a boot
    SIGTERM         stop all, as a machine that shuts down does: it is still wanted. Once more: at once
    supervisor.sock one line of JSON, a `SupervisorRequest`, and `Report`s back, a line each: `start` when it
                    is under way, `stop` when they are gone, `watch` now and whenever something changed;
                    `replace` when it is that program. Who is cut off without one asks again

It becomes another program by an exec: the same process, so that its children stay its children and their
death with it is not asked for. Its lock is inherited, and a memory file is its standard input: a `Handover`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from mvmci.cluster.changes import Observed, in_stopping_order
from mvmci.cluster.deployment import ROLES
from mvmci.runtime import GRACE_S, why_ended
from mvmci.runtimes.local.messages import (
    LINE_BYTES_MAX,
    Desired,
    Handover,
    Replace,
    Report,
    Running,
    Start,
    Stop,
    SupervisorFiles,
    SupervisorProcess,
    SupervisorRequest,
    Wanted,
    Watch,
    desired_by,
    keep_desired,
    read_desired,
    socket_address,
    write,
)
from mvmci.runtimes.local.service import notify, notify_always
from mvmci.runtimes.local.unit_process import USUAL, Pace, UnitProcess, how_ended
from mvmci.system.files import sweep
from mvmci.system.lock import hold
from mvmci.system.processes import heeded, program_digest, this_process

LOG_BYTES_MAX = 16 << 20
TRY_S = 120.0  # for a program that is to be the next: a small machine unpacks it first
STOPPING = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger(__name__)
_requests: msgspec.json.Decoder[SupervisorRequest] = msgspec.json.Decoder(SupervisorRequest)


async def supervise(
    folder: Path,
    begin: Desired | Handover | None,
    program: Sequence[str],
    env: Mapping[str, str],
    *,
    ready: Callable[[], None],
    options: Sequence[str] = (),
    kept: bool = True,
    pace: Pace = USUAL,
) -> None:
    """Keep the units of a cluster running, from those of `begin` on, until none is left. Raises LockHeld, and
    Usage where what was asked for before, which is meant by None, cannot be read.

    `program` is what this one is, and `options` are those that its next one is started with too; `ready` is
    called once requests count. What is asked for is `kept` for the next boot, or ends with this process.
    """
    files = SupervisorFiles(folder)
    inherited = begin.lock if isinstance(begin, Handover) else None
    lock = hold(
        files.lock, f"already runs the units in {folder}", "`mvmci down` stops it", inherited=inherited
    )
    with contextlib.ExitStack() as held:
        descriptor = held.enter_context(lock)
        # Under the lock: who stops all meanwhile finds us, or has nothing wanted before we look.
        begin = read_desired(files) if begin is None else begin
        if not begin.units:  # after a boot: all was stopped before it
            ready()
            notify("READY=1")
            return
        address = held.enter_context(socket_address(files.socket))
        files.socket.unlink(missing_ok=True)
        if not kept:
            files.desired.unlink(missing_ok=True)  # of one that did not come to its end
        async with asyncio.TaskGroup() as tasks:
            supervisor = Supervisor(files, program, env, pace, tasks, kept=kept)
            supervisor.lock, supervisor.options = descriptor, options
            for signum in heeded(*STOPPING):  # before there is anything that it would leave
                asyncio.get_running_loop().add_signal_handler(
                    signum, lambda: tasks.create_task(supervisor.terminate())
                )
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # see `Supervisor._become`
            if isinstance(begin, Handover):
                supervisor.take_over(begin.units)
            else:
                supervisor.begin(begin)
            server = await asyncio.start_unix_server(supervisor.answer, address, limit=LINE_BYTES_MAX)
            write(files.supervisor, supervisor.process)
            ready()
            notify("READY=1")
            await supervisor.run()
            server.close()
        for path in (files.units, files.supervisor, files.socket):
            path.unlink(missing_ok=True)
        for place in (folder, *folder.glob("*/"), *files.logs.glob("*/")):
            sweep(place)


def _why_unfit(command: Sequence[str]) -> str:
    """Why the supervisor cannot become what `command` starts.

    That this is tried also unpacks it, so that nobody is without a supervisor meanwhile.
    """
    command = [*command, "--check"]
    try:
        tried = subprocess.run(
            command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, timeout=TRY_S, check=False
        )
    except OSError as error:
        return f"{command[0]} cannot be started: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"it did not answer in {TRY_S:g} s"
    if tried.returncode == 0:
        return ""
    return why_ended(tried.stderr.decode(errors="replace").splitlines(), how_ended(tried.returncode))


class Supervisor:
    """All units of one cluster."""

    def __init__(
        self,
        files: SupervisorFiles,
        program: Sequence[str],
        env: Mapping[str, str],
        pace: Pace,
        tasks: asyncio.TaskGroup,
        *,
        kept: bool = True,
    ) -> None:
        self.files = files
        self.program = program
        self.env = env
        self.pace = pace
        self.tasks = tasks
        self.units: dict[str, UnitProcess] = {}
        self.lock = -1
        self.options: Sequence[str] = ()
        known = this_process()
        self.process = SupervisorProcess(pid=known.pid, started=known.started, digest=program_digest(program))
        self._kept = kept
        self._desired: dict[str, Wanted] = {}
        self._watchers: set[asyncio.Event] = set()
        self._ended = asyncio.Event()
        self._terminating = False
        self._quiet = False  # while many change at once

    async def run(self) -> None:
        """Until all units were stopped, because a request or a signal said so."""
        beside = [self.tasks.create_task(self._bound_logs()), self.tasks.create_task(notify_always())]
        await self._ended.wait()
        for task in beside:
            task.cancel()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Do what one connection asks for."""
        with contextlib.suppress(ConnectionError, msgspec.DecodeError):
            request = _requests.decode(await reader.readline())
            if isinstance(request, Watch):
                await self._report_always(writer)
            elif not self._terminating or isinstance(request, Stop):
                error = await self._do(request)
                # Else it is too late, and there has to be another supervisor.
                if not self._ended.is_set() or isinstance(request, Stop):
                    await self._report(writer, error)
        writer.close()

    async def _do(self, request: Start | Stop | Replace) -> str:
        """What was asked for, to its end; why that was not possible."""
        if self._ended.is_set():
            return ""
        if isinstance(request, Replace):
            return await self.replace(request)
        if isinstance(request, Start):
            self.begin(desired_by(request, self.program))
        else:
            self._keep({name for name in self._desired if request.names is None or name in request.names})
            await self.stop(request.names, request.grace_s)
        return ""

    def begin(self, desired: Desired) -> None:
        """Keep these running too, now and after the next boot."""
        self._desired |= {one.config.unit.name: one for one in desired.units}
        self._keep()
        self._quiet = True
        for one in desired.units:
            name = one.config.unit.name
            there = self.units.get(name)
            if there is not None:
                there.want(one)
            else:
                self._add(UnitProcess(one, self))
        self._quiet = False
        self.tell()

    def take_over(self, running: Sequence[Running]) -> None:
        """Go on with what the program ran that this process was before."""
        for one in running:
            self._desired[one.wanted.config.unit.name] = one.wanted
            self._add(UnitProcess(one.wanted, self, one))

    def _add(self, unit: UnitProcess) -> None:
        self.units[unit.seen.name] = unit
        self.tasks.create_task(self._run(unit), name=unit.seen.name)

    async def _run(self, unit: UnitProcess) -> None:
        await unit.run()
        del self.units[unit.seen.name]
        self.tell()
        unit.settled.set()

    def _keep(self, forgotten: Collection[str] = ()) -> None:
        """Write down what is wanted at the next boot. A full disk keeps nobody from running."""
        self._desired = {name: one for name, one in self._desired.items() if name not in forgotten}
        if self._kept:
            try:
                keep_desired(self.files, Desired(units=tuple(self._desired.values())))
            except OSError as error:
                log.warning("%s cannot be written: %s", self.files.desired, error.strerror)

    async def replace(self, request: Replace) -> str:
        """Become another program, once no unit is leaving; why that was not possible, if it returns."""
        if request.digest == self.process.digest:
            return ""
        error = await asyncio.to_thread(_why_unfit, self._next(request.program))
        if error:
            return error
        with self._watching() as changed:
            while not all(unit.is_steady for unit in self.units.values()):
                changed.clear()
                await changed.wait()
        return self._become(request.program) if self.units and not self._terminating else ""

    def _next(self, program: Sequence[str]) -> list[str]:
        """The command by which `program` goes on with what this one runs."""
        return [*program, "supervise", "--cluster", self.files.folder.name, "--take-over", *self.options]

    def _become(self, program: Sequence[str]) -> str:
        """Become `program`, and return why that failed.

        A signal that comes in between waits for the next program, which would otherwise be killed by it.
        """
        command = self._next(program)
        units = tuple(unit.hand_over() for unit in self.units.values())
        with open(os.memfd_create("handover"), "w+b") as file:
            file.write(msgspec.json.encode(Handover(units=units, lock=self.lock)))
            file.seek(0)
            os.dup2(file.fileno(), 0)
        os.set_inheritable(self.lock, True)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        log.info("the supervisor becomes %s", " ".join(program))
        try:
            os.execvp(command[0], command)  # noqa: S606 (there is no shell, and none is wanted)
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
            os.set_inheritable(self.lock, False)
            return f"{command[0]} cannot be started: {error.strerror}"

    async def terminate(self) -> None:
        """Stop all, as the machine shuts down: none is started any more, and all are still wanted."""
        self._terminating = True
        await self.stop(None, GRACE_S)

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

    async def _report(self, writer: asyncio.StreamWriter, error: str = "") -> None:
        report = msgspec.structs.replace(self._told(), error=error)
        writer.write(msgspec.json.encode(report) + b"\n")
        await writer.drain()

    async def _report_always(self, writer: asyncio.StreamWriter) -> None:
        with self._watching() as changed:
            while True:
                changed.clear()
                await self._report(writer)
                await changed.wait()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[asyncio.Event]:
        """What is set whenever something became of a unit."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            yield changed
        finally:
            self._watchers.discard(changed)

    async def _bound_logs(self) -> None:
        while True:
            await asyncio.sleep(self.pace.look_every_s)
            for file in (self.files.own_log, *map(self.files.log, self.units)):
                with contextlib.suppress(OSError):
                    _bound(file)


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
