"""The route for workers: one request in, and the replies to it out, one a line.

The run is the executor's from the moment that it is taken: a worker that goes away ends the listening,
not the job.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Protocol

import msgspec
from aiohttp import web

from mvmci.api.answers import NDJSON, WRITE_S, HttpError
from mvmci.api.bodies import read_json
from mvmci.engine import Outcome
from mvmci.engines.remote import NEWER, Failed, NoCapacity, Reply, RunRequest, encode_reply, read_request
from mvmci.errors import Usage, VersionsDiffer
from mvmci.wire import Level

RUN = "/api/engine/run"


class JobRunner(Protocol):
    """What the API asks of its executor: to run jobs for workers, and how it stands."""

    unit: str
    slots: int
    draining: bool
    counts: Counter[str]
    level: Level

    @property
    def free(self) -> int:
        """Slots in which nothing runs."""

    async def take(self, request: RunRequest) -> asyncio.Task[Outcome | Failed]:
        """Begin to run a job, or follow it if that has begun. Raises NoCapacity."""

    def replies(self, running: asyncio.Task[Outcome | Failed]) -> AsyncIterator[Reply]:
        """What its worker is told of it."""


async def run_job(runner: JobRunner, request: web.Request) -> web.StreamResponse:
    """Run a job, if a slot is free; 503 at once if none is."""
    body = await read_json(request)
    try:
        wanted = read_request(body)
    except VersionsDiffer as newer:
        refusal = encode_reply(Failed(why=NEWER, message=newer.message), runner.level)
        return web.Response(body=refusal + b"\n", content_type=NDJSON)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as bad:
        raise Usage(f"the body is no request to run a job: {bad}") from None
    try:
        running = await runner.take(wanted)
    except NoCapacity as none:
        raise HttpError(503, none.message, hint="another executor may have one") from None
    response = web.StreamResponse()
    response.content_type = NDJSON
    await response.prepare(request)
    async for reply in runner.replies(running):
        async with asyncio.timeout(WRITE_S):
            await response.write(encode_reply(reply, runner.level) + b"\n")
    return response
