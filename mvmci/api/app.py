"""The application: its routes, who may use them, and how it is served.

With a token, everything but `/health` and `/version` wants `Authorization: Bearer …`; who has that of workers
may have jobs run, and nothing else. Without one it is
for this machine alone, and a page in a browser here must not be able to use it: requests that come from a
page, or under a name that is not this machine's, are refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import os
import re
import resource
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

from mvmci import __version__
from mvmci.api import answers, engine
from mvmci.api.answers import HttpError
from mvmci.api.engine import JobRunner
from mvmci.api.jobs import Jobs
from mvmci.api.metrics import CONTENT_TYPE, Metrics
from mvmci.api.openapi import openapi
from mvmci.cluster.metrics import UnitMetrics
from mvmci.errors import MvmciError, StoreUnavailable, Usage
from mvmci.store import Store
from mvmci.system.files import sweep
from mvmci.trust.certificate import run_token

OPEN = frozenset({"/health", "/version"})  # for balancers, and for whoever looks who is there
KEEP_ALIVE_S = 75.0  # for the next request of a connection, and for the headers of its first
STOP_S = 0.5  # for what is being answered when we stop
HANDSHAKE_S = 10.0
LINGER_S = 10.0  # so long the rest of a body is taken that was refused, so that its sender reads why
BACKLOG = 1024
NO_HTTP = (HttpProcessingError, web.RequestPayloadError)
BEGUN = web.RequestKey("begun", bool)  # its answer is on its way

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Api:
    """What the application stands on.

    `folder` holds modules on their way in. `away` says why the store cannot be reached now; empty: it can.
    `queues` are those that the executor may write to; none is all of them.
    """

    store: Store
    executor: JobRunner
    folder: Path
    now_ms: Callable[[], int]
    queues: tuple[str, ...] = ()
    token: str = ""  # empty: none is asked for
    away: Callable[[], str] = lambda: ""
    unit: Callable[[], UnitMetrics] | None = None  # what the unit that it is tells of itself


def make_app(api: Api) -> web.Application:
    """The application."""
    metrics = Metrics(api.executor, api.unit)
    app = web.Application(middlewares=[_measured(metrics), _answered, _guarded(api.token)])
    jobs = Jobs(api.store, api.folder, api.now_ms, api.queues)
    app.add_routes(
        [
            web.get("/version", _version),
            web.get("/health", partial(_health, api)),
            web.get("/metrics", partial(_metrics, metrics)),
            web.get("/openapi.json", _describe),
            web.post("/api/module/deploy", jobs.deploy),
            web.post("/api/workflow/start", jobs.start),
            web.post("/api/workflow/send-msg/{id}", jobs.send_message),
            web.get("/api/workflow/{id}", jobs.status),
            web.get("/api/workflow/{id}/wait", jobs.wait),
            web.get("/api/workflow/{id}/logs", jobs.logs),
            web.post("/api/workflow/{id}/cancel", jobs.cancel),
            web.post(engine.RUN, partial(engine.run_job, api.executor)),
        ]
    )
    app.on_response_prepare.append(_begin)
    return app


async def _version(request: web.Request) -> web.Response:
    return answers.json({"mvmci": __version__})


async def _health(api: Api, request: web.Request) -> web.Response:
    """An executor without a free slot is healthy too: each request is told that it has none."""
    executor = api.executor
    if executor.draining:
        raise HttpError(
            503, "this executor is draining", hint="it finishes what it has, and takes nothing more"
        )
    if reason := api.away():
        raise StoreUnavailable(reason, hint="it comes back by itself")
    return answers.json({"status": "ready", "slots": executor.slots, "free": executor.free})


async def _metrics(metrics: Metrics, request: web.Request) -> web.Response:
    return web.Response(body=metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def _describe(request: web.Request) -> web.Response:
    return answers.json(openapi())


# ---- Around every route


def _measured(metrics: Metrics) -> Middleware:
    @web.middleware
    async def measured(request: web.Request, handler: Handler) -> web.StreamResponse:
        began, status = time.monotonic(), 499  # the client went away
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            found = request.match_info.route.resource
            route = found.canonical if found is not None else ""
            metrics.count(request.method, route, status, time.monotonic() - began)

    return measured


@web.middleware
async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong is answered with a sentence; an answer that has begun is broken off."""
    try:
        return await handler(request)
    except MvmciError as failure:
        wrong, told = answers.error(failure), failure.message
    except web.HTTPException as found:
        message, hint = answers.SENTENCES.get(found.status, (found.reason, None))
        allow = {name: found.headers[name] for name in ("Allow",) if name in found.headers}
        wrong, told = answers.sentence(found.status, message, hint, allow), message
    except (ConnectionError, TimeoutError):
        told = "nobody reads the answer"
        wrong = answers.sentence(408, told, None)
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        told = "something is wrong with this executor"
        wrong = answers.sentence(500, told, "its log says what")
    if BEGUN in request:
        log.info("the answer to %s %s was broken off: %s", request.method, request.path, told)
        if request.transport is not None:
            request.transport.abort()
    return wrong


async def _begin(request: web.Request, response: web.StreamResponse) -> None:
    request[BEGUN] = True
    response.headers["Server"] = "mvmci"


def _guarded(token: str) -> Middleware:
    wanted, to_run = _hashed(token.encode()), _hashed(run_token(token).encode())

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in OPEN:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            found = given.strip().encode(errors="replace") if scheme.lower() == "bearer" else b""
            if not token:
                _check_local(request)
            elif not (
                hmac.compare_digest(wanted, _hashed(found))
                or (request.path == engine.RUN and hmac.compare_digest(to_run, _hashed(found)))
            ):
                raise HttpError(
                    401,
                    "the token is missing, or it is another one",
                    hint="send the header `Authorization: Bearer TOKEN`",
                    WWW_Authenticate="Bearer",
                )
        return await handler(request)

    return guarded


def _hashed(token: bytes) -> bytes:
    """Of one length, so that comparing tells nothing of the token's."""
    return hashlib.sha256(token).digest()


def _check_local(request: web.Request) -> None:
    """Raises HttpError for what a page in a browser on this machine may have sent."""
    site = request.headers.get("Sec-Fetch-Site", "none")  # a browser says whose page asks; others say nothing
    if (
        site not in ("none", "same-origin")
        or "Origin" in request.headers
        or not _is_loopback(request.headers.get("Host", ""))
    ):
        raise HttpError(
            403,
            "without a token, only programs on this machine may ask, and by its loopback address",
            hint="give the executor a --token-file, and send its token",
        )


def _is_loopback(host: str) -> bool:
    name = host.rpartition(":")[0] if re.search(r":[0-9]+$", host) else host
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


# ---- Serving


@asynccontextmanager
async def serve_api(api: Api, host: str, port: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Serve the application at `host`, over TLS if there is a context for it, and say at which port: 0 is any
    that is free. Raises Usage."""
    sweep(api.folder)
    async with _serve(make_app(api), host, port, tls) as bound:
        yield bound


@asynccontextmanager
async def serve_metrics(
    read: Callable[[], Awaitable[bytes]], host: str, port: int, token: str = ""
) -> AsyncIterator[int]:
    """Serve nothing but `/metrics`, which is what `read` returns then; as `serve_api`."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=await read(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application(middlewares=[_answered, _guarded(token)])
    app.add_routes([web.get("/metrics", answer)])
    async with _serve(app, host, port) as bound:
        yield bound


@asynccontextmanager
async def _serve(
    app: web.Application, host: str, port: int, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    http_log = log.getChild("http")  # the library has a traceback for every connection that brings no HTTP
    http_log.addFilter(_is_worth_logging)
    # Who goes away has nobody that an answer is made for; runs are shielded from that.
    runner = web.AppRunner(
        app,
        access_log=None,
        logger=http_log,
        auto_decompress=False,
        handler_cancellation=True,
        keepalive_timeout=KEEP_ALIVE_S,
        shutdown_timeout=STOP_S,
        lingering_time=LINGER_S,
    )
    await runner.setup()
    assert runner.server is not None
    manager = runner.server
    # Slots need files too: no more than half of those that may be open are connections.
    connections_max = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2

    def connect() -> asyncio.BaseProtocol:
        return manager() if len(manager.connections) < connections_max else _Full()

    try:
        server = await _listen(connect, host, port, tls)
        try:
            yield int(server.sockets[0].getsockname()[1])
        finally:
            server.close()
    finally:
        await runner.cleanup()


def _is_worth_logging(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], NO_HTTP))


async def _listen(
    connect: Callable[[], asyncio.BaseProtocol], host: str, port: int, tls: ssl.SSLContext | None
) -> asyncio.Server:
    try:
        return await asyncio.get_running_loop().create_server(
            connect,
            host,
            port,
            backlog=BACKLOG,
            ssl=tls,
            ssl_handshake_timeout=HANDSHAKE_S if tls is not None else None,
        )
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise Usage(f"{host}:{port} cannot be listened at: {why}", hint="choose another --listen") from None


class _Full(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
