"""Runs a command in a slot of its own: workspace in, streams live, exit code and artifacts out.

A command starts over after a crash, in a fresh workspace. Its process runs one guest and ends with
it, so nothing that a guest may have done to its process outlives the job.
"""

from __future__ import annotations

import asyncio
import io
import os
from typing import Protocol

import msgspec

from mvmci.config.quantity import format_size
from mvmci.engines.embedded import workspace
from mvmci.engines.embedded.host import Host
from mvmci.engines.embedded.limits import Output, first
from mvmci.engines.embedded.slots import Slot
from mvmci.errors import JobUnfit
from mvmci.jobs import tree
from mvmci.jobs.job import Artifact, Limits
from mvmci.jobs.journal import Done, Spec
from mvmci.journals.holder import Holder
from mvmci.sandbox import frames
from mvmci.sandbox.confinement import Profile
from mvmci.sandbox.forkserver import Child, SlotDied
from mvmci.store import keep_text
from mvmci.system.tasks import readable

PROCESS_BYTES = 512 << 20  # what a slot's process may use beyond its guest's memory
FILE_SLACK_BYTES = 1 << 30
_READ_BYTES = 64 << 10
_REASON_CHARS_MAX = 4_096


async def run_command(host: Host, holder: Holder, slot: Slot, code: str) -> Done:
    """The end of the command that `holder` holds, in a slot whose workspace is laid out.

    Raises LimitReached, SlotDied, BadWorkspace, JobUnfit.
    """
    spec = holder.spec
    output = Output(
        holder, attempt=holder.lease.epoch, bytes_max=spec.limits.output_bytes, now_ms=host.now_ms
    )
    watch = workspace.watch(slot.place, spec.limits.workspace_bytes)
    ended = await first(run_guest(host, slot, spec, code, output), watch)
    done = done_of(ended, spec.limits, at=host.now_ms())
    if not spec.artifacts:
        return done
    found = await workspace.collect(slot.directory, spec.artifacts, host.store.blobs)
    return await with_artifacts(host, done, found)


async def with_artifacts(host: Host, done: Done, found: tuple[Artifact, ...]) -> Done:
    """`done`, naming what the job left."""
    listed = await keep_text(host.store.blobs, msgspec.json.encode(found).decode())
    return msgspec.structs.replace(done, artifacts=listed)


async def fill(host: Host, slot: Slot, digest: str | None) -> workspace.Snapshot:
    """Lay the workspace tree `digest` out in the slot's empty directory. Raises NotFound, BadWorkspace."""
    slot.used = True
    value = tree.Tree()
    if digest is not None:
        value = tree.decode_tree(await host.store.blobs.get(digest))
    return await workspace.materialise(value, slot.directory, host.store.blobs, owner=slot.uid)


class Sink(Protocol):
    """What takes a guest's output."""

    async def write(self, stream: str, data: bytes) -> None: ...


async def run_guest(host: Host, slot: Slot, spec: Spec, code: str, output: Sink) -> frames.Ended:
    """Run the guest to its end, its streams passed on; nothing of it is left, however this ends."""
    guests = await host.guests()
    profile = Profile(
        name="command",
        uid=slot.uid,
        readable=("code",),
        writable=(slot.work, slot.tmp),
        threads=True,
        data_bytes=spec.limits.memory_bytes + PROCESS_BYTES,
        # Beyond the limit of the whole workspace, which ends the job; this one only stops a file.
        file_bytes=spec.limits.workspace_bytes + FILE_SLACK_BYTES,
    )
    task = frames.RunCommand(
        code=code,
        component=spec.component,
        args=(spec.name, *spec.args),
        env=spec.env,
        workspace=slot.work,
        tmp="" if os.path.lexists(slot.directory / "tmp") else slot.tmp,  # its own, if the workspace has one
        memory_bytes=spec.limits.memory_bytes,
    )
    stdin = await _open_stdin(host, slot, spec)
    stdout, out = _pipe()
    stderr, err = _pipe()
    with stdout, stderr:
        try:
            child = await guests.fork(profile, (stdin, out, err))
        finally:
            for fd in (stdin, out, err):
                os.close(fd)
        pumps = [
            asyncio.create_task(_pump(stdout, "stdout", output)),
            asyncio.create_task(_pump(stderr, "stderr", output)),
        ]
        try:
            return await first(_converse(child, task, pumps), *pumps)
        finally:
            await child.close()


def _pipe() -> tuple[io.FileIO, int]:
    """The end of a pipe to read from, and the other."""
    read, write = os.pipe()
    return io.FileIO(read, "rb"), write


async def _converse(child: Child, task: frames.RunCommand, pumps: list[asyncio.Task[None]]) -> frames.Ended:
    """Give the task, await its end, and then the rest of its output."""
    await child.send(task)
    try:
        ended = await child.receive()
    except SlotDied:
        await asyncio.wait(pumps)
        raise
    # Only here, where it has said its last word: a guest that is to be stopped ends when it is killed.
    await child.wait()
    await asyncio.wait(pumps)
    if not isinstance(ended, frames.Ended):
        raise SlotDied("the slot sent what no command can send")
    return ended


async def _open_stdin(host: Host, slot: Slot, spec: Spec) -> int:
    if spec.stdin is None:
        return os.open(os.devnull, os.O_RDONLY)
    path = host.root / "slots" / str(slot.number) / "stdin"
    path.unlink(missing_ok=True)
    await host.store.blobs.fetch(spec.stdin, path)
    fd = os.open(path, os.O_RDONLY)
    path.unlink()
    return fd


async def _pump(pipe: io.FileIO, stream: str, output: Sink) -> None:
    """Pass on what comes through `pipe` until its end.

    Not by `connect_read_pipe`: uvloop closes the descriptor twice, and by the second time its number may
    be another thread's file.
    """
    while True:
        await readable(pipe.fileno())
        data = pipe.read(_READ_BYTES)
        if not data:
            return
        await output.write(stream, data)


def done_of(ended: frames.Ended, limits: Limits, *, at: int) -> Done:
    """The end of a job by the end of its guest. Raises JobUnfit."""
    match ended.outcome:
        case "ok":
            return Done(at=at, status="succeeded", exit_code=ended.code)
        case "exit":
            reason = f"exit: {ended.code}"
        case "err":
            reason = ended.text[:_REASON_CHARS_MAX]
        case "host":
            raise JobUnfit(ended.text)
        case "invalid":
            reason = f"module: {ended.text}"
        case _:
            reason = f"trap: {ended.text}"
    if ended.limit is not None:
        said = f": {ended.text[:_REASON_CHARS_MAX]}" if ended.outcome == "err" else ""
        reason = f"{ended.limit}: {_limit_text(ended.limit, limits)}{said}"
    return Done(at=at, status="failed", reason=reason, exit_code=ended.code)


def _limit_text(limit: str, limits: Limits) -> str:
    match limit:
        case "memory":
            return f"more than {format_size(limits.memory_bytes)}"
        case "fuel":
            return f"more than {limits.fuel} units"
        case "stack":
            return "the guest's stack overflowed"
        case _:
            return "reached"
