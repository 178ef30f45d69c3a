"""An executor with its HTTP face at a port of this machine, over an empty store in memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, FormData

from mvmci.api import app
from mvmci.api.app import Api, serve_api
from mvmci.engines import open_embedded
from mvmci.engines.server import Executor
from mvmci.jobs.allow import Allow
from mvmci.roles.worker import Worker
from mvmci.store import Store
from tests.harness.guests import ECHO, workflow
from tests.harness.memory import open_memory
from tests.harness.places import GUESTS
from tests.harness.waiting import LONG_S

TOKEN = "a-token-of-the-tests"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class Answer:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str]:
        """The status and the sentence; every error is of that form."""
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"message", "hint"}
        assert "Traceback" not in self.json["error"]["message"]
        return self.status, self.json["error"]["message"]


@dataclass
class Face:
    """The executor, and a client of its HTTP face."""

    api: Api
    port: int
    session: ClientSession
    stop: Callable[[], Awaitable[Any]]  # only the HTTP face

    @property
    def executor(self) -> Executor:
        return self.api.executor

    @property
    def store(self) -> Store:
        return self.api.store

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        async with asyncio.timeout(LONG_S), self.session.request(method, self.url + path, **options) as found:
            return Answer(found.status, found.headers, await found.read())

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.ask("GET", path, **options)

    async def post(self, path: str, value: Any = None, **options: Any) -> Answer:
        if value is not None:
            options["data"] = value if isinstance(value, bytes) else json.dumps(value).encode()
        return await self.ask("POST", path, **options)

    async def deploy(self, data: bytes, filename: str) -> Answer:
        form = FormData()
        form.add_field("module", data, filename=filename)
        return await self.ask("POST", "/api/module/deploy", data=form)

    async def deployed(self, guest: str) -> dict[str, str]:
        """The name and the version of a guest of the tests, ready to be started."""
        data = workflow(ECHO) if guest == "echo" else (GUESTS / f"{guest}.wasm").read_bytes()
        kept = (await self.deploy(data, f"{guest}.wasm")).json["ok"]
        return {"module": kept["name"], "version": kept["version"]}

    async def start(self, guest: str, **more: Any) -> Answer:
        return await self.post("/api/workflow/start", {**await self.deployed(guest), **more})

    @contextlib.asynccontextmanager
    async def worker(self) -> AsyncIterator[Worker]:
        """Somebody who takes hints, so that jobs run."""
        worker = Worker(self.store, self.executor.engine, queues=("default",), slots=2)
        running = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


Open = Callable[..., Awaitable[Face]]


@pytest.fixture
async def open_face(host_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Open]:
    monkeypatch.setattr(app, "LINGER_S", 0.1)
    async with contextlib.AsyncExitStack() as leaving:

        async def open_face(store: Store, *, slots: int = 2, **options: Any) -> Face:
            engine = open_embedded(store, host_root, allow=Allow, slots=slots)
            leaving.push_async_callback(engine.close)
            executor = Executor(engine, store, slots=slots)
            api = Api(store=store, executor=executor, folder=tmp_path / "in", now_ms=now_ms, **options)
            serving = contextlib.AsyncExitStack()
            leaving.push_async_callback(serving.aclose)
            port = await serving.enter_async_context(serve_api(api, "127.0.0.1", 0))
            session = await leaving.enter_async_context(ClientSession())
            return Face(api, port, session, serving.aclose)

        yield open_face


@pytest.fixture
async def face(open_face: Open) -> Face:
    return await open_face(open_memory("x1"))
