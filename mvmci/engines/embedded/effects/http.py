"""The effect `http`: one request, at most once on the wire, from its request to its answer.

Owns the connections; aiohttp is loaded with the first request. It promises that a request goes out once:
a connection of its own, nothing tried again, and redirects followed by hand for GET and HEAD alone. It
promises that nothing is asked for that the allow-list does not allow: each hop is looked at again, a name
is resolved once, private addresses are refused unless a rule names the host, and the connection goes to an
address that was looked at. What is read is bounded, before and after decompression.

What is reported is what is known:

    denied      the list, or the address, or a hop to which an answer pointed
    failed      no connection came about, or the request is not one: it did not happen
    timed-out   the time was up after the connection stood: it may have happened
    lost        no whole answer came after that: it may have happened
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import socket
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

import msgspec

from mvmci import __version__
from mvmci.engines.embedded.effects.context import Context, Effect
from mvmci.jobs import effect
from mvmci.jobs.allow import Allow, BadUrl, Decision, Url, is_guarded, line, parse

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.abc import AbstractResolver, ResolveResult

SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "x-api-key"})
REDACTED = "(redacted)"
RESPONSE_BYTES_MAX = 4 << 20
_ESCAPED_BYTES_MAX = 12 << 20  # the body written as JSON; what is longer goes as base64
HEADER_BYTES_MAX = 64 << 10
_HEADER_BYTES_MIN = 4  # `a:` and the end of its line
HEADERS_MAX = 100  # of a request
REDIRECTS_MAX = 10
_TIMEOUT_MS = 60_000  # where a request says none
TIMEOUT_MS_MAX = 3_600_000
_READ_BYTES = 64 << 10
_CONNECTIONS_MAX = 256  # of one client at a time

TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\U0010ffff]*")
REFUSED_METHODS = frozenset({"CONNECT", "TRACE"})
OUR_HEADERS = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
REDIRECTS = frozenset({301, 302, 303, 307, 308})
GZIP = frozenset({"gzip", "x-gzip"})  # all that is decoded; anything else is handed on as it came
GZIP_WINDOW_BITS = 31

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""The addresses, as text, of a host name. Raises OSError."""


class HttpResponse(effect.Value, frozen=True, kw_only=True, tag="response"):
    """The answer to an `Http`. `body` is base64 where it is not text."""

    status: int
    headers: effect.Pairs = ()
    body: str = ""
    base64: bool = False


class Http(Effect, frozen=True, kw_only=True, tag="http"):
    """One HTTP request."""

    method: str
    url: str
    headers: effect.Pairs = ()
    body: str = ""
    timeout_ms: int = 0
    idempotent: bool = False

    def line(self) -> str:
        return f"http {self.method} {self.url}"

    def redacted(self) -> Http:
        """Without the values of headers that carry credentials."""
        headers = tuple(
            (name, REDACTED if name.lower() in SECRET_HEADERS else value) for name, value in self.headers
        )
        return msgspec.structs.replace(self, headers=headers)

    async def perform(self, context: Context) -> HttpResponse | effect.Error:
        client = context.host.tool(HttpClient, lambda: HttpClient(context.host.allow))
        return await client.perform(self, context.key)


class Ends(Exception):
    """The effect ends with this error."""

    def __init__(self, why: Any, text: str) -> None:
        super().__init__(text)
        self.error = effect.Error(why=why, text=text)


async def resolve_host(host: str, port: int) -> list[str]:
    """What the system's resolver says."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class HttpClient:
    """Performs requests, as far as `allow` allows them. `resolve` is for tests."""

    def __init__(self, allow: Callable[[], Allow], *, resolve: Resolve = resolve_host) -> None:
        self._allow = allow
        self._resolve = resolve
        self._permits = asyncio.Semaphore(_CONNECTIONS_MAX)

    async def perform(self, request: Http, key: str | None = None) -> HttpResponse | effect.Error:
        """The answer to `request`; `key` goes out as `Idempotency-Key`. Raises nothing that is expected."""
        hop = _Hop()
        timeout_ms = min(request.timeout_ms or _TIMEOUT_MS, TIMEOUT_MS_MAX)
        try:
            headers = _headers(request, key)
            async with asyncio.timeout(timeout_ms / 1000), self._permits:
                return await self._follow(request, headers, hop)
        except TimeoutError:
            what = f"{hop.name or request.method} was not answered within {timeout_ms} ms"
            return effect.Error(why="timed-out" if hop.sent else "failed", text=what)
        except Ends as end:
            return end.error

    async def _follow(self, request: Http, headers: list[tuple[str, str]], hop: _Hop) -> HttpResponse:
        follows = request.method in ("GET", "HEAD")
        url = _parsed(request.url)
        for _ in range(REDIRECTS_MAX + 1):
            hop.name = f"{request.method} {url.origin}{url.path}"
            addresses = await self._look_up(url, hop)
            response, location = await _exchange(request, headers, url, addresses, hop)
            if not follows or location is None:
                return response
            there = _redirected(url, location)
            if there.origin != url.origin:
                headers = [pair for pair in headers if pair[0].lower() not in SECRET_HEADERS]
            url = there
        raise Ends("lost", f"{hop.name}: more than {REDIRECTS_MAX} redirects")

    async def _look_up(self, url: Url, hop: _Hop) -> list[str]:
        """The addresses that may be connected to for `url`."""
        decision = self._allow().decide_parsed(url)
        if not decision.allowed:
            raise Ends("denied", decision.hint)
        try:
            found = await self._resolve(url.host, url.port)
        except (OSError, UnicodeError) as error:
            raise hop.broken(f"{url.host} cannot be resolved: {error}") from None
        return _permitted(decision, url, list(dict.fromkeys(found)), hop)


def _permitted(decision: Decision, url: Url, found: list[str], hop: _Hop) -> list[str]:
    permitted = [address for address in found if decision.permits(address)]
    if found and not permitted:
        private = parse(f"{url.scheme}://{_bracketed(found[0])}:{url.port}/")
        guarded = decision.in_full or is_guarded(found[0])
        opened = f"ask for {private.origin} itself; {line(private)}" if guarded else line(url)
        where = "which no name opens" if guarded else "which is not a public address"
        raise Ends("denied", f"not allowed: {url.origin} is at {found[0]}, {where}; {opened}")
    if not permitted:
        raise hop.broken(f"{url.host} has no address")
    return permitted


@dataclass
class _Hop:
    """How far a request has come: `sent` once there was a connection on which it may have gone out."""

    name: str = ""
    sent: bool = False

    def trace(self) -> aiohttp.TraceConfig:
        """Watches one exchange, and lets it have one connection.

        The client sends GET, PUT, DELETE and the like again by itself when their connection breaks,
        also one that was never used before, and offers no way to turn that off. The second connection
        is refused here, before it is made.
        """
        import aiohttp

        trace = aiohttp.TraceConfig()
        connections = 0

        async def connecting(*_: object) -> None:
            nonlocal connections
            connections += 1
            if connections > 1:
                raise Ends("lost", f"{self.name}: the connection broke before an answer came")

        async def connected(*_: object) -> None:
            self.sent = True

        trace.on_connection_create_start.append(connecting)
        trace.on_connection_create_end.append(connected)
        return trace

    def broken(self, what: str) -> Ends:
        """The end for a hop that could not be made; what went before it may have happened."""
        return Ends("lost" if self.sent else "failed", f"{self.name}: {what}")


def _pinned(addresses: list[str]) -> AbstractResolver:
    """Gives out the addresses that were looked at, so that none is asked for a second time."""
    from aiohttp.abc import AbstractResolver

    class Pinned(AbstractResolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
        ) -> list[ResolveResult]:
            return [
                {
                    "hostname": host,
                    "host": address,
                    "port": port,
                    "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                    "proto": socket.IPPROTO_TCP,
                    "flags": socket.AI_NUMERICHOST,
                }
                for address in addresses
            ]

        async def close(self) -> None:
            """Nothing to close."""

    return Pinned()


async def _exchange(
    request: Http, headers: list[tuple[str, str]], url: Url, addresses: list[str], hop: _Hop
) -> tuple[HttpResponse, str | None]:
    """One request on a connection of its own: the answer, and where a redirect points."""
    import aiohttp
    import yarl

    connector = aiohttp.TCPConnector(
        resolver=_pinned(addresses), use_dns_cache=False, force_close=True, limit=1, ssl=True
    )
    session = aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        trust_env=False,
        auto_decompress=False,
        skip_auto_headers=("Content-Type",),
        max_line_size=HEADER_BYTES_MAX,
        max_field_size=HEADER_BYTES_MAX,
        max_headers=HEADER_BYTES_MAX // _HEADER_BYTES_MIN,
        trace_configs=[hop.trace()],
    )
    target = yarl.URL(str(url), encoded=True)
    data = request.body.encode() or None
    try:
        async with (
            session,
            session.request(
                request.method, target, headers=headers, data=data, allow_redirects=False
            ) as answer,
        ):
            location = answer.headers.get("Location") if answer.status in REDIRECTS else None
            body = await _body(answer, hop)
            return _response(answer, body), location
    except aiohttp.ClientConnectorError as error:
        raise hop.broken(f"no connection to {_bracketed(url.host)}:{url.port}: {_refusal(error)}") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        # ValueError is what an answer that is not HTTP may come to.
        what = "no whole answer came" if hop.sent else "no connection"
        raise hop.broken(f"{what}: {_reason(error)}") from None


async def _body(answer: aiohttp.ClientResponse, hop: _Hop) -> bytes:
    """The whole body, decoded. Raises Ends beyond `RESPONSE_BYTES_MAX`, ClientError when it breaks off."""
    decoder = zlib.decompressobj(GZIP_WINDOW_BITS) if _is_gzip(answer) else None
    if sum(len(name) + len(value) for name, value in answer.raw_headers) > HEADER_BYTES_MAX:
        raise Ends("lost", f"{hop.name}: the headers are over the limit of {HEADER_BYTES_MAX} bytes")
    body = bytearray()
    async for data in answer.content.iter_chunked(_READ_BYTES):
        if decoder is None:
            body += data
        else:
            body += _decoded(decoder, data, RESPONSE_BYTES_MAX + 1 - len(body), hop)
        if len(body) > RESPONSE_BYTES_MAX:
            raise Ends("lost", f"{hop.name}: the answer is over the limit of {RESPONSE_BYTES_MAX} bytes")
    if decoder is not None and ((body and not decoder.eof) or decoder.unused_data):
        raise Ends("lost", f"{hop.name}: the compressed answer does not end where it should")
    return bytes(body)


def _decoded(decoder: Any, data: bytes, bytes_max: int, hop: _Hop) -> bytes:
    """What `data` decodes to, and no more than `bytes_max` of it."""
    try:
        decoded: bytes = decoder.decompress(data, bytes_max)
    except zlib.error as error:
        raise Ends("lost", f"{hop.name}: the answer cannot be decompressed: {error}") from None
    return decoded


def _response(answer: aiohttp.ClientResponse, body: bytes) -> HttpResponse:
    gone = {"content-encoding", "content-length"} if _is_gzip(answer) else set()
    headers = tuple(
        (_text(name), _text(value)) for name, value in answer.raw_headers if _text(name).lower() not in gone
    )
    escaped = len(body) + 5 * sum(body.count(byte) for byte in range(0x20))
    if escaped <= _ESCAPED_BYTES_MAX:
        try:
            return HttpResponse(status=answer.status, headers=headers, body=body.decode())
        except UnicodeDecodeError:
            pass
    return HttpResponse(
        status=answer.status, headers=headers, body=base64.b64encode(body).decode(), base64=True
    )


def _is_gzip(answer: aiohttp.ClientResponse) -> bool:
    return answer.headers.get("Content-Encoding", "").strip().lower() in GZIP


def _headers(request: Http, key: str | None) -> list[tuple[str, str]]:
    """The headers to send. Raises Ends for what cannot be sent, or would break out of its place."""
    if not TOKEN.fullmatch(request.method) or request.method.upper() in REFUSED_METHODS:
        raise Ends("failed", f"{request.method[:40]!r} is not a method that can be used")
    if (
        len(request.headers) > HEADERS_MAX
        or sum(len(n) + len(v) for n, v in request.headers) > HEADER_BYTES_MAX
    ):
        raise Ends("failed", f"more than {HEADERS_MAX} headers or {HEADER_BYTES_MAX} bytes of them")
    for name, value in request.headers:
        if not TOKEN.fullmatch(name) or not _VALUE.fullmatch(value) or re.search("[\ud800-\udfff]", value):
            raise Ends("failed", f"the header {name[:40]!r} holds characters that no header may hold")
        if name.lower() in OUR_HEADERS:
            raise Ends("failed", f"the header {name[:40]!r} belongs to the connection and cannot be set")
    if re.search("[\ud800-\udfff]", request.body):
        raise Ends("failed", "the body is not text that can be sent")
    ours = {"user-agent": f"mvmci/{__version__}", "accept": "*/*", "accept-encoding": "gzip"}
    given = {name.lower() for name, _ in request.headers}
    headers = [(name.title(), value) for name, value in ours.items() if name not in given]
    headers += [pair for pair in request.headers if key is None or pair[0].lower() != "idempotency-key"]
    return headers if key is None else [*headers, ("Idempotency-Key", key)]


def _parsed(url: str) -> Url:
    try:
        return parse(url)
    except BadUrl as refused:
        raise Ends("denied", f"refused: {refused}") from None


def _redirected(url: Url, location: str) -> Url:
    """Where it points. Servers write blanks there as they are, and everybody quotes them."""
    try:
        return _parsed(urljoin(str(url), location.strip(" \t").replace(" ", "%20")))
    except ValueError:
        raise Ends("denied", f"refused: {url.origin} redirects to what is not a URL") from None


def _bracketed(address: str) -> str:
    address = address.partition("%")[0]
    return f"[{address}]" if ":" in address else address


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def _refusal(error: aiohttp.ClientConnectorError) -> str:
    """Why there is no connection: in the system's words, or in those of TLS."""
    import aiohttp

    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return _reason(error.certificate_error)
    number = error.os_error.errno
    if isinstance(error, aiohttp.ClientConnectorSSLError) or not number:
        return _reason(error.os_error)
    return os.strerror(number)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
