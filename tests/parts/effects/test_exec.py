"""The effect `exec`, through a real fork server: streams, limits, time, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mvmci.engines.embedded.effects.exec import (
    ESCAPED_BYTES_MAX,
    OUTPUT_BYTES_MAX,
    Exec,
    Exit,
    LimitReached,
    run_program,
)
from mvmci.engines.embedded.limits import first
from mvmci.jobs import effect
from mvmci.sandbox import frames
from mvmci.sandbox.forkserver import ForkServer
from mvmci.sandbox.frames import FRAME_BYTES_MAX
from tests.parts.effects.processes import UID, alive


class Runner:
    """Runs programs in `<root>/work`."""

    def __init__(self, forkserver: ForkServer, uid: int | None) -> None:
        self.forkserver = forkserver
        self.uid = uid

    async def __call__(
        self, *argv: str, key: str | None = None, how: dict[str, Any] | None = None, **request: Any
    ) -> Exit | effect.Error:
        limits: dict[str, Any] = {"file_bytes": 1 << 20, "processes_max": 16, **(how or {})}
        return await run_program(
            self.forkserver,
            Exec(argv=argv, **request),
            directory="work",
            tmp="tmp",
            uid=self.uid,
            key=key,
            **limits,
        )


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Runner]:
    uid = UID if os.geteuid() == 0 else None
    for name in ("work", "tmp"):
        (tmp_path / name).mkdir(mode=0o700)
        if uid:
            os.chown(tmp_path / name, uid, uid)
    forkserver = await ForkServer.start(tmp_path, network=True)
    yield Runner(forkserver, uid)
    await forkserver.close()


@contextmanager
def ends_at(limit: str) -> Iterator[None]:
    """What runs inside is ended at `limit`."""
    with pytest.raises(LimitReached) as caught:
        yield
    assert caught.value.reason.startswith(f"{limit}: ")


@pytest.fixture
def marker() -> str:
    return f"marker-{uuid.uuid4()}"


async def test_a_program_answers_with_its_code_and_both_streams(run: Runner) -> None:
    script = 'cat; echo "$A:$MVMCI_IDEMPOTENCY_KEY:$1" >&2; touch "$TMPDIR/x" "$HOME/y"; exit 3'
    answer = await run("sh", "-c", script, "sh", "b c", stdin="héllo", env=(("A", "a"),), key="k")
    assert answer == Exit(code=3, stdout="héllo", stderr="a:k:b c\n")
    assert (run.forkserver.root / "tmp/x").exists()
    assert (run.forkserver.root / "work/y").exists()


async def test_a_program_that_dies_of_a_signal_has_the_code_of_a_shell(run: Runner) -> None:
    assert await run("sh", "-c", "kill -TERM $$") == Exit(code=143)


async def test_output_that_is_not_utf8_is_replaced(run: Runner) -> None:
    assert await run("printf", r"a\377b") == Exit(code=0, stdout="a�b")


async def test_the_largest_answer_of_a_program_fits_into_a_frame_with_room_to_spare(run: Runner) -> None:
    # A control character is 6 bytes of JSON, and a byte that is not UTF-8 becomes 3.
    controls = (ESCAPED_BYTES_MAX - OUTPUT_BYTES_MAX) // 5
    script = f"""head -c {controls} /dev/zero | tr '\\0' '\\1'
        head -c {OUTPUT_BYTES_MAX - controls} /dev/zero | tr '\\0' '\\377' >&2"""
    answer = await run("sh", "-c", script)
    assert isinstance(answer, Exit)
    assert (len(answer.stdout), len(answer.stderr)) == (controls, OUTPUT_BYTES_MAX - controls)
    frame = frames.encode(frames.Answer(now_ms=1, value=answer))
    assert 16 << 20 < len(frame) < FRAME_BYTES_MAX * 3 // 4


async def test_a_program_that_reads_no_input_is_not_waited_for(run: Runner) -> None:
    assert await run("true", stdin="x" * (1 << 20)) == Exit(code=0)


async def test_much_input_and_output_at_once_arrive_whole(run: Runner) -> None:
    text = "0123456789abcde\n" * (1 << 16)
    heard: list[int] = []
    answer = await run("cat", stdin=text, how={"on_output": lambda stream, data: heard.append(len(data))})
    assert answer == Exit(code=0, stdout=text)
    assert sum(heard) == len(text)


@pytest.mark.parametrize(
    ("argv", "request_"),
    [
        ((), {}),
        (("no-such-program-here",), {}),
        (("/etc/passwd",), {}),
        (("sh\0",), {}),
        (("true", "a\0b"), {}),
        (("true",), {"env": (("A=B", "c"),)}),
        (("true",), {"env": (("", "c"),)}),
        (("true",), {"env": (("A", "b\0"),)}),
        (("true", "x" * (1 << 18)), {}),
    ],
)
async def test_what_cannot_be_started_did_not_happen(
    run: Runner, argv: tuple[str, ...], request_: dict[str, Any]
) -> None:
    answer = await run(*argv, **request_)
    assert isinstance(answer, effect.Error)
    assert answer.why == "failed"
    assert answer.text


async def test_a_path_that_a_workflow_sets_does_not_change_which_program_runs(run: Runner) -> None:
    planted = run.forkserver.root / "work/true"
    planted.write_text("#!/bin/sh\necho planted\n")
    planted.chmod(0o755)
    assert await run("true", env=(("PATH", str(planted.parent)),)) == Exit(code=0)


async def test_a_program_that_ignores_signals_is_dead_when_its_time_is_up(
    run: Runner, marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvmci.engines.embedded.effects.exec.GRACE_S", 0.3)
    script = f"trap '' TERM INT HUP PIPE; setsid sleep 1000 & while :; do sleep 1; done; : {marker}"
    answer = await run("sh", "-c", script, timeout_ms=300)
    assert isinstance(answer, effect.Error)
    assert answer.why == "timed-out"
    assert alive(marker) == []


async def test_the_time_that_a_job_has_left_counts_too(run: Runner) -> None:
    answer = await run("sleep", "1000", timeout_ms=600_000, how={"time_left_s": 0.1})
    assert isinstance(answer, effect.Error)
    assert answer.why == "timed-out"


async def test_a_cancelled_effect_leaves_nothing_behind(run: Runner, marker: str) -> None:
    started = asyncio.Event()
    script = f"setsid sh -c 'sleep 1000; : {marker}' & echo up; wait; : {marker}"
    task = asyncio.create_task(run("sh", "-c", script, how={"on_output": lambda stream, data: started.set()}))
    await started.wait()
    assert alive(marker)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert alive(marker) == []


@pytest.mark.parametrize("why", ["its time is up", "it is cancelled"])
async def test_a_program_that_is_stopped_may_put_down_what_it_has_in_hand(
    run: Runner, marker: str, why: str
) -> None:
    started = asyncio.Event()
    script = f"trap 'rm lock; exit 0' TERM; touch lock; echo up; while :; do sleep 0.1; done; : {marker}"
    timeout_ms = 2_000 if why == "its time is up" else 0
    how = {"on_output": lambda stream, data: started.set()}
    task = asyncio.create_task(run("sh", "-c", script, timeout_ms=timeout_ms, how=how))
    if timeout_ms:
        assert isinstance(await task, effect.Error)
    else:
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not (run.forkserver.root / "work/lock").exists()
    assert alive(marker) == []


async def test_a_program_over_a_limit_of_its_job_is_killed_at_once(run: Runner, marker: str) -> None:
    started = asyncio.Event()
    script = f"trap 'touch late' TERM; echo up; while :; do sleep 0.1; done; : {marker}"

    async def limit() -> None:
        await started.wait()
        raise LimitReached("workspace", "too much")

    with ends_at("workspace"):
        await first(run("sh", "-c", script, how={"on_output": lambda stream, data: started.set()}), limit())
    assert not (run.forkserver.root / "work/late").exists()
    assert alive(marker) == []


@pytest.mark.parametrize("program", ["yes", "tr '\\0' '\\1' </dev/zero"])
async def test_endless_output_ends_at_its_limit(run: Runner, marker: str, program: str) -> None:
    with ends_at("output"):
        await run("sh", "-c", f"{program}; : {marker}")
    assert alive(marker) == []


async def test_output_just_before_the_end_counts_too(run: Runner) -> None:
    with ends_at("output"):
        await run("sh", "-c", "head -c 4096 /dev/zero | tr '\\0' x", how={"output_bytes_max": 4095})
    answer = await run("sh", "-c", "head -c 4096 /dev/zero | tr '\\0' x", how={"output_bytes_max": 4096})
    assert answer == Exit(code=0, stdout="x" * 4096)


async def test_a_fork_bomb_ends_its_own_effect_and_no_other(run: Runner, marker: str) -> None:
    other = asyncio.create_task(run("sh", "-c", "read line; echo $line", stdin="fine\n"))
    with ends_at("processes"):
        await run("sh", "-c", f"while :; do sleep 1000 & done; : {marker}")
    assert alive(marker) == []
    assert await other == Exit(code=0, stdout="fine\n")


async def test_a_supervisor_that_is_killed_means_that_it_may_have_happened(run: Runner, marker: str) -> None:
    started = asyncio.Event()
    how = {"on_output": lambda stream, data: started.set()}
    task = asyncio.create_task(run("sh", "-c", f"echo up; sleep 1000; : {marker}", how=how))
    await started.wait()
    for child in run.forkserver._children.values():
        child.kill()
    answer = await task
    assert isinstance(answer, effect.Error)
    assert answer.why == "lost"


@pytest.mark.parametrize(
    "name", ["LD_PRELOAD", "LD_AUDIT", "BASH_ENV", "ENV", "PYTHONPATH", "PERL5OPT", "NODE_OPTIONS"]
)
async def test_what_makes_any_program_run_other_code_is_not_set_by_a_workflow(run: Runner, name: str) -> None:
    answer = await run("sh", "-c", "echo ran", env=((name, "x"),))
    assert isinstance(answer, effect.Error)
    assert (answer.why, name in answer.text) == ("failed", True)
    assert isinstance(await run("sh", "-c", "true", env=((f"MY_{name}", "x"),)), Exit)
