"""The way to executors over HTTP: by name on one network, or through one URL in front of many.

The answer to `POST /api/engine/run` is streamed: one reply a line, `Accepted` at once and the rest when
the run has come out. 503 says that no slot is free, also where a balancer says it for all that it knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec

from mvmci.cluster.identity import ENGINE_TLS_NAME
from mvmci.engines.remote import BUSY, NoCapacity, Reply, RunRequest, read_reply
from mvmci.errors import EngineAway, Usage
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import Link, Unsubscribe
from mvmci.trust.certificate import client_context

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

_CONNECT_S = 3.0
_REPLY_WITHIN_S = 5.0
_LINE_BYTES_MAX = 64 << 10
NO_SLOT = 503
FORBIDDEN = (401, 403)
_NO_BACKEND = (502, 503, 504)  # what a balancer says that has nobody behind it

_encode = msgspec.json.Encoder().encode


class HttpTransport:
    """The port `mvmci.engines.remote.Transport`: to `url`, with a bearer `token` if executors want one.

    Over https, who answers must have a certificate of the cluster's CA; of a `public` one, where the URL is
    that of a balancer of the user's own.
    """

    def __init__(self, url: str, token: str, link: Link, layout: Layout, *, public: bool = False) -> None:
        self._url = url.rstrip("/")
        ours = url.startswith("https:") and link.login.ca and not public
        self._trust: dict[str, Any] = (
            {"ssl": client_context(link.login.ca), "server_hostname": ENGINE_TLS_NAME} if ours else {}
        )
        self._token = token
        self._link = link
        self._layout = layout
        self._capacity = asyncio.Event()
        self._answers: set[ClientResponse] = set()
        self._leave: Unsubscribe | None = None
        self._session: ClientSession | None = None

    async def open(self) -> None:
        """Raises StoreUnavailable. Whether somebody answers at the URL is seen when a job is sent."""
        self._session = open_session(self._token)
        self._leave = await self._link.subscribe(self._layout.capacity(), lambda _: self._on_capacity())

    def capacity(self) -> asyncio.Event:
        return self._capacity

    @contextlib.asynccontextmanager
    async def send(self, request: RunRequest) -> AsyncGenerator[AsyncIterator[Reply]]:
        from aiohttp import ClientError

        assert self._session is not None
        async with contextlib.AsyncExitStack() as leaving:
            try:
                async with asyncio.timeout(_REPLY_WITHIN_S):
                    where = f"{self._url}/api/engine/run"
                    posting = self._session.post(where, data=_encode(request), **self._trust)
                    answer = await leaving.enter_async_context(posting)
            except (ClientError, OSError, TimeoutError) as error:
                raise EngineAway(f"the executor at {self._url} cannot be reached: {_why(error)}") from None
            if answer.status == NO_SLOT:
                raise NoCapacity(BUSY)
            if answer.status in FORBIDDEN:
                raise EngineAway(f"the executor at {self._url} refuses the token")
            if answer.status != 200 or answer.content_type != "application/x-ndjson":
                raise EngineAway(f"what answers at {self._url} is no executor (HTTP {answer.status})")
            self._answers.add(answer)
            leaving.callback(self._answers.discard, answer)
            yield _iterate(answer)

    async def probe(self) -> bool:
        from aiohttp import ClientError

        assert self._session is not None
        try:
            async with asyncio.timeout(_REPLY_WITHIN_S):
                async with self._session.get(f"{self._url}/version", **self._trust) as answer:
                    return answer.status == 200
        except (
            ClientError,
            OSError,
            TimeoutError,
            RuntimeError,
        ) as error:  # that of a session that was closed
            raise EngineAway(f"the executor at {self._url} cannot be reached: {_why(error)}") from None

    def disconnect(self) -> None:
        for answer in self._answers:
            answer.close()
        self._on_capacity()

    async def close(self) -> None:
        if self._leave is not None:
            await self._leave()
        if self._session is not None:
            await self._session.close()

    def _on_capacity(self) -> None:
        self._capacity.set()
        self._capacity = asyncio.Event()


def open_session(token: str) -> ClientSession:
    """A client of executors. Proxies of the environment are for other hosts."""
    from aiohttp import ClientSession, ClientTimeout, TCPConnector

    return ClientSession(
        connector=TCPConnector(limit=0),
        timeout=ClientTimeout(total=None, sock_connect=_CONNECT_S),
        headers={"Authorization": f"Bearer {token}"} if token else {},
        read_bufsize=_LINE_BYTES_MAX,
    )


async def check_executor(url: str, token: str = "") -> None:
    """See that an executor answers at `url`, or a balancer with nobody behind it yet. Raises Usage."""
    from aiohttp import ClientError

    url = url.rstrip("/")
    async with open_session(token) as session:
        try:
            async with asyncio.timeout(_REPLY_WITHIN_S), session.get(f"{url}/version") as answer:
                found = await answer.content.read(_LINE_BYTES_MAX) if answer.status == 200 else b""
        except (ClientError, OSError, TimeoutError) as error:
            raise Usage(
                f"no executor can be reached at {url}: {_why(error)}",
                hint="`executors.url` is that of a balancer which you run; it must answer",
            ) from None
    if answer.status in _NO_BACKEND:
        return
    try:
        ours = "mvmci" in msgspec.json.decode(found, type=dict[str, object])
    except msgspec.DecodeError:
        ours = False
    if not ours:
        raise Usage(
            f"what answers at {url} is no executor of mvmci (HTTP {answer.status})",
            hint="its /version must come from `mvmci executor`",
        )


async def _iterate(answer: ClientResponse) -> AsyncIterator[Reply]:
    from aiohttp import ClientError

    with contextlib.suppress(ClientError, OSError, ValueError):
        async for line in answer.content:
            yield read_reply(line)


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "it does not answer"
    reason = str(getattr(error, "strerror", None) or error)
    number = getattr(error, "errno", None)
    if number and reason.startswith("Connect call failed"):  # asyncio says so whatever the reason is
        return os.strerror(number)
    return reason or type(error).__name__
