"""What `mvmci.roles.broker` promises of the server that it starts, and what it answers to batches."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from mvmci.cluster.broker import LOOPBACK, BrokerSettings
from mvmci.cluster.identity import TLS_NAME, Login
from mvmci.errors import EXIT_USAGE, StoreUnavailable, TicketRefused, Usage
from mvmci.roles import broker
from mvmci.roles.broker import check_broker, configuration
from mvmci.stores.nats import remove
from mvmci.stores.nats.append import BATCH_MIN
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import Link
from mvmci.system.ports import check_port
from mvmci.trust.authority import Authority
from tests.conftest import open_nats
from tests.harness.broker import Broker, ensure, serve
from tests.harness.places import ROOT
from tests.harness.ports import own_port
from tests.harness.proxy import Proxy
from tests.harness.waiting import LONG_S

OPEN_BATCHES = 60  # more than the server holds for a stream

STARTS_ONE = """
import asyncio, sys
from pathlib import Path
from tests.harness.broker import serve

async def main():
    async with serve(Path(sys.argv[1])) as url:
        print(url, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""

# A supervisor's child that becomes a broker: told to die with its parent, as units are.
BECOMES_ONE = """
import ctypes, os, signal, sys
from pathlib import Path
from mvmci.cluster.broker import BrokerSettings
from mvmci.roles.broker import become
from mvmci.trust.authority import Authority

if os.fork() == 0:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    print(os.getpid(), flush=True)
    cluster, settings = Path(sys.argv[1]), BrokerSettings(name="broker-1", port=int(sys.argv[2]))
    become(cluster / "broker", settings, Authority.load(cluster).guard())
signal.pause()
"""


async def answers(url: str) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


async def test_the_broker_ends_with_its_block_and_keeps_its_data(tmp_path: Path) -> None:
    async with serve(tmp_path / "broker") as url:
        await ensure(url, "demo", store_bytes=64 << 20)
        store = await open_nats(url, "demo", "u1")
        await store.journals.append("a", "spec", "q", b"x", expect=0)
        await store.close()
    assert not await answers(url)
    async with serve(tmp_path / "broker") as url:
        store = await open_nats(url, "demo", "u1")
        assert len(await store.journals.read("a")) == 1
        await store.close()


async def test_a_stream_whose_folder_the_server_could_not_make_is_made_again(tmp_path: Path) -> None:
    """As where it is still removing the account's folder, after another's last stream. Here a file is in
    the way, which the server removes when it gives up.
    """
    streams = tmp_path / "broker" / "store" / "jetstream" / "$G" / "streams"
    streams.mkdir(parents=True)
    (streams / Layout("demo").jobs).touch()
    async with serve(tmp_path / "broker") as url:
        await ensure(url, "demo", store_bytes=64 << 20)
        store = await open_nats(url, "demo", "u1")
        await store.journals.append("a", "spec", "q", b"x", expect=0)
        await store.close()


async def test_the_broker_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STARTS_ONE, tmp_path / "broker", stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )  # fmt: skip
    assert parent.stdout is not None
    url = (await parent.stdout.readline()).decode().strip()
    assert await answers(url)
    os.kill(parent.pid, signal.SIGKILL)
    await parent.wait()
    await parent.stdout.read()
    async with asyncio.timeout(LONG_S):
        while await answers(url):  # noqa: ASYNC110 (nobody tells of it)
            await asyncio.sleep(0.02)


async def test_a_server_that_does_not_sync_is_not_used(tmp_path: Path) -> None:
    relaxed = Broker(tmp_path / "broker", BrokerSettings(synced=False))
    with pytest.raises(StoreUnavailable, match="does not sync"):
        await relaxed.start()
    assert relaxed.process is not None
    assert relaxed.process.returncode is not None


async def test_a_server_that_cannot_start_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "broker").mkdir()
    (tmp_path / "broker" / "store").write_text("in the way")
    with pytest.raises(StoreUnavailable, match="did not start"):
        await Broker(tmp_path / "broker").start()


async def test_what_it_keeps_is_its_owners_alone(tmp_path: Path) -> None:
    async with serve(tmp_path / "broker"):
        assert (tmp_path / "broker").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "broker" / "nats.conf").stat().st_mode & 0o777 == 0o600


async def test_appends_go_out_plainly_when_too_many_batches_are_open(broker_url: str) -> None:
    cluster = f"t-{secrets.token_hex(4)}"
    await ensure(broker_url, cluster, store_bytes=64 << 20)
    store = await open_nats(broker_url, cluster, "u1")
    hog = Link(broker_url, "hog")
    await hog.open()
    for number in range(OPEN_BATCHES):
        headers = {"Nats-Batch-Id": f"b{number}", "Nats-Batch-Sequence": "1"}
        await hog.publish(Layout(cluster).message(f"hog{number}", "spec", "q", "u"), b"x", headers=headers)
    await hog.api("INFO")  # they have arrived
    writes = [store.journals.append(f"j{i}", "spec", "q", b"x", expect=0) for i in range(4 * BATCH_MIN)]
    assert len(set(await asyncio.gather(*writes))) == 4 * BATCH_MIN
    await hog.close()
    await store.close()
    await remove(broker_url, cluster)


# One of a cluster.


async def until_silent(url: str) -> None:
    async with asyncio.timeout(LONG_S):
        while await answers(url):  # noqa: ASYNC110 (nobody tells of it)
            await asyncio.sleep(0.02)


@pytest.fixture
def settings() -> BrokerSettings:
    """What the broker with an operator is to be; a test may say otherwise."""
    return BrokerSettings()


@dataclass
class Guarded:
    """A broker with an operator, and how to reach it."""

    server: Broker
    authority: Authority
    base: Login


@pytest.fixture
async def guarded(tmp_path: Path, settings: BrokerSettings) -> AsyncIterator[Guarded]:
    authority = Authority.create(tmp_path / "demo")
    server = Broker(tmp_path / "demo" / "broker", settings, authority.guard())
    await server.start()
    url = f"nats://{LOOPBACK}:{server.settings.port}"
    yield Guarded(server, authority, authority.login([url], tls=settings.listen != LOOPBACK))
    await server.stop()


async def test_a_process_that_becomes_a_broker_stays_the_same_and_dies_with_its_parent(
    tmp_path: Path,
) -> None:
    cluster = tmp_path / "demo"
    authority = Authority.create(cluster)
    port = own_port()
    (cluster / "broker").mkdir()
    (cluster / "broker" / "nats-server_1.ports").write_text("{}")
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", BECOMES_ONE, cluster, str(port), stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    try:
        url = await _see_that_it_became_one(cluster, pid, port)
        base = authority.login([url], tls=False)
        assert await check_broker(authority.admin(base).login, authority.system_login(base)) == []
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        await parent.wait()
        await parent.stdout.read()  # until the broker has gone, which has it too
    await until_silent(url)


async def _see_that_it_became_one(cluster: Path, pid: int, port: int) -> str:
    async with asyncio.timeout(LONG_S):
        while not broker.read_ports(cluster / "broker", pid):  # noqa: ASYNC110 (nobody tells of it)
            await asyncio.sleep(0.02)
    [url] = broker.read_ports(cluster / "broker", pid)["nats"]
    assert url == f"nats://{LOOPBACK}:{port}"
    assert [path.name for path in (cluster / "broker").glob("*.ports")] == [f"nats-server_{pid}.ports"]
    assert os.readlink(f"/proc/{pid}/exe") == str(broker.find_server().resolve())
    return url


@pytest.fixture
def no_exec(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests themselves must not become a broker."""

    def execv(*_: object) -> None:
        raise AssertionError("this would have become a broker")

    monkeypatch.setattr(os, "execv", execv)


@pytest.mark.usefixtures("no_exec")
def test_a_port_in_use_is_one_sentence_before_anything_is_changed(tmp_path: Path) -> None:
    cluster = tmp_path / "demo"
    authority = Authority.create(cluster)
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        for look in (lambda: check_port(LOOPBACK, port), lambda: check_port("0.0.0.0", port)):
            with pytest.raises(Usage, match=f"port {port} of .* is in use") as caught:
                look()
            assert caught.value.exit_code == EXIT_USAGE and "broker.listen" in str(caught.value.hint)
        guard = authority.guard()
        assert guard is not None
        with pytest.raises(Usage, match="is in use"):
            broker.become(cluster / "broker", BrokerSettings(port=port), guard)
        assert not (cluster / "broker").exists()
    check_port(LOOPBACK, port)


def test_an_address_that_is_not_this_machines_is_one_sentence() -> None:
    with pytest.raises(Usage, match="this machine does not have that address"):
        check_port("203.0.113.77", 4222)
    with pytest.raises(Usage, match="cannot be used"):
        check_port("no.such.host.invalid", 4222)


async def test_a_broker_of_a_cluster_takes_nobody_without_a_credential(
    guarded: Guarded, tmp_path: Path
) -> None:
    authority, base = guarded.authority, guarded.base
    with pytest.raises(TicketRefused):
        await Link(base, "nobody").open()
    forged = Authority.create(tmp_path / "other").admin(base).login
    with pytest.raises(TicketRefused):
        await Link(forged, "forger").open()
    stolen = msgspec.structs.replace(authority.admin(base).login, seed=forged.seed)
    with pytest.raises(TicketRefused):
        await Link(stolen, "thief").open()


class Late(Proxy):
    """Has the first who comes hear what was said to one who was too slow."""

    def __init__(self, target: str, said: bytes) -> None:
        super().__init__(target)
        self.said = said

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said, self.said = self.said, b""
        if said:
            writer.write(said)
            await reader.read()
        else:
            await super()._serve(reader, writer)


async def test_who_was_too_slow_to_show_a_credential_is_not_refused_and_tries_again(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvmci.stores.nats.link._CONNECT_S", LONG_S)
    reader, writer = await asyncio.open_connection(LOOPBACK, guarded.server.settings.port)
    async with asyncio.timeout(LONG_S):
        said = await reader.read()  # until the server hangs up
    writer.close()
    assert said.endswith(b"-ERR 'Authentication Timeout'\r\n")
    async with Late(guarded.base.urls[0], said).serve() as proxy:
        login = guarded.authority.admin(guarded.base).login
        found = Link(msgspec.structs.replace(login, urls=(proxy.url,)), "late")
        await found.open()
        await found.close()
    assert not proxy.said


async def test_a_broker_of_a_cluster_has_no_other_listener(guarded: Guarded) -> None:
    server = guarded.server
    assert server.process is not None
    assert set(broker.read_ports(server.folder, server.process.pid)) == {"nats"}


@pytest.mark.parametrize("settings", [BrokerSettings(listen="0.0.0.0")])
async def test_beyond_the_loopback_a_broker_speaks_nothing_but_tls_1_3(guarded: Guarded) -> None:
    authority, base, port = guarded.authority, guarded.base, guarded.server.settings.port
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    with pytest.raises(TimeoutError):  # not even a greeting
        async with asyncio.timeout(0.3):
            await reader.read(1)
    writer.close()
    for newest, taken in ((ssl.TLSVersion.TLSv1_2, False), (ssl.TLSVersion.TLSv1_3, True)):
        context = ssl.create_default_context(cadata=authority.ca)
        context.maximum_version = newest
        try:
            _, writer = await asyncio.open_connection(LOOPBACK, port, ssl=context, server_hostname=TLS_NAME)
        except ssl.SSLError:
            assert not taken
        else:
            assert taken and writer.get_extra_info("ssl_object").version() == "TLSv1.3"
            writer.close()
    with pytest.raises(StoreUnavailable):
        await Link(msgspec.structs.replace(authority.admin(base).login, ca=""), "plain").open()
    assert await check_broker(authority.admin(base).login, authority.system_login(base)) == []


def test_a_broker_that_would_take_anybody_listens_on_the_loopback_alone(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="take anybody"):
        configuration(tmp_path, BrokerSettings(listen="0.0.0.0"), None)


@pytest.mark.parametrize("settings", [BrokerSettings(synced=False)])
async def test_a_broker_that_does_not_sync_is_found_out_unless_that_is_wanted(guarded: Guarded) -> None:
    authority, base = guarded.authority, guarded.base
    admin, system = authority.admin(base).login, authority.system_login(base)
    with pytest.raises(StoreUnavailable, match="does not sync every write"):
        await check_broker(admin, system)
    [warning] = await check_broker(admin, system, synced=False)
    assert "power cut" in warning
    told = await check_broker(admin)  # of somebody else's, nobody can tell
    assert "does not tell us" in told[0] and "each may do what any other may" in told[1]


async def test_what_a_broker_lacks_is_named(tmp_path: Path) -> None:
    """A server without JetStream; somebody on it answers as older ones do."""
    server = await asyncio.create_subprocess_exec(
        broker.find_server(), "-a", LOOPBACK, "-p", "-1", "--ports_file_dir", tmp_path,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    async with asyncio.timeout(LONG_S):
        while not (ports := broker.read_ports(tmp_path, server.pid)):  # noqa: ASYNC110 (nobody tells of it)
            await asyncio.sleep(0.02)
    try:
        await _see_what_it_lacks(Login(urls=(ports["nats"][0],)))
    finally:
        server.kill()
        await server.wait()


async def _see_what_it_lacks(login: Login) -> None:
    with pytest.raises(Usage, match="cannot carry a cluster: it has no JetStream"):
        await check_broker(login)
    link = Link(login, "old")
    await link.open()

    answers = {
        b'{"api": {"level": 1}}': "older than 2.12",
        b'{"api": {}}': "older than 2.12",
        b'{"error": {"code": 503, "description": "not enabled for account"}}': "not enabled for account",
    }
    tell = iter(answers)

    async def answer(subject: str, data: bytes) -> bytes:
        return next(tell)

    await link.serve("$JS.API.INFO", answer, lambda subject, reply: True)
    for lacks in answers.values():
        with pytest.raises(Usage, match=f"cannot carry a cluster: .*{lacks}") as caught:
            await check_broker(login)
        assert caught.value.exit_code == EXIT_USAGE and "2.12" in str(caught.value.hint)
    await link.close()


WEIRD = 'José\'s "state" \\n \\x41 $HOME #1 {a: b}; %s \x01\t' + os.fsdecode(b"\xff")


async def test_a_server_starts_in_a_folder_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / WEIRD
    async with serve(folder):
        assert {"nats.conf", "store"} <= set(os.listdir(folder))
        assert (folder / broker.LOG).stat().st_size
    assert os.listdir(tmp_path) == [WEIRD]
