"""Slots: the places on this host where guests run, each with a number, a user and two directories.

    <root>/slots/<n>/lock    held by the process that uses the slot
    <root>/slots/<n>/work    the workspace of the job that runs there
    <root>/slots/<n>/tmp     its temporary files

A number belongs to one process at a time, also across processes that share a root, and so its user
does too. What a job left is removed before the slot is used again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mvmci.engines.embedded import workspace
from mvmci.errors import LockHeld
from mvmci.sandbox.forkserver import Child, ForkServer
from mvmci.system.files import passable_folder
from mvmci.system.tasks import TaskSet

SLOTS_MAX = 1_000  # on one root, over all processes
RUNS_MAX = 1_000  # of one warm process, before it is replaced


@dataclass
class Slot:
    """One place. `uid` is None where slots have no users of their own. Paths are relative to `root`."""

    root: Path
    number: int
    lock: FileLock
    uid: int | None
    warm: Child | None = None  # a process that has run workflows and can run another
    runs: int = 0
    memory_bytes: int = 0  # that the warm process was made for
    used: bool = False  # whether there may be something in its directories

    @property
    def place(self) -> Path:
        """The directory of everything that a guest here can write to."""
        return self.root / "slots" / str(self.number)

    @property
    def work(self) -> str:
        """The workspace, relative to the root."""
        return f"slots/{self.number}/work"

    @property
    def tmp(self) -> str:
        """The temporary directory, relative to the root."""
        return f"slots/{self.number}/tmp"  # noqa: S108 - beneath our own root

    @property
    def directory(self) -> Path:
        """The workspace, as this process opens it."""
        return self.root / self.work

    async def discard(self) -> None:
        """Kill the warm process, if there is one."""
        if self.warm is not None:
            child, self.warm, self.runs = self.warm, None, 0
            await child.close()

    def prepare(self) -> None:
        """Make both directories, empty and this slot's own."""
        for path in (self.root / self.work, self.root / self.tmp):
            path.mkdir(mode=0o700, exist_ok=True)
            workspace.clear(path)
            path.chmod(0o700)
            if self.uid is not None:
                os.chown(path, self.uid, self.uid)
        self.used = False


class Slots:
    """At most `count` slots of this process at a time."""

    def __init__(self, root: Path, count: int) -> None:
        self._root = root
        self._free: list[Slot] = []
        self.all: list[Slot] = []
        self._permits = asyncio.Semaphore(count)
        self._cleaning = TaskSet()

    @asynccontextmanager
    async def take(self, guests: ForkServer) -> AsyncIterator[Slot]:
        """A slot with empty directories, waited for if none is free.

        It is cleaned behind the job's back, so that no job waits for what another one left.
        """
        await self._permits.acquire()
        try:
            slot = self._free.pop() if self._free else self._claim(guests)
        except BaseException:
            self._permits.release()
            raise
        try:
            yield slot
        finally:
            if slot.used:
                self._cleaning.start(self._clean(slot))
            else:
                self._free.append(slot)
                self._permits.release()

    @asynccontextmanager
    async def borrow(self, guests: ForkServer) -> AsyncIterator[Slot]:
        """One more slot, for a moment, however many are taken."""
        slot = self._free.pop() if self._free else self._claim(guests)
        try:
            yield slot
        finally:
            await asyncio.to_thread(slot.prepare)
            self._free.append(slot)

    async def _clean(self, slot: Slot) -> None:
        try:
            await asyncio.to_thread(slot.prepare)
            self._free.append(slot)
        finally:
            self._permits.release()

    def _claim(self, guests: ForkServer) -> Slot:
        for number in range(SLOTS_MAX):
            place = passable_folder(passable_folder(self._root / "slots") / str(number))
            lock = FileLock(place / "lock", timeout=0, mode=0o600, thread_local=False)
            try:
                lock.acquire()
            except Timeout:
                continue
            slot = Slot(self._root, number, lock, guests.slot_uid(number))
            self.all.append(slot)
            slot.prepare()
            return slot
        raise LockHeld(f"all {SLOTS_MAX} slots of {self._root} are in use")

    async def close(self) -> None:
        """Kill what is warm, empty the directories, give the numbers back."""
        await asyncio.gather(*self._cleaning.tasks, return_exceptions=True)
        for slot in self.all:
            await slot.discard()
            await asyncio.to_thread(slot.prepare)
            slot.lock.release()
        self.all.clear()
        self._free.clear()
