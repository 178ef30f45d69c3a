"""Runs a workflow in a slot: its effects are answered from the journal, or performed and journaled.

    recorded            the journal's answer, at the journal's time
    begun, idempotent   done again, under the same key
    begun, at most once `interrupted`; the matcher says so
    new                 intent on disk, effect, result

The workspace is laid out when the first program is about to run, as the last recorded one left it.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import msgspec

from mvmci.engines.embedded import workspace
from mvmci.engines.embedded.command import FILE_SLACK_BYTES, PROCESS_BYTES, done_of, fill, with_artifacts
from mvmci.engines.embedded.exec import run_program
from mvmci.engines.embedded.host import Host
from mvmci.engines.embedded.limits import LimitReached, Output, first
from mvmci.engines.embedded.slots import RUNS_MAX, Slot
from mvmci.errors import BadWorkspace, Nondeterminism
from mvmci.jobs import effect, tree
from mvmci.jobs.glob import Pattern
from mvmci.jobs.job import INLINE_BYTES_MAX, Artifact
from mvmci.jobs.journal import Done, Intent, Journal, Progress, Response, Result, Spec
from mvmci.jobs.replay import Recorded, Replay, show
from mvmci.journals.holder import Holder
from mvmci.sandbox import frames
from mvmci.sandbox.confinement import Profile
from mvmci.sandbox.forkserver import Child
from mvmci.store import Blobs, keep_text, load_text

SLEEP_IN_SLOT_MS = 10_000  # a longer sleep frees the slot
PROGRESS_WAIT_S = 1.0
PROGRESS_CHARS_MAX = 1_000
PROCESSES_MAX = 256  # of one native program and all that it starts

_encode = msgspec.json.Encoder().encode
_answers: msgspec.json.Decoder[effect.Answer] = msgspec.json.Decoder(effect.Answer)


class Suspended(Exception):
    """The workflow let go: it sleeps until `until` (ms since 1970), or drains (0)."""

    def __init__(self, until: int) -> None:
        super().__init__()
        self.until = until


class Conversation(Protocol):
    """The other side of a running workflow."""

    replay: Replay

    async def hear(self, frame: frames.ToParent) -> frames.Answer | None:
        """Take what the guest said; an answer if it waits for one."""


async def run_workflow(
    host: Host, slot: Slot, spec: Spec, started_at: int, code: str, other: Conversation
) -> Done:
    """Run a workflow from its beginning, at the time of its first lease, to its end.

    The slot's warm process is kept for the next job only if this one ended by itself.
    """
    child = await _warm(host, slot, spec.limits.memory_bytes)
    try:
        await child.send(
            frames.RunWorkflow(
                code=code,
                input=await load_text(host.store.blobs, spec.input),
                memory_bytes=spec.limits.memory_bytes,
                fuel=spec.limits.fuel,
                seed=spec.seed,
                now_ms=started_at,
            )
        )
        while not isinstance(frame := await child.receive(), frames.Ended):
            answer = await other.hear(frame)
            if answer is not None:
                await child.send(answer)
        other.replay.finish()
    except BaseException:
        await slot.discard()
        raise
    done = done_of(frame, spec.limits, at=host.now_ms())
    if frame.outcome != "ok":
        return done
    if not _is_json(frame.text):
        return msgspec.structs.replace(done, status="failed", reason="result: not JSON")
    return msgspec.structs.replace(done, result=await keep_text(host.store.blobs, frame.text))


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


async def _warm(host: Host, slot: Slot, memory_bytes: int) -> Child:
    if slot.warm is not None and (
        not slot.warm.alive
        or slot.runs >= (RUNS_MAX if host.reuse else 1)
        or slot.memory_bytes < memory_bytes
    ):
        await slot.discard()
    if slot.warm is None:
        guests = await host.guests()
        profile = Profile(
            name="workflow", uid=slot.uid, readable=("code",), data_bytes=memory_bytes + PROCESS_BYTES
        )
        slot.warm, slot.memory_bytes = await guests.fork(profile), memory_bytes
    slot.runs += 1
    return slot.warm


class LiveEffects:
    """Performs what a workflow asks for, and journals it; `published` pieces of its output are out."""

    def __init__(self, host: Host, holder: Holder, slot: Slot, *, published: int) -> None:
        # An open intent is interrupted by a newer lease: without ours, it would be done again.
        assert holder.leased or holder.journal.state.lease is None
        self.replay = Replay(holder.journal.records)
        self._host = host
        self._holder = holder
        self._slot = slot
        self._spec = holder.spec
        self._responded = holder.journal.state.response is not None
        self._tree = self._spec.tree
        self._files: workspace.Snapshot | None = None  # as they lie in the slot, once they do
        self._output = Output(
            holder,
            attempt=0,
            bytes_max=self._spec.limits.output_bytes,
            now_ms=host.now_ms,
            published=published,
        )

    async def hear(self, frame: frames.ToParent) -> frames.Answer | None:
        match frame:
            case frames.Log():
                await self._output.write("stderr", frame.message.encode() + b"\n")
            case frames.Respond():
                await self._respond(frame.value)
            case frames.Progress() if self.replay.live:
                message = frame.message[:PROGRESS_CHARS_MAX]
                at = self._host.now_ms()
                progress = Progress(at=at, done=frame.done, total=frame.total, message=message)
                await self._holder.add(progress, within_s=PROGRESS_WAIT_S)
            case frames.Call():
                return await self._effect(frame.request)
        return None

    async def _respond(self, value: str) -> None:
        if self._responded:
            return
        if not _is_json(value):
            raise LimitReached("response", "not JSON")
        self._responded = True
        payload = await keep_text(self._host.store.blobs, value)
        await self._holder.add(Response(at=self._host.now_ms(), value=payload))

    async def _effect(self, request: effect.Request) -> frames.Answer:
        found = self.replay.ask(request)
        if isinstance(found, Recorded):
            self._tree = found.tree or self._tree
            return await recorded_answer(self._host.store.blobs, found)
        if self._host.draining.is_set():
            raise Suspended(0)
        intent = found.intent or self._intent(found.index, request)
        if isinstance(request, effect.Sleep):
            if found.intent is None:
                await self._holder.add(intent)
            value: effect.Answer = await self._sleep(intent.at + request.ms)
        else:
            await self._holder.write(*([intent] if found.intent is None else []))
            await self._holder.check_still_holder()
            value = await self._perform(request, intent)
        return await self._record(found.index, request, value)

    def _intent(self, index: int, request: effect.Request) -> Intent:
        shown = effect.redacted(request)
        return Intent(
            at=self._host.now_ms(),
            index=index,
            kind=effect.kind(request),
            digest=effect.digest(request),
            idempotent=request.idempotent,
            request=shown if len(_encode(shown)) <= INLINE_BYTES_MAX else None,
        )

    async def _record(self, index: int, request: effect.Request, value: effect.Answer) -> frames.Answer:
        blobs = self._host.store.blobs
        data = _encode(value)
        large = len(data) > INLINE_BYTES_MAX
        ran = isinstance(request, effect.Exec) and self._files is not None
        result = Result(
            at=self._host.now_ms(),
            index=index,
            value=None if large else value,
            blob=await blobs.put(data) if large else None,
            tree=await self._keep_files() if ran else None,
        )
        await self._holder.add(result)
        return frames.Answer(now_ms=result.at, value=value)

    async def _sleep(self, until: int) -> effect.Slept:
        left_ms = until - self._host.now_ms()
        if left_ms > SLEEP_IN_SLOT_MS:
            raise Suspended(until)
        try:
            async with asyncio.timeout(max(left_ms, 0) / 1000):
                await self._host.draining.wait()
        except TimeoutError:
            return effect.Slept()
        raise Suspended(0)

    async def _perform(self, request: effect.Http | effect.Exec, intent: Intent) -> effect.Answer:
        key = effect.idempotency_key(self._spec.id, intent.index) if intent.idempotent else None
        if isinstance(request, effect.Http):
            return await (await self._host.http()).perform(request, key)
        decision = self._host.allow().decide_program(request.argv[0] if request.argv else "")
        if not decision.allowed:
            return effect.Error(why="denied", text=decision.hint)
        return await self._run_program(request, key)

    async def _run_program(self, request: effect.Exec, key: str | None) -> effect.Exit | effect.Error:
        limits, slot = self._spec.limits, self._slot
        if self._files is None:
            self._files = await fill(self._host, slot, self._tree)
        running = run_program(
            await self._host.programs(),
            request,
            directory=slot.work,
            uid=slot.uid,
            key=key,
            tmp=slot.tmp,
            output_bytes_max=limits.output_bytes,
            file_bytes=limits.workspace_bytes + FILE_SLACK_BYTES,
        )
        return await first(running, workspace.watch(slot.place, limits.workspace_bytes))

    async def _scan(self) -> workspace.Snapshot:
        return await workspace.scan(
            self._slot.directory, self._host.store.blobs, previous=self._files, strict=False
        )

    async def _keep_files(self) -> str:
        """Keep the workspace as a program left it, and return the digest of its tree."""
        self._files = await self._scan()
        self._tree = await self._host.store.blobs.put(tree.encode_tree(self._files.tree))
        return self._tree

    async def collect(self, done: Done) -> Done:
        """`done`, naming the artifacts in the workspace as the last recorded program left it."""
        if not self._spec.artifacts or self._tree is None:
            return done
        entries = tree.decode_tree(await self._host.store.blobs.get(self._tree)).entries
        wanted = [Pattern(pattern) for pattern in self._spec.artifacts]
        found = tuple(
            Artifact(path=entry.path, digest=entry.digest, size=entry.size)
            for entry in entries
            if entry.kind == "file" and any(pattern.matches(entry.path) for pattern in wanted)
        )
        if len(found) > workspace.ARTIFACTS_MAX:
            raise BadWorkspace(f"more than {workspace.ARTIFACTS_MAX} files match the artifact patterns")
        return await with_artifacts(self._host, done, found)


class Verification:
    """Answers a workflow from its journal alone, and performs nothing.

    `partial` is for a job that was stopped from outside: there its records may run out.
    """

    def __init__(self, host: Host, journal: Journal, *, partial: bool) -> None:
        self.replay = Replay(journal.records)
        self._host = host
        self._partial = partial

    async def hear(self, frame: frames.ToParent) -> frames.Answer | None:
        if not isinstance(frame, frames.Call):
            return None
        found = self.replay.ask(frame.request)
        if isinstance(found, Recorded):
            return await recorded_answer(self._host.store.blobs, found)
        if self._partial:
            raise HistoryEnded
        raise Nondeterminism(
            f"nondeterminism: effect {found.index}: expected the end, got {show(frame.request)}"
        )


class HistoryEnded(Exception):
    """The journal of a job that was stopped has no more to say."""


async def recorded_answer(blobs: Blobs, found: Recorded) -> frames.Answer:
    """The answer that the journal holds, at its time."""
    value = found.value
    if value is None:
        assert found.blob is not None
        value = _answers.decode(await blobs.get(found.blob))
    return frames.Answer(now_ms=found.at, value=value)
