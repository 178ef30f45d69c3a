"""The balancer: a real haproxy in front of executors that are only as real as they have to be."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientError, ClientSession, web

from mvmci.cluster.deployment import Unit, UnitConfig
from mvmci.cluster.identity import ENGINE_TLS_NAME
from mvmci.errors import Usage
from mvmci.roles.balancer import find_haproxy, haproxy_config
from mvmci.system import keys
from mvmci.system.files import write_private
from mvmci.trust.authority import Authority
from mvmci.trust.certificate import Certificate, Certifier, client_context
from mvmci.trust.provision import make_config
from tests.harness.places import need
from tests.harness.ports import own_port
from tests.harness.waiting import LONG_S, until_true

ORDER = b'{"job": "j"}'


class Backend:
    """An executor's door: `slots` orders at a time, each answered at once and ended when `done` is set."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.running = 0
        self.refused = 0
        self.taken = 0
        self.healthy = True
        self.done = asyncio.Event()
        self.port = own_port()  # as it goes, it is back there, and nobody else meanwhile
        self._runner: web.AppRunner | None = None

    async def open(self, tls: ssl.SSLContext | None = None) -> None:
        app = web.Application()
        app.router.add_post("/api/engine/run", self._run)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=tls)
        await site.start()

    async def close(self) -> None:
        self.done.set()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _run(self, request: web.Request) -> web.StreamResponse:
        assert await request.read() == ORDER
        if self.running >= self.slots:
            self.refused += 1
            return web.Response(status=503, headers={"Retry-After": "1"})
        self.running += 1
        self.taken += 1
        try:
            answer = web.StreamResponse()
            await answer.prepare(request)
            await answer.write(b"taken\n")
            await self.done.wait()
            with contextlib.suppress(ConnectionError):  # who listened may have gone
                await answer.write(b"stepped\n")
            return answer
        finally:
            self.running -= 1


class Front:
    """The balancer's URL, and a client that gives orders."""

    def __init__(self, url: str, session: ClientSession, trusts: ssl.SSLContext | None = None) -> None:
        self.url = url
        self.tls = {"ssl": trusts, "server_hostname": ENGINE_TLS_NAME} if trusts is not None else {}
        self.session = session
        self.answers: list[Any] = []

    async def order(self) -> int:
        """Give one, and keep its answer open; the status."""
        answer = await self.session.post(f"{self.url}/api/engine/run", data=ORDER, **self.tls)
        self.answers.append(answer)
        if answer.status == 200:
            assert await answer.content.readline() == b"taken\n"
        return int(answer.status)

    def close(self) -> None:
        """Hang up on all of them: what a test leaves open is held against whichever test runs later."""
        for answer in self.answers:
            answer.close()


@asynccontextmanager
async def balanced(tmp_path: Path, *backends: Backend) -> AsyncIterator[Front]:
    need(shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin"), "no haproxy")
    (tmp_path / "demo" / "units").mkdir(parents=True)
    for backend in backends:
        await backend.open()
    port = own_port()
    command = [sys.executable, "-m", "mvmci", "balancer", "--state", str(tmp_path), "--name", "b-1"]
    command += ["--listen", f"127.0.0.1:{port}"]
    command += [f"--backend=e-{n}=127.0.0.1:{one.port}" for n, one in enumerate(backends)]
    with (tmp_path / "log").open("wb") as log:
        abroad = os.environ | {"TZ": "Asia/Tokyo"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=abroad)  # noqa: ASYNC220 (it is watched)
    try:
        async with ClientSession() as session:
            front = Front(f"http://127.0.0.1:{port}", session)
            await until_true(lambda: process.poll() is not None or answers(port))
            assert process.poll() is None, (tmp_path / "log").read_text()
            executable = os.readlink(f"/proc/{process.pid}/exe")
            assert executable == os.path.realpath(find_haproxy())  # and none around it
            yield front
            front.close()
    finally:
        process.terminate()
        process.wait(LONG_S)
        for backend in backends:
            await backend.close()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_each_job_goes_to_the_executor_that_has_the_fewest(tmp_path: Path) -> None:
    backends = [Backend(4), Backend(4), Backend(4)]
    async with balanced(tmp_path, *backends) as front:
        assert [await front.order() for _ in range(9)] == [200] * 9
        assert [one.running for one in backends] == [3, 3, 3]
        assert [one.refused for one in backends] == [0, 0, 0]


async def test_an_executor_that_is_full_with_jobs_of_others_is_passed_over(tmp_path: Path) -> None:
    full, other = Backend(0), Backend(9)
    async with balanced(tmp_path, full, other) as front:
        assert [await front.order() for _ in range(6)] == [200] * 6
        assert other.running == 6
        assert full.refused


async def test_when_all_are_full_the_worker_hears_so_until_one_is_not(tmp_path: Path) -> None:
    backends = [Backend(2), Backend(2), Backend(2)]
    async with balanced(tmp_path, *backends) as front:
        statuses = Counter([await front.order() for _ in range(9)])
        assert statuses == {200: 6, 503: 3}
        assert [one.running for one in backends] == [2, 2, 2]
        refused = front.answers[-1]
        assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
        backends[0].done.set()  # slots are free again
        await until_true(lambda: backends[0].running == 0)
        assert await front.order() == 200


async def test_what_an_executor_says_is_heard_at_once_and_to_the_end(tmp_path: Path) -> None:
    backend = Backend(1)
    async with balanced(tmp_path, backend) as front:
        async with asyncio.timeout(LONG_S):
            assert await front.order() == 200  # its first word was read, and it has not ended
        backend.done.set()
        assert await front.answers[0].content.read() == b"stepped\n"


async def test_an_executor_that_dies_is_passed_over_and_taken_back(tmp_path: Path) -> None:
    dying, other = Backend(9), Backend(9)
    async with balanced(tmp_path, dying, other) as front:
        assert [await front.order() for _ in range(2)] == [200, 200]
        assert dying.running == 1
        await dying.close()
        assert [await front.order() for _ in range(4)] == [200] * 4
        assert other.running == 5
        await until_true(lambda: "is DOWN" in (tmp_path / "log").read_text())
        dying.done.clear()
        await dying.open()
        before = dying.taken

        async def comes_back() -> bool:
            return await front.order() == 200 and dying.taken > before

        await until_true(comes_back)
    log = (tmp_path / "log").read_text()
    assert re.search(
        r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\+00:00 Server executors/e-0 is DOWN", log, re.MULTILINE
    )


async def test_who_follows_a_job_on_an_executor_that_fell_silent_hears_of_it(tmp_path: Path) -> None:
    silent, other = Backend(9), Backend(9)
    async with balanced(tmp_path, silent, other) as front:
        assert [await front.order() for _ in range(2)] == [200, 200]
        assert silent.running == 1
        silent.healthy = False
        cut = front.answers[0]
        async with asyncio.timeout(LONG_S):
            with pytest.raises(ClientError):
                await cut.content.read()
        assert await front.order() == 200
        assert other.running == 2


def test_names_are_looked_up_again_and_numbers_are_not() -> None:
    by_number = haproxy_config("127.0.0.1:1", {"a": "10.0.0.1:2", "b": "[::1]:3"})
    assert "server a 10.0.0.1:2\n" in by_number
    assert "resolvers" not in by_number
    by_name = haproxy_config("0.0.0.0:1", {"a": "10.0.0.1:2", "b": "executor-2:3"})
    assert "server a 10.0.0.1:2\n" in by_name
    assert "server b executor-2:3 resolvers system\n" in by_name


def test_where_there_is_no_haproxy_it_is_said_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    with pytest.raises(Usage, match="haproxy is not installed on this machine") as caught:
        find_haproxy()
    assert str(caught.value.hint).startswith("apt-get install haproxy")


@pytest.mark.parametrize(
    "options",
    [
        ["--listen=127.0.0.1:1", "--backend=a"],
        ["--listen=127.0.0.1:1", "--backend=a=h"],
        ["--listen=127.0.0.1:1", "--backend=a=h:1", "--backend=a=h:2"],
        ["--listen=127.0.0.1:1", "--backend=a=h:1 check"],
        ["--listen=127.0.0.1", "--backend=a=h:1"],
        ["--listen=127.0.0.1:1\n", "--backend=a=h:1"],
    ],
)
def test_what_would_be_another_configuration_is_refused(options: list[str], tmp_path: Path) -> None:
    need(shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin"), "no haproxy")
    (tmp_path / "demo" / "units").mkdir(parents=True)
    command = [sys.executable, "-m", "mvmci", "balancer", "--state", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: --")
    assert "is not of the form" in done.stderr


async def test_over_a_network_it_shows_who_it_is_and_gives_orders_to_our_executors_alone(
    tmp_path: Path,
) -> None:
    need(shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin"), "no haproxy")
    authority, stranger = (Authority.create(tmp_path / one / "demo") for one in ("ours", "theirs"))
    ours, theirs = Backend(2), Backend(2)
    for backend, who in ((ours, authority), (theirs, stranger)):
        await backend.open(executors_context(tmp_path, who))
    config = UnitConfig(unit=Unit(name="b-1", role="balancer", host="h", options=("--listen=0.0.0.0:1",)))
    data = make_config(config, authority, b"", keys_in=authority.folder, addresses=("127.0.0.1",))
    assert data is not None
    assert make_config(config, authority, data, keys_in=authority.folder, addresses=("127.0.0.1",)) == data
    file, port = tmp_path / "a folder" / "given.json", own_port()
    write_private(file, data)
    (tmp_path / "demo" / "units").mkdir(parents=True)
    command = [sys.executable, "-m", "mvmci", "balancer", "--state", str(tmp_path), "--name", "b-1"]
    command += ["--listen", f"127.0.0.1:{port}", "--config", str(file), "--cluster", "demo"]
    command += [f"--backend=e-{n}=127.0.0.1:{one.port}" for n, one in enumerate((theirs, ours))]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: ASYNC220 (it is watched)
    try:
        async with ClientSession() as session:
            await until_true(lambda: process.poll() is not None or answers(port))
            assert process.poll() is None, (tmp_path / "log").read_text()
            front = Front(f"https://127.0.0.1:{port}", session, client_context(authority.ca))
            assert [await front.order() for _ in range(2)] == [200, 200]
            assert (ours.running, theirs.running) == (2, 0)
            with pytest.raises(ClientError):
                await Front(f"http://127.0.0.1:{port}", session).order()
            with pytest.raises(ClientError):
                await Front(front.url, session, client_context(stranger.ca)).order()
            front.close()
    finally:
        process.terminate()
        process.wait(LONG_S)
        for backend in (ours, theirs):
            await backend.close()


def executors_context(tmp_path: Path, authority: Authority) -> ssl.SSLContext:
    """What an executor of that cluster serves with."""
    key = keys.new_tls_key()
    certifier = Certifier(key=key, ca=authority.sign_signer(keys.public_tls_key(key), "c-1"))
    own = Certificate(tmp_path / authority.issuer, (), lambda: ("127.0.0.1",))
    asked = own.wanted()
    assert asked is not None
    own.keep(certifier.certificate(asked, time.time()))
    return own.context
