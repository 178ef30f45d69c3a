"""Runs a workflow in a slot: its effects are answered from the journal, or performed and journaled.

    recorded            the journal's answer, at the journal's time
    begun, idempotent   done again, under the same key
    begun, at most once `interrupted`; the matcher says so
    new                 intent on disk, effect, result

What the kinds of effects are is said in `effects`.
"""

from __future__ import annotations

import msgspec

from mvmci.engines.embedded import workspace
from mvmci.engines.embedded.command import PROCESS_BYTES, done_of, with_artifacts
from mvmci.engines.embedded.effects import request_of, show
from mvmci.engines.embedded.effects.context import Context, Effect, Files, Suspended
from mvmci.engines.embedded.host import Host
from mvmci.engines.embedded.limits import LimitReached, Output
from mvmci.engines.embedded.slots import RUNS_MAX, Slot
from mvmci.errors import BadWorkspace, Nondeterminism
from mvmci.jobs import effect, tree
from mvmci.jobs.glob import Pattern
from mvmci.jobs.job import INLINE_BYTES_MAX, Artifact
from mvmci.jobs.journal import Done, Intent, Journal, Progress, Response, Result, Spec
from mvmci.jobs.replay import Recorded, Replay, clip
from mvmci.journals.holder import Holder
from mvmci.sandbox import frames
from mvmci.sandbox.confinement import Profile
from mvmci.sandbox.forkserver import Child, SlotDied
from mvmci.store import Blobs, keep_text, load_text

PROGRESS_WAIT_S = 1.0
PROGRESS_CHARS_MAX = 1_000

_encode = msgspec.json.Encoder().encode
_answers: msgspec.json.Decoder[effect.Fields] = msgspec.json.Decoder(effect.Fields)


async def run_workflow(
    host: Host, slot: Slot, spec: Spec, started_at: int, code: str, handler: LiveEffects | Verification
) -> Done:
    """Run a workflow from its beginning, at the time of its first lease, to its end.

    `handler` takes what the guest says, and answers where it waits for one.
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
            answer = await handler.handle(frame)
            if answer is not None:
                await child.send(answer)
        handler.replay.finish()
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
        self.replay = Replay(holder.journal.records, show)
        self._host = host
        self._holder = holder
        self._slot = slot
        self._spec = holder.spec
        self._responded = holder.journal.state.response is not None
        self._files = Files(host, slot, self._spec.tree)
        self._output = Output(
            holder,
            attempt=0,
            bytes_max=self._spec.limits.output_bytes,
            now_ms=host.now_ms,
            published=published,
        )

    async def handle(self, frame: frames.ToParent) -> frames.Answer | None:
        match frame:
            case frames.Log():
                await self._output.write("stderr", frame.message.encode() + b"\n")
            case frames.Respond():
                await self._respond(frame.value)
            case frames.ReportProgress() if self.replay.live:
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

    async def _effect(self, fields: effect.Fields) -> frames.Answer:
        request = _request_of(fields)
        found = self.replay.ask(request)
        if isinstance(found, Recorded):
            self._files.tree = found.tree or self._files.tree
            return await recorded_answer(self._host.store.blobs, found)
        if self._host.draining.is_set():
            raise Suspended(0)
        intent = found.intent or self._intent(found.index, request)
        if request.outside:
            await self._holder.write(*([intent] if found.intent is None else []))
            await self._holder.check_still_holder()
        elif found.intent is None:
            await self._holder.add(intent)
        key = effect.idempotency_key(self._spec.id, intent.index) if intent.idempotent else None
        context = Context(self._host, self._spec, self._slot, self._files, intent, key)
        with self._holder.stopwatch.part("effects"):
            answer = await request.perform(context)
        return await self._record(found.index, answer)

    def _intent(self, index: int, request: effect.Request) -> Intent:
        shown = request.redacted().fields()
        return Intent(
            at=self._host.now_ms(),
            index=index,
            kind=request.kind,
            digest=request.digest(),
            idempotent=request.idempotent,
            request=shown if len(_encode(shown)) <= INLINE_BYTES_MAX else None,
        )

    async def _record(self, index: int, answer: effect.Value) -> frames.Answer:
        blobs = self._host.store.blobs
        data = _encode(answer)
        value = _answers.decode(data)
        large = len(data) > INLINE_BYTES_MAX
        result = Result(
            at=self._host.now_ms(),
            index=index,
            value=None if large else value,
            blob=await blobs.put(data) if large else None,
            tree=await self._files.keep(),
        )
        await self._holder.add(result)
        return frames.Answer(now_ms=result.at, value=value)

    async def collect(self, done: Done) -> Done:
        """`done`, naming the artifacts in the workspace as the last recorded program left it."""
        if not self._spec.artifacts or self._files.tree is None:
            return done
        entries = tree.decode_tree(await self._host.store.blobs.get(self._files.tree)).entries
        wanted = [Pattern(pattern) for pattern in self._spec.artifacts]
        found = tuple(
            Artifact(path=entry.path, digest=entry.digest, size=entry.size, executable=entry.executable)
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
        self.replay = Replay(journal.records, show)
        self._host = host
        self._partial = partial

    async def handle(self, frame: frames.ToParent) -> frames.Answer | None:
        if not isinstance(frame, frames.Call):
            return None
        request = _request_of(frame.request)
        found = self.replay.ask(request)
        if isinstance(found, Recorded):
            return await recorded_answer(self._host.store.blobs, found)
        if self._partial:
            raise HistoryEnded
        raise Nondeterminism(
            f"nondeterminism: effect {found.index}: expected the end, got {clip(request.line())}"
        )


class HistoryEnded(Exception):
    """The journal of a job that was stopped has no more to say."""


def _request_of(fields: effect.Fields) -> Effect:
    """Raises SlotDied for what no workflow can ask for: its slot is not to be believed any more."""
    try:
        return request_of(fields)
    except msgspec.ValidationError as wrong:
        raise SlotDied(f"the slot process asked for what is no effect: {wrong}") from None


async def recorded_answer(blobs: Blobs, found: Recorded) -> frames.Answer:
    """The answer that the journal holds, at its time."""
    value = found.value
    if value is None:
        assert found.blob is not None
        value = _answers.decode(await blobs.get(found.blob))
    return frames.Answer(now_ms=found.at, value=value)
