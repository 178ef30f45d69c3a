"""The certificates of executors: got and renewed with the token, believed by name, and never a broker's."""

from __future__ import annotations

import asyncio
import base64
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession, web

from mvmci.cluster.identity import ENGINE_TLS_NAME, TLS_NAME, Login
from mvmci.engines.http import HttpTransport
from mvmci.engines.remote import RunRequest
from mvmci.roles.executor import certificate_for
from mvmci.stores.nats.layout import Layout
from mvmci.system import keys
from mvmci.trust.authority import Authority
from mvmci.trust.certificate import DAYS, Certificate, CertificateRequest, Certifier, client_context
from mvmci.trust.enrol.client import renew, renew_always
from tests.harness.waiting import LONG_S
from tests.parts.trust.conftest import CLUSTER, World

DAY_S = 24 * 3600


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "demo")


CURVE, KIND = "06082a8648ce3d030107", "06072a8648ce3d0201"


def strange(pem: str, number: str) -> str:
    """What is in PEM, with an object identifier `number`, in DER, that ends otherwise."""
    lines, known = pem.splitlines(), bytes.fromhex(number)
    data = base64.b64decode("".join(lines[1:-1]))
    assert known in data
    body = base64.encodebytes(data.replace(known, known[:-1] + b"\x63")).decode()
    return f"{lines[0]}\n{body}{lines[-1]}\n"


STRANGE_KEYS: dict[Any, str] = {
    "of a curve that nobody knows": strange(keys.public_tls_key(keys.new_tls_key()), CURVE),
    "of a kind that nobody knows": strange(keys.public_tls_key(keys.new_tls_key()), KIND),
}


def certifier_of(authority: Authority) -> Certifier:
    key = keys.new_tls_key()
    return Certifier(key=key, ca=authority.sign_signer(keys.public_tls_key(key), "control-plane-1"))


def certificate(tmp_path: Path, *addresses: str) -> Certificate:
    return Certificate(tmp_path / "unit", ("box",), lambda: addresses or ("127.0.0.1",))


def got(tmp_path: Path, certifier: Certifier, now: float | None = None) -> Certificate:
    """One that was asked for and signed."""
    own = certificate(tmp_path)
    asked = own.wanted(now)
    assert asked is not None
    own.keep(certifier.certificate(asked, now or time.time()))
    return own


@asynccontextmanager
async def served(context: ssl.SSLContext) -> AsyncIterator[int]:
    """Somebody who says no to every job, with a certificate."""

    async def full(request: web.Request) -> web.Response:
        return web.Response(status=503)

    app = web.Application()
    app.router.add_post("/api/engine/run", full)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def shown(port: int, context: ssl.SSLContext, name: str) -> dict[str, Any]:
    """The certificate that a client sees, if it believes it."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
    try:
        return dict(writer.get_extra_info("peercert"))
    finally:
        writer.close()


class NoLink:
    """As much of a `Link` as a transport wants."""

    def __init__(self, ca: str) -> None:
        self.login = Login(urls=("tls://x:1",), ca=ca)

    async def subscribe(self, *_: object) -> Any:
        async def leave() -> None:
            pass

        return leave


async def told(port: int, ca: str, **more: Any) -> str:
    """What a worker says that sends a job there."""
    transport = HttpTransport(f"https://127.0.0.1:{port}", "", NoLink(ca), Layout(CLUSTER), **more)  # type: ignore[arg-type]
    await transport.open()
    try:
        async with transport.send(RunRequest(job="j", worker="w")):
            return "taken"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        await transport.close()


async def test_an_executor_is_believed_by_workers_and_by_whoever_dials_its_address(
    authority: Authority, tmp_path: Path
) -> None:
    own = got(tmp_path, certifier_of(authority))
    async with served(own.context) as port, ClientSession() as session:
        assert (await told(port, authority.ca)).startswith("NoCapacity")
        trusted = client_context(authority.ca)
        async with session.post(f"https://127.0.0.1:{port}/api/engine/run", ssl=trusted) as answer:
            assert answer.status == 503
        found = await shown(port, trusted, "box")
        assert {one for _, one in found["subjectAltName"]} == {ENGINE_TLS_NAME, "box", "127.0.0.1"}


async def test_a_worker_sends_nothing_to_a_stranger(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority.create(tmp_path / "other" / "demo")
    async with served(got(tmp_path, certifier_of(stranger)).context) as port:
        assert "EngineAway" in await told(port, authority.ca)
    async with served(got(tmp_path / "own", certifier_of(authority)).context) as port:
        assert "EngineAway" in await told(port, authority.ca, public=True), "no public CA knows it"


async def test_a_broker_is_no_executor_to_a_worker(authority: Authority) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.folder / "broker.pem", authority.folder / "broker.key")
    async with served(context) as port:
        assert "EngineAway" in await told(port, authority.ca)


async def test_who_has_a_control_planes_key_cannot_be_a_broker(authority: Authority, tmp_path: Path) -> None:
    """Its own certificate says so, and every client looks."""
    certifier, key = certifier_of(authority), keys.new_tls_key()
    for name in (TLS_NAME, f"x.{TLS_NAME}"):
        forged = keys.sign_certificate(
            certifier.key, certifier.ca, keys.public_tls_key(key), names=(name,), addresses=(),
            now=time.time(), dials=True,
        )  # fmt: skip
        (tmp_path / "forged.pem").write_text(forged + certifier.ca + key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "forged.pem")
        async with served(context) as port:
            with pytest.raises(ssl.SSLCertVerificationError, match="excluded subtree violation"):
                await shown(port, client_context(authority.ca), name)


async def test_nor_can_it_dial_as_one(authority: Authority, tmp_path: Path) -> None:
    """Brokers know each other by certificates that may dial."""
    certifier, key = certifier_of(authority), keys.new_tls_key()
    forged = keys.sign_certificate(
        certifier.key, certifier.ca, keys.public_tls_key(key), names=("box",), addresses=(), now=time.time(),
        dials=True,
    )  # fmt: skip
    (tmp_path / "forged.pem").write_text(forged + certifier.ca + key)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=authority.ca)
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_cert_chain(authority.folder / "broker.pem", authority.folder / "broker.key")
    for chain, fine in ((authority.folder / "broker.pem", True), (tmp_path / "forged.pem", False)):
        client = client_context(authority.ca)
        client.load_cert_chain(chain, authority.folder / "broker.key" if fine else None)
        said = b""

        async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"INFO ")
            writer.close()

        listening = await asyncio.start_server(hold, "127.0.0.1", 0, ssl=server)
        async with listening:
            port = listening.sockets[0].getsockname()[1]
            try:
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, ssl=client, server_hostname=TLS_NAME
                )
                said = await reader.read()
                writer.close()
            except (ssl.SSLError, ConnectionError):
                pass
        assert (said == b"INFO ") == fine


@pytest.mark.parametrize(
    "asked",
    [
        {"names": (TLS_NAME,)},
        {"names": ("Broker.MVMCI",)},
        {"names": ("executor.mvmci", "mvmci")},
        {"names": ("a b",)},
        {"names": ("*.example.com",)},
        {"names": ("",)},
        {"names": tuple(f"a{n}" for n in range(65))},
        {"addresses": ("not-an-address",)},
        {"addresses": ("127.0.0.1",) * 65},
        {"key": "nonsense"},
        {"key": "of a curve that nobody knows"},
        {"key": "of a kind that nobody knows"},
    ],
)
def test_a_control_plane_signs_nothing_that_is_not_a_hosts(
    asked: dict[str, Any], authority: Authority
) -> None:
    fine = {"key": keys.public_tls_key(keys.new_tls_key())}
    certifier = certifier_of(authority)
    asked = {name: STRANGE_KEYS.get(what, what) for name, what in asked.items()}
    assert certifier.certificate(CertificateRequest(**fine), time.time())
    assert not certifier.certificate(CertificateRequest(**(fine | asked)), time.time())


async def test_a_certificate_is_renewed_while_connections_go_on(authority: Authority, tmp_path: Path) -> None:
    certifier, now = certifier_of(authority), time.time()
    own = got(tmp_path, certifier, now - DAYS * DAY_S * 0.6)
    trusted = client_context(authority.ca)
    async with served(own.context) as port:
        first = await shown(port, trusted, ENGINE_TLS_NAME)
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=trusted, server_hostname=ENGINE_TLS_NAME
        )
        asked = own.wanted()
        assert asked is not None, "half of its life is over"
        own.keep(certifier.certificate(asked, now))
        assert own.wanted() is None
        assert (await shown(port, trusted, ENGINE_TLS_NAME))["serialNumber"] != first["serialNumber"]
        writer.write(b"POST /api/engine/run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        assert b"503" in await reader.readline()
        writer.close()


def test_another_address_wants_another_certificate_and_a_restart_none(
    authority: Authority, tmp_path: Path
) -> None:
    got(tmp_path, certifier_of(authority))
    again = certificate(tmp_path)
    assert again.there.is_set() and again.wanted() is None
    moved = certificate(tmp_path, "127.0.0.1", "192.0.2.1")
    asked = moved.wanted()
    assert asked is not None and asked.addresses == ("127.0.0.1", "192.0.2.1")


@pytest.mark.parametrize("left", [b"", b"nonsense"])
def test_files_that_are_damaged_are_made_anew(authority: Authority, tmp_path: Path, left: bytes) -> None:
    got(tmp_path, certifier_of(authority))
    (tmp_path / "unit" / "tls.pem").write_bytes(left)
    own = certificate(tmp_path)
    assert not own.there.is_set() and own.wanted() is not None


def test_no_certificate_lives_longer_than_that_of_who_signed_it(authority: Authority) -> None:
    certifier, key = certifier_of(authority), keys.public_tls_key(keys.new_tls_key())
    late = time.time() + (keys.SIGNER_DAYS - 10) * DAY_S
    signed = certifier.certificate(CertificateRequest(key=key), late)
    from cryptography import x509

    leaf, ca = x509.load_pem_x509_certificates(signed.encode())
    assert leaf.not_valid_after_utc <= ca.not_valid_after_utc


def test_a_control_plane_whose_own_has_expired_signs_none_and_says_no(authority: Authority) -> None:
    certifier, key = certifier_of(authority), keys.public_tls_key(keys.new_tls_key())
    long_after = time.time() + (keys.SIGNER_DAYS + 10) * DAY_S
    assert certifier.certificate(CertificateRequest(key=key), long_after) == ""


@pytest.mark.parametrize("number", [CURVE, KIND])
def test_a_certificate_that_nobody_signed_is_replaced_without_a_look(
    number: str, authority: Authority
) -> None:
    """A host over ssh says which one it has."""
    public = keys.public_tls_key(keys.new_tls_key())
    there = strange(keys.new_ca("demo", time.time())[1], number)
    assert keys.is_signed(authority.sign_certificate(public, there=there), authority.ca)
    assert keys.is_signed(authority.sign_signer(public, "control-plane-1", there=there), authority.ca)


def test_up_renews_that_of_a_control_plane_when_half_of_its_life_is_over(authority: Authority) -> None:
    from dataclasses import replace

    public = keys.public_tls_key(keys.new_tls_key())
    first = authority.sign_signer(public, "control-plane-1")
    assert authority.sign_signer(public, "control-plane-1", there=first) == first
    later = replace(authority, now=lambda: time.time() + keys.SIGNER_DAYS * DAY_S * 0.6)
    assert later.sign_signer(public, "control-plane-1", there=first) != first


@pytest.mark.parametrize(
    ("listen", "names", "addresses"),
    [
        ("192.0.2.7", {"box"}, ["192.0.2.7"]),
        ("0.0.0.0", {"box"}, None),
        ("gpu.lan", {"gpu.lan", "box"}, None),
    ],
)
def test_a_certificate_is_for_where_an_executor_listens(
    listen: str, names: set[str], addresses: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "box")
    asked = certificate_for(tmp_path, listen).wanted()
    assert asked is not None and {*asked.names} == names
    assert list(asked.addresses) == addresses if addresses else "127.0.0.1" in asked.addresses


# With a cluster.


async def test_an_executor_gets_its_certificate_with_its_token(world: World, tmp_path: Path) -> None:
    await world.control_plane()
    own = certificate(tmp_path)
    identity = world.unit("executor-1", "executor", "default")
    cluster = await world.open(identity)
    renewing = asyncio.create_task(renew_always(cluster.link, identity, tmp_path / "i.json", own))
    async with asyncio.timeout(LONG_S):
        await own.there.wait()
    async with served(own.context) as port:
        assert (await told(port, world.authority.ca)).startswith("NoCapacity")
    renewing.cancel()


async def test_a_worker_gets_none(world: World, tmp_path: Path) -> None:
    await world.control_plane()
    own, identity = certificate(tmp_path), world.unit("worker-1", "worker", "default")
    cluster = await world.open(identity)
    await renew(cluster.link, identity, tmp_path / "i.json", own)
    assert not own.there.is_set()


async def test_a_control_plane_of_the_version_before_signs_none_and_renews_all_the_same(
    world: World, tmp_path: Path
) -> None:
    plane = msgspec.structs.replace(world.plane(), tls="")
    await world.control_plane(plane=plane)
    own, identity = certificate(tmp_path), world.unit("executor-1", "executor", "default")
    cluster = await world.open(identity)
    assert await renew(cluster.link, identity, tmp_path / "i.json", own) == identity
    assert not own.there.is_set()
