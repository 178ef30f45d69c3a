"""The world outside of a cluster: a server that remembers what it was asked for, and under which keys.

Each answer is the number of the request, so that a result which a workflow got tells which request it
was the answer to. A request can be held, which keeps its workflow in the middle of an effect.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass(frozen=True)
class Asked:
    """One request as it came in."""

    number: int
    key: str | None
    authorization: str | None = None


@dataclass
class Gate:
    """A request that is answered when it may be."""

    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    may_go: asyncio.Event = field(default_factory=asyncio.Event)


class Outside:
    """The server. It takes up to `slow_s` for an answer, by the dice of `seed`."""

    def __init__(self, *, slow_s: float = 0.0, seed: int = 0) -> None:
        self.asked: dict[str, list[Asked]] = defaultdict(list)  # by path
        self.gates: dict[str, Gate] = {}
        self.total = 0
        self.url = ""
        self._slow_s = slow_s
        self._dice = random.Random(seed)

    def hold(self, path: str) -> Gate:
        """Hold the first request for `path`; the next ones are answered at once."""
        gate = self.gates[path] = Gate()
        return gate

    @property
    def allow(self) -> str:
        """The rule that lets workflows come here."""
        return f"{self.url}/*"

    async def _answer(self, request: web.Request) -> web.Response:
        await request.read()
        self.total += 1
        asked = Asked(
            self.total, request.headers.get("Idempotency-Key"), request.headers.get("Authorization")
        )
        self.asked[request.path].append(asked)
        gate = self.gates.pop(request.path, None)
        if gate is not None:
            gate.arrived.set()
            await gate.may_go.wait()
        if self._slow_s:
            await asyncio.sleep(self._dice.uniform(0, self._slow_s))
        return web.Response(text=str(asked.number))

    @asynccontextmanager
    async def serve(self, host: str = "127.0.0.1") -> AsyncIterator[Outside]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, host, 0)
        await site.start()
        self.url = f"http://{host}:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            for gate in self.gates.values():
                gate.may_go.set()
            await runner.cleanup()


def once(outside: Outside, job: str, number: int) -> dict[str, Any]:
    """A step of the guest `script`: a request that must not be made twice."""
    url = f"{outside.url}/{job}/once/{number}"
    return {"http": {"method": "POST", "url": url}}


def again(outside: Outside, job: str, number: int) -> dict[str, Any]:
    """The same of one that may be made again, under its one key."""
    url = f"{outside.url}/{job}/again/{number}"
    return {"http": {"method": "PUT", "url": url, "idempotent": True}}


def path_of(step: dict[str, Any]) -> str:
    """Where the server sees a step."""
    return "/" + str(step["http"]["url"]).split("/", 3)[3]


Steps = Sequence[dict[str, Any]]
