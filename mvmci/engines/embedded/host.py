"""What an engine has at hand to run guests: the processes that fork them, the code cache, what effects share.

Everything is opened when it is first needed, so that a command never pays for what effects need. A
fork server that died is replaced when it is next asked for.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from mvmci.engines.embedded.code import CodeCache
from mvmci.errors import HostUnfit, IsolationUnavailable
from mvmci.jobs import nothing
from mvmci.jobs.allow import Allow
from mvmci.jobs.journal import Spec
from mvmci.sandbox.confinement import LEVELS
from mvmci.sandbox.forkserver import ForkServer
from mvmci.store import Store
from mvmci.system.clock import wall_clock_ms
from mvmci.system.files import passable_folder

T = TypeVar("T")


@dataclass
class Host:
    """The tools of one engine. `root` is the directory that slots and compiled code lie beneath."""

    store: Store
    root: Path
    allow: Callable[[], Allow]  # what effects may do now; one that is under way is not called back
    min_isolation: str = "process"
    reuse: bool = True  # a process that ran a workflow may run another
    without: frozenset[str] = frozenset()  # layers of confinement that tests leave out
    now_ms: Callable[[], int] = wall_clock_ms
    notice: Callable[[str], None] = lambda _: None  # hears of work that may take long
    trouble: Callable[[str], None] = lambda _: None  # hears why no guest can run here, and "" once one can
    files_min: int = 0  # descriptors that this process needs
    draining: asyncio.Event = field(default_factory=asyncio.Event)  # workflows are to let go
    _guests: ForkServer | None = None
    _good: ForkServer | None = None  # that which was found to isolate enough
    _programs: ForkServer | None = None
    _code: CodeCache | None = None
    _tools: dict[type, Any] = field(default_factory=dict)
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def guests(self) -> ForkServer:
        """The fork server of slots. Raises HostUnfit, and IsolationUnavailable below `min_isolation`."""
        guests = self._guests
        if guests is None or not guests.alive:
            guests = await self._start_guests()
        if guests is not self._good:
            reached = guests.isolation
            if LEVELS.index(reached) < LEVELS.index(self.min_isolation):
                raise IsolationUnavailable(
                    f"this host reaches isolation {reached}, and {self.min_isolation} is demanded",
                    hint="`mvmci doctor` says what is missing",
                )
            self._good = guests
        return guests

    async def _start_guests(self) -> ForkServer:
        async with self._opening:
            if self._guests is None or not self._guests.alive:
                _check_files(self.files_min)
                passable_folder(self.root)
                dead, self._guests, self._code = self._guests, None, None
                await _close(dead)
                self._guests = await ForkServer.start(self.root, without=self.without)
            return self._guests

    async def programs(self) -> ForkServer:
        """The fork server of native programs: with the host's network, without a slot's confinement."""
        async with self._opening:
            if self._programs is None or not self._programs.alive:
                dead, self._programs = self._programs, None
                await _close(dead)
                self._programs = await ForkServer.start(self.root, network=True, without=self.without)
            return self._programs

    def tool(self, kind: type[T], make: Callable[[], T]) -> T:
        """What all effects of a kind share in this engine, made when the first one needs it."""
        if kind not in self._tools:
            self._tools[kind] = make()
        return cast(T, self._tools[kind])

    async def compiled(self, spec: Spec, *, refused: bool = False) -> str:
        """The path of the job's compiled module, relative to `root`. Raises BadModule, NotFound.

        `refused` is for a slot that ended with CodeGone: the code is made anew, if it is not already.
        """
        guests = await self.guests()
        if self._code is None:
            self._code = CodeCache(self.root, guests)

        async def fetch(to: Path) -> None:
            if spec.module == nothing.DIGEST:
                to.write_bytes(nothing.NOTHING)
                return
            self.notice(f"compiling {spec.name}: once on this machine")
            await self.store.blobs.fetch(spec.module, to)

        if refused:
            self._code.drop(spec.module, spec.component, spec.kind == "workflow")
        return await self._code.get(spec.module, spec.component, spec.kind == "workflow", fetch)

    async def close(self) -> None:
        """End every process."""
        for forkserver in (self._guests, self._programs):
            await _close(forkserver)


def _check_files(needed: int) -> None:
    """See that so many descriptors can be open, and raise our own limit to that. Raises HostUnfit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise HostUnfit(
            f"this host allows a process {hard} open files, and {needed} are needed for so many slots",
            hint="raise the limit (`ulimit -Hn`, LimitNOFILE of systemd), or use fewer slots",
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


async def _close(forkserver: ForkServer | None) -> None:
    if forkserver is not None:
        await forkserver.close()
