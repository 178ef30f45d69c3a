"""Units as processes of this machine, under a supervisor that outlives the `up` that started it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from mvmci.errors import MvmciError
from mvmci.plan import Unit
from mvmci.runtime import GRACE_S, UnitStatus
from mvmci.runtimes.processes import Known, clean_environment, has_ended, open_alive, this_program
from mvmci.runtimes.supervisor import Files, Orders, Told, write

READY = b"ready\n"
WORDS_BYTES_MAX = 2000
LOOK_EVERY_S = 0.01


class Local:
    """The port `mvmci.runtime.Runtime`. `program` is how the supervisor is started, and units by it."""

    def __init__(self, root: Path, cluster: str, program: Sequence[str] = ()) -> None:
        self.root = root
        self.cluster = cluster
        self.files = Files(root / cluster)
        self._program = program

    def planned(self) -> tuple[Unit, ...]:
        with self._supervisor() as pidfd, contextlib.suppress(FileNotFoundError):
            if pidfd is not None:
                return self.files.orders().units
        return ()

    def units(self) -> list[UnitStatus]:
        with self._supervisor() as pidfd, contextlib.suppress(FileNotFoundError):
            if pidfd is not None:
                return self._told().units
        return []

    async def apply(self, units: Sequence[Unit], *, attached: bool = False) -> None:
        orders = Orders(cluster=self.cluster, units=tuple(units), number=time.time_ns())
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

    def _told(self) -> Told:
        return msgspec.json.decode(self.files.units.read_bytes(), type=Told)

    async def _start(self, attached: bool) -> None:
        """Start a supervisor, and wait until it listens."""
        command = [*(self._program or this_program()), "supervise", "--cluster", self.cluster]
        command += ["--attached", str(os.getpid())] if attached else []
        log = self.files.folder / "supervisor.log"
        with open(log, "wb", opener=_private) as stderr:  # noqa: ASYNC230 (a local file)
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


async def _wait(pidfd: int) -> None:
    """Until the process has ended."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)
