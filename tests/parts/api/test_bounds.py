"""What hostile or careless clients send: bounded in size and in time, refused in a sentence, and gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from mvmci.api import answers, app, bodies, jobs
from mvmci.errors import StoreFull, StoreUnavailable
from mvmci.jobs import module
from mvmci.store import Chunk
from tests.harness.memory import open_memory
from tests.harness.places import GUESTS
from tests.harness.waiting import LONG_S
from tests.parts.api.conftest import TOKEN, Face, Open

DEPLOY = "/api/module/deploy"
START = "/api/workflow/start"
SOON_S = 0.2
HELLO = (GUESTS / "hello.wasm").read_bytes()


def left(face: Face) -> list[str]:
    """What lies in the folder for modules on their way in."""
    return [path.name for path in face.api.folder.iterdir()] if face.api.folder.exists() else []


def form(*parts: tuple[str, bytes], boundary: str = "b") -> bytes:
    return (
        b"".join(f"--{boundary}\r\n{head}\r\n\r\n".encode() + data + b"\r\n" for head, data in parts)
        + f"--{boundary}--\r\n".encode()
    )


def named(name: str, filename: str | None = "m.wasm", more: str = "") -> str:
    file = f'; filename="{filename}"' if filename is not None else ""
    return f'Content-Disposition: form-data; name="{name}"{file}{more}'


MULTIPART = "multipart/form-data; boundary=b"
BAD_FORMS: dict[str, tuple[str, bytes, int, str]] = {
    "no form": ("application/wasm", HELLO, 415, "the body is no form"),
    "another multipart": ("multipart/mixed; boundary=b", form((named("module"), HELLO)), 415, "no form"),
    "no boundary": ("multipart/form-data", HELLO, 400, "the form cannot be read"),
    "a long boundary": (f"multipart/form-data; boundary={'b' * 200}", HELLO, 400, "the form cannot be read"),
    "nothing": (MULTIPART, b"", 400, "the form cannot be read"),
    "no part": (MULTIPART, form(), 400, "the form has no field `module`"),
    "another boundary": (
        MULTIPART,
        form((named("module"), HELLO), boundary="c"),
        400,
        "the form cannot be read",
    ),
    "cut short": (MULTIPART, form((named("module"), HELLO))[:500], 400, "the form cannot be read"),
    "another field": (MULTIPART, form((named("file"), HELLO)), 400, "the form has no field `module`"),
    "a nameless field": (MULTIPART, form(("X: y", HELLO)), 400, "the form has no field `module`"),
    "two modules": (
        MULTIPART,
        form((named("module"), HELLO), (named("module"), HELLO)),
        400,
        "more than one",
    ),
    "no file's name": (
        MULTIPART,
        form((named("module", None), HELLO)),
        400,
        "cannot be the name of a module",
    ),
    "an empty name": (
        MULTIPART,
        form((named("module", ".wasm"), HELLO)),
        400,
        "cannot be the name of a module",
    ),
    "a long name": (
        MULTIPART,
        form((named("module", "m" * 300), HELLO)),
        400,
        "cannot be the name of a module",
    ),
    "a form in a form": (
        MULTIPART,
        form((named("module", more="\r\nContent-Type: multipart/mixed; boundary=c"), form(boundary="c"))),
        400,
        "the form has no field `module`",
    ),
    "a compressed part": (
        MULTIPART,
        form((named("module", more="\r\nContent-Encoding: gzip"), HELLO)),
        415,
        "the module is encoded",
    ),
    "many headers": (MULTIPART, form((named("module") + "\r\nX: y" * 1000, HELLO)), 400, "cannot be read"),
    "a long header": (
        MULTIPART,
        form((named("module") + "\r\nX: " + "y" * 70_000, HELLO)),
        400,
        "cannot be read",
    ),
    "no module": (MULTIPART, form((named("module"), b"\x7fELF....")), 400, "m is a native program"),
    "an empty module": (MULTIPART, form((named("module"), b"")), 400, "m is empty"),
    "a script": (MULTIPART, form((named("module"), b"#!/bin/sh\n")), 400, "m is a script"),
}


@pytest.mark.parametrize("name", BAD_FORMS)
async def test_a_bad_form_is_one_sentence_and_leaves_nothing(face: Face, name: str) -> None:
    kind, body, status, words = BAD_FORMS[name]
    found = await face.post(DEPLOY, body, headers={"Content-Type": kind})
    assert found.status == status
    assert words in found.error[1]
    assert not left(face)


@pytest.mark.parametrize(
    "filename", ["tool.wasm", "/etc/tool.wasm", r"C:\\tool.wasm", "../../tool.wasm", "tool"]
)
async def test_of_a_files_name_only_its_last_part_counts(face: Face, filename: str) -> None:
    found = await face.post(
        DEPLOY, form((named("module", filename), HELLO)), headers={"Content-Type": MULTIPART}
    )
    assert found.json["ok"]["name"] == "tool"
    assert not left(face)


async def test_what_is_too_large_is_refused_whether_or_not_it_says_so_beforehand(
    face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MODULE_BYTES_MAX", 1000)
    monkeypatch.setattr(bodies, "JSON_BYTES_MAX", 1000)

    async def pieces(data: bytes, size: int = 256):  # type: ignore[no-untyped-def]
        for at in range(0, len(data), size):
            yield data[at : at + size]

    whole = form((named("module"), HELLO))
    large = form((named("module"), bytes(bodies.FORM_BYTES_MAX)))
    for body in (large, pieces(whole), whole):
        found = await face.ask("POST", DEPLOY, data=body, headers={"Content-Type": MULTIPART})
        assert found.status == 413
    for body in (bytes(2000), pieces(bytes(2000))):
        assert (await face.ask("POST", START, data=body)).status == 413
    for headers in ({"Content-Encoding": "gzip"}, {"Content-Encoding": "br"}):
        assert (await face.post(START, b"{}", headers=headers)).error == (415, "the body is compressed")
    assert not left(face)


async def talk(face: Face, *parts: bytes) -> bytes:
    """What comes back until the connection is closed, when no more than `parts` is sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", face.port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        async with asyncio.timeout(LONG_S):
            return await reader.read()
    finally:
        writer.close()


def head(path: str, length: int, kind: str = "application/json") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\nContent-Type: {kind}\r\n\r\n"
    ).encode()


@pytest.mark.parametrize(
    ("path", "kind", "begun"),
    [
        (START, "application/json", b'{"module'),
        ("/api/engine/run", "application/json", b""),
        (DEPLOY, MULTIPART, b""),
        (DEPLOY, MULTIPART, form((named("module"), HELLO))[:2000]),
    ],
)
async def test_a_body_that_does_not_come_is_given_up(
    face: Face, monkeypatch: pytest.MonkeyPatch, path: str, kind: str, begun: bytes
) -> None:
    monkeypatch.setattr(bodies, "JSON_S", SOON_S)
    monkeypatch.setattr(bodies, "IDLE_S", SOON_S)
    answer = await talk(face, head(path, 50_000, kind), begun)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body did not come in time" in answer
    assert not left(face)


@pytest.mark.parametrize(
    ("path", "kind", "whole"),
    [
        (START, "application/json", b" " * 160_000),
        (DEPLOY, MULTIPART, form((named("module"), bytes(160_000)))),
    ],
)
async def test_a_body_that_comes_over_a_slow_line_is_taken(
    face: Face, monkeypatch: pytest.MonkeyPatch, path: str, kind: str, whole: bytes
) -> None:
    """Its time grows with what has come."""
    monkeypatch.setattr(bodies, "JSON_S", 2.0)
    monkeypatch.setattr(bodies, "MODULE_S", 2.0)
    reader, writer = await asyncio.open_connection("127.0.0.1", face.port)
    writer.write(head(path, len(whole), kind))
    for start in range(0, len(whole), 20_000):
        await asyncio.sleep(0.4)
        writer.write(whole[start : start + 20_000])
    answer = await reader.read(1000)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 4")
    assert not answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("path", [START, DEPLOY])
async def test_what_says_that_it_is_too_large_is_refused_before_it_is_sent(face: Face, path: str) -> None:
    assert b" 413 " in (await talk(face, head(path, 1 << 40, MULTIPART))).splitlines()[0]


@pytest.mark.parametrize("path", [START, DEPLOY])
async def test_a_body_that_is_not_sent_as_it_says_is_refused(face: Face, path: str) -> None:
    says = head(path, 0, MULTIPART).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    answer = await talk(face, says, b"1\r\n-\r\nno length\r\n")
    assert b" 400 " in answer
    assert b"Traceback" not in answer


async def test_headers_that_do_not_come_are_given_up(
    open_face: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "KEEP_ALIVE_S", SOON_S)
    face = await open_face(open_memory("x1"))
    assert await talk(face) == b""
    assert await talk(face, b"GET /version HTTP/1.1\r\nHost: x\r\nX: ") == b""


async def test_who_reads_nothing_is_given_up_and_the_others_are_answered(
    face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up = asyncio.Event()
    write = jobs.Reader.write

    async def watched(reader: jobs.Reader, chunk: Chunk) -> None:
        try:
            await write(reader, chunk)
        except TimeoutError:
            given_up.set()
            raise

    monkeypatch.setattr(answers, "WRITE_S", SOON_S)
    monkeypatch.setattr(jobs.Reader, "write", watched)
    job = (await face.start("hello")).json["ok"]["id"]
    pieces = [
        Chunk(attempt=0, number=number, stream="stdout", data=bytes(1 << 20), at=1) for number in range(32)
    ]
    await face.store.logs.append(job, "default", pieces)
    reader, writer = await asyncio.open_connection("127.0.0.1", face.port, limit=1)
    writer.write(f"GET /api/workflow/{job}/logs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    await reader.read(1)
    assert (await face.get("/version")).status == 200
    await asyncio.wait_for(given_up.wait(), LONG_S)  # while it reads nothing
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):  # no more than was on its way
        await asyncio.wait_for(reader.readexactly(32 << 20), LONG_S)
    writer.close()


async def test_an_answer_that_has_begun_and_cannot_go_on_is_broken_off(
    face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(_: str) -> list[Chunk]:
        raise StoreUnavailable("the broker is away")

    job = (await face.start("hello")).json["ok"]["id"]
    monkeypatch.setattr(face.store.logs, "read", away)
    answer = await talk(face, f"GET /api/workflow/{job}/logs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    assert answer.count(b"HTTP/1.1") == 1
    assert not answer.endswith(b"0\r\n\r\n")  # it does not look as if that were all


async def test_no_more_modules_come_in_at_once_than_there_is_room_for(
    face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "UPLOADS_MAX", 1)
    reader, writer = await asyncio.open_connection("127.0.0.1", face.port)
    whole = form((named("module"), HELLO))
    writer.write(head(DEPLOY, len(whole), MULTIPART) + whole[:2000])
    async with asyncio.timeout(LONG_S):
        while not left(face):  # noqa: ASYNC110 (nobody tells of it)
            await asyncio.sleep(0.01)
    assert (await face.deploy(HELLO, "m.wasm")).error == (503, "1 modules are being deployed")
    writer.write(whole[2000:])
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    assert (await face.deploy(HELLO, "m.wasm")).status == 200
    writer.close()


async def test_an_upload_that_breaks_off_leaves_nothing(face: Face) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", face.port)
    writer.write(head(DEPLOY, 50_000, MULTIPART) + form((named("module"), HELLO))[:2000])
    async with asyncio.timeout(LONG_S):
        while not left(face):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        writer.close()
        while left(face):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await face.deploy(HELLO, "m.wasm")).status == 200


async def test_a_disk_that_is_full_is_told(face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bodies, "_receive", full)
    assert (await face.deploy(HELLO, "m.wasm")).error == (507, "this executor's disk is full")

    async def no_room(*_: object) -> str:
        raise StoreFull("the store is full")

    monkeypatch.undo()
    monkeypatch.setattr(face.store.blobs, "put_file", no_room)
    assert (await face.deploy(HELLO, "m.wasm")).error == (507, "the store is full")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"hello\r\n\r\n",
        b"GET /version HTTP/1.1\r\n: x\r\n\r\n",
    ],
    ids=["TLS", "a word", "no header"],
)
async def test_what_is_no_http_is_refused_and_fills_no_log(
    face: Face, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    caplog.set_level(logging.INFO)
    assert (await talk(face, sent)).startswith(b"HTTP/1.0 400") or b" 400 " in (await talk(face, sent))
    assert "Traceback" not in caplog.text


async def test_connections_beyond_half_of_all_files_are_not_taken(
    open_face: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit: Callable[[int], tuple[int, int]] = lambda _: (8, 8)  # noqa: E731
    monkeypatch.setattr(app.resource, "getrlimit", limit)
    face = await open_face(open_memory("x1"), token=TOKEN)
    some = [await asyncio.open_connection("127.0.0.1", face.port) for _ in range(4)]
    await asyncio.gather(*(asyncio.wait_for(ask(*one), LONG_S) for one in some))
    one_more = await asyncio.open_connection("127.0.0.1", face.port)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await ask(*one_more)
    for _, writer in (*some, one_more):
        writer.close()


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await reader.readexactly(12)) == b"HTTP/1.1 200"
