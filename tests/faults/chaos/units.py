"""The processes of a cluster, to be killed and stopped: units, and the sandboxes beneath them.

Every process is held by a pidfd from the moment it is chosen, so that a signal never meets another one
that has got its number since.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

STOPPED_S = (0.5, 12.0)
PAUSE_S = (0.2, 1.4)  # from one deed to the next
WEIGHTS = {"worker": 5, "sandbox": 3, "control-plane": 2, "broker": 2}


def pids(folder: Path) -> dict[str, int]:
    """The units of the cluster in `folder` that have a process, by their names."""
    told = json.loads((folder / "units.json").read_bytes())["units"]
    return {unit["name"]: unit["pid"] for unit in told if unit["pid"]}


def children(pid: int) -> list[int]:
    """Every process beneath `pid`, the nearest first."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError, IndexError):
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(path.name))
    found: list[int] = []
    todo = [pid]
    while todo:
        beneath = parents.get(todo.pop(0), [])
        found += beneath
        todo += beneath
    return found


def sandboxes(worker: int) -> set[int]:
    """The processes in which a worker's guests run, or ran: those beneath its zygote."""
    return {guest for zygote in children(worker) for guest in children(zygote)}


def signal_all(pids: Collection[int], signum: int) -> None:
    """Send a signal to our own processes, which are not reaped behind our back."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)


def alive(pid: int) -> bool:
    """Whether it runs, or is stopped: a zombie does neither."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@dataclass
class Mayhem:
    """Kills and stops the processes of one cluster at random, by `dice`."""

    folder: Path
    dice: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    _stopped: dict[int, int] = field(default_factory=dict)  # pidfd, by pid
    _spared: set[int] = field(default_factory=set)  # what is to come back
    _stops: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, seconds: float) -> None:
        """Do so for `seconds`, and then let everything live."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    await asyncio.sleep(self.dice.uniform(*PAUSE_S))
                    self._do()
        except TimeoutError:
            pass
        finally:
            await self.relent()

    async def relent(self) -> None:
        """Continue whatever is stopped."""
        for task in self._stops:
            task.cancel()
        await asyncio.gather(*self._stops, return_exceptions=True)

    async def stop(self, unit: str, seconds: float) -> None:
        """Stop a worker with all that is beneath it, and let nothing else happen to it meanwhile."""
        pid = pids(self.folder).get(unit)
        if pid is None or pid in self._stopped:
            return
        self._spared.add(pid)
        self.counts["stopped worker"] += 1
        try:
            await self._stopping([pid, *children(pid)], seconds)
        finally:
            self._spared.discard(pid)

    def _do(self) -> None:
        kind = self.dice.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
        found = [pid for pid in self._processes(kind) if pid not in self._spared]
        if not found:
            return
        pid = self.dice.choice(found)
        if self.dice.random() < 0.5:
            self._kill(kind, pid)
        elif pid not in self._stopped:
            whole = [pid, *children(pid)] if kind == "worker" and self.dice.random() < 0.5 else [pid]
            self._stop(kind, whole, self.dice.uniform(*STOPPED_S))

    def _processes(self, kind: str) -> Iterator[int]:
        for name, pid in pids(self.folder).items():
            if kind == "sandbox" and name.startswith("worker"):
                yield from children(pid)
            elif name.startswith(kind):
                yield pid

    def _kill(self, kind: str, pid: int) -> None:
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)
            self.counts[f"killed {kind}"] += 1

    def _stop(self, kind: str, whole: list[int], seconds: float) -> None:
        self.counts[f"stopped {kind}"] += 1
        task = asyncio.create_task(self._stopping(whole, seconds))
        self._stops.add(task)
        task.add_done_callback(self._stops.discard)

    async def _stopping(self, whole: list[int], seconds: float) -> None:
        fds: dict[int, int] = {}
        for pid in whole:
            with suppress(ProcessLookupError):
                fds[pid] = os.pidfd_open(pid)
        self._stopped |= fds
        try:
            _signal(fds, signal.SIGSTOP)
            await asyncio.sleep(seconds)
        finally:
            _signal(fds, signal.SIGCONT)
            for pid, pidfd in fds.items():
                os.close(pidfd)
                self._stopped.pop(pid, None)


def _signal(fds: dict[int, int], signum: int) -> None:
    for pidfd in fds.values():
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signum)
