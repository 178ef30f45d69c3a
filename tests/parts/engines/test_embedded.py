"""What an engine promises that is reached by a call, beyond the contract: time, attempts, replay, slots."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mvmci.config.quantity import DURATION_MS_MAX, SIZE_BYTES_MAX
from mvmci.engines.embedded import command
from mvmci.engines.embedded import engine as engine_module
from mvmci.engines.embedded.code import _stat
from mvmci.engines.embedded.engine import Embedded
from mvmci.engines.embedded.host import Host
from mvmci.engines.embedded.limits import LimitReached, first
from mvmci.errors import HostFull, HostUnfit, JobUnfit, Nondeterminism, StoreFull, Usage
from mvmci.jobs.allow import Allow
from mvmci.jobs.job import ATTEMPTS_MAX, COUNT_MAX, Limits
from mvmci.jobs.journal import AnyRecord, Cancel, Intent, Journal, Lease, Released, Result, Spec, status
from mvmci.journals.client import submit
from mvmci.journals.reader import load
from mvmci.sandbox.confinement import Profile
from mvmci.sandbox.forkserver import Child, ForkServer, NoSlot, SlotLost
from mvmci.store import Blobs, Source, Store
from tests.harness.memory import Memory
from tests.harness.waiting import until_journal
from tests.harness.world import Counting, Crashed, command_spec, mortal, script_spec

HOUR_MS = 3_600_000

Make = Callable[[Store], Embedded]


class Clock:
    """The engine's wall clock, which a test may put forward."""

    def __init__(self) -> None:
        self.ahead_ms = 0

    def __call__(self) -> int:
        return time.time_ns() // 1_000_000 + self.ahead_ms


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def make(host_root: Path, clock: Clock) -> AsyncIterator[Make]:
    """Makes engines, and closes them at the end."""
    made: list[Embedded] = []

    def make(store: Store) -> Embedded:
        allow = Allow(http=("http://127.0.0.1:*/*",), exec=("true", "touch"))
        made.append(Embedded(Host(store=store, root=host_root, allow=lambda: allow, now_ms=clock), slots=2))
        return made[-1]

    yield make
    for engine in made:
        await engine.close()


async def cancel(store: Store, job: str) -> None:
    """What a client does: one more message, by compare-and-set."""
    journal = await load(store, job)
    data = journal.encode([Cancel(at=1, by="me")], "cancel")
    await store.journals.append(job, "cancel", "default", data, expect=journal.tail)


def has_result(records: Sequence[AnyRecord], index: int) -> bool:
    return any(isinstance(record, Result) and record.index == index for record in records)


def count(journal: Journal, kind: type[AnyRecord]) -> int:
    return sum(isinstance(record, kind) for record in journal.records)


async def test_a_fresh_job_that_ends_quickly_is_written_in_one_message(memory: Memory, make: Make) -> None:
    store = memory.store("w")
    engine = make(store)
    for job in ("compiles", "j"):
        await submit(store, await script_spec(store, job, []))
        await engine.run(job, spec_entry=(await store.journals.read(job))[0])
    journal = await load(store, "j")
    assert status(journal.state)[0] == "succeeded"
    assert journal.tail == 2


async def test_a_long_sleep_frees_the_slot_and_ends_at_the_time_that_its_intent_named(
    memory: Memory, make: Make, clock: Clock
) -> None:
    store = memory.store("w")
    engine = make(store)
    limits = Limits(timeout_ms=10 * HOUR_MS)
    steps = [{"now": True}, {"sleep": HOUR_MS}, {"now": True}]
    await submit(store, await script_spec(store, "j", steps, limits=limits))
    asleep = await engine.run("j")
    assert asleep.kind == "released"
    assert (await engine.run("j")).kind == "released", "too early is too early"
    journal = await load(store, "j")
    intent = next(record for record in journal.records if isinstance(record, Intent))
    assert asleep.until == intent.at + HOUR_MS
    assert status(journal.state) == ("suspended", "sleep")
    assert count(journal, Released) == 1
    clock.ahead_ms = HOUR_MS
    assert (await engine.run("j")).kind == "ended"
    journal = await load(store, "j")
    assert status(journal.state)[0] == "succeeded"
    assert (journal.state.attempts, journal.state.epoch) == (1, 2)
    assert await engine.verify("j") == 1


async def test_a_first_delivery_that_comes_late_does_nothing_again(memory: Memory, make: Make) -> None:
    store, crashing = memory.store("w"), memory.store("dies")
    async with Counting().serve() as server:
        steps = [{"http": {"method": "POST", "url": f"{server.url}/a"}}]
        await submit(store, await script_spec(store, "j", steps))
        dying, _ = mortal(crashing, lambda number, records: has_result(records, 0), "before")
        with contextlib.suppress(Crashed):
            await make(dying).run("j")
        await crashing.close()
        engine = make(store)
        late = await engine.run("j", spec_entry=(await store.journals.read("j"))[0])
        assert late.kind == "fenced", "by the holder that it knew nothing of"
        await engine.run("j")
        assert status((await load(store, "j")).state)[0] == "succeeded"
        assert server.counts == {"POST /a": 1}


async def test_waiting_for_a_slot_is_not_counted_as_time(memory: Memory, host_root: Path) -> None:
    """The clock stands still but for that time, so that the run may take as long as it takes."""
    store, now_ms = memory.store("w"), [1_000_000]
    allow = Allow(http=("http://127.0.0.1:*/*",))
    host = Host(store=store, root=host_root, allow=lambda: allow, now_ms=lambda: now_ms[0])
    engine = Embedded(host, slots=1)
    async with Counting().serve() as server:
        server.answers.clear()
        await submit(store, await script_spec(store, "long", [{"http": {"url": server.url}}]))
        await submit(store, await script_spec(store, "j", [], limits=Limits(timeout_ms=100)))
        running = [asyncio.create_task(engine.run("long"))]
        await server.asked.wait()
        running.append(asyncio.create_task(engine.run("j")))
        await until_journal(store, "j", lambda journal: journal.state.held)
        now_ms[0] += HOUR_MS
        await asyncio.sleep(0.5)  # by then a timer of 0.1 s would have looked at the clock
        server.answers.set()
        await asyncio.gather(*running)
    await engine.close()
    assert status((await load(store, "j")).state)[0] == "succeeded"


async def test_time_is_up_for_a_sleeper_as_well(memory: Memory, make: Make, clock: Clock) -> None:
    store = memory.store("w")
    engine = make(store)
    await submit(store, await script_spec(store, "j", [{"sleep": HOUR_MS}], limits=Limits(timeout_ms=60_000)))
    asleep = await engine.run("j")
    assert asleep.until == (await load(store, "j")).state.deadline_ms
    clock.ahead_ms = 60_000
    await engine.run("j")
    assert status((await load(store, "j")).state)[0] == "timed_out"


async def test_a_cancelled_job_whose_holder_died_is_not_run_again(memory: Memory, make: Make) -> None:
    store, crashing = memory.store("w"), memory.store("dies")
    async with Counting().serve() as server:
        steps = [{"http": {"url": f"{server.url}/a"}}]
        await submit(store, await script_spec(store, "j", steps))
        dying, _ = mortal(crashing, lambda number, records: True, "after")
        with contextlib.suppress(Crashed):
            await make(dying).run("j")
        await crashing.close()
        await cancel(store, "j")
        assert (await make(store).run("j")).kind == "ended"
        assert status((await load(store, "j")).state)[0] == "cancelled"
        assert not server.counts


async def test_a_job_that_loses_every_holder_is_given_up(memory: Memory, make: Make) -> None:
    store = memory.store("w")
    await submit(store, await command_spec(store, "j", "files", Limits(attempts=3)))
    for unit in ("a", "b", "c"):
        crashing = memory.store(unit)
        dying, journals = mortal(crashing, lambda number, records: True, "after")
        with contextlib.suppress(Crashed):
            await make(dying).run("j")
        assert journals.crashed
        await crashing.close()
    assert (await make(store).run("j")).kind == "ended"
    assert status((await load(store, "j")).state) == ("errored", "attempts: 3 holders were lost")


class Full:
    """Blobs of a store that takes no more: neither files nor what is large."""

    def __init__(self, inner: Blobs) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def put_all(self, sources: Mapping[str, Source]) -> set[str]:
        raise StoreFull("60 KiB do not fit")


@pytest.mark.parametrize("kind", ["artifacts of a command", "tree of an exec"])
async def test_what_a_job_leaves_that_does_not_fit_fails_it_once(
    memory: Memory, make: Make, kind: str
) -> None:
    """Five holders would only make it five times."""
    store = memory.store("w")
    if kind == "tree of an exec":
        spec = await script_spec(store, "j", [{"exec": {"argv": ["touch", "left"]}}])
    else:
        spec = msgspec.structs.replace(await command_spec(store, "j", "files"), artifacts=("**",))
    await submit(store, spec)
    engine = make(dataclasses.replace(store, blobs=Full(store.blobs)))
    assert (await engine.run("j")).kind == "ended"
    state = (await load(store, "j")).state
    assert status(state) == ("failed", "store: 60 KiB do not fit")
    assert state.attempts == 1


async def test_a_host_without_room_lets_a_job_go_and_loses_no_attempt(
    memory: Memory, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = memory.store("w")
    engine = make(store)

    async def full(*_: Any, **__: Any) -> None:
        raise HostFull("no space left here")

    await submit(store, await script_spec(store, "j", [{"exec": {"argv": ["true"], "idempotent": True}}]))
    with monkeypatch.context() as patched:
        patched.setattr("mvmci.engines.embedded.workspace.materialise", full)
        with pytest.raises(HostFull):
            await engine.run("j")
    state = (await load(store, "j")).state
    assert (state.ended, state.lost) == (False, 0)
    await engine.run("j")
    assert status((await load(store, "j")).state)[0] == "succeeded"


async def test_a_job_whose_code_takes_long_to_make_says_so(
    memory: Memory, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvmci.engines.embedded.engine.SAY_S", 0.0)
    store, told = memory.store("w"), []
    await submit(store, await command_spec(store, "j", "hello"))

    async def slowly(self: Host, spec: Spec, *, refused: bool = False) -> str:
        while not (waits := (await store.presence.members())[0].waits):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        told.append(waits)
        return await compiled(self, spec, refused=refused)

    compiled = Host.compiled
    monkeypatch.setattr(Host, "compiled", slowly)
    await make(store).run("j")
    assert told == [{"j": "compiling hello.wasm, once on this host"}]
    assert (await store.presence.members())[0].waits == {}


async def test_closing_lets_jobs_go_and_loses_no_attempt(memory: Memory, make: Make) -> None:
    store = memory.store("w")
    engine = make(store)
    await submit(store, await command_spec(store, "j", "loop"))
    running = asyncio.create_task(engine.run("j"))
    await until_journal(store, "j", lambda journal: journal.state.held)
    await engine.close()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    state = (await load(store, "j")).state
    assert status(state) == ("queued", "drained")
    assert state.lost == 0


async def test_a_command_is_not_replayed(memory: Memory, make: Make) -> None:
    store = memory.store("w")
    engine = make(store)
    await submit(store, await command_spec(store, "c", "files"))
    await engine.run("c")
    with pytest.raises(Usage, match="cannot be replayed"):
        await engine.verify("c")


async def test_a_workflow_that_asks_for_something_else_than_its_journal_says_is_errored(
    memory: Memory, make: Make
) -> None:
    store, crashing = memory.store("w"), memory.store("dies")
    await submit(store, await script_spec(store, "j", [{"sleep": 1}, {"sleep": 500}]))
    dying, _ = mortal(crashing, lambda number, records: has_result(records, 0), "after")
    with contextlib.suppress(Crashed):
        await make(dying).run("j")
    await crashing.close()
    # The module of the job is another one now: its journal says what the old one asked for.
    journal = await load(store, "j")
    forged = Memory()
    forge = forged.store("w")
    spec = await script_spec(forge, "j", [{"sleep": 7}, {"sleep": 500}])
    copy = Journal("j")
    for number, records in enumerate([[spec], journal.records[1:]], 1):
        data = copy.encode(records, f"m{number}")
        kind = "spec" if number == 1 else "run"
        await forge.journals.append("j", kind, "default", data, expect=copy.tail)
        copy.absorb(await forge.journals.read("j", copy.tail))
    assert (await make(forge).run("j")).kind == "ended"
    name, reason = status((await load(forge, "j")).state)
    assert name == "errored"
    assert reason == "nondeterminism: effect 0: expected sleep 1 ms, got sleep 7 ms"
    with pytest.raises(Nondeterminism):
        await make(forge).verify("j")


async def test_a_warm_process_that_was_killed_while_idle_fails_no_job(memory: Memory, make: Make) -> None:
    store = memory.store("w")
    engine = make(store)
    for job in ("first", "second"):
        await submit(store, await script_spec(store, job, []))
        await engine.run(job)
        assert status((await load(store, job)).state)[0] == "succeeded"
        for slot in engine.slots.all:
            if slot.warm is not None:
                os.kill(slot.warm.pid, signal.SIGKILL)
                await slot.warm.wait()


def pipes() -> set[str]:
    """The pipes that this process has open."""
    fds = Path("/proc/self/fd").iterdir()
    return {link for fd in fds if (link := os.readlink(fd) if fd.is_symlink() else "").startswith("pipe:")}


async def test_a_job_whose_guest_is_stopped_before_its_first_output_leaves_no_pipe(
    memory: Memory, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = memory.store("w")
    engine = make(store)
    await submit(store, await command_spec(store, "j", "files"))

    async def stop(guest: Coroutine[Any, Any, Any], *guards: Any) -> Any:
        """Cancels what reads the streams before its first step."""
        if not isinstance(guards[0], asyncio.Task):
            return await first(guest, *guards)
        guest.close()
        for guard in guards:
            guard.cancel()
        await asyncio.gather(*guards, return_exceptions=True)
        raise LimitReached("output", "test")

    before = pipes()
    with monkeypatch.context() as patched:
        patched.setattr(command, "first", stop)
        await engine.run("j")
    assert status((await load(store, "j")).state) == ("failed", "output: test")
    assert pipes() == before


async def test_a_job_for_which_the_host_makes_no_process_is_left_to_the_next_holder(
    memory: Memory, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = memory.store("w")
    engine = make(store)
    await submit(store, await command_spec(store, "j", "files"))

    async def refuse(self: ForkServer, profile: Profile, streams: Sequence[int] = ()) -> Child:
        if profile.name == "command":
            raise NoSlot("no slot process could be made: fork failed")
        return await fork(self, profile, streams)

    fork = ForkServer.fork
    before = pipes()
    with monkeypatch.context() as patched:
        patched.setattr(ForkServer, "fork", refuse)
        with pytest.raises(NoSlot):
            await engine.run("j")
    assert pipes() == before, "the guest's streams are closed"
    assert (await load(store, "j")).state.done is None
    await engine.run("j")
    assert status((await load(store, "j")).state)[0] == "succeeded"


@pytest.mark.parametrize("how", ["missing", "refused"])
async def test_code_that_is_gone_when_the_slot_wants_it_is_made_anew(
    memory: Memory, make: Make, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    store = memory.store("w")
    engine = make(store)
    for job in ("j", "next"):
        await submit(store, await command_spec(store, job, "files"))

    async def lose(self: Host, spec: Spec, *, refused: bool = False) -> str:
        """The code is gone, or another than was verified, as soon as the engine has its name."""
        path = await compiled(self, spec, refused=refused)
        if not refused:
            file = self.root / path
            file.unlink()
            if how == "refused":
                file.write_bytes(b"nonsense")
                assert self._code is not None
                self._code._verified[file.stem] = _stat(file.stat())
        return path

    compiled = Host.compiled
    with monkeypatch.context() as patched:
        patched.setattr(Host, "compiled", lose)
        await engine.run("j")
    await engine.run("next")
    for job in ("j", "next"):
        assert status((await load(store, job)).state)[0] == "succeeded"
        assert count(await load(store, job), Lease) == 1


async def test_a_command_closes_a_pipe_once(
    memory: Memory, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever closes a descriptor twice closes what another thread has opened by then."""
    found_closed: list[int] = []
    closed = 0

    class Pipe(io.FileIO):
        def close(self) -> None:
            nonlocal closed
            if not self.closed:
                closed += 1
                try:
                    os.fstat(self.fileno())
                except OSError:
                    found_closed.append(self.fileno())
            super().close()

    monkeypatch.setattr(io, "FileIO", Pipe)
    store = memory.store("w")
    await submit(store, await command_spec(store, "j", "hello"))
    assert (await make(store).run("j")).kind == "ended"
    assert closed == 2
    assert not found_closed


EXTREMES = Limits(
    timeout_ms=DURATION_MS_MAX,
    memory_bytes=SIZE_BYTES_MAX,
    output_bytes=SIZE_BYTES_MAX,
    workspace_bytes=SIZE_BYTES_MAX,
    attempts=ATTEMPTS_MAX,
    fuel=COUNT_MAX,
)


@pytest.mark.parametrize("kind", ["command", "workflow"])
async def test_a_job_may_have_the_most_of_everything(memory: Memory, make: Make, kind: str) -> None:
    store = memory.store("w")
    spec = await (
        command_spec(store, "j", "hello", EXTREMES)
        if kind == "command"
        else script_spec(store, "j", [], limits=EXTREMES)
    )
    await submit(store, spec)
    assert (await make(store).run("j")).kind == "ended"
    assert status((await load(store, "j")).state) == ("succeeded", "")


@pytest.mark.parametrize("guest", ["hello", "script"])
@pytest.mark.parametrize(
    ("kind", "component"),
    [("command", True), ("workflow", False), ("command", False), ("workflow", True)],
)
async def test_a_kind_that_does_not_fit_the_module_fails_at_once(
    memory: Memory, make: Make, guest: str, kind: Any, component: bool
) -> None:
    store = memory.store("w")
    like = await (command_spec(store, "j", "hello") if guest == "hello" else script_spec(store, "j", []))
    if (like.kind, like.component) == (kind, component):
        return
    await submit(store, msgspec.structs.replace(like, kind=kind, component=component))
    assert (await make(store).run("j")).kind == "ended"
    journal = await load(store, "j")
    assert status(journal.state)[0] == "failed"
    assert status(journal.state)[1].startswith(("module: ", "trap: "))
    assert count(journal, Lease) <= 1


@pytest.mark.parametrize("pattern", ["/etc/*", "../x", "", "[z-a]", "a" * 2_000])
async def test_bad_artifact_patterns_fail_a_job_at_once(memory: Memory, make: Make, pattern: str) -> None:
    store = memory.store("w")
    spec = msgspec.structs.replace(await command_spec(store, "j", "hello"), artifacts=(pattern,))
    await submit(store, spec)
    assert (await make(store).run("j")).kind == "ended"
    assert status((await load(store, "j")).state)[0] == "failed"


async def test_a_bug_of_ours_ends_its_job_alone(
    memory: Memory, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = memory.store("w")
    engine = make(store)
    await submit(store, await script_spec(store, "long", [{"sleep": 2_000}]))
    await submit(store, await command_spec(store, "j", "hello"))
    running = asyncio.create_task(engine.run("long"))

    async def broken(*_: Any) -> None:
        raise OverflowError("too large\n\x1b[2J")

    await until_journal(store, "long", lambda journal: journal.state.held)
    monkeypatch.setattr("mvmci.engines.embedded.engine.fill", broken)
    assert (await engine.run("j")).kind == "ended"
    name, reason = status((await load(store, "j")).state)
    assert (name, reason.startswith("a bug in mvmci: OverflowError")) == ("errored", True)
    assert "job j met a bug" in caplog.text
    assert (await running).kind == "ended"
    assert status((await load(store, "long")).state)[0] == "succeeded"


async def test_a_death_before_the_guest_runs_counts_from_the_second_delivery_on(
    memory: Memory, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies before the guest, its module or its workspace, may be what ends the process."""
    store = memory.store("w")
    await submit(store, await command_spec(store, "j", "hello", Limits(attempts=2)))

    async def deadly(*_: Any) -> None:
        raise Crashed

    spec_entry = (await store.journals.read("j"))[0]
    with monkeypatch.context() as patched:
        patched.setattr("mvmci.engines.embedded.engine.fill", deadly)
        for delivery in (spec_entry, None, None):
            dying = memory.store("w")
            with contextlib.suppress(Crashed):
                await make(dying).run("j", spec_entry=delivery)
            await dying.close()
    await make(store).run("j")
    assert status((await load(store, "j")).state) == ("errored", "attempts: 2 holders were lost")


async def test_time_counts_from_the_guest_though_its_lease_is_older(
    memory: Memory, make: Make, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = memory.store("w")
    await submit(store, await command_spec(store, "j", "hello", Limits(timeout_ms=HOUR_MS)))
    fill = engine_module.fill

    async def slow(*args: Any) -> None:
        clock.ahead_ms += 2 * HOUR_MS
        await fill(*args)

    monkeypatch.setattr(engine_module, "fill", slow)
    await make(store).run("j")
    assert status((await load(store, "j")).state)[0] == "succeeded"


async def test_a_host_that_loses_slots_ends_no_job_and_says_what_is_wrong_until_it_is_mended(
    memory: Memory, host_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    store = memory.store("w")
    engine = Embedded(Host(store=store, root=host_root, allow=Allow, trouble=heard.put_nowait), slots=1)
    run = command.run_guest

    async def lose(*_: object) -> Any:
        raise SlotLost("the slot process was killed by SIGKILL")

    monkeypatch.setattr(engine_module, "UNFIT_PAUSE_S", 0.01)
    monkeypatch.setattr(engine_module, "FIT_S", 0.0)
    try:
        await submit(store, await command_spec(store, "j", "hello"))
        monkeypatch.setattr(command, "run_guest", lose)
        with pytest.raises(JobUnfit):  # others run here
            await engine.run("j")
        monkeypatch.setattr(engine_module, "run_guest", lose)
        with pytest.raises(HostUnfit, match="killed by SIGKILL"):
            await engine.run("j")
        assert "killed by SIGKILL" in await heard.get()
        monkeypatch.setattr(command, "run_guest", run)
        monkeypatch.setattr(engine_module, "run_guest", run)
        assert await heard.get() == ""
        assert (await engine.run("j")).kind == "ended"
        assert status((await load(store, "j")).state)[0] == "succeeded"
    finally:
        await engine.close()


@pytest.mark.parametrize(("demanded", "kind"), [("process", "exit"), ("filtered", "error")])
async def test_a_program_that_could_read_our_keys_is_refused_where_isolation_is_demanded(
    memory: Memory, host_root: Path, demanded: str, kind: str
) -> None:
    store = memory.store("w")
    host = Host(
        store=store,
        root=host_root,
        allow=lambda: Allow(exec=("sh",)),
        min_isolation=demanded,
        without=frozenset({"uid", "namespace"}),
    )
    engine = Embedded(host, slots=1)
    await submit(store, await script_spec(store, "j", [{"exec": {"argv": ["sh", "-c", "true"]}}]))
    try:
        await engine.prepare()
        await engine.run("j")
    finally:
        await engine.close()
    assert not engine.parts_programs
    journal = await load(store, "j")
    (result,) = (record for record in journal.records if isinstance(record, Result))
    assert result.value is not None
    assert result.value["kind"] == kind
    if kind == "error":
        assert result.value["why"] == "denied"
        assert "filtered is demanded" in result.value["text"]
