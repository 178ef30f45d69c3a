"""The world around a crash test: a server outside that counts, a store that dies, and the script guest."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web

from mvmci.jobs.job import Limits
from mvmci.jobs.journal import AnyRecord, Entry, MessageKind, Result, Spec
from mvmci.journals.reader import load
from mvmci.store import Chunk, Journals, Store, keep_text
from tests.harness.places import GUESTS


class Counting:
    """An HTTP server that counts what it was asked for, and under which keys."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.keys: dict[str, set[str]] = defaultdict(set)
        self.url = ""
        self.asked = asyncio.Event()  # set by every request, for whoever clears it
        self.answers = asyncio.Event()  # cleared by whoever holds requests up
        self.answers.set()

    async def _answer(self, request: web.Request) -> web.Response:
        await request.read()
        name = f"{request.method} {request.path}"
        self.counts[name] += 1
        self.asked.set()
        await self.answers.wait()
        if "Idempotency-Key" in request.headers:
            self.keys[name].add(request.headers["Idempotency-Key"])
        return web.Response(text="yes")

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[Counting]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
        try:
            yield self
        finally:
            self.answers.set()
            await runner.cleanup()


class Crashed(BaseException):
    """The process is dead: nothing that it asks of the store happens any more."""


Where = Callable[[int, Sequence[AnyRecord]], bool]  # the number of the append, and its records


class Mortal:
    """Journals of a process that dies before or after the append that `where` names."""

    def __init__(self, inner: Journals, where: Where, when: str) -> None:
        self._inner = inner
        self._where = where
        self._when = when
        self._appends = 0
        self.crashed = False

    async def read(self, job: str, after: int = 0) -> list[Entry]:
        self._live()
        return await self._inner.read(job, after)

    async def first(self, job: str, seq: int) -> Entry | None:
        self._live()
        return await self._inner.first(job, seq)

    async def append(
        self,
        job: str,
        kind: MessageKind,
        queue: str,
        data: bytes,
        *,
        expect: int,
        may_delay: bool = False,
    ) -> int:
        self._live()
        self._appends += 1
        here = self._where(self._appends, msgspec.json.decode(data, type=_Records).records)
        if here and self._when == "before":
            self._die()
        seq = await self._inner.append(job, kind, queue, data, expect=expect)
        if here:
            self._die()
        self._live()
        return seq

    def jobs(self) -> AsyncIterator[str]:
        return self._inner.jobs()

    def _live(self) -> None:
        if self.crashed:
            raise Crashed

    def _die(self) -> None:
        self.crashed = True
        raise Crashed


class Suspicious:
    """Logs that look whether the first effect's result is on disk when its output comes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.too_early = 0

    async def append(self, job: str, queue: str, chunks: Sequence[Chunk]) -> None:
        records = (await load(self._store, job)).records
        if not any(isinstance(record, Result) for record in records):
            self.too_early += len(chunks)
        await self._store.logs.append(job, queue, chunks)

    async def read(self, job: str) -> list[Chunk]:
        return await self._store.logs.read(job)

    def follow(self, job: str) -> AsyncIterator[Chunk]:
        return self._store.logs.follow(job)


class _Records(msgspec.Struct):
    records: tuple[AnyRecord, ...]


def mortal(store: Store, where: Where, when: str) -> tuple[Store, Mortal]:
    """`store`, dying at an append."""
    journals = Mortal(store.journals, where, when)
    return dataclasses.replace(store, journals=journals), journals


async def command_spec(store: Store, job: str, guest: str, limits: Limits | None = None) -> Spec:
    """The spec of a job that is a command of tests/guests/commands."""
    return Spec(
        at=1_000,
        id=job,
        queue="default",
        kind="command",
        module=await store.blobs.put_file(GUESTS / f"{guest}.wasm"),
        name=f"{guest}.wasm",
        component=False,
        limits=limits or Limits(),
        seed=1,
        by="test",
    )


async def script_spec(
    store: Store, job: str, steps: Sequence[dict[str, Any]], *, limits: Limits | None = None
) -> Spec:
    """The spec of a job that does `steps` (see tests/guests/script)."""
    return Spec(
        at=1_000,
        id=job,
        queue="default",
        kind="workflow",
        module=await store.blobs.put_file(GUESTS / "script.wasm"),
        name="script.wasm",
        component=True,
        input=await keep_text(store.blobs, msgspec.json.encode({"steps": steps}).decode()),
        limits=limits or Limits(),
        seed=7,
        by="test",
    )
