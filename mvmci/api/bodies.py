"""What comes in: bodies that are hostile: bounded in size and time, and kept out of memory if large."""

from __future__ import annotations

import asyncio
import mmap
import os
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from mvmci.api.answers import HttpError
from mvmci.errors import BadModule, Usage
from mvmci.jobs.job import MODULE_NAME_CHARS_MAX
from mvmci.jobs.module import MODULE_BYTES_MAX, Module, check_module_size, inspect_module
from mvmci.system.files import create_private, private_folder
from mvmci.system.tasks import in_thread

JSON_BYTES_MAX = 16 << 20
JSON_S = 60.0
MODULE_S = 600.0
BYTES_PER_S_MIN = 8 << 10  # what comes at that rate may take as long as it takes: lines are slow
IDLE_S = 30.0  # without a byte
PIECE_BYTES = 256 << 10
FORM_BYTES_MAX = 64 << 10  # of a form around its module

PLAIN = frozenset({"", "identity", "binary", "7bit", "8bit"})
_NAME = re.compile(r"[^/\\\x00-\x1f\x7f\ud800-\udfff]+")


async def read_json(request: web.Request) -> bytes:
    """The body, which is to be JSON. Raises HttpError."""
    _check_size(request, JSON_BYTES_MAX, "the body")
    body = bytearray()
    try:
        async with asyncio.timeout(JSON_S) as limit:
            async for piece in request.content.iter_any():
                body += piece
                _prolong(limit, len(piece))
                if len(body) > JSON_BYTES_MAX:
                    raise _too_large("the body", JSON_BYTES_MAX)
    except TimeoutError:
        raise _too_slow() from None
    except web.RequestPayloadError:
        raise _broken() from None
    return bytes(body)


def _prolong(limit: asyncio.Timeout, size: int) -> None:
    """`size` bytes have come."""
    when = limit.when()
    assert when is not None
    limit.reschedule(when + size / BYTES_PER_S_MIN)


def _check_size(request: web.Request, bytes_max: int, what: str) -> None:
    """Refuse what says beforehand that it is too large, and what would have to be unpacked."""
    if request.headers.get("Content-Encoding", "").strip().lower() not in PLAIN:
        raise HttpError(415, "the body is compressed", hint="send it as it is")
    if (request.content_length or 0) > bytes_max:
        raise _too_large(what, bytes_max)


def _too_slow() -> HttpError:
    return HttpError(408, "the body did not come in time", hint="send it again", Connection="close")


def _broken() -> HttpError:
    return HttpError(400, "the body is not sent as HTTP sends one", Connection="close")


def _too_large(what: str, bytes_max: int) -> HttpError:
    return HttpError(413, f"{what} is larger than {bytes_max >> 20} MiB, which is the most that is taken")


# ---- Modules


@asynccontextmanager
async def receive_module(request: web.Request, folder: Path) -> AsyncIterator[tuple[str, Path]]:
    """The name of the module that a form carries in its field `module`, and a file in `folder` that holds it.

    Raises HttpError, Usage.
    """
    if request.content_type != "multipart/form-data":
        raise HttpError(
            415,
            "the body is no form",
            hint="send the module as the field `module`: curl -F module=@tool.wasm …",
        )
    _check_size(request, MODULE_BYTES_MAX + FORM_BYTES_MAX, "the form")
    with draft(folder) as path:
        try:
            async with asyncio.timeout(MODULE_S) as limit:
                name = await _receive(request, path, limit)
        except TimeoutError:
            raise _too_slow() from None
        except web.RequestPayloadError:
            raise _broken() from None
        except (ValueError, AssertionError, LookupError, RuntimeError, HttpProcessingError) as problem:
            # What the library makes of bytes that are no form.
            why = " ".join(ascii(str(problem))[1:-1].split())[:200] or type(problem).__name__
            raise Usage(f"the form cannot be read: {why}") from None
        yield name, path


async def _receive(request: web.Request, path: Path, limit: asyncio.Timeout) -> str:
    form = await request.multipart()
    async with asyncio.timeout(IDLE_S):
        part = await form.next()
    if not isinstance(part, BodyPartReader) or part.name != "module":
        raise Usage("the form has no field `module`", hint="curl -F module=@tool.wasm …")
    packed = {
        part.headers.get(name, "").lower() for name in ("Content-Encoding", "Content-Transfer-Encoding")
    }
    if packed - PLAIN:
        raise HttpError(415, "the module is encoded", hint="send its bytes as they are")
    name = module_name(part.filename or "")
    with create_private(path) as file:
        await _copy(part, file, name, limit)
    async with asyncio.timeout(IDLE_S):
        if await form.next() is not None:
            raise Usage("the form has more than one field", hint="send `module`, and nothing else")
    return name


async def _copy(part: BodyPartReader, file: IO[bytes], name: str, limit: asyncio.Timeout) -> None:
    size = 0
    while True:
        async with asyncio.timeout(IDLE_S):
            piece = await part.read_chunk(PIECE_BYTES)
        if not piece:
            return
        size += len(piece)
        _prolong(limit, len(piece))
        try:
            check_module_size(size, name=name)
        except BadModule as large:
            raise HttpError(413, large.message, hint=large.hint) from None
        await in_thread(file.write, piece)


def module_name(filename: str) -> str:
    """What a module whose file has that name is called. Raises Usage."""
    name = re.split(r"[/\\]", filename)[-1].removesuffix(".wasm")
    if not _NAME.fullmatch(name) or len(name) + len(".wasm") > MODULE_NAME_CHARS_MAX:
        raise Usage(
            f"{ascii(filename)[:80]} cannot be the name of a module's file",
            hint="give it one, such as tool.wasm: curl -F 'module=@x;filename=tool.wasm' …",
        )
    return name


def inspect_file(path: Path, name: str) -> Module:
    """What the module in the file at `path` is. Raises BadModule."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        check_module_size(size, name=name)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    return inspect_module(memoryview(data), name=name)


@contextmanager
def draft(folder: Path) -> Iterator[Path]:
    """A path for a file that is there for a while; `files.sweep` removes it if we are killed."""
    private_folder(folder)
    path = folder / f".module-{secrets.token_hex(8)}.{os.getpid()}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
