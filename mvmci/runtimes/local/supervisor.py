"""The process that keeps a cluster's units running on this machine.

It owns `plan.json` (what is to run), `supervisor.json` (who it is), `units.json` (what became of them)
and the `log` of each unit. It promises that there is one of it per cluster; that a unit that crashed
is started again, after a pause that doubles with every crash; that on SIGHUP only units that the plan
changed are touched; that SIGTERM stops all, workers first and the broker last; and that no unit
outlives it, however it ends. Whether a unit does its work, and one that is stopped by SIGSTOP, is not
its business: presence tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout

from mvmci.cluster.deployment import ROLES, Unit, diff
from mvmci.errors import EXIT_REFUSED, LockHeld
from mvmci.runtime import GRACE_S, UnitStatus
from mvmci.system.files import private_opener, sweep, write_private
from mvmci.system.linux import dying_with_us
from mvmci.system.processes import this_process

LOG_BYTES_MAX = 16 << 20
TAIL_BYTES = 4096
REASON_CHARS_MAX = 300


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """What a supervisor is told: `plan.json`."""

    cluster: str
    units: tuple[Unit, ...]
    grace_s: float = GRACE_S
    number: int = 0  # later ones have higher numbers


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """What a supervisor tells: `units.json`."""

    number: int  # of the orders that it has taken
    units: list[UnitStatus]


@dataclass(frozen=True)
class Pace:
    """How long things take; tests are in more of a hurry."""

    first_pause_s: float = 0.1  # between a crash and the next start; doubles with every crash
    longest_pause_s: float = 10.0
    healthy_s: float = 30.0  # a process that lived as long has not crashed because of the one before
    hurry_s: float = 5.0  # from the second SIGTERM to SIGKILL
    look_every_s: float = 5.0  # at the size of the logs


class SupervisorFiles:
    """Where the supervisor of a cluster keeps what."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = folder / "plan.json"
        self.supervisor = folder / "supervisor.json"
        self.units = folder / "units.json"
        self.lock = folder / "supervisor.lock"
        self.logs = folder / "units"

    def log(self, name: str) -> Path:
        """What the unit printed."""
        return self.logs / name / "log"

    def orders(self) -> Desired:
        """What is to run. Raises FileNotFoundError."""
        return msgspec.json.decode(self.plan.read_bytes(), type=Desired)


def write(path: Path, value: Any) -> None:
    """Write `value` as JSON. No power cut is to be survived: with the processes, it would mean nothing."""
    write_private(path, msgspec.json.encode(value), synced=False)


async def supervise(
    folder: Path,
    program: Sequence[str],
    env: Mapping[str, str],
    *,
    ready: Callable[[], None],
    pace: Pace = Pace(),
) -> None:
    """Keep the units of `plan.json` running until SIGTERM. Raises LockHeld.

    `program` is what a unit's role and options are put behind; `ready` is called once signals count.
    """
    files = SupervisorFiles(folder)
    lock = FileLock(files.lock, mode=0o600, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LockHeld(
            f"another process already runs the units in {folder}", hint="`mvmci down` stops it"
        ) from None
    with lock:
        async with asyncio.TaskGroup() as tasks:
            supervisor = Supervisor(files, program, env, pace, tasks)
            supervisor.listen()
            write(files.supervisor, this_process())
            supervisor.converge()
            ready()
            await supervisor.run()
        for path in (files.plan, files.units, files.supervisor):
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
        self.orders = files.orders()
        self.keepers: dict[str, UnitProcess] = {}
        self._tasks = tasks
        self._told_to_stop = asyncio.Event()
        self._converging = False

    def listen(self) -> None:
        """Take signals."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.converge)
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._stop)

    async def run(self) -> None:
        """Until all units are stopped, because a signal said so."""
        looking = self._tasks.create_task(self._bound_logs())
        await self._told_to_stop.wait()
        for role in reversed(ROLES):
            leaving = [keeper for keeper in self.keepers.values() if keeper.status.role == role]
            for keeper in leaving:
                keeper.want(None)
            await asyncio.gather(*(keeper.gone.wait() for keeper in leaving))
        looking.cancel()

    def converge(self) -> None:
        """Read the plan again, and touch what it changed."""
        if self._told_to_stop.is_set():
            return
        self.orders, self._converging = self.files.orders(), True
        wanted = [keeper.wanted for keeper in self.keepers.values() if keeper.wanted is not None]
        for keeper in self.keepers.values():
            keeper.try_again()
        for change in diff(wanted, self.orders.units):
            name = change.unit.name
            if change.kind == "stop":
                self.keepers[name].want(None)
            elif name in self.keepers:
                self.keepers[name].want(change.unit)
            else:
                self._keep(change.unit)
        self._converging = False
        self.tell()

    def tell(self) -> None:
        """Write down what became of the units. A full disk keeps nobody from running.

        Not in the middle of a new plan: whoever reads its number may believe all that stands beside it.
        """
        if self._converging:
            return
        places = {unit.name: place for place, unit in enumerate(self.orders.units)}
        statuses = [keeper.status for keeper in self.keepers.values()]
        statuses.sort(key=lambda status: places.get(status.name, len(places)))
        with contextlib.suppress(OSError):
            write(self.files.units, Observed(number=self.orders.number, units=statuses))

    def _keep(self, unit: Unit) -> None:
        keeper = self.keepers[unit.name] = UnitProcess(unit, self)
        self._tasks.create_task(keeper.run(), name=unit.name)

    def _stop(self) -> None:
        """The first time, let units finish what they do; the second time, hurry them."""
        if self._told_to_stop.is_set():
            for keeper in self.keepers.values():
                keeper.hurry()
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            self.orders = self.files.orders()  # they say how long the stop may take
        self._told_to_stop.set()

    async def _bound_logs(self) -> None:
        while True:
            await asyncio.sleep(self.pace.look_every_s)
            for name in self.keepers:
                with contextlib.suppress(OSError):
                    _bound(self.files.log(name))


class UnitProcess:
    """One unit: its processes, one after the other, and its log."""

    def __init__(self, unit: Unit, supervisor: Supervisor) -> None:
        self.wanted: Unit | None = unit
        self.status = UnitStatus(name=unit.name, role=unit.role, host=unit.host)
        self.gone = asyncio.Event()
        self._supervisor = supervisor
        self._pace = supervisor.pace
        self._log = supervisor.files.log(unit.name)
        self._news = asyncio.Event()  # its process has ended, or somebody wants something of it
        self._hurried = False
        self._refused = False
        self._printed_before = 0  # the size of its log when its process was started

    def want(self, unit: Unit | None) -> None:
        """Run as `unit` from now on; None: no more."""
        self.wanted = unit
        if self.status.pid is not None:
            self._say(state="draining")
        self._news.set()

    def hurry(self) -> None:
        """Cut short what grace it has."""
        self._hurried = True
        self._news.set()

    def try_again(self) -> None:
        """Start it, if it was given up."""
        self._refused = False
        self._news.set()

    async def run(self) -> None:
        """Until it is wanted no more."""
        crashes = 0
        while (unit := self.wanted) is not None:
            began = time.monotonic()
            code = await self._live(unit)
            if self.wanted != unit:
                crashes = 0
                continue
            crashes = 1 if time.monotonic() - began >= self._pace.healthy_s else crashes + 1
            await self._pause(unit, code, crashes)
        del self._supervisor.keepers[self.status.name]
        self._supervisor.tell()
        self.gone.set()

    async def _live(self, unit: Unit) -> int:
        """One process of `unit`, from start to end, by itself or because `unit` is wanted no more."""
        try:
            process = self._start(unit)
        except OSError as error:
            self._say(state="down", pid=None, reason=f"it cannot be started: {error.strerror}")
            return -1
        pidfd = os.pidfd_open(process.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, self._news.set)
        try:
            self._say(role=unit.role, host=unit.host, state="starting", pid=process.pid, reason="")
            await self._until(lambda: self.wanted != unit or process.poll() is not None)
            if process.poll() is None:
                await self._end(process)
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        code = process.wait()
        self._say(state="down", pid=None, last_exit=code, reason=self._last_words() or _how(code))
        return code

    def _start(self, unit: Unit) -> subprocess.Popen[bytes]:
        supervisor = self._supervisor
        name = [] if unit.role == "broker" else ["--name", unit.name]
        command = [*supervisor.program, unit.role, "--cluster", supervisor.orders.cluster, *name]
        self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self._log, "ab", opener=private_opener) as log:
            self._printed_before = log.tell()
            return subprocess.Popen(
                [*command, *unit.options],
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
        await self._until(lambda: ended() or self._hurried, self._supervisor.orders.grace_s)
        process.terminate()
        await self._until(ended, self._pace.hurry_s)
        process.kill()
        await self._until(ended)

    async def _pause(self, unit: Unit, code: int, crashes: int) -> None:
        """Between a crash and the next start."""
        self._refused = code == EXIT_REFUSED
        pause_s = min(self._pace.longest_pause_s, self._pace.first_pause_s * 2 ** min(crashes - 1, 30))
        then = "it is not started again" if self._refused else f"it is started again in {pause_s:g} s"
        self._note(f"{unit.name} {_how(code)}; {then}")
        if self._refused:
            await self._until(lambda: self.wanted != unit or not self._refused)
        else:
            await self._until(lambda: self.wanted != unit, pause_s)
        if self.wanted == unit:
            self._say(restarts=self.status.restarts + 1)

    async def _until(self, done: Callable[[], bool], wait_s: float | None = None) -> None:
        """Until `done()`, at which every news makes us look, or the time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while not done():
                    self._news.clear()
                    await self._news.wait()

    def _say(self, **changes: Any) -> None:
        before = self.status
        self.status = msgspec.structs.replace(before, **changes)
        if self.status.state != before.state:
            self.status = msgspec.structs.replace(self.status, since=time.time_ns() // 1_000_000)
        self._supervisor.tell()

    def _note(self, text: str) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with contextlib.suppress(OSError), open(self._log, "ab", opener=private_opener) as log:
            log.write(f"{now} {text}\n".encode())

    def _last_words(self) -> str:
        """The last error that this process printed."""
        try:
            with self._log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                since = self._printed_before if size >= self._printed_before else 0
                log.seek(max(since, size - TAIL_BYTES))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        errors = [line for line in lines if line.startswith("Error: ")]
        return errors[-1].removeprefix("Error: ")[:REASON_CHARS_MAX] if errors else ""


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
        shutil.copy2(log, log.with_name("log.1"))
    finally:
        os.truncate(log, 0)
