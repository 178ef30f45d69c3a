"""The door for workers: one order in, and the words about it out, one a line.

The run is the executor's from the moment that it is taken: a worker that goes away ends the listening,
not the job.
"""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import web

from mvmci.api.answers import NDJSON, WRITE_S, HttpError
from mvmci.api.bodies import read_json
from mvmci.engines.remote import Reply, RunRequest
from mvmci.engines.server import Executor, Full, comes_soon
from mvmci.errors import Usage

_orders = msgspec.json.Decoder(RunRequest)
_encode = msgspec.json.Encoder().encode


async def run_job(executor: Executor, request: web.Request) -> web.StreamResponse:
    """See to a job, if a slot is free; 503 at once if none is."""
    body = await read_json(request)
    try:
        order = _orders.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as bad:
        raise Usage(f"this is no order: {bad}") from None
    try:
        running = await executor.take(order)
    except Full as full:
        raise HttpError(503, full.message, hint="another executor may have one") from None
    response = web.StreamResponse()
    response.content_type = NDJSON
    await response.prepare(request)
    if not await comes_soon(running):
        await _tell(response, executor.taken)
    await _tell(response, await asyncio.shield(running))
    return response


async def _tell(response: web.StreamResponse, word: Reply) -> None:
    async with asyncio.timeout(WRITE_S):
        await response.write(_encode(word) + b"\n")
