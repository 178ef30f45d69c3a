"""What a guest does inside WebAssembly, in real slots: ends, limits, effects, and what it cannot reach."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from mvmci.engines.embedded.effects import request_of
from mvmci.engines.embedded.effects.context import Effect
from mvmci.engines.embedded.effects.exec import Exec, Exit
from mvmci.engines.embedded.effects.http import Http, HttpResponse
from mvmci.engines.embedded.effects.sleep import Sleep, Slept
from mvmci.jobs import effect
from mvmci.sandbox import frames
from mvmci.sandbox.confinement import LAYERS, Profile
from mvmci.sandbox.determinism import Chance
from mvmci.sandbox.forkserver import Child, ForkServer, SlotDied
from tests.harness import guests

MEBIBYTE = 1 << 20
FUEL = 10**9
Compile = Callable[..., Awaitable[frames.Ended]]


async def compile_to(
    forkserver: ForkServer, wasm: bytes, name: str, *, workflow: bool = False
) -> frames.Ended:
    """Compile in a confined process of its own; the code is `name` in the fork server's root."""
    source, target = forkserver.root / f"{name}.wasm", forkserver.root / name
    source.write_bytes(wasm)
    with source.open("rb") as module, target.open("wb") as code:
        profile = Profile(name="compile", uid=forkserver.slot_uid(9), threads=True)
        child = await forkserver.fork(profile, (module.fileno(), code.fileno()))
        component = wasm[6] == 1
        await child.send(frames.Compile(component=component, workflow=workflow))
        ended = await child.receive()
        assert await child.wait() == 0
        await child.close()
    assert isinstance(ended, frames.Ended)
    return ended


async def run_command(
    forkserver: ForkServer,
    wasm: bytes,
    *,
    args: tuple[str, ...] = ("guest",),
    stdin: bytes = b"",
    memory: int = 64 * MEBIBYTE,
) -> tuple[frames.Ended, bytes, bytes]:
    """Compile and run a command; its end and what it printed."""
    compiled = await compile_to(forkserver, wasm, "code")
    assert compiled == frames.Ended(outcome="ok"), compiled
    uid = forkserver.slot_uid(0)
    for name in ("work", "tmp"):
        (forkserver.root / name).mkdir(mode=0o700, exist_ok=True)
        if uid is not None:
            os.chown(forkserver.root / name, uid, uid)
    pipes = [os.pipe() for _ in range(3)]
    (theirs_in, ours_in), (ours_out, theirs_out), (ours_err, theirs_err) = pipes
    os.write(ours_in, stdin)
    os.close(ours_in)
    profile = Profile(name="command", uid=uid, readable=("code",), writable=("work", "tmp"), threads=True)
    child = await forkserver.fork(profile, (theirs_in, theirs_out, theirs_err))
    for fd in (theirs_in, theirs_out, theirs_err):
        os.close(fd)
    component = wasm[6] == 1
    await child.send(
        frames.RunCommand(
            code="code",
            component=component,
            args=args,
            env=(("NAME", "value"),),
            workspace="work",
            tmp="tmp",
            memory_bytes=memory,
        )
    )
    try:
        ended = await child.receive()
        assert isinstance(ended, frames.Ended)
        assert await child.wait() == 0
        with os.fdopen(ours_out, "rb") as out, os.fdopen(ours_err, "rb") as err:
            return ended, out.read(), err.read()
    finally:
        await child.close()


@contextlib.asynccontextmanager
async def workflow_slot(forkserver: ForkServer, wasm: bytes, **profile: int) -> AsyncIterator[Child]:
    compiled = await compile_to(forkserver, wasm, "flow", workflow=True)
    assert compiled == frames.Ended(outcome="ok"), compiled
    child = await forkserver.fork(
        Profile(name="workflow", uid=forkserver.slot_uid(0), readable=("flow",), **profile)
    )
    try:
        yield child
    finally:
        await child.close()


def start_of(
    text: str = "{}", *, fuel: int = FUEL, memory: int = 64 * MEBIBYTE, seed: int = 1
) -> frames.RunWorkflow:
    return frames.RunWorkflow(code="flow", input=text, memory_bytes=memory, fuel=fuel, seed=seed, now_ms=1000)


# ---- commands


@pytest.mark.parametrize("code", [0, 1, 125, 126, 127, 200, 255])
async def test_a_command_ends_with_its_own_exit_code(forkserver, code):
    ended, _, _ = await run_command(forkserver, guests.command(f"(call $exit (i32.const {code}))"))
    assert ended == frames.Ended(outcome="exit" if code else "ok", code=code)


@pytest.mark.parametrize(("code", "shown"), [(256, 255), (-1, 255), (257, 1), (512, 255)])
async def test_a_code_beyond_a_byte_is_never_taken_for_success(forkserver, code, shown):
    ended, _, _ = await run_command(forkserver, guests.command(f"(call $exit (i32.const {code}))"))
    assert ended == frames.Ended(outcome="exit", code=shown)


async def test_a_command_reads_and_writes_its_streams(forkserver):
    body = """
      (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 5))
      (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 16)))
      (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))
      (drop (call $write (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 16)))"""
    assert await run_command(forkserver, guests.command(body), stdin=b"hello") == (
        frames.Ended(outcome="ok", code=0),
        b"hello",
        b"hello",
    )


async def test_a_trap_is_reported_with_its_reason_and_its_function(forkserver):
    body = "(call $boom)"
    ended, _, _ = await run_command(forkserver, guests.command(body, more="(func $boom unreachable)"))
    assert ended == frames.Ended(outcome="trap", text="wasm `unreachable` instruction executed in `boom`")


async def test_a_stack_that_overflows_names_the_limit(forkserver):
    ended, _, _ = await run_command(
        forkserver, guests.command("(call $again)", more="(func $again (call $again))")
    )
    assert (ended.outcome, ended.limit) == ("trap", "stack")


FILL = "(loop (br_if 0 (i32.ge_s (memory.grow (i32.const 1)) (i32.const 0))))"


async def test_a_guest_that_fails_with_its_memory_full_names_the_limit(forkserver):
    trapped, _, _ = await run_command(forkserver, guests.command(f"{FILL} unreachable"), memory=16 * MEBIBYTE)
    assert (trapped.outcome, trapped.limit) == ("trap", "memory")
    failed, _, _ = await run_command(forkserver, guests.command(f"{FILL} (call $exit (i32.const 1))"))
    assert (failed.outcome, failed.code, failed.limit) == ("exit", 1, "memory")
    fine, _, _ = await run_command(forkserver, guests.command(FILL))
    assert fine == frames.Ended(outcome="ok", code=0)
    small, _, _ = await run_command(forkserver, guests.command("(call $exit (i32.const 1))"))
    assert small.limit is None


async def test_a_guest_that_starts_beyond_its_memory_names_the_limit(forkserver):
    ended, _, _ = await run_command(forkserver, guests.command("", memory="2000"))
    assert (ended.outcome, ended.limit) == ("trap", "memory")


async def test_an_endless_loop_ends_when_it_is_killed(forkserver):
    await compile_to(forkserver, guests.command("(loop (br 0))"), "code")
    for name in ("work", "tmp"):
        (forkserver.root / name).mkdir(mode=0o777)
        (forkserver.root / name).chmod(0o777)
    null = os.open(os.devnull, os.O_RDWR)
    child = await forkserver.fork(
        Profile(
            name="command",
            uid=forkserver.slot_uid(0),
            readable=("code",),
            writable=("work", "tmp"),
            threads=True,
        ),
        [null] * 3,
    )
    os.close(null)
    await child.send(
        frames.RunCommand(
            code="code",
            component=False,
            args=("x",),
            env=(),
            workspace="work",
            tmp="tmp",
            memory_bytes=MEBIBYTE,
        )
    )
    receiving = asyncio.ensure_future(child.receive())
    child.kill()
    child.kill()
    with pytest.raises(SlotDied, match="was killed by SIGKILL"):
        await receiving
    assert os.WTERMSIG(await child.wait()) == signal.SIGKILL
    await child.close()


@pytest.mark.parametrize(
    "without",
    [frozenset(), frozenset({"landlock"}), frozenset({"seccomp"}), LAYERS],
    ids=lambda one: "-".join(sorted(one)),
)
async def test_a_guest_reaches_nothing_outside_its_directories_at_any_level(start, without):
    forkserver = await start(without=without)
    outside = forkserver.root / "outside"
    outside.write_text("secret")
    outside.chmod(0o644)
    for path in (
        "/etc/passwd",
        "../outside",
        "/proc/self/environ",
        "..",
        "work/../../outside",
        "/../outside",
    ):
        ended, _, _ = await run_command(forkserver, guests.opens(path))
        assert ended.outcome == "exit", path
        ended, _, _ = await run_command(forkserver, guests.opens(path, through_link=True))
        (forkserver.root / "work" / "link").unlink(missing_ok=True)
        assert ended.outcome == "exit", f"a link to {path}"
    ended, _, _ = await run_command(forkserver, guests.opens("."))
    assert ended.outcome == "ok", "its own directory can be opened"


@pytest.mark.parametrize("fd", [3, 5, 6, 7, 100])
async def test_a_guest_has_no_descriptor_that_it_was_not_given(forkserver, fd):
    read = f"(call $exit (call $read (i32.const {fd}) (i32.const 0) (i32.const 1) (i32.const 16)))"
    ended, _, _ = await run_command(forkserver, guests.command(read))
    assert ended.outcome == "exit"


async def test_a_command_component_ends_with_0_or_1(forkserver):
    text = """(component
      (core module $m (func (export "run") (result i32) (i32.const {code})))
      (core instance $i (instantiate $m))
      (func $run (result (result)) (canon lift (core func $i "run")))
      (instance $cli (export "run" (func $run)))
      (export "wasi:cli/run@0.2.3" (instance $cli)))"""
    for code, outcome in ((0, "ok"), (1, "exit")):
        ended, _, _ = await run_command(forkserver, guests.wasm(text.format(code=code)))
        assert ended == frames.Ended(outcome=outcome, code=code)


# ---- what cannot run


RUN = """
  (core module $m (func (export "run")))
  (core instance $i (instantiate $m))
  (func $run (canon lift (core func $i "run")))
  (export "run" (func $run))
"""
PROGRAM = guests.wasm('(module (func (export "_start")))')

REFUSED = {
    "not WebAssembly": (b"#!/bin/sh\0\0\0\0", False, "not WebAssembly"),
    "text": (b"(module)", False, "WebAssembly in its text form"),
    "broken": (b"\0asm\1\0\0\0\1\xff", False, "ends too early"),
    "broken code": (PROGRAM[:-1] + b"\xff", False, "opcode"),
    "no _start": (guests.wasm("(module)"), False, "_start"),
    "an import": (
        guests.wasm('(module (import "env" "foo" (func)) (func (export "_start")))'),
        False,
        "env.foo",
    ),
    "a wrong import": (
        guests.wasm(
            '(module (import "wasi_snapshot_preview1" "fd_write" (func))'
            ' (memory (export "memory") 1) (func (export "_start")))'
        ),
        False,
        "fd_write",
    ),
    "no run": (guests.wasm("(component)"), True, "run"),
    "another version": (
        guests.wasm('(component (import "mvmci:workflow/host@0.2.0" (instance)))'),
        True,
        "0.2.0",
    ),
    "wasi in a workflow": (
        guests.wasm('(component (import "wasi:cli/stdout@0.2.0" (instance))' + RUN + ")"),
        True,
        "wasi:cli/stdout@0.2.0",
    ),
    "another type": (
        guests.wasm(
            '(component (import "mvmci:workflow/host@0.1.0" (instance (export "now" (func (result u32)))))'
            + RUN
            + ")"
        ),
        True,
        "`now` as ()->u32",
    ),
    "another function": (
        guests.wasm(
            '(component (import "mvmci:workflow/host@0.1.0" (instance (export "shell" (func))))' + RUN + ")"
        ),
        True,
        "shell",
    ),
    "a run of another type": (guests.wasm(f"(component {RUN})"), True, "`run` is ()->"),
    "no command": (guests.workflow(guests.ECHO), False, "it is a workflow"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_run_here_is_refused_with_one_sentence(forkserver, name):
    wasm, workflow, said = REFUSED[name]
    ended = await compile_to(forkserver, wasm, "code", workflow=workflow)
    assert ended.outcome == "invalid"
    assert said in ended.text
    assert "\n" not in ended.text


async def test_code_that_is_missing_or_damaged_ends_the_slot_and_not_the_job(forkserver):
    (forkserver.root / "flow").write_bytes(b"nonsense")
    child = await forkserver.fork(Profile(name="workflow", uid=forkserver.slot_uid(0), readable=("flow",)))
    await child.send(start_of())
    with pytest.raises(SlotDied, match="compiled code was missing or was refused"):
        await child.receive()
    await child.close()


# ---- workflows


async def test_a_workflow_answers_and_its_slot_is_used_again(forkserver):
    async with workflow_slot(forkserver, guests.workflow(guests.ECHO)) as child:
        for text in ("{}", '"ü"', "", "x" * 50_000):
            await child.send(start_of(text))
            assert await child.receive() == frames.Ended(outcome="ok", text=text)


async def test_an_err_is_the_reason_of_the_failure(forkserver):
    body = "(call $answer (i32.const 1) (local.get $ptr) (local.get $len))"
    async with workflow_slot(forkserver, guests.workflow(body)) as child:
        await child.send(start_of("because"))
        assert await child.receive() == frames.Ended(outcome="err", text="because")


async def asked(child) -> Effect:
    """The effect that a workflow asks for."""
    call = await child.receive()
    assert isinstance(call, frames.Call)
    return request_of(call.request)


async def test_an_effect_crosses_whole_and_its_answer_too(forkserver):
    async with workflow_slot(forkserver, guests.calls_host(guests.FETCH)) as child:
        await child.send(start_of("body"))
        assert await asked(child) == Http(
            method="POST",
            url="http://example.com/x",
            headers=(("POST", "hello"),),
            body="body",
            timeout_ms=1500,
            idempotent=True,
        )
        answer = HttpResponse(status=200, headers=(("a", "b"),), body="hällo")
        await child.send(frames.Answer(now_ms=2000, value=answer.fields()))
        assert await child.receive() == frames.Ended(outcome="ok", text="hällo")


@pytest.mark.parametrize(("why", "text"), [("denied", "not allowed"), ("lost", "gone"), ("failed", "no")])
async def test_an_effect_that_fails_says_why(forkserver, why, text):
    async with workflow_slot(forkserver, guests.calls_host(guests.FETCH)) as child:
        await child.send(start_of())
        await child.receive()
        await child.send(frames.Answer(now_ms=2000, value=effect.Error(why=why, text=text).fields()))
        assert await child.receive() == frames.Ended(outcome="err", text=text)


@pytest.mark.parametrize(
    ("why", "number"), [("interrupted", 0), ("timed-out", 1), ("denied", 2), ("failed", 4)]
)
async def test_every_kind_of_failure_is_told_apart(forkserver, why, number):
    kind = """(drop {fetch})
      (i32.store8 (i32.const 300) (i32.add (i32.const 48) (i32.load8_u (i32.const 260))))
      (call $answer (i32.const 0) (i32.const 300) (i32.const 1))"""
    async with workflow_slot(
        forkserver, guests.calls_host(kind.format(fetch=f"(block (result i32) {guests.FETCH})"))
    ) as child:
        await child.send(start_of())
        await child.receive()
        await child.send(frames.Answer(now_ms=1, value=effect.Error(why=why).fields()))
        assert await child.receive() == frames.Ended(outcome="ok", text=str(number))


EVERYTHING = """
  (call $log (i32.const 2) (local.get $ptr) (local.get $len))
  (call $respond (local.get $ptr) (local.get $len))
  (call $progress (i32.const 1) (i32.const 2) (local.get $ptr) (local.get $len))
  (call $sleep (i64.const 5000))
  (i32.store (i32.const 512) (i32.const 16)) (i32.store (i32.const 516) (i32.const 4))
  (i32.store (i32.const 520) (i32.const 64)) (i32.store (i32.const 524) (i32.const 5))
  (call $exec (i32.const 512) (i32.const 2) (i32.const 512) (i32.const 1) (local.get $ptr) (local.get $len)
    (i32.const 7) (i32.const 0) (i32.const 256))
  (call $answer (i32.const 0) (i32.load (i32.const 264)) (i32.load (i32.const 268)))"""


async def test_what_a_workflow_says_comes_in_order_and_only_effects_wait(forkserver):
    async with workflow_slot(forkserver, guests.calls_host(EVERYTHING)) as child:
        await child.send(start_of("hi"))
        assert [await child.receive() for _ in range(4)] == [
            frames.Log(level="warning", message="hi"),
            frames.Respond(value="hi"),
            frames.ReportProgress(done=1, total=2, message="hi"),
            frames.Call(request=Sleep(ms=5000).fields()),
        ]
        await child.send(frames.Answer(now_ms=6000, value=Slept().fields()))
        command = Exec(argv=("POST", "hello"), env=(("POST", "hello"),), stdin="hi", timeout_ms=7)
        assert await asked(child) == command
        await child.send(frames.Answer(now_ms=6000, value=Exit(code=3, stdout="out", stderr="err").fields()))
        assert await child.receive() == frames.Ended(outcome="ok", text="out")


async def test_time_and_chance_come_from_the_journal_alone(forkserver):
    body = """(call $sleep (i64.const 1)) (call $progress (i32.wrap_i64 (call $now))
      (i32.wrap_i64 (call $random)) (local.get $ptr) (local.get $len))
      (call $answer (i32.const 0) (local.get $ptr) (local.get $len))"""
    async with workflow_slot(forkserver, guests.calls_host(body)) as child:
        for _ in range(2):
            await child.send(start_of(seed=7))
            await child.receive()
            await child.send(frames.Answer(now_ms=123_456, value=Slept().fields()))
            said = await child.receive()
            assert said == frames.ReportProgress(
                done=123_456, total=Chance(7).next() & 0xFFFFFFFF, message="{}"
            )
            assert (await child.receive()).outcome == "ok"


async def test_what_is_too_large_for_a_frame_is_a_trap_with_a_sentence(forkserver):
    body = """(call $respond (i32.const 0) (i32.const 20000000))
      (call $answer (i32.const 0) (local.get $ptr) (local.get $len))"""
    async with workflow_slot(forkserver, guests.calls_host(body)) as child:
        await child.send(start_of())
        ended = await child.receive()
        assert (ended.outcome, ended.limit) == ("trap", None)
        assert "too large" in ended.text
        assert str(frames.FRAME_BYTES_MAX) in ended.text


@pytest.mark.parametrize(
    ("body", "limit"),
    [
        ("(loop (br 0)) unreachable", "fuel"),
        ("(call $run (local.get $ptr) (local.get $len))", "stack"),
        (f"{FILL} unreachable", "memory"),
        ("unreachable", None),
    ],
)
async def test_a_workflow_that_reaches_a_limit_names_it_and_its_slot_lives(forkserver, body, limit):
    async with workflow_slot(forkserver, guests.workflow(body)) as child:
        for _ in range(2):
            await child.send(start_of(memory=16 * MEBIBYTE))
            ended = await child.receive()
            assert (ended.outcome, ended.limit) == ("trap", limit)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_two_hundred_workflows_in_one_slot_take_no_more_memory_and_the_same_fuel(forkserver):
    # Touches 8 MiB, so that memory which stayed behind would show.
    body = f"""(drop (memory.grow (i32.const 128)))
      (memory.fill (i32.const 65536) (i32.const 1) (i32.const 8388608))
      {guests.ECHO}"""
    async with workflow_slot(forkserver, guests.workflow(body)) as child:

        async def outcome(fuel: int) -> str:
            await child.send(start_of(fuel=fuel))
            return (await child.receive()).outcome

        low, high = 0, 1 << 24  # what it takes lies in between
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if await outcome(middle) == "ok" else (middle, high)
        before = resident_bytes(child.pid)
        for _ in range(100):
            assert await outcome(high) == "ok"
            assert await outcome(low) == "trap"
        assert resident_bytes(child.pid) - before < 4 * MEBIBYTE


async def test_the_memory_of_a_whole_slot_is_bounded_whatever_the_guest_was_allowed(forkserver):
    body = f"""(local $pages i32) (local.set $pages (memory.grow (i32.const 4096)))
      (if (i32.lt_s (local.get $pages) (i32.const 0)) (then (return {guests.ECHO})))
      unreachable"""
    wasm = guests.workflow(body)
    async with workflow_slot(forkserver, wasm, data_bytes=128 * MEBIBYTE) as child:
        await child.send(start_of(memory=1 << 30))
        assert (await child.receive()).outcome == "ok", "256 MiB were refused"


# ---- hostile frames


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"\xff\xff\xff\xff", "over the limit"),
        (b"\x04\0\0\0oops", "not a frame"),
        (b'\x11\0\0\0{"frame":"other"}', "not a frame"),
        (b"\x02\0\0\0\xff\xfe", "not a frame"),
        (b"\x00\0\0\0", "not a frame"),
        (b"\x04\x00\x01\x00" + b"[" * 65540, "not a frame"),
        (b"\x10\0\0\0half", "without saying how"),
        (b"", "without saying how"),
    ],
)
async def test_a_slot_that_talks_nonsense_is_killed(start, root, sent, why):
    forkserver = await start(probe="tests.parts.sandbox.liar:run", without=frozenset({"landlock"}))
    (root / "lie").write_bytes(sent)
    if "not a frame" in why or "limit" in why:
        (root / "linger").touch()  # it must be killed, and does not end by itself
    child = await forkserver.fork(Profile(name="probe", uid=forkserver.slot_uid(0), readable=("lie",)))
    with pytest.raises(SlotDied, match=why):
        await child.receive()
    await child.wait()
    with pytest.raises(SlotDied, match=why):
        await child.receive()
    with pytest.raises(SlotDied):
        await child.send(frames.Answer(now_ms=0, value=Slept().fields()))
    await child.close()


async def test_a_slot_whose_parent_lets_go_in_a_call_ends_at_once(forkserver):
    async with workflow_slot(forkserver, guests.calls_host(guests.FETCH)) as child:
        await child.send(start_of())
        await child.receive()
        child.disconnect()
        assert await child.wait() == 0


async def test_a_receive_that_is_cancelled_loses_nothing(forkserver):
    async with workflow_slot(forkserver, guests.calls_host(guests.FETCH)) as child:
        waiting = asyncio.ensure_future(child.receive())
        await asyncio.sleep(0)
        waiting.cancel()
        await child.send(start_of())
        assert isinstance(await child.receive(), frames.Call)
