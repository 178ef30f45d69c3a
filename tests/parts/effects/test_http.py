"""The effect `http` against servers that misbehave: sent at most once, never where it must not go."""

from __future__ import annotations

import asyncio
import base64
import gzip
import socket
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from mvmci.engines.embedded.effects import http
from mvmci.engines.embedded.effects.http import Http, HttpClient, HttpResponse
from mvmci.jobs import effect
from mvmci.jobs.allow import Allow
from tests.harness.ports import own_port

Reply = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """Counts connections and keeps the requests' heads."""

    port: int = 0
    connections: int = 0
    requests: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def allow(self) -> Allow:
        return Allow(http=(f"{self.url}/*", f"http://named.example:{self.port}/*"))


@asynccontextmanager
async def serving(*replies: bytes | Reply) -> AsyncIterator[Server]:
    """Answers the n-th connection with the n-th reply, and all later ones with the last."""
    seen = Server()
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reply = replies[min(seen.connections, len(replies) - 1)]
        seen.connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            seen.requests.append(head)
            sizes = [
                int(line[15:]) for line in head.lower().split("\r\n") if line.startswith("content-length:")
            ]
            seen.bodies.append(await reader.readexactly(sizes[0]) if sizes else b"")
            if isinstance(reply, bytes):
                writer.write(reply)
                await writer.drain()
            else:
                waiting = {asyncio.ensure_future(reply(reader, writer)), asyncio.ensure_future(over.wait())}
                _, left = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in left:
                    task.cancel()
        except (OSError, EOFError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    seen.port = server.sockets[0].getsockname()[1]
    try:
        yield seen
    finally:
        over.set()
        server.close()
        await server.wait_closed()


def ok(body: bytes = b"fine", *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def to(url: str, status: str = "302 Found") -> bytes:
    return ok(b"moved", f"Location: {url}", status=status)


def request(url: str, method: str = "GET", **more: object) -> Http:
    return Http(method=method, url=url, **more)  # type: ignore[arg-type]


async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    return


def names(*addresses: str) -> http.Resolve:
    async def resolve(host: str, port: int) -> list[str]:
        return list(addresses)

    return resolve


def why(answer: effect.Answer) -> str:
    assert isinstance(answer, effect.Error), answer
    assert answer.text
    return answer.why


async def test_a_request_goes_out_as_it_was_given_and_its_answer_comes_back() -> None:
    async with serving(ok("fïne".encode(), "X-Two: a", "X-Two: b", status="201 Created")) as server:
        answer = await HttpClient(lambda: server.allow).perform(
            request(f"{server.url}/a/../b?c=%20d", "POST", headers=(("X-One", "1"),), body="héllo"), "the-key"
        )
    assert isinstance(answer, HttpResponse)
    assert (answer.status, answer.body, answer.base64) == (201, "fïne", False)
    assert [value for name, value in answer.headers if name == "X-Two"] == ["a", "b"]
    head = server.requests[0]
    assert head.startswith("POST /b?c=%20d HTTP/1.1\r\n")
    assert "\r\nX-One: 1\r\n" in head
    assert "\r\nIdempotency-Key: the-key\r\n" in head
    assert f"\r\nHost: 127.0.0.1:{server.port}\r\n" in head
    assert server.bodies == ["héllo".encode()]


async def test_a_body_that_is_not_text_is_base64() -> None:
    data = bytes(range(256))
    async with serving(ok(data)) as server:
        answer = await HttpClient(lambda: server.allow).perform(request(server.url))
    assert isinstance(answer, HttpResponse)
    assert answer.base64
    assert base64.b64decode(answer.body) == data


async def test_a_body_that_would_swell_as_json_is_base64() -> None:
    async with serving(ok(bytes(3 << 20))) as server:
        answer = await HttpClient(lambda: server.allow).perform(request(server.url))
    assert isinstance(answer, HttpResponse)
    assert answer.base64


async def test_the_key_of_an_idempotent_request_is_ours_alone() -> None:
    async with serving(ok()) as server:
        given = (("idempotency-key", "theirs"),)
        await HttpClient(lambda: server.allow).perform(request(server.url, headers=given), "ours")
        await HttpClient(lambda: server.allow).perform(request(server.url, headers=given))
    assert "theirs" not in server.requests[0]
    assert "ours" in server.requests[0]
    assert "theirs" in server.requests[1]


async def test_what_the_list_does_not_allow_is_denied_and_nobody_hears_of_it() -> None:
    async with serving(ok()) as server:
        answer = await HttpClient(Allow).perform(request(f"{server.url}/x"))
    assert why(answer) == "denied"
    assert f'allow: {{http: ["{server.url}/*"]}}' in answer.text  # type: ignore[union-attr]
    assert server.connections == 0


async def test_what_is_denied_is_not_even_resolved_neither_at_first_nor_after_a_redirect() -> None:
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if host == "127.0.0.1" else []

    async with serving(to("https://public.example/")) as server:
        client = HttpClient(lambda: server.allow, resolve=resolve)
        assert why(await client.perform(request("https://public.example/"))) == "denied"
        assert asked == []
        assert why(await client.perform(request(server.url))) == "denied"
    assert asked == ["127.0.0.1"]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "10.0.0.1", "169.254.169.254"])
async def test_a_name_that_resolves_to_a_private_address_is_denied_unless_a_rule_names_it(
    address: str,
) -> None:
    async with serving(ok()) as server:
        url = f"http://named.example:{server.port}/"
        for rule in ("*", f"http://*.example:{server.port}/*", "http://*:*/*"):
            client = HttpClient(lambda rule=rule: Allow(http=(rule,)), resolve=names(address))
            answer = await client.perform(request(url))
            assert why(answer) == "denied"
    assert server.connections == 0
    assert isinstance(answer, effect.Error)
    line = answer.text.partition('http: ["')[2].partition('"]')[0]
    followed = f"http://{address}:{server.port}/" if "itself" in answer.text else url
    decision = Allow(http=(line,)).decide(followed)
    assert decision.permits(address), "the line that is said to open it does"


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "100.100.100.200"]
)
async def test_no_name_leads_to_where_hosts_find_credentials(address: str) -> None:
    async with serving(ok()) as server:
        client = HttpClient(lambda: server.allow, resolve=names(address))
        answer = await client.perform(request(f"http://named.example:{server.port}/"))
    assert why(answer) == "denied"
    assert "which no name opens" in answer.text  # type: ignore[union-attr]


async def test_a_host_that_a_rule_names_in_full_is_reached_where_it_is() -> None:
    async with serving(ok()) as server:
        client = HttpClient(lambda: server.allow, resolve=names("127.0.0.1"))
        answer = await client.perform(request(f"http://named.example:{server.port}/"))
    assert isinstance(answer, HttpResponse)


async def test_a_star_does_not_open_a_private_address() -> None:
    async with serving(ok()) as server:
        for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]"):
            answer = await HttpClient(lambda: Allow(http=("*",))).perform(
                request(f"http://{host}:{server.port}/")
            )
            assert why(answer) == "denied"
    assert server.connections == 0


async def test_localhost_by_name_opens_loopback_and_nothing_else_private() -> None:
    async with serving(ok()) as server:
        allow = Allow(http=("http://localhost:*/*",))
        url = f"http://localhost:{server.port}/"
        assert isinstance(
            await HttpClient(lambda: allow, resolve=names("127.0.0.1")).perform(request(url)), HttpResponse
        )
        assert (
            why(await HttpClient(lambda: allow, resolve=names("10.0.0.1")).perform(request(url))) == "denied"
        )
    assert server.connections == 1


async def test_a_name_is_resolved_once_for_each_request() -> None:
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    async with serving(ok()) as server:
        client = HttpClient(lambda: Allow(http=("http://localhost:*/*",)), resolve=resolve)
        await client.perform(request(f"http://localhost:{server.port}/"))
    assert asked == ["localhost"]


async def test_a_redirect_to_a_private_address_is_denied() -> None:
    async with serving(ok()) as inner, serving(to(f"{inner.url}/secret")) as outer:
        answer = await HttpClient(lambda: outer.allow).perform(request(outer.url))
        assert why(answer) == "denied"
        star = Allow(http=("*", f"{outer.url}/*"))
        assert why(await HttpClient(lambda: star).perform(request(outer.url))) == "denied"
    assert inner.connections == 0


@pytest.mark.parametrize(
    "there", ["file:///etc/passwd", "http://user:pw@h.example/", "//evil.example/", "http://["]
)
async def test_a_redirect_to_what_is_no_allowed_url_is_denied(there: str) -> None:
    async with serving(to(there)) as server:
        assert why(await HttpClient(lambda: server.allow).perform(request(server.url))) == "denied"


async def test_redirects_are_followed_for_get_and_handed_back_for_others() -> None:
    async with serving(to("/there?x=1", "307 Temporary Redirect"), ok(), to("/there")) as server:
        answer = await HttpClient(lambda: server.allow).perform(request(f"{server.url}/here"))
        assert isinstance(answer, HttpResponse)
        assert answer.body == "fine"
        assert server.requests[1].startswith("GET /there?x=1 ")
        answer = await HttpClient(lambda: server.allow).perform(request(f"{server.url}/here", "POST"))
        assert isinstance(answer, HttpResponse)
        assert answer.status == 302
    assert server.connections == 3


@pytest.mark.parametrize("there", ["/a b", "/a b ", "/a%20b"])
async def test_a_redirect_with_a_blank_in_it_is_quoted(there: str) -> None:
    async with serving(to(there), ok()) as server:
        answer = await HttpClient(lambda: server.allow).perform(request(server.url))
    assert isinstance(answer, HttpResponse)
    assert server.requests[1].startswith("GET /a%20b HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "headers",
    [["X: " + "y" * 9_000], ["X: " + "y" * 65_000], [f"X-{number}: 1" for number in range(5_000)]],
    ids=["one of 9 kB", "one of 65 kB", "5000"],
)
async def test_headers_are_taken_up_to_the_limit_of_their_bytes(headers: list[str]) -> None:
    async with serving(ok(b"fine", *headers)) as server:
        answer = await HttpClient(lambda: server.allow).perform(request(server.url, "POST"))
    assert isinstance(answer, HttpResponse), answer
    assert len(answer.headers) == len(headers) + 1


async def test_redirects_come_to_an_end() -> None:
    async with serving(to("/again")) as server:
        assert why(await HttpClient(lambda: server.allow).perform(request(server.url))) == "lost"
    assert server.connections == http.REDIRECTS_MAX + 1


async def test_credentials_stay_with_their_origin() -> None:
    secret = (*((name.upper(), "secret") for name in http.SECRET_HEADERS), ("X-Other", "kept"))
    async with serving(ok()) as other, serving(to("/same"), to(other.url)) as server:
        allow = Allow(http=server.allow.http + other.allow.http)
        await HttpClient(lambda: allow).perform(request(server.url, headers=secret))
    assert server.requests[1].count("secret") == len(http.SECRET_HEADERS)
    assert "secret" not in other.requests[0]
    assert "kept" in other.requests[0]


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "POST"])
@pytest.mark.parametrize("end", [cut, closed])
async def test_a_connection_that_ends_after_sending_is_lost_and_never_tried_again(
    method: str, end: Reply
) -> None:
    async with serving(end) as server:
        assert why(await HttpClient(lambda: server.allow).perform(request(server.url, method))) == "lost"
    assert server.connections == 1


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n",
        b"HTTP/1.1 200 OK\r\nContent-",
        b"this is not HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        ok(gzip.compress(b"fine", mtime=0)[:-4], "Content-Encoding: gzip"),
        ok(b"not gzip", "Content-Encoding: gzip"),
        ok(gzip.compress(b"a", mtime=0) + gzip.compress(b"b", mtime=0), "Content-Encoding: gzip"),
    ],
)
async def test_an_answer_that_is_not_whole_is_lost(reply: bytes) -> None:
    async with serving(reply) as server:
        assert why(await HttpClient(lambda: server.allow).perform(request(server.url))) == "lost"
    assert server.connections == 1


async def test_where_nobody_listens_nothing_happened() -> None:
    port = own_port()
    client = HttpClient(lambda: Allow(http=(f"http://127.0.0.1:{port}/*",)))
    assert await client.perform(request(f"http://127.0.0.1:{port}/", "POST")) == effect.Error(
        why="failed",
        text=f"POST http://127.0.0.1:{port}/: no connection to 127.0.0.1:{port}: Connection refused",
    )


async def test_a_name_that_does_not_resolve_means_that_nothing_happened() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        raise socket.gaierror("no such name")

    client = HttpClient(lambda: Allow(http=("*",)), resolve=resolve)
    assert why(await client.perform(request("http://named.example/"))) == "failed"


async def test_a_server_without_tls_under_https_means_that_nothing_happened() -> None:
    async with serving(ok()) as server:
        url = server.url.replace("http:", "https:")
        answer = await HttpClient(lambda: Allow(http=(f"{url}/*",))).perform(request(url, timeout_ms=300))
    assert why(answer) == "failed"
    assert server.requests == []


async def test_a_server_that_never_answers_times_out_after_sending() -> None:
    async with serving(never) as server:
        answer = await HttpClient(lambda: server.allow).perform(request(server.url, timeout_ms=1000))
    assert why(answer) == "timed-out"
    assert server.connections == 1


async def test_a_server_that_drips_its_answer_times_out() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with serving(drip) as server:
        answer = await HttpClient(lambda: server.allow).perform(request(server.url, timeout_ms=1000))
    assert why(answer) == "timed-out"


async def test_a_connection_that_does_not_come_about_in_time_means_that_nothing_happened() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        held = [socket.socket() for _ in range(4)]
        for one in held:  # fill the backlog, so that the next waits for its handshake
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        client = HttpClient(lambda: Allow(http=(f"http://127.0.0.1:{port}/*",)))
        answer = await client.perform(request(f"http://127.0.0.1:{port}/", "POST", timeout_ms=300))
        for one in held:
            one.close()
    assert why(answer) == "failed"


async def test_an_endless_answer_ends_at_the_limit() -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(65536))
            await writer.drain()

    async with serving(flood) as server:
        answer = await HttpClient(lambda: server.allow).perform(request(server.url))
    assert why(answer) == "lost"
    assert str(http.RESPONSE_BYTES_MAX) in answer.text  # type: ignore[union-attr]


async def test_an_answer_is_decompressed_up_to_the_limit() -> None:
    fits = gzip.compress(b"x" * http.RESPONSE_BYTES_MAX)
    bomb = gzip.compress(bytes(1 << 27))
    async with serving(ok(fits, "Content-Encoding: gzip"), ok(bomb, "Content-Encoding: gzip")) as server:
        answer = await HttpClient(lambda: server.allow).perform(request(server.url))
        assert isinstance(answer, HttpResponse)
        assert len(answer.body) == http.RESPONSE_BYTES_MAX
        assert "content-encoding" not in {name.lower() for name, _ in answer.headers}
        tracemalloc.start()
        try:
            assert why(await HttpClient(lambda: server.allow).perform(request(server.url))) == "lost"
            assert tracemalloc.get_traced_memory()[1] < 6 * http.RESPONSE_BYTES_MAX
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    "more",
    [
        {"method": "GET / HTTP/1.1\r\nX: y\r\n\r\n"},
        {"method": ""},
        {"method": "CONNECT"},
        {"headers": (("X", "a\r\nY: b"),)},
        {"headers": (("X", "a\nb"),)},
        {"headers": (("X", "a\0"),)},
        {"headers": (("X\r\nY", "b"),)},
        {"headers": (("X Y", "b"),)},
        {"headers": (("", "b"),)},
        {"headers": (("Host", "evil.example"),)},
        {"headers": (("transfer-encoding", "chunked"),)},
        {"headers": (("Content-Length", "5"),)},
        {"headers": (("Connection", "keep-alive"),)},
        {"headers": (("Upgrade", "websocket"),)},
        {"headers": (("X", "y" * 70_000),)},
        {"headers": (("X", "y"),) * 101},
    ],
)
async def test_a_request_that_would_break_out_of_its_place_is_not_sent(more: dict[str, object]) -> None:
    async with serving(ok()) as server:
        answer = await HttpClient(lambda: server.allow).perform(request(**{"url": server.url, **more}))  # type: ignore[arg-type]
    assert why(answer) == "failed"
    assert server.connections == 0


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(ok(b"proxy")) as proxy, serving(ok(b"direct")) as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "")
        answer = await HttpClient(lambda: server.allow).perform(request(server.url))
    assert isinstance(answer, HttpResponse)
    assert answer.body == "direct"


async def test_a_host_that_is_forgotten_in_one_hop_is_lost_once_anything_was_sent() -> None:
    port = own_port()
    async with serving(to(f"http://127.0.0.1:{port}/")) as server:
        allow = Allow(http=(*server.allow.http, f"http://127.0.0.1:{port}/*"))
        assert why(await HttpClient(lambda: allow).perform(request(server.url))) == "lost"
