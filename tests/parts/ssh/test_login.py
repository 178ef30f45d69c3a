"""With which keys we log in, and what is said where a host cannot be reached or does not let us in."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mvmci.cluster.topology import HostSection
from mvmci.errors import HostAway, HostRefused, MvmciError, Usage
from mvmci.runtimes.ssh.connection import TRIES
from tests.harness.sshd import ADDRESS, Sshd, make_key, serve, user
from tests.parts.ssh.conftest import Connect


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An agent without keys."""
    path = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # it listens
    monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
    try:
        yield path
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def add(key: Path, passphrase: str = "") -> None:
    """Give the agent a key, and type its passphrase."""
    asking = key.with_name("ask")
    asking.write_text(f"#!/bin/sh\necho '{passphrase}'\n")
    asking.chmod(0o700)
    environment = os.environ | {"SSH_ASKPASS": str(asking), "SSH_ASKPASS_REQUIRE": "force"}
    subprocess.run(["ssh-add", "-q", key], check=True, env=environment)


async def failure(connect: Connect, kind: type[MvmciError] = HostRefused, **hosts: HostSection) -> MvmciError:
    """Why the first of `hosts` cannot be had."""
    with pytest.raises(kind) as failed:
        await connect(**hosts).connect(next(iter(hosts)))
    return failed.value


async def runs(connect: Connect, section: HostSection) -> bool:
    return (await (await connect(h1=section).connect("h1")).run(["true"])).code == 0


async def test_without_a_key_it_is_said_that_there_is_none(sshd: Sshd, connect: Connect, home: Path) -> None:
    (home / ".ssh/id_ed25519").unlink()
    error = await failure(connect, h1=sshd.section())
    assert f"does not let {user()} in, and there is no key to show it: the agent has none" in error.message


async def test_a_key_that_is_not_known_there_is_named(sshd: Sshd, connect: Connect, home: Path) -> None:
    sshd.authorized_keys.write_text("")
    error = await failure(connect, h1=sshd.section())
    where = re.escape(f"h1 ([{ADDRESS}]:{sshd.port})")
    assert re.fullmatch(f"{where} does not let {user()} in with {home}/.ssh/id_ed25519", error.message)
    assert error.hint is not None
    assert f"~/.ssh/authorized_keys of {user()}" in error.hint


async def test_a_user_who_is_not_there_is_named(sshd: Sshd, connect: Connect) -> None:
    error = await failure(connect, h1=sshd.section(user="nobody-here"))
    assert "does not let nobody-here in with" in error.message


async def test_the_key_of_the_file_counts_and_no_other(
    sshd: Sshd, connect: Connect, tmp_path: Path, key: str
) -> None:
    other = make_key(tmp_path / "keys/ci")
    assert (
        "with " + str(tmp_path / "keys/ci")
        in (await failure(connect, h1=sshd.section(key="keys/ci"))).message
    )
    sshd.authorized_keys.write_text(other + "\n")
    assert await runs(connect, sshd.section(key="keys/ci"))
    assert await runs(connect, sshd.section(key=str(tmp_path / "keys/ci")))


@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519"])
async def test_any_type_of_key_will_do(sshd: Sshd, connect: Connect, home: Path, kind: str) -> None:
    (home / ".ssh/id_ed25519").unlink()
    sshd.authorized_keys.write_text(make_key(home / f".ssh/id_{kind}") + "\n")
    assert await runs(connect, sshd.section())


async def test_a_key_that_others_can_read_does_not_count(
    sshd: Sshd, connect: Connect, tmp_path: Path, home: Path
) -> None:
    make_key(tmp_path / "ci")
    (tmp_path / "ci").chmod(0o640)
    error = await failure(connect, Usage, h1=sshd.section(key="ci"))
    assert error.message == f"others can read the key {tmp_path}/ci, so it does not count"
    assert error.hint == f"chmod 600 {tmp_path}/ci"
    (home / ".ssh/id_ed25519").chmod(0o644)
    error = await failure(connect, h1=sshd.section())
    assert f"others can read the key {home}/.ssh/id_ed25519" in error.message


async def test_a_key_that_is_missing_or_none_is_said_to_be(
    sshd: Sshd, connect: Connect, tmp_path: Path
) -> None:
    error = await failure(connect, Usage, h1=sshd.section(key="ci"))
    assert error.message == f"the key {tmp_path}/ci cannot be read: No such file or directory"
    (tmp_path / "ci").write_text("no key")
    (tmp_path / "ci").chmod(0o600)
    error = await failure(connect, Usage, h1=sshd.section(key="ci"))
    assert error.message.startswith(f"{tmp_path}/ci is no private key")


async def test_a_key_with_a_passphrase_is_for_the_agent(
    sshd: Sshd, connect: Connect, tmp_path: Path, home: Path
) -> None:
    for path, told in ((tmp_path / "ci", {"key": "ci"}), (home / ".ssh/id_rsa", {})):
        make_key(path, "rsa", "secret")
        (home / ".ssh/id_ed25519").unlink(missing_ok=True)
        with pytest.raises((Usage, HostRefused)) as failed:
            await connect(h1=sshd.section(**told)).connect("h1")
        assert f"the key {path} is protected by a passphrase, and no agent has it" in failed.value.message


async def test_the_agents_keys_are_shown_and_of_a_key_with_a_passphrase_that_one(
    sshd: Sshd, connect: Connect, tmp_path: Path, home: Path, agent: Path
) -> None:
    (home / ".ssh/id_ed25519").unlink()
    sshd.authorized_keys.write_text(make_key(tmp_path / "ci", passphrase="secret") + "\n")
    for number in range(2):
        make_key(tmp_path / f"other{number}")
        add(tmp_path / f"other{number}")
    error = await failure(connect, h1=sshd.section())
    assert error.message.endswith(f"does not let {user()} in with 2 of the agent")
    add(tmp_path / "ci", "secret")
    assert await runs(connect, sshd.section())
    sshd_log = len(sshd.log)
    assert await runs(connect, sshd.section(key="ci"))
    assert sum("Failed publickey" in line or "Postponed" in line for line in sshd.log[sshd_log:]) <= 1


async def test_more_keys_than_a_host_looks_at_are_said_to_be_too_many(
    tmp_path: Path, connect: Connect, agent: Path
) -> None:
    for number in range(3):
        make_key(tmp_path / f"other{number}")
        add(tmp_path / f"other{number}")
    async with serve(tmp_path / "strict", settings={"MaxAuthTries": 2}) as sshd:
        error = await failure(connect, h1=sshd.section(host_key=sshd.host_keys[0]))
        assert "too many keys were shown it" in error.message


async def test_a_certificate_beside_a_key_is_shown(
    sshd: Sshd, connect: Connect, tmp_path: Path, home: Path
) -> None:
    authority = make_key(tmp_path / "authority")
    command = ["ssh-keygen", "-q", "-s", tmp_path / "authority", "-I", "us", "-n", user()]
    subprocess.run([*command, home / ".ssh/id_ed25519.pub"], check=True)  # noqa: ASYNC221
    sshd.authorized_keys.write_text(f"cert-authority {authority}\n")
    assert await runs(connect, sshd.section())


def dial(port: int) -> HostSection:
    return HostSection(address=ADDRESS, port=port)


async def test_a_name_that_is_none_is_said_to_be(connect: Connect) -> None:
    error = await failure(connect, HostAway, h1=HostSection(address="h1.invalid"))
    assert error.message == "h1 is not found: there is no address of the name h1.invalid"


async def test_where_nothing_listens_it_is_said(connect: Connect) -> None:
    with socket.create_server((ADDRESS, 0)) as server:
        port = server.getsockname()[1]
    error = await failure(connect, HostAway, h1=dial(port))
    assert error.message == f"h1 ([{ADDRESS}]:{port}) refuses: nothing listens there"
    error = await failure(connect, HostAway, localhost=HostSection(port=port))  # has two addresses
    assert "refuses: nothing listens there" in error.message


async def test_where_no_way_leads_it_is_said(connect: Connect) -> None:
    error = await failure(connect, HostAway, h1=HostSection(address="255.255.255.255"))
    assert error.message.startswith("there is no way to h1 (255.255.255.255): ")


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(talk: Talk) -> AsyncIterator[int]:
    """A port at which something else than sshd listens."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await talk(reader, writer)
        writer.close()

    server = await asyncio.start_server(answer, ADDRESS, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_a_host_that_says_nothing_is_said_to(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvmci.runtimes.ssh.dial.CONNECT_S", 0.2)

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listening(wait) as port:
        error = await failure(connect, HostAway, h1=dial(port))
    assert "does not answer within 0 s" in error.message


async def test_a_host_that_hangs_up_is_said_to(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvmci.runtimes.ssh.connection.RETRY_S", 0.01)
    calls = 0

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1

    async with listening(hang_up) as port:
        error = await failure(connect, HostAway, h1=dial(port))
    assert error.message.endswith("hangs up before it says who it is")
    assert calls == TRIES


async def test_what_is_no_sshd_is_said_to_be(connect: Connect) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-1.5-old\r\n")
        await reader.read()

    async with listening(answer) as port:
        error = await failure(connect, h1=dial(port))
    assert "speaks no ssh that is understood here" in error.message


async def test_hosts_behind_a_jump_host_share_one_connection_to_it(
    sshd: Sshd, connect: Connect, tmp_path: Path, key: str
) -> None:
    async with serve(tmp_path / "behind") as behind:
        behind.authorized_keys.write_text(key + "\n")
        inside = behind.section(jump="gate", host_key=behind.host_keys[0])
        hosts = {f"h{number}": inside for number in range(30)}
        connections = connect(gate=sshd.section(), **hosts)
        made = await asyncio.gather(*(connections.connect(name) for name in hosts))
        assert [(await one.run(["true"])).code for one in made] == [0] * 30
        assert sum("Accepted publickey" in line for line in sshd.log) == 1
        assert sum("Accepted publickey" in line for line in behind.log) == 30


async def test_a_jump_host_need_not_be_in_the_file_and_may_have_one_itself(
    sshd: Sshd, connect: Connect, tmp_path: Path, key: str
) -> None:
    async with serve(tmp_path / "middle") as middle, serve(tmp_path / "behind") as behind:
        for one in (middle, behind):
            one.authorized_keys.write_text(key + "\n")
        gate = f"{user()}@{ADDRESS}:{sshd.port}"
        connections = connect(
            h1=behind.section(jump="h2", host_key=behind.host_keys[0]),
            h2=middle.section(jump=gate, host_key=middle.host_keys[0]),
        )
        assert (await (await connections.connect("h1")).run(["echo", "in"])).out == b"in\n"
        assert all(
            sum("Accepted publickey" in line for line in one.log) == 1 for one in (sshd, middle, behind)
        )


async def test_a_jump_host_that_reaches_nobody_is_said_to(
    sshd: Sshd, connect: Connect, tmp_path: Path, key: str
) -> None:
    with socket.create_server((ADDRESS, 0)) as server:
        port = server.getsockname()[1]
    inside = HostSection(address=ADDRESS, port=port, jump="gate")
    error = await failure(connect, HostAway, h1=inside, gate=sshd.section())
    assert error.message == f"gate does not reach h1 ([{ADDRESS}]:{port}): Connection refused"
    async with serve(tmp_path / "closed", settings={"AllowTcpForwarding": "no"}) as closed:
        closed.authorized_keys.write_text(key + "\n")
        gate = closed.section(host_key=closed.host_keys[0])
        error = await failure(connect, HostAway, h1=inside, gate=gate)
        assert error.message.startswith(f"gate does not reach h1 ([{ADDRESS}]:{port}): ")


async def test_who_is_behind_a_jump_host_that_is_away_says_so(connect: Connect) -> None:
    with socket.create_server((ADDRESS, 0)) as server:
        port = server.getsockname()[1]
    error = await failure(connect, HostAway, h1=HostSection(address="10.0.0.1", jump="gate"), gate=dial(port))
    assert error.message == (
        f"h1 is behind gate, and gate ([{ADDRESS}]:{port}) refuses: nothing listens there"
    )
