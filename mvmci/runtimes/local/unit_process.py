"""One unit that a supervisor keeps running: its processes, one after the other, and its log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from mvmci.cluster.changes import Observed
from mvmci.cluster.deployment import UnitConfig
from mvmci.errors import FOR_GOOD
from mvmci.jobs.summary import rfc3339
from mvmci.roles import broker
from mvmci.runtime import GRACE_S, why_ended
from mvmci.runtimes.local.messages import Running, SupervisorFiles, Wanted
from mvmci.system.clock import wall_clock_ms
from mvmci.system.files import private_folder, private_opener
from mvmci.system.linux import dying_with_us

_TAIL_BYTES = 4096
PORT_ANSWER_S = 0.2  # of a port of this machine
ANSWER_PAUSE_S = 0.05

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pace:
    """How long things take; tests are in more of a hurry."""

    first_pause_s: float = 0.1  # between a crash and the next start; doubles with every crash
    longest_pause_s: float = 10.0
    healthy_s: float = 30.0  # a process that lived as long has not crashed because of the one before
    hurry_s: float = 15.0  # from the second SIGTERM to SIGKILL: longer than a native program has
    look_every_s: float = 5.0  # at the size of the logs


USUAL = Pace()


class Keeper(Protocol):
    """The supervisor, as a unit needs it."""

    files: SupervisorFiles
    env: Mapping[str, str]
    pace: Pace
    tasks: asyncio.TaskGroup

    def tell(self) -> None: ...


class UnitProcess:
    """One unit: its processes, one after the other, and its log. `before`: as another program had it."""

    def __init__(self, wanted: Wanted, supervisor: Keeper, before: Running | None = None) -> None:
        self.wanted: UnitConfig | None = wanted.config
        unit = wanted.config.unit
        self.seen = Observed(name=unit.name, role=unit.role, host=unit.host, config=wanted.config)
        self.settled = asyncio.Event()  # it has gone, or is wanted again
        self._program = wanted.program
        self._supervisor = supervisor
        self._pace = supervisor.pace
        self._log = supervisor.files.log(unit.name)
        self._news = asyncio.Event()  # its process has ended, or somebody wants something of it
        self._grace_s = GRACE_S
        self._hurried = False
        self._crashes = 0  # one after the other
        self._began = 0.0
        self._process: _Process | None = None
        self._said_in = [self._log]  # where its process says what is wrong
        if unit.role == "broker":
            self._said_in.append(supervisor.files.folder / broker.FOLDER / broker.LOG)
        self._said_before: dict[str, int] = {}  # the sizes of these when its process was started
        if before is not None:
            self.seen = before.seen
            self._crashes, self._began, self._said_before = before.crashes, before.began, before.said_before
            if before.seen.pid is not None:
                self._process = _Adopted(before.seen.pid)

    @property
    def is_steady(self) -> bool:
        """Whether it is not on its way from one process to another, or out."""
        return self.wanted is not None and (self.seen.pid is None or self.wanted == self.seen.config)

    def hand_over(self) -> Running:
        """What another program needs to go on with it. It is steady."""
        assert self.wanted is not None
        return Running(
            wanted=Wanted(config=self.wanted, program=self._program),
            seen=self.seen,
            crashes=self._crashes,
            began=self._began,
            said_before=self._said_before,
        )

    def want(self, wanted: Wanted) -> None:
        """Run as `wanted` from now on, also if it was given up. One that runs so already is left alone."""
        if self.wanted != wanted.config or self.seen.pid is None:
            self._program = wanted.program
        if self.wanted != wanted.config and self.seen.pid is not None:
            self._say(state="draining")
        self.wanted = wanted.config
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
        if self._crashes and self._process is None and self.wanted is not None:  # taken over in its pause
            await self._pause(self.wanted)
        while (config := self.wanted) is not None:
            process = self._process or self._start(config)
            if process is not None:
                await self._live(process, config)
            if self.wanted != config:
                self._crashes = 0
                continue
            lived_s = time.monotonic() - self._began
            self._crashes = 1 if lived_s >= self._pace.healthy_s else self._crashes + 1
            await self._pause(config)

    def _start(self, config: UnitConfig) -> _Process | None:
        """The next process of the unit; None where that cannot be started."""
        unit = config.unit
        told = {"role": unit.role, "host": unit.host, "config": config}
        self._began = time.monotonic()
        try:
            process = self._process = self._open(config)
        except OSError as error:
            self._say(
                **told,
                state="down",
                pid=None,
                last_exit=None,
                reason=f"it cannot be started: {error.strerror}",
            )
            return None
        log.info("%s is started: process %d", unit.name, process.pid)
        self._say(**told, state="starting", pid=process.pid, reason="", given_up=False)
        return process

    async def _live(self, process: _Process, config: UnitConfig) -> None:
        """One process of the unit, until it ends, by itself or because it is wanted no more."""
        unit = config.unit
        pidfd = os.pidfd_open(process.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, self._news.set)
        looking = None
        try:
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
        code = process.poll()
        assert code is not None
        self._process = None
        log.info("%s %s", unit.name, how_ended(code))
        self._say(
            state="down",
            pid=None,
            last_exit=code,
            given_up=code in FOR_GOOD,
            reason=why_ended(self._last_words(), how_ended(code)),
        )

    async def _until_it_answers(self, listen: str) -> None:
        """Say that a balancer is ready, which does not do so itself."""
        host, _, port = listen.rpartition(":")
        while True:
            with contextlib.suppress(OSError, ValueError, TimeoutError):
                async with asyncio.timeout(PORT_ANSWER_S):
                    _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
                writer.close()
                break
            await asyncio.sleep(ANSWER_PAUSE_S)
        if self.seen.state == "starting":
            self._say(state="ready")

    def _open(self, config: UnitConfig) -> subprocess.Popen[bytes]:
        supervisor, unit = self._supervisor, config.unit
        given = supervisor.files.config(unit.name)
        who = ["--config", str(given)]
        if unit.role == "balancer":  # it is given nothing, and has a folder
            who = ["--cluster", supervisor.files.folder.name, "--name", unit.name]
        private_folder(self._log.parent)
        with open(self._log, "ab", opener=private_opener) as log:
            self._said_before = {str(path): _size(path) for path in self._said_in}
            return subprocess.Popen(
                [*self._program, unit.role, *who, *unit.options],
                env=supervisor.env,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=dying_with_us(),
            )

    async def _end(self, process: _Process) -> None:
        """Ask, ask again, and then do not ask."""

        def ended() -> bool:
            return process.poll() is not None

        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)  # one that is stopped has a right to go as well
        await self._until(lambda: ended() or self._hurried, self._grace_s)
        process.send_signal(signal.SIGTERM)
        await self._until(ended, self._pace.hurry_s)
        process.send_signal(signal.SIGKILL)
        await self._until(ended)

    async def _pause(self, config: UnitConfig) -> None:
        """Between a crash and the next start."""
        longest_s, doubled = self._pace.longest_pause_s, 2 ** min(self._crashes - 1, 30)
        pause_s = min(longest_s, self._pace.first_pause_s * doubled)
        then = "it is not started again" if self.seen.given_up else f"it is started again in {pause_s:g} s"
        how = "did not start" if self.seen.last_exit is None else how_ended(self.seen.last_exit)
        self._note(f"{config.unit.name} {how}; {then}")
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
                size, before = log.seek(0, os.SEEK_END), self._said_before.get(str(path), 0)
                log.seek(max(before if size >= before else 0, size - _TAIL_BYTES))
                yield from log.read().decode(errors="replace").splitlines()


class _Process(Protocol):
    """A child: as much of `subprocess.Popen` as is needed."""

    pid: int

    def poll(self) -> int | None: ...
    def send_signal(self, sig: int, /) -> None: ...


class _Adopted:
    """A child that this process had before it became this program."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, as `Popen` has it; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def send_signal(self, sig: int, /) -> None:
        """Send it `sig`, if it runs: nobody else can have its number before `poll` saw it end."""
        if self.poll() is None:
            os.kill(self.pid, sig)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def how_ended(code: int) -> str:
    """How a process ended, to stand behind its name."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
