"""The engine that is reached by a call: it takes jobs, runs them in slots of this host, and ends them.

For one job it reads the journal, decides whether there is anything to do, claims it, gets the code
and the workspace ready, writes the lease, runs the guest, and writes the end. Whatever goes wrong on
the way becomes an end with a reason, a release, or an exception that leaves the job to the next
holder. The rules are docs/protocol.md §2 to §4.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from mvmci.config.quantity import format_duration
from mvmci.engine import Outcome
from mvmci.engines.embedded.code import CompileFailed
from mvmci.engines.embedded.command import fill, run_command, run_guest
from mvmci.engines.embedded.effects.context import Suspended
from mvmci.engines.embedded.host import Host
from mvmci.engines.embedded.limits import Deadline, LimitReached, TimedOut, first
from mvmci.engines.embedded.slots import Slots
from mvmci.engines.embedded.workflow import HistoryEnded, LiveEffects, Verification, run_workflow
from mvmci.errors import (
    BadModule,
    BadWorkspace,
    Fenced,
    HostFull,
    HostUnfit,
    IsolationUnavailable,
    JobUnfit,
    LockHeld,
    MvmciError,
    Nondeterminism,
    NotFound,
    StoreFull,
    Usage,
)
from mvmci.jobs.glob import Pattern
from mvmci.jobs.job import REASON_CHARS_MAX, End
from mvmci.jobs.journal import Done, Entry, Lease, Released, State, status
from mvmci.jobs.nothing import nothing
from mvmci.jobs.times import Stopwatch
from mvmci.journals.holder import Cancelled, Holder, Reread
from mvmci.journals.reader import load
from mvmci.sandbox.forkserver import CodeGone, SlotDied, SlotLost
from mvmci.store import load_text
from mvmci.system.tasks import TaskSet, cancel

log = logging.getLogger(__name__)

LEASE_WAIT_S = 0.25  # a first delivery that ends sooner is written in one message
LET_GO_S = 2.0
SAY_S = 0.5  # after which a job that waits for its code says so
FILES, FILES_OF_SLOT = 192, 16  # descriptors of this process
FIT_S = 1.0  # for so long a look at the host holds
UNFIT_PAUSE_S, UNFIT_PAUSE_S_MAX = 1.0, 30.0  # before it is looked at again
LOST_HINT = "the kernel ends processes when memory is short: `dmesg` may say so"
HINTS = {
    "mmap failed to reserve": "a guest reserves more than 4 GiB of addresses: raise `ulimit -v`",
    "make memory executable": "compiled code has to be executable: MemoryDenyWriteExecute=no under systemd",
}
OUTSIDE_REASONS = ("output", "workspace", "processes", "response")  # ends that no replay repeats


class _Nowhere:
    """Where the output of a guest goes that has none."""

    async def write(self, stream: str, data: bytes) -> None:
        """Drop it."""


@dataclass(frozen=True)
class _Run:
    """What `Embedded.run` was called with."""

    job: str
    spec_entry: Entry | None
    worker: str
    on_slot_free: Callable[[], None]
    stopwatch: Stopwatch


class Embedded:
    """An engine in this process, with `slots` guests at a time."""

    refused = 0  # it is given no more than it has slots for

    def __init__(self, host: Host, *, slots: int) -> None:
        self._host = host
        self.slots = Slots(host.root, slots)
        host.files_min = FILES + FILES_OF_SLOT * slots
        self.parts_programs = False  # whether programs are out of reach of our keys, as `prepare` found
        self._unfit: HostUnfit | None = None  # why no guest can run here
        self._fit_at = -FIT_S  # when one was last seen to
        self._checking = asyncio.Lock()
        self._tasks = TaskSet()
        self._runs: dict[str, asyncio.Task[Outcome]] = {}

    async def run(
        self,
        job: str,
        *,
        spec_entry: Entry | None = None,
        worker: str = "",
        on_slot_free: Callable[[], None] = lambda: None,
        stopwatch: Stopwatch | None = None,
    ) -> Outcome:
        """See `mvmci.engine.Engine.run`. A second call for the same job follows the first."""
        if job not in self._runs:
            run = _Run(job, spec_entry, worker, on_slot_free, stopwatch or Stopwatch(time.monotonic_ns))
            task = asyncio.create_task(self._run(run), name=f"job {job}")
            self._runs[job] = task
            task.add_done_callback(lambda _: self._runs.pop(job, None))
        return await asyncio.shield(self._runs[job])

    def drain(self, yes: bool = True) -> None:
        """See `mvmci.engine.Engine.drain`."""
        if yes:
            self._host.draining.set()
        else:
            self._host.draining.clear()

    async def probe(self) -> bool:
        """See `mvmci.engine.Engine.probe`."""
        return False

    async def prepare(self) -> str:
        """Get ready to run guests, and return the isolation that they get.

        Raises IsolationUnavailable, HostUnfit.
        """
        await self.check()
        guests = await self._host.guests()
        self.parts_programs = guests.parts_programs
        return guests.isolation

    async def check(self) -> None:
        """Run a guest that does nothing, as any job is run. Raises HostUnfit, IsolationUnavailable."""
        async with self._checking:
            if time.monotonic() - self._fit_at < FIT_S:
                return
            try:
                await self._run_nothing()
            except (HostUnfit, IsolationUnavailable):
                raise
            except (MvmciError, OSError) as error:
                hint = next((hint for words, hint in HINTS.items() if words in str(error)), None)
                raise HostUnfit(f"this host cannot run guests: {error}", hint=hint) from None
            self._fit_at = time.monotonic()

    async def _run_nothing(self) -> None:
        host, spec = self._host, nothing("nothing", queue="none", at=0, by="check", timeout_ms=1)
        guests = await host.guests()
        for again in (False, True):
            code = await host.compiled(spec, refused=again)
            async with self.slots.borrow(guests) as slot:
                try:
                    ended = await run_guest(host, slot, spec, code, _Nowhere())
                except CodeGone:
                    if again:
                        raise
                    continue
            if ended.outcome != "ok":
                raise SlotDied(ended.text)
            return

    async def _look_at_host(self) -> None:
        """A guest failed as it need not have by itself: see whether any can run here. Raises HostUnfit."""
        try:
            await self.check()
        except HostUnfit as unfit:
            if self._unfit is None:
                self._unfit = unfit
                self._host.trouble(unfit.message)
                self._tasks.start(self._until_fit(), name="until fit")
            raise

    async def _until_fit(self) -> None:
        pause_s = UNFIT_PAUSE_S
        while self._unfit is not None:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, UNFIT_PAUSE_S_MAX)
            with contextlib.suppress(MvmciError):
                await self.check()
                self._unfit = None
        self._host.trouble("")

    async def close(self) -> None:
        """See `mvmci.engine.Engine.close`."""
        await cancel(*self._runs.values())
        await self._tasks.close()
        await self.slots.close()
        await self._host.close()

    async def verify(self, job: str) -> int:
        """Run an ended workflow again from its journal, without effects, and return how many it had.

        Raises Nondeterminism where it differs, Usage for a job that cannot be replayed.
        """
        journal = await load(self._host.store, job)
        spec, done = journal.state.spec, journal.state.done
        if spec is None or done is None or spec.kind != "workflow":
            what = "a command" if spec and done else f"{status(journal.state)[0]}"
            raise Usage(f"{job} cannot be replayed: it is {what}", hint="replay takes a workflow that ended")
        partial = done.status not in ("succeeded", "failed") or done.reason.startswith(OUTSIDE_REASONS)
        other = Verification(self._host, journal, partial=partial)
        code = await self._host.compiled(spec)
        started_at, limit_ms = journal.state.started_at or 0, spec.limits.timeout_ms
        async with self.slots.take(await self._host.guests()) as slot:
            try:
                replaying = run_workflow(self._host, slot, spec, started_at, code, other)
                time = Deadline(self._host.now_ms)
                time.begin(self._host.now_ms() + limit_ms)
                got = await first(replaying, time.over)
            except (HistoryEnded, TimedOut) as stopped:
                if not partial:
                    raise Nondeterminism("nondeterminism: the end: it did not come in time") from stopped
                return journal.state.results
        if not partial:
            await self._compare(done, got)
        return journal.state.results

    async def _compare(self, done: Done, got: Done) -> None:
        blobs = self._host.store.blobs
        expected = (done.status, done.reason, await load_text(blobs, done.result))
        found = (got.status, got.reason, await load_text(blobs, got.result))
        if expected != found:
            raise Nondeterminism(f"nondeterminism: the end: expected {expected}, got {found}")

    async def _run(self, run: _Run) -> Outcome:
        run.stopwatch.begin("slot")
        while True:
            with contextlib.suppress(Reread):
                return await self._take(run)
            run = replace(run, spec_entry=None)

    async def _take(self, run: _Run) -> Outcome:
        """Look whether there is anything to do, and hold the job while there is.

        What may have come after the spec (a cancel) refuses the first write, and is read then.
        """
        store, job = self._host.store, run.job
        journal = await load(store, job, run.spec_entry)
        state = journal.state
        if state.ended:
            return Outcome("ended")
        if state.released is not None and state.released.until > self._host.now_ms():
            return Outcome("released", state.released.until)
        if state.held and state.lease is not None and await store.presence.live(job, state.lease):
            return Outcome("held")
        try:
            await store.presence.add_job(job, state.epoch + 1)
        except LockHeld:
            return Outcome("held")
        try:
            holder = Holder(store, journal, self._lease(state, run.worker), run.stopwatch)
            try:
                return await self._hold(holder, run)
            except Fenced:  # by another holder, or by an end: then there is nothing left to do
                journal.check_readable()
                self._host.notice(f"{job}: another holder has taken over")
                return Outcome("ended" if journal.state.ended else "fenced")
            finally:
                await holder.close()
        finally:
            await store.presence.remove_job(job)

    def _lease(self, state: State, worker: str) -> Lease:
        presence = self._host.store.presence
        return Lease(
            at=self._host.now_ms(),
            epoch=state.epoch + 1,
            unit=presence.unit,
            incarnation=presence.incarnation,
            run=secrets.token_hex(8),
            why="first" if state.lease is None else "resumed" if state.released else "recovered",
            worker=worker,
        )

    async def _hold(self, holder: Holder, run: _Run) -> Outcome:
        """From the lease to the end, or to a release."""
        try:
            try:
                done = await self._attempt(holder, run)
            except Suspended as asleep:
                return await self._release(holder, asleep.until)
            await holder.finish(done)
        except Cancelled:
            assert holder.journal.state.cancel is not None
            by = holder.journal.state.cancel.by
            await holder.finish(self._done("cancelled", f"cancelled by {by}"))
        except (asyncio.CancelledError, HostFull):
            await self._let_go(holder)
            raise
        except MvmciError:
            if holder.started_at is None:  # nothing of the job has run: that is no attempt
                await self._let_go(holder)
            raise
        return Outcome("ended")

    async def _release(self, holder: Holder, until: int) -> Outcome:
        if not until:
            await holder.finish(Released(at=self._host.now_ms(), why="drain"))
            return Outcome("released")
        until = min(until, holder.journal.state.deadline_ms or holder.deadline_ms)
        await holder.finish(Released(at=self._host.now_ms(), why="sleep", until=until))
        await self._host.store.hints.timer(holder.spec.queue, holder.spec.id, until)
        return Outcome("released", until)

    async def _let_go(self, holder: Holder) -> None:
        """This engine is told to stop: say so in the journal, if it can be said quickly."""
        if holder.leased and holder.journal.state.held:
            released = holder.finish(Released(at=self._host.now_ms(), why="drain"))
            with contextlib.suppress(MvmciError, Cancelled, Reread, TimeoutError):
                await asyncio.wait_for(released, LET_GO_S)

    async def _attempt(self, holder: Holder, run: _Run) -> Done:
        """One try at the job. What ends the job becomes its `done`; what does not is raised."""
        if self._unfit is not None:
            raise self._unfit
        state, limits = holder.journal.state, holder.spec.limits
        if state.cancel is not None:
            raise Cancelled
        if state.held and state.lost + 1 >= limits.attempts:
            return self._done("errored", f"attempts: {state.lost + 1} holders were lost")
        time = Deadline(self._host.now_ms)
        try:
            for pattern in holder.spec.artifacts:
                Pattern(pattern)
            if state.deadline_ms is not None:
                time.begin(state.deadline_ms)
                if time.over.done():
                    time.over.result()
            return await first(self._guest(holder, run, time), holder.failed(), time.over)
        except TimedOut:
            return self._done("timed_out", f"timeout: more than {format_duration(limits.timeout_ms)}")
        except LimitReached as reached:
            return self._done("failed", reached.reason)
        except (BadModule, CompileFailed) as bad:
            if isinstance(bad, CompileFailed):
                await self._look_at_host()
            return self._done("failed", f"module: {bad.message}")
        except BadWorkspace as bad:
            return self._done("failed", f"workspace: {bad.message}")
        except CodeGone:
            raise  # twice: something is wrong with this host, not with the job
        except JobUnfit:
            await self._look_at_host()
            raise
        except SlotDied as died:
            await self._look_at_host()
            if isinstance(died, SlotLost):
                raise JobUnfit(died.message, hint=LOST_HINT) from None
            return self._done("failed", f"trap: {died.message}")
        except StoreFull as full:  # what the job made does not fit; another holder would only make it again
            return self._done("failed", f"store: {full.message}")
        except (Nondeterminism, NotFound) as ours:
            return self._done("errored", ours.message)
        except Usage as wrong:
            return self._done("failed", f"request: {wrong.message}")
        except (MvmciError, Cancelled, Reread, Suspended):
            raise
        except Exception as bug:  # it is ours, and costs this job; the others here run on
            log.exception("job %s met a bug in mvmci", holder.spec.id)
            return self._done("errored", f"a bug in mvmci: {type(bug).__name__}: {bug}")

    async def _guest(self, holder: Holder, run: _Run, time: Deadline) -> Done:
        """Everything slow comes before the first lease; the guest runs once it is written, or soon will be.

        Where somebody may have tried before, what lies before the guest may be what that one died of: then
        the lease is written at once, and dying again is an attempt.
        """
        if run.spec_entry is None:
            await holder.write()
        code = await self._compiled(holder)
        try:
            try:
                return await self._in_slot(holder, code, run, time)
            except CodeGone:
                # Another process has removed it since, to make room, or the disk has damaged it.
                holder.stopwatch.begin("slot")
                code = await self._compiled(holder, refused=True)
                return await self._in_slot(holder, code, run, time, again=True)
        finally:
            run.on_slot_free()

    async def _compiled(self, holder: Holder, *, refused: bool = False) -> str:
        """The job's code. While it takes long to make, whoever looks at the job is told."""
        explain, job = self._host.store.presence.explain, holder.spec.id

        told: asyncio.Task[None] | None = None

        def tell() -> None:
            nonlocal told
            told = asyncio.create_task(explain(job, f"compiling {holder.spec.name}, once on this host"))

        timer = asyncio.get_running_loop().call_later(SAY_S, tell)
        try:
            with holder.stopwatch.part("compile"):
                return await self._host.compiled(holder.spec, refused=refused)
        finally:
            timer.cancel()
            if told is not None:
                await told
                await explain(job, "")

    async def _in_slot(
        self, holder: Holder, code: str, run: _Run, time: Deadline, *, again: bool = False
    ) -> Done:
        host, spec = self._host, holder.spec
        async with self.slots.take(await host.guests()) as slot:
            holder.stopwatch.begin("guest")
            if spec.kind == "command":
                with holder.stopwatch.part("layout"):
                    await fill(host, slot, spec.tree)
            if not again:
                holder.set_start(host.now_ms())
                time.begin(holder.deadline_ms)
            if run.spec_entry is not None and not again:
                holder.write_within(LEASE_WAIT_S)
            else:
                await holder.write()
            if spec.kind == "command":
                return await run_command(host, holder, slot, code)
            started_at = holder.journal.state.started_at or holder.lease.at
            # How many pieces of its output earlier holders gave out.
            earlier = () if run.spec_entry is not None else await host.store.logs.read(spec.id)
            published = max((chunk.number + 1 for chunk in earlier), default=0)
            live = LiveEffects(host, holder, slot, published=published)
            return await live.collect(await run_workflow(host, slot, spec, started_at, code, live))

    def _done(self, end: End, reason: str) -> Done:
        return Done(at=self._host.now_ms(), status=end, reason=reason[:REASON_CHARS_MAX])
