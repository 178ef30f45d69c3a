"""The effect `exec`: one native program, from its request to its answer.

A program is started by the supervisor (`program.py`) in a child of the fork server. This module finds the
executable, feeds and reads the streams, and keeps the limits on time and output. A program that is to stop
gets SIGTERM and `GRACE_S` to put down what it has in hand, and only then SIGKILL; what goes over a limit of
the job gets SIGKILL at once. When `run_program`
returns or raises, nothing that the program started is alive; only where the supervisor itself was killed
may that take a moment longer.

Output is text: bytes that are not UTF-8 become U+FFFD. The program is looked for on the engine's own
PATH, never on one that a workflow sets, so that an allowed name cannot be made to mean another file;
its `argv[0]` is the path that was found.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

from mvmci.engines.embedded import workspace
from mvmci.engines.embedded.command import FILE_SLACK_BYTES
from mvmci.engines.embedded.effects.context import Context, Effect
from mvmci.engines.embedded.limits import AT_ONCE, LimitReached, first
from mvmci.jobs import effect
from mvmci.sandbox import frames
from mvmci.sandbox.confinement import LEVELS, Profile
from mvmci.sandbox.forkserver import Child, ForkServer, NoSlot, SlotDied
from mvmci.sandbox.program import DEFAULT_PATH, supervise_program

__all__ = ["LimitReached", "run_program", "supervise_program"]

_PROCESSES_MAX = 256
OUTPUT_BYTES_MAX = 4 << 20  # both streams together: an answer stands in the journal and crosses a socket
ESCAPED_BYTES_MAX = 12 << 20  # the same, with control characters counted as JSON writes them
_READ_BYTES = 64 << 10
GRACE_S = 10.0  # as containers give it
KILL_S_MAX = 10.0
SIGNAL_CODE_BASE = 128  # a program that died of signal n has code 128 + n, as in a shell

# What loaders, shells and interpreters read before they do what their arguments say.
_OF_LOADERS = re.compile(
    r"LD_.*|DYLD_.*|GCONV_PATH|GLIBC_TUNABLES|ENV|BASH_ENV|BASH_FUNC_.*|SHELLOPTS|BASHOPTS|PS4|ZDOTDIR"
    r"|PYTHON.*|PERL5.*|PERLLIB|RUBYLIB|RUBYOPT|NODE_OPTIONS|NODE_PATH|LUA_(INIT|PATH|CPATH).*"
    r"|JAVA_TOOL_OPTIONS|_JAVA_OPTIONS|JDK_JAVA_OPTIONS"
)

OnOutput = Callable[[str, bytes], None]


class Exit(effect.Value, frozen=True, kw_only=True, tag="exit"):
    """How an `Exec` ended."""

    code: int
    stdout: str = ""
    stderr: str = ""


class Exec(Effect, frozen=True, kw_only=True, tag="exec"):
    """One native program: an argument list, run in the job's workspace."""

    argv: tuple[str, ...]
    env: effect.Pairs = ()
    stdin: str = ""
    timeout_ms: int = 0
    idempotent: bool = False

    def line(self) -> str:
        return f"exec {' '.join(self.argv)}"

    async def perform(self, context: Context) -> Exit | effect.Error:
        host, slot, limits = context.host, context.slot, context.spec.limits
        decision = host.allow().decide_program(self.argv[0] if self.argv else "")
        if not decision.allowed:
            return effect.Error(why="denied", text=decision.hint)
        programs = await host.programs()
        if not programs.parts_programs and host.min_isolation != LEVELS[0]:
            text = f"this host cannot keep programs from mvmci's keys, and {host.min_isolation} is demanded"
            return effect.Error(why="denied", text=text)
        await context.files.use()
        running = run_program(
            programs,
            self,
            directory=slot.work,
            uid=slot.uid,
            key=context.key,
            tmp=slot.tmp,
            output_bytes_max=limits.output_bytes,
            file_bytes=limits.workspace_bytes + FILE_SLACK_BYTES,
        )
        return await first(running, workspace.watch(slot.place, limits.workspace_bytes))


async def run_program(
    forkserver: ForkServer,
    request: Exec,
    *,
    directory: str,
    uid: int | None,
    key: str | None,
    tmp: str | None = None,
    output_bytes_max: int = OUTPUT_BYTES_MAX,
    file_bytes: int,
    processes_max: int = _PROCESSES_MAX,
    time_left_s: float | None = None,
    on_output: OnOutput | None = None,
) -> Exit | effect.Error:
    """Run `request` in `directory` (and `tmp`), both relative to the fork server's root, as user `uid`.

    `key` is the idempotency key of an idempotent request. The time is up after the request's own
    timeout or after `time_left_s`, what comes first. `on_output` hears the name of a stream and what
    came through it. Whether the program is allowed was decided before.

    Raises LimitReached for `output` and `processes`, ForkServerDied when nothing can be started any more.
    """
    try:
        task = _task(forkserver, request, directory, tmp, key, file_bytes, processes_max)
    except ValueError as wrong:
        return effect.Error(why="failed", text=str(wrong))
    timeouts = [request.timeout_ms / 1000] if request.timeout_ms else []
    timeouts += [] if time_left_s is None else [max(0.0, time_left_s)]
    streams = _Streams(request.stdin.encode(), min(output_bytes_max, OUTPUT_BYTES_MAX), on_output)
    profile = Profile(name="program", uid=uid)
    try:
        async with _started(forkserver, profile, streams) as child:
            ended = await _converse(child, task, streams, min(timeouts, default=None))
    except TimeoutError:
        return effect.Error(why="timed-out", text=f"{request.argv[0]} was stopped: its time was up")
    except NoSlot as why:
        return effect.Error(why="failed", text=f"{request.argv[0]}: {why.message}")
    except SlotDied as died:
        return effect.Error(why="lost", text=f"{request.argv[0]}: {died.message}")
    return _answer(request, ended, streams, processes_max)


def _task(
    forkserver: ForkServer,
    request: Exec,
    directory: str,
    tmp: str | None,
    key: str | None,
    file_bytes: int,
    processes_max: int,
) -> frames.RunProgram:
    """Raises ValueError for a request that cannot be run."""
    if not request.argv or not request.argv[0]:
        raise ValueError("an exec without a program: argv is empty")
    search = os.environ.get("PATH", DEFAULT_PATH)
    program = shutil.which(request.argv[0], path=search) if "\0" not in request.argv[0] else None
    if program is None:
        raise ValueError(f"{request.argv[0]!r} is not an executable on the PATH of the engine")
    for name, value in request.env:
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(f"the environment variable {name!r} cannot be set")
        if _OF_LOADERS.fullmatch(name):
            raise ValueError(
                f"the environment variable {name!r} cannot be set: it makes any program run other code"
            )
    if any("\0" in argument for argument in request.argv):
        raise ValueError("an argument with a NUL in it cannot be passed")
    env = {"PATH": search}
    if tmp is not None:
        env["TMPDIR"] = str(forkserver.root / tmp)
    env |= dict(request.env)
    if key is not None:
        env["MVMCI_IDEMPOTENCY_KEY"] = key
    return frames.RunProgram(
        argv=(os.path.abspath(program), *request.argv[1:]),
        env=tuple(env.items()),
        directory=directory,
        processes_max=processes_max,
        file_bytes=file_bytes,
        hidden=str(forkserver.root.parent) if forkserver.parts_programs else "",
    )


async def _converse(
    child: Child, task: frames.RunProgram, streams: _Streams, within_s: float | None
) -> frames.Ended:
    """The end of the program. Raises LimitReached for too much output, SlotDied, TimeoutError."""
    answer = asyncio.ensure_future(_answered(child, task, streams))
    waiting: set[asyncio.Future[Any]] = {answer, streams.full}
    try:
        await asyncio.wait(waiting, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done() and not streams.full.done():
            await _stop(child, waiting)
            raise TimeoutError
        if not streams.full.done():
            return answer.result()
    except asyncio.CancelledError as told:
        if AT_ONCE not in told.args:
            await _stop(child, waiting)
        raise
    finally:
        answer.cancel()
        with contextlib.suppress(asyncio.CancelledError, SlotDied):
            await answer
    raise LimitReached("output", streams.limit)


async def _answered(child: Child, task: frames.RunProgram, streams: _Streams) -> frames.Ended:
    await child.send(task)
    streams.start()
    ended = await child.receive()
    assert isinstance(ended, frames.Ended)
    streams.drain()
    return ended


async def _stop(child: Child, ends: set[asyncio.Future[Any]]) -> None:
    """Let it end by itself, for a while. Who is told a second time waits no longer."""
    child.kill(signal.SIGTERM)
    await asyncio.wait(ends, timeout=GRACE_S, return_when=asyncio.FIRST_COMPLETED)


@contextlib.asynccontextmanager
async def _started(forkserver: ForkServer, profile: Profile, streams: _Streams) -> AsyncIterator[Child]:
    """A child that has `streams`; at the end it is gone, and so is everything beneath it.

    The supervisor kills when its output is closed, and ends when all are dead. Raises NoSlot.
    """
    try:
        child = await forkserver.fork(profile, streams.theirs)
    except BaseException:
        streams.close()
        raise
    finally:
        streams.close_theirs()
    try:
        yield child
    finally:
        streams.close()
        try:
            async with asyncio.timeout(KILL_S_MAX):
                await child.wait()
        except TimeoutError:
            pass
        finally:
            child.kill()
        await child.close()


def _answer(request: Exec, ended: frames.Ended, streams: _Streams, processes_max: int) -> Exit | effect.Error:
    if streams.full.done():
        raise LimitReached("output", streams.limit)
    match ended.outcome:
        case "limit":
            raise LimitReached(
                "processes", f"{request.argv[0]} had more than {processes_max} processes at a time"
            )
        case "invalid":
            return effect.Error(why="failed", text=ended.text)
        case _:
            base = SIGNAL_CODE_BASE if ended.outcome == "signal" else 0
            stdout, stderr = (streams.text(name) for name in ("stdout", "stderr"))
            return Exit(code=base + (ended.code or 0), stdout=stdout, stderr=stderr)


class _Streams:
    """The three pipes of one program: what is fed to it, and what it says, counted."""

    def __init__(self, stdin: bytes, bytes_max: int, on_output: OnOutput | None) -> None:
        self._loop = asyncio.get_running_loop()
        self.full: asyncio.Future[None] = self._loop.create_future()  # it said more than it may
        self._stdin = memoryview(stdin)
        self._bytes_max = bytes_max
        self._on_output = on_output
        self._said = {"stdout": bytearray(), "stderr": bytearray()}
        self._bytes = self._escaped = 0
        feed, self._writer = os.pipe()
        stdout, out = os.pipe()
        stderr, err = os.pipe()
        self.theirs = (feed, out, err)
        self._readers = {"stdout": stdout, "stderr": stderr}
        for fd in (self._writer, stdout, stderr):
            os.set_blocking(fd, False)

    @property
    def limit(self) -> str:
        """What the limit on output is, as a sentence."""
        return f"a program printed more than {self._bytes_max} bytes"

    def text(self, stream: str) -> str:
        """All that came through `stream`."""
        return self._said[stream].decode(errors="replace")

    def start(self) -> None:
        """Feed and read from now on, as the loop finds the time."""
        for stream, fd in self._readers.items():
            self._loop.add_reader(fd, self._read, stream)
        self._loop.add_writer(self._writer, self._write)

    def drain(self) -> None:
        """Read what is still in the pipes; whoever wrote it is dead."""
        for stream in tuple(self._readers):
            while stream in self._readers and self._read(stream):
                pass

    def close_theirs(self) -> None:
        """Close the ends that the child has."""
        for fd in self.theirs:
            os.close(fd)

    def close(self) -> None:
        """Close our ends."""
        for stream in tuple(self._readers):
            self._close_reader(stream)
        self._close_writer()

    def _read(self, stream: str) -> bool:
        """Read once; whether there was something."""
        try:
            data = os.read(self._readers[stream], _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._close_reader(stream)
            return False
        self._bytes += len(data)
        self._escaped += len(data) + 5 * sum(byte < 0x20 for byte in data)
        if self._bytes > self._bytes_max or self._escaped > ESCAPED_BYTES_MAX:
            if not self.full.done():
                self.full.set_result(None)
            self._close_reader(stream)
            return False
        self._said[stream] += data
        if self._on_output is not None:
            self._on_output(stream, data)
        return True

    def _write(self) -> None:
        try:
            while self._stdin:
                self._stdin = self._stdin[os.write(self._writer, self._stdin[:_READ_BYTES]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            pass  # it does not read its input, which is its own affair
        self._close_writer()

    def _close_reader(self, stream: str) -> None:
        fd = self._readers.pop(stream, None)
        if fd is not None:
            self._loop.remove_reader(fd)
            os.close(fd)

    def _close_writer(self) -> None:
        if self._writer >= 0:
            self._loop.remove_writer(self._writer)
            os.close(self._writer)
            self._writer = -1
