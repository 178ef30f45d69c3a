"""The routes about jobs: deploy a module, start it, and what else a client does with a job.

They do what the verbs of the command line do, by the same functions. Nothing is remembered here, so any
executor of a cluster answers for any job: a module's version is the digest of its bytes.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from mvmci.api import answers, bodies
from mvmci.api.answers import HttpError
from mvmci.config.quantity import format_duration, parse_duration
from mvmci.errors import NotFound, NotYet, StoreFull, Usage
from mvmci.jobs.job import check_id, is_digest
from mvmci.jobs.journal import Journal
from mvmci.jobs.module import Module
from mvmci.journals.client import cancel_job, mint_id, submit, until_ended
from mvmci.journals.logs import LATE_S, OutputWatch, Viewer, last_attempt, late_s
from mvmci.journals.reader import load
from mvmci.journals.request import (
    Digests,
    JobFields,
    JobRequest,
    check_request,
    read_object,
    request_from,
    spec_of,
)
from mvmci.journals.status import summary_of
from mvmci.store import UNNAMED_BLOB_S, Chunk, Store, load_text

UPLOADS_MAX = 4  # at once; each may take 256 MiB of disk
MODULES_KNOWN_MAX = 1024
WAIT_MS = 60_000
WAIT_MS_MAX = 3_600_000
_WORKFLOW = "run"  # the one that a module has
STREAMS = ("stdout", "stderr")


class StartRequest(JobFields, kw_only=True, frozen=True):
    """The body of `start`. `version` is what `deploy` answered with, `input` is JSON as text."""

    module: str
    version: Annotated[str, Meta(extra_json_schema={"pattern": "^[0-9a-f]{64}$"})]
    workflow: str | None = None
    input: str | None = None


class Jobs:
    """The handlers. `folder` holds modules while they are looked at; `now_ms` is since 1970.

    `queues` are those that the executor may write to; none is all of them.
    """

    def __init__(
        self, store: Store, folder: Path, now_ms: Callable[[], int], queues: Sequence[str] = ()
    ) -> None:
        self._store = store
        self._queues = queues
        self._folder = folder
        self._now_ms = now_ms
        self._uploads = 0
        self._looking = asyncio.Semaphore(UPLOADS_MAX)
        self._modules: OrderedDict[str, Module] = OrderedDict()  # by digest, the last used last

    async def deploy(self, request: web.Request) -> web.Response:
        """Keep a module that can run here."""
        if self._uploads >= UPLOADS_MAX:
            raise HttpError(503, f"{self._uploads} modules are being deployed", hint="try again in a while")
        self._uploads += 1
        try:
            async with bodies.receive_module(request, self._folder) as (name, path):
                what = await asyncio.to_thread(bodies.inspect_file, path, name)
                digest = await self._store.blobs.put_file(path)
        except OSError as full:
            if full.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StoreFull("this executor's disk is full", hint="make room on its host") from None
        finally:
            self._uploads -= 1
        self._know(digest, what)
        kept = {"version": digest.removeprefix("sha256:"), "kept_s": UNNAMED_BLOB_S}
        return answers.json({"ok": {"name": name} | kept})

    async def start(self, request: web.Request) -> web.Response:
        """Submit a job. The same request with the same `id` is the same job."""
        body = read_object(await bodies.read_json(request), StartRequest)
        wanted = request_from(body, JobRequest(), module=bodies.module_name, input=lambda text: text)
        digests = Digests(module=f"sha256:{body.version}")
        if not is_digest(digests.module):
            hint = "it is the 64 digits that `deploy` answered with"
            raise Usage(f"`version`: {ascii(body.version)[:80]} is no version", hint=hint)
        self._check_queue(wanted.queue)
        module = await self._module(wanted.module, digests.module)
        _check_workflow(wanted.module, module, body.workflow)
        checked = check_request(wanted, module, name=f"{wanted.module}.wasm", read=lambda text: text)
        job = wanted.id or mint_id()
        spec = await spec_of(checked, job, digests, self._store, at=self._now_ms(), by=self._who(request))
        response = None
        if not await submit(self._store, spec):
            found = (await load(self._store, job)).state.response
            response = msgspec.Raw((await load_text(self._store.blobs, found)).encode()) if found else None
        return answers.json({"ok": {"id": job, "response": response}})

    async def send_message(self, request: web.Request) -> web.Response:
        """Workflows hear no messages yet."""
        check_id(request.match_info["id"])
        raise HttpError(
            501,
            "a workflow of world mvmci:workflow@0.1.0 cannot be sent a message",
            hint="give it all it needs as its input, or let it ask for the rest with `http`",
        )

    async def status(self, request: web.Request) -> web.Response:
        """How a job stands: what `mvmci status --json` prints."""
        return await self._summary(await self._load(request))

    async def wait(self, request: web.Request) -> web.Response:
        """How a job stands once it has ended; 504 if it has not when the time of waiting is up."""
        limit_ms = parse_duration(request.query.get("timeout", WAIT_MS // 1000), maximum_ms=WAIT_MS_MAX)
        journal = await self._load(request)
        try:
            async with asyncio.timeout(limit_ms / 1000):
                await until_ended(self._store, journal)
        except TimeoutError:
            raise NotYet(
                f"after {format_duration(limit_ms)}, {journal.job} has not ended",
                hint="it goes on; ask again",
            ) from None
        return await self._summary(journal)

    async def cancel(self, request: web.Request) -> web.Response:
        """Let a job end as cancelled, and say how it stands: one that somebody runs ends within seconds."""
        journal = await self._load(request)
        if journal.state.spec is not None:
            self._check_queue(journal.state.spec.queue)
        await cancel_job(self._store, journal, self._who(request))
        return await self._summary(journal)

    async def logs(self, request: web.Request) -> web.StreamResponse:
        """What a job printed, as it was printed; with `follow`, until it has ended."""
        stream, follow, attempt = _what_to_show(request)
        journal = await self._load(request)
        response = web.StreamResponse(headers={"X-Content-Type-Options": "nosniff"})
        response.content_type, response.charset = "text/plain", "utf-8"
        await response.prepare(request)
        viewer = Reader(response, stream, since=last_attempt(journal.state), attempt=attempt)
        if not follow and not journal.state.ended:
            await viewer.show(await self._store.logs.read(journal.job))
            return response
        wait_s = late_s(journal.state, self._now_ms())
        async with OutputWatch(self._store, journal.job, viewer) as watch:
            if not journal.state.ended:
                await watch.until(until_ended(self._store, journal))
                wait_s = LATE_S
            await watch.rest(journal.state, wait_s)
        return response

    def _check_queue(self, queue: str) -> None:
        """Refuse what the broker would not even answer. Raises HttpError."""
        if self._queues and queue not in self._queues:
            raise HttpError(
                403,
                f"this executor's credential is not for queue {ascii(queue)[1:-1][:80]}",
                hint=f"it is for {', '.join(self._queues)}; ask another executor",
            )

    async def _load(self, request: web.Request) -> Journal:
        return await load(self._store, check_id(request.match_info["id"]))

    async def _summary(self, journal: Journal) -> web.Response:
        return answers.json(await summary_of(self._store, journal))

    def _who(self, request: web.Request) -> str:
        return f"{request.remote} through {self._store.presence.unit}"

    # ---- Modules

    async def _module(self, name: str, digest: str) -> Module:
        """What the module of that digest is. Raises NotFound, BadModule."""
        if await self._store.blobs.missing([digest]):  # also says that somebody counts on it
            version = digest.removeprefix("sha256:")
            raise NotFound(
                f"there is no module {name} of version {version}",
                hint="deploy it: one without a job is kept for a day",
            )
        what = self._modules.get(digest)
        if what is None:
            async with self._looking:
                with bodies.draft(self._folder) as path:
                    await self._store.blobs.fetch(digest, path)
                    what = await asyncio.to_thread(bodies.inspect_file, path, name)
        self._know(digest, what)
        return what

    def _know(self, digest: str, what: Module) -> None:
        self._modules[digest] = msgspec.structs.replace(what, imports=())
        self._modules.move_to_end(digest)
        if len(self._modules) > MODULES_KNOWN_MAX:
            self._modules.popitem(last=False)


class Reader(Viewer):
    """Writes one stream or both to a response."""

    def __init__(self, response: web.StreamResponse, stream: str | None, **which: Any) -> None:
        super().__init__(**which)
        self._response = response
        self._stream = stream

    async def write(self, chunk: Chunk) -> None:
        if self._stream in (None, chunk.stream):
            async with asyncio.timeout(answers.WRITE_S):
                await self._response.write(chunk.data)


def _check_workflow(module: str, what: Module, workflow: str | None) -> None:
    """Raises Usage for a workflow that the module has not."""
    if workflow is None:
        return
    if what.kind == "command":
        raise Usage(f"{module} is a command and has no workflow", hint="leave `workflow` out; give it `args`")
    if workflow not in (_WORKFLOW, module):
        raise Usage(
            f"{module} has no workflow {ascii(workflow)[:80]}",
            hint=f"it has one, which is called `{_WORKFLOW}`",
        )


def _what_to_show(request: web.Request) -> tuple[str | None, bool, int | None]:
    """Which stream, whether to follow, and which attempt. Raises Usage."""
    stream, follow = request.query.get("stream"), request.query.get("follow", "0")
    attempt = request.query.get("attempt")
    if stream is not None and stream not in STREAMS:
        raise Usage(f"there is no stream {ascii(stream)[:80]}", hint=f"there are {' and '.join(STREAMS)}")
    if follow not in ("0", "1"):
        raise Usage(f"`follow` is {ascii(follow)[:80]}", hint="it is 1 or 0")
    if attempt is not None and not re.fullmatch("[1-9][0-9]{0,8}", attempt):
        raise Usage(f"`attempt` is {ascii(attempt)[:80]}", hint="attempts are counted from 1")
    return stream, follow == "1", int(attempt) if attempt else None
