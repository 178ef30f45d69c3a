"""What runs a job. A port: `engines/embedded` is reached by a call, others through a broker or HTTP.

An engine that runs a job is its holder: it takes the lease, runs the guest in a sandbox, performs the
effects and writes the journal. Whoever sends it a job learns how that ended from the journal, never
from the engine's word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import msgspec

from mvmci.jobs.journal import Entry
from mvmci.jobs.times import Stopwatch


class Outcome(msgspec.Struct, frozen=True, tag_field="reply", tag="finished"):
    """How one run of a job came out; an executor replies with it.

    `ended`: there is nothing more to do. `released`: it sleeps until `until` (ms since 1970), or it
    was let go for another holder (`until` 0). `held`: a live holder is at work on it. `fenced`: this
    engine was deposed; acknowledge nothing. `wire` is the level at which an executor says so; absent at 0.
    """

    kind: Literal["ended", "released", "held", "fenced"]
    until: int = 0
    wire: int | msgspec.UnsetType = msgspec.UNSET


class Engine(Protocol):
    """Runs jobs, each at most once at a time."""

    refused: int  # orders that no executor had a free slot for

    async def run(
        self,
        job: str,
        *,
        spec_entry: Entry | None = None,
        worker: str = "",
        on_slot_free: Callable[[], None] = lambda: None,
        stopwatch: Stopwatch | None = None,
    ) -> Outcome:
        """Run `job` to its end, or to a release.

        `spec_entry` is its first message, where that came with the job's first delivery and nobody can have
        tried before: it is not read again, and a job that ends quickly is written in one message more.
        `worker` is who sent it, where that is not the engine's own unit. `on_slot_free` may be called when
        the guest has ended and another can begin, while the end is still being written. `stopwatch` has run
        since the job's hint or order came.
        Raises NotFound, StoreUnavailable, IsolationUnavailable, EngineAway, and HostUnfit,
        JobUnfit or VersionsDiffer where another host may do better.
        """

    def drain(self, yes: bool = True) -> None:
        """Let workflows go at their next effect, for another holder; commands run on. `False` ends that."""

    async def probe(self) -> bool:
        """Go to an executor and back, with nothing to do there; False where the engine is in this process.

        Raises NoCapacity, EngineAway, StoreUnavailable.
        """

    async def close(self) -> None:
        """Let every job go, kill what runs, and leave nothing behind."""
