"""Whether a host is who it is to be: what is said if not, and that nothing of us is sent before."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from mvmci.cluster.topology import HostSection
from mvmci.errors import HostRefused, Usage
from mvmci.runtimes.ssh.known_hosts import fingerprint, parse_key
from tests.harness.sshd import ADDRESS, Sshd, make_key, serve
from tests.parts.ssh.conftest import Connect


@pytest.fixture
async def stranger(tmp_path: Path, home: Path, key: str) -> AsyncIterator[Sshd]:
    """A host that lets us in, and of which nothing is known."""
    async with serve(tmp_path / "stranger", kinds=("ed25519", "ecdsa", "rsa")) as sshd:
        sshd.authorized_keys.write_text(key + "\n")
        yield sshd


@pytest.fixture
def known(home: Path) -> Path:
    return home / ".ssh" / "known_hosts"


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return tmp_path / "cluster" / "known_hosts"


def shown(sshd: Sshd, number: int = 0) -> str:
    """How a host and its key are called in sentences."""
    return f"h1 ([{ADDRESS}]:{sshd.port}) shows the key {fingerprint(parse_key(sshd.host_keys[number]))}"


async def refusal(
    connect: Connect, sshd: Sshd, *, accept_new: bool = False, **settings: object
) -> HostRefused:
    """Why it was refused, having been sent nothing."""
    connections = connect(accept_new, h1=sshd.section(**settings))
    with pytest.raises(HostRefused) as refused:
        await connections.connect("h1")
    assert not any("userauth-request" in line for line in await sshd.left())
    return refused.value


async def runs(connect: Connect, sshd: Sshd, *, accept_new: bool = False, **settings: object) -> bool:
    h1 = await connect(accept_new, h1=sshd.section(**settings)).connect("h1")
    return (await h1.run(["true"])).code == 0


async def test_a_host_that_nobody_knows(stranger: Sshd, connect: Connect) -> None:
    error = await refusal(connect, stranger)
    assert error.message == f"{shown(stranger)}, and nothing is known of it"
    assert error.hint is not None
    assert "--accept-new-host-keys" in error.hint


async def test_a_host_whose_key_is_another_than_the_one_that_is_known(
    stranger: Sshd, connect: Connect, known: Path, tmp_path: Path
) -> None:
    other = make_key(tmp_path / "other")
    known.write_text(f"# mine\n[{ADDRESS}]:{stranger.port} {other}\n")
    for accept_new in (False, True):
        error = await refusal(connect, stranger, accept_new=accept_new)
        assert (
            error.message
            == f"{shown(stranger)}, which is not the one that is known for it (~/.ssh/known_hosts:2)"
        )
        assert error.hint is not None
        assert f"ssh-keygen -R '[{ADDRESS}]:{stranger.port}' -f" in error.hint


async def test_a_host_whose_key_is_not_the_one_in_the_cluster_file(
    stranger: Sshd, connect: Connect, known: Path, tmp_path: Path
) -> None:
    known.write_text(stranger.known())  # a pin alone counts
    other = make_key(tmp_path / "other")
    for accept_new in (False, True):
        error = await refusal(connect, stranger, accept_new=accept_new, host_key=other)
        wanted = fingerprint(parse_key(other))
        assert error.message == f"{shown(stranger)}, and its `host_key:` is another: {wanted}"


async def test_a_jump_host_whose_key_is_unknown_or_another(
    stranger: Sshd, connect: Connect, known: Path, tmp_path: Path, key: str
) -> None:
    async with serve(tmp_path / "behind") as behind:
        behind.authorized_keys.write_text(key + "\n")
        hosts = {"h1": stranger.section(), "h2": behind.section(jump="h1", host_key=behind.host_keys[0])}
        for entry, why in (
            ("", "and nothing is known of it"),
            (make_key(tmp_path / "other"), "which is not the one that is known for it"),
        ):
            known.write_text(f"[{ADDRESS}]:{stranger.port} {entry}\n")
            with pytest.raises(HostRefused) as refused:
                await connect(bool(entry), **hosts).connect("h2")
            assert refused.value.message.startswith(f"h2 is behind h1, and {shown(stranger)}, {why}")
        assert not any("userauth-request" in line for line in await stranger.left())
        assert not any("Connection from" in line for line in behind.log)


async def test_a_host_behind_a_jump_host_whose_key_is_another(
    stranger: Sshd, connect: Connect, tmp_path: Path
) -> None:
    async with serve(tmp_path / "behind") as behind:
        other = make_key(tmp_path / "other")
        jump = stranger.section(host_key=stranger.host_keys[0])
        with pytest.raises(HostRefused, match="its `host_key:` is another"):
            await connect(h1=jump, h2=behind.section(jump="h1", host_key=other)).connect("h2")
        assert not any("userauth-request" in line for line in await behind.left())


async def test_a_pin_lets_in_without_any_file(stranger: Sshd, connect: Connect, tmp_path: Path) -> None:
    for key in stranger.host_keys:
        assert await runs(connect, stranger, host_key=f"{key} a comment")
    with pytest.raises(Usage, match="the `host_key:` of h1 is no public key"):
        await connect(h1=stranger.section(host_key="ssh-ed25519 AAAAAAAAAAAAAAAA")).connect("h1")


async def test_any_type_of_key_that_is_known_is_asked_for(
    stranger: Sshd, connect: Connect, known: Path
) -> None:
    for number in range(3):
        known.write_text(stranger.known(number))
        assert await runs(connect, stranger)


async def test_a_new_key_is_recorded_once_and_then_known(
    stranger: Sshd, connect: Connect, known: Path, recorded: Path
) -> None:
    for _ in range(2):
        assert await runs(connect, stranger, accept_new=True)
    assert recorded.read_text() == stranger.known()
    assert recorded.stat().st_mode & 0o777 == 0o600
    assert not known.exists()
    assert await runs(connect, stranger)


async def test_a_new_key_of_a_host_that_has_one_of_another_type_is_not_new(
    tmp_path: Path, connect: Connect, known: Path, key: str
) -> None:
    """Whoever listens in would show a type that is not known."""
    async with serve(tmp_path / "sshd", kinds=("ed25519",)) as sshd:
        known.write_text(f"[{ADDRESS}]:{sshd.port} {make_key(tmp_path / 'rsa', 'rsa')}\n")
        error = await refusal(connect, sshd, accept_new=True)
        assert "which is not the one that is known for it" in error.message


async def test_a_key_is_recorded_only_of_who_has_it(stranger: Sshd, connect: Connect, recorded: Path) -> None:
    """It is, also where we are not let in: the host has proved who it is."""
    stranger.authorized_keys.write_text("")
    with pytest.raises(HostRefused, match="does not let"):
        await runs(connect, stranger, accept_new=True)
    assert recorded.read_text() == stranger.known()


async def test_a_host_is_recorded_under_the_name_by_which_it_is_dialled(
    stranger: Sshd, connect: Connect, recorded: Path
) -> None:
    connections = connect(True, h1=stranger.section(), localhost=HostSection(port=stranger.port))
    await asyncio.gather(connections.connect("h1"), connections.connect("localhost"))
    names = {line.split()[0] for line in recorded.read_text().splitlines()}
    assert names == {f"[127.0.0.1]:{stranger.port}", f"[localhost]:{stranger.port}"}


async def test_entries_that_are_hashed_count(stranger: Sshd, connect: Connect, known: Path) -> None:
    known.write_text(stranger.known())
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", known], check=True, capture_output=True)  # noqa: ASYNC221
    assert ADDRESS not in known.read_text()
    assert await runs(connect, stranger)


async def test_a_revoked_key_is_refused_by_its_line(stranger: Sshd, connect: Connect, known: Path) -> None:
    known.write_text(f"{stranger.known()}@revoked * {stranger.host_keys[0]}\n")
    for accept_new in (False, True):
        error = await refusal(connect, stranger, accept_new=accept_new)
        assert error.message == f"{shown(stranger)}, which ~/.ssh/known_hosts:2 revokes"


def certify(folder: Path, authority: Path, sshd: Sshd, principals: Sequence[str], validity: str) -> None:
    command = ["ssh-keygen", "-q", "-s", authority, "-I", "host", "-h", "-n", ",".join(principals)]
    subprocess.run([*command, "-V", validity, sshd.folder / "host_ed25519.pub"], check=True)


@pytest.mark.parametrize(
    ("principals", "validity", "why"),
    [
        ([ADDRESS], "always:forever", ""),
        (["other"], "always:forever", "ertificate"),
        ([ADDRESS], "20200101:20200102", "expired"),
    ],
)
async def test_a_certificate_of_an_authority_that_is_known_is_enough(
    tmp_path: Path, connect: Connect, known: Path, key: str, principals: list[str], validity: str, why: str
) -> None:
    authority = tmp_path / "authority"
    public = make_key(authority)
    folder = tmp_path / "sshd"
    async with serve(folder) as sshd:
        certify(folder, authority, sshd, principals, validity)
    shutil.move(folder / "host_ed25519-cert.pub", tmp_path / "cert.pub")
    async with serve(folder, settings={"HostCertificate": tmp_path / "cert.pub"}) as sshd:
        sshd.authorized_keys.write_text(key + "\n")
        known.write_text(f"@cert-authority *.example {public}\n")
        assert "nothing is known of it" in (await refusal(connect, sshd)).message
        known.write_text(f"@cert-authority 127.0.0.*,[127.0.0.*]:* {public}\n")
        if why:
            assert why in (await refusal(connect, sshd)).message
            return
        other = make_key(tmp_path / "other")
        known.write_text(f"@cert-authority * {other}\n")
        assert "nothing is known of it" in (await refusal(connect, sshd)).message
        known.write_text(f"@cert-authority * {public}\n")
        assert await runs(connect, sshd)
        known.write_text(f"@cert-authority * {other}\n{sshd.known()}")
        assert await runs(connect, sshd)
        known.write_text(f"@cert-authority * {public}\n@revoked * {sshd.host_keys[0]}\n")
        with pytest.raises(HostRefused, match="revoked"):
            await runs(connect, sshd)
