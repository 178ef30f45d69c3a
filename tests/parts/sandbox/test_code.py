"""The code cache: made once, checked always, and confined while it is made."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import stat
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import filelock
import pytest

from mvmci.engines.embedded import code
from mvmci.engines.embedded.code import CodeCache, CompileFailed
from mvmci.errors import BadModule, JobUnfit, MvmciError
from mvmci.sandbox import frames, settings
from mvmci.sandbox.confinement import Profile
from mvmci.sandbox.forkserver import ForkServer
from tests.harness import guests
from tests.harness.waiting import LONG_S

ECHO = guests.workflow(guests.ECHO)


class Module:
    """A module's file, and how often it was asked for: once a compile."""

    def __init__(self, path: Path, wasm: bytes) -> None:
        path.write_bytes(wasm)
        self.path = path
        self.digest = "sha256:" + hashlib.sha256(wasm).hexdigest()
        self.compiles = 0

    async def __call__(self, to: Path) -> None:
        self.compiles += 1
        to.write_bytes(self.path.read_bytes())

    async def get(self, cache: CodeCache) -> str:
        return await cache.get(self.digest, True, True, self)


@pytest.fixture
def echo(tmp_path: Path) -> Module:
    return Module(tmp_path / "echo.wasm", ECHO)


async def runs(forkserver: ForkServer, path: str) -> bool:
    child = await forkserver.fork(Profile(name="workflow", uid=forkserver.slot_uid(0), readable=(path,)))
    await child.send(
        frames.RunWorkflow(code=path, input="x", memory_bytes=1 << 20, fuel=10**6, seed=1, now_ms=1)
    )
    ended = await child.receive()
    await child.close()
    return ended == frames.Ended(outcome="ok", text="x")


async def test_a_module_is_compiled_once_and_its_code_runs_in_a_slot(forkserver, root, echo):
    cache = CodeCache(root, forkserver)
    path = await echo.get(cache)
    assert await echo.get(cache) == path
    assert await echo.get(CodeCache(root, forkserver)) == path, "another process finds it"
    assert echo.compiles == 1
    assert await runs(forkserver, path)


async def test_all_who_wait_share_one_compile(forkserver, root, echo):
    one, other = CodeCache(root, forkserver), CodeCache(root, forkserver)
    paths = await asyncio.gather(*[echo.get(cache) for cache in (one, one, one, other, other)])
    assert len(set(paths)) == 1
    assert echo.compiles == 1


HOLDER = """
import os, signal, sys, filelock
held = [filelock.SoftFileLease(path, lease_duration=float(sys.argv[1])) for path in sys.argv[2:]]
for lease in held:
    lease.acquire()
print("held", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


async def test_who_is_stopped_while_compiling_is_not_waited_for(forkserver, root, echo, monkeypatch):
    monkeypatch.setattr(code, "LEASE_S", 0.5)
    cache = CodeCache(root, forkserver)
    stripe = int(code._key(echo.digest, True, True)[:8], 16) % code.LEASES
    turn = stripe % cache._bounds.at_once
    files = [root / "code" / f"lease-{name}" for name in (stripe, f"turn-{turn}")]
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, str(code.LEASE_S), *files, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        await holder.stdout.readline()
        async with asyncio.timeout(LONG_S):
            assert await runs(forkserver, await echo.get(cache))
    finally:
        holder.kill()
        await holder.wait()


async def test_who_was_stopped_for_so_long_that_another_took_over_uses_what_that_one_made(
    forkserver, root, echo
):
    made = root / await echo.get(CodeCache(root, forkserver))
    files = {path: path.read_bytes() for path in (made, made.with_suffix(".mac"))}
    for path in files:
        path.unlink()

    async def taken_over(to: Path) -> None:
        shutil.rmtree(to.parent)
        for path, data in files.items():
            path.write_bytes(data)
            path.chmod(0o444)

    assert root / await CodeCache(root, forkserver).get(echo.digest, True, True, taken_over) == made


async def test_who_lives_and_compiles_for_long_is_waited_for(forkserver, root, echo, monkeypatch):
    monkeypatch.setattr(code, "LEASE_S", 2.0)
    one, other = CodeCache(root, forkserver), CodeCache(root, forkserver)
    began, goes_on = asyncio.Event(), asyncio.Event()

    async def slow(to: Path) -> None:
        began.set()
        await goes_on.wait()
        await echo(to)

    first = asyncio.ensure_future(one.get(echo.digest, True, True, slow))
    await began.wait()
    second = asyncio.ensure_future(echo.get(other))
    await asyncio.sleep(1.5 * code.LEASE_S)  # longer than a stopped one would be waited for
    goes_on.set()
    assert await first == await second
    assert echo.compiles == 1


async def test_one_who_gives_up_does_not_end_the_compile_of_the_others(forkserver, root, echo):
    cache = CodeCache(root, forkserver)
    first, second = asyncio.ensure_future(echo.get(cache)), asyncio.ensure_future(echo.get(cache))
    await asyncio.sleep(0)
    first.cancel()
    assert await runs(forkserver, await second)
    assert echo.compiles == 1


def flip(path: Path, at: int) -> None:
    """Change one byte in place, as a bad disk or a bad neighbour would."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("fresh", [True, False], ids=["in another process", "in the same process"])
@pytest.mark.parametrize("at", [0, 5000, -1])
async def test_code_with_a_flipped_byte_is_made_anew_and_never_run(forkserver, root, echo, fresh, at):
    cache = CodeCache(root, forkserver)
    path = root / await echo.get(cache)
    before = path.read_bytes()
    flip(path, at % len(before))
    again = root / await echo.get(CodeCache(root, forkserver) if fresh else cache)
    assert echo.compiles == 2
    assert again.read_bytes()[at] == before[at]


async def test_code_under_another_name_is_not_taken(forkserver, root, echo, tmp_path):
    cache = CodeCache(root, forkserver)
    other = Module(tmp_path / "other.wasm", guests.workflow("unreachable"))
    mine, theirs = root / await echo.get(cache), root / await other.get(cache)
    os.replace(theirs, mine)
    os.replace(theirs.with_suffix(".mac"), mine.with_suffix(".mac"))
    assert await runs(forkserver, await echo.get(cache))
    assert echo.compiles == 2


@pytest.mark.parametrize("suffix", [".mac", ".cwasm"])
async def test_code_whose_files_are_missing_is_made_anew(forkserver, root, echo, suffix):
    path = root / await echo.get(CodeCache(root, forkserver))
    path.with_suffix(suffix).unlink()
    assert await runs(forkserver, await echo.get(CodeCache(root, forkserver)))
    assert echo.compiles == 2


async def test_code_of_another_host_s_key_is_not_taken(forkserver, root, echo):
    await echo.get(CodeCache(root, forkserver))
    (root / "code.key").unlink()
    await echo.get(CodeCache(root, forkserver))
    assert echo.compiles == 2


async def test_a_setting_or_a_machine_that_differs_has_code_of_its_own(forkserver, root, echo, monkeypatch):
    cache = CodeCache(root, forkserver)
    paths = {await echo.get(cache)}
    monkeypatch.setitem(settings.WORKFLOW, "max_wasm_stack", settings.WORKFLOW_STACK_BYTES + 1)
    paths.add(code._key(echo.digest, True, True))
    monkeypatch.setattr(code, "_machine", lambda: "another")
    paths.add(code._key(echo.digest, True, True))
    paths.add(code._key(echo.digest, True, False))
    assert len(paths) == 4


async def test_the_key_is_ours_alone_and_the_code_is_the_world_s_to_map(forkserver, root, echo):
    path = root / await echo.get(CodeCache(root, forkserver))
    assert stat.S_IMODE((root / "code.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o711
    (root / "code.key").chmod(0o644)
    with pytest.raises(MvmciError, match="not a key of ours alone"):
        CodeCache(root, forkserver)


async def test_a_module_that_cannot_run_is_refused_to_everyone_and_leaves_nothing(forkserver, root, tmp_path):
    cache = CodeCache(root, forkserver)
    bad = Module(tmp_path / "bad.wasm", b"\0asm\x0d\0\1\0\xff")
    outcomes = await asyncio.gather(bad.get(cache), bad.get(cache), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [BadModule, BadModule]
    assert not [path for path in (root / "code").iterdir() if not path.name.startswith("lease-")]
    with pytest.raises(BadModule, match="cannot run here"):
        await bad.get(cache)


async def test_a_compile_that_takes_too_long_or_too_much_is_ended(forkserver, root, echo, monkeypatch):
    monkeypatch.setattr(code, "COMPILE_S_MAX", 0.0)
    with pytest.raises(CompileFailed):
        await echo.get(CodeCache(root, forkserver))
    monkeypatch.undo()
    monkeypatch.setattr(code, "COMPILE_DATA_BYTES_MAX", 1 << 20)
    with pytest.raises((CompileFailed, BadModule)):
        await echo.get(CodeCache(root, forkserver))
    monkeypatch.undo()
    monkeypatch.setattr(code, "CODE_FILE_BYTES_MAX", 100)
    with pytest.raises(BadModule, match="larger than is allowed"):
        await echo.get(CodeCache(root, forkserver))


async def test_what_only_this_host_has_no_memory_for_is_no_fault_of_the_module(
    forkserver, root, echo, monkeypatch
):
    monkeypatch.setattr(code, "memory_bytes", lambda: 0)
    monkeypatch.setattr(code, "COMPILE_DATA_BYTES_MIN", 1 << 20)
    small = CodeCache(root, forkserver)
    with pytest.raises(JobUnfit):
        await echo.get(small)
    compiles = echo.compiles
    with pytest.raises(JobUnfit):
        await echo.get(small)
    assert echo.compiles == compiles, "it is remembered for a while"
    monkeypatch.undo()
    await echo.get(CodeCache(root, forkserver))


@pytest.mark.parametrize(
    ("processors", "gib", "at_once", "each_gib"),
    [(8, 64, 2, 6), (1, 64, 1, 6), (8, 8, 1, 6), (8, 4, 1, 3), (2, 12, 2, 4.5)],
)
def test_what_compiling_may_take_is_bounded_by_the_host(monkeypatch, processors, gib, at_once, each_gib):
    monkeypatch.setattr(code, "processors", lambda: processors)
    monkeypatch.setattr(code, "memory_bytes", lambda: gib << 30)
    assert code.compile_bounds() == (at_once, int(each_gib * (1 << 30)))


Make = Callable[[int], Awaitable[Path]]


async def test_the_longest_unused_code_goes_first_and_never_what_is_in_use(
    forkserver, root, tmp_path, monkeypatch
):
    modules = [
        Module(tmp_path / f"{n}.wasm", guests.workflow(f"(drop (i32.const {n})) {guests.ECHO}"))
        for n in range(4)
    ]
    earlier = CodeCache(root, forkserver)
    old = [root / await module.get(earlier) for module in modules[:3]]
    for age, path in enumerate(old):
        os.utime(path.with_suffix(".mac"), (0, time.time() - 10_000 + age))
    left, busy = root / "code" / "new-3-a", root / "code" / "new-4-b"
    left.mkdir()
    busy.mkdir()
    with filelock.SoftFileLease(root / "code" / "lease-4", lease_duration=code.LEASE_S):
        cache = CodeCache(root, forkserver)
    assert not left.exists(), "somebody was killed while writing it"
    assert busy.exists(), "somebody else is at work there"
    used = root / await modules[0].get(cache)  # the oldest, but in use here
    os.utime(used.with_suffix(".mac"), (0, 0))
    size = used.stat().st_size
    monkeypatch.setattr(code, "CODE_BYTES_MAX", 3 * size + size // 2)
    await modules[3].get(cache)
    assert [path.exists() for path in old] == [True, False, True]
    monkeypatch.setattr(code, "CODE_BYTES_MAX", 0)
    os.utime(old[2].with_suffix(".mac"), None)
    await asyncio.to_thread(cache._evict)
    assert old[2].exists(), "another process may be about to map it"
