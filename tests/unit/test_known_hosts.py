"""Files of known hosts mean what they mean to ssh."""

from __future__ import annotations

import base64
import hmac
from pathlib import Path

import pytest

from mvmci.runtimes.ssh import known_hosts


def blob(kind: str, seed: int) -> bytes:
    name = kind.encode()
    return len(name).to_bytes(4, "big") + name + bytes([0, 0, 0, 32]) + bytes([seed]) * 32


def text(key: bytes) -> str:
    return f"{known_hosts.key_type(key)} {base64.b64encode(key).decode()}"


A, B, R = blob("ssh-ed25519", 1), blob("ssh-ed25519", 2), blob("ssh-rsa", 3)


def keys(tmp_path: Path, lines: str, host: str = "h1.example", port: int = 22) -> known_hosts.HostKeys:
    file = tmp_path / "known_hosts"
    file.write_text(lines)
    return known_hosts.look_up(known_hosts.read_lines([file]), host, port)


def hashed(name: str) -> str:
    salt = bytes(range(20))
    digest = hmac.digest(salt, name.encode(), "sha1")
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


@pytest.mark.parametrize(
    "patterns",
    [
        "h1.example",
        "H1.Example",
        "other,h1.example",
        "*.example",
        "h?.example",
        "*",
        "!h2.example,*.example",
        hashed("h1.example"),
    ],
)
def test_a_key_belongs_to_the_hosts_that_its_patterns_name(tmp_path: Path, patterns: str) -> None:
    assert keys(tmp_path, f"{patterns} {text(A)} a comment\n").trusts(A)
    assert keys(tmp_path, f"{patterns} {text(A)}\n", "H1.EXAMPLE").trusts(A)
    assert not keys(tmp_path, f"{patterns} {text(A)}\n").trusts(B)


@pytest.mark.parametrize(
    "patterns",
    [
        "h1",
        "example",
        "h1.example.org",
        "!h1.example",
        "*.example,!h1.example",
        "[h1.example]:2222",
        hashed("h1"),
    ],
)
def test_and_to_no_other(tmp_path: Path, patterns: str) -> None:
    assert not keys(tmp_path, f"{patterns} {text(A)}\n").known


def test_a_host_may_have_any_of_its_keys(tmp_path: Path) -> None:
    found = keys(tmp_path, f"h1.example {text(A)}\nh1.example {text(R)}\n*.example {text(B)}\n")
    assert all(found.trusts(key) for key in (A, R, B))
    assert found.known[R].where == f"{tmp_path}/known_hosts:2"


def test_at_a_port_of_its_own_a_host_has_a_name_of_its_own(tmp_path: Path) -> None:
    found = keys(tmp_path, f"[h1.example]:2222 {text(A)}\nh1.example {text(B)}\n", port=2222)
    assert found.trusts(A)
    assert not found.trusts(B)
    assert keys(tmp_path, f"{hashed('[h1.example]:2222')} {text(A)}\n", port=2222).trusts(A)


def test_one_that_is_not_known_by_its_port_may_be_by_its_name_and_no_key_is_wrong_for_that(
    tmp_path: Path,
) -> None:
    found = keys(tmp_path, f"h1.example {text(B)}\n", port=2222)
    assert found.trusts(B)
    assert not found.trusts(A)
    assert not found.known


def test_a_revoked_key_is_trusted_under_no_name(tmp_path: Path) -> None:
    for name in ("h1.example", "[h1.example]:2222", "*"):
        found = keys(tmp_path, f"[h1.example]:2222 {text(A)}\n@revoked {name} {text(A)}\n", port=2222)
        assert not found.trusts(A)
        assert found.revoked[A].where.endswith(":2")


def test_an_authority_is_no_key_of_a_host(tmp_path: Path) -> None:
    found = keys(tmp_path, f"@cert-authority *.example {text(A)}\n")
    assert set(found.authorities) == {A}
    assert not found.trusts(A)
    assert set(keys(tmp_path, f"@cert-authority *.example {text(A)}\n", port=2222).authorities) == {A}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "# h1.example",
        f"#h1.example {text(A)}",
        "h1.example",
        "h1.example ssh-ed25519",
        "h1.example ssh-ed25519 AAAA",
        "h1.example ssh-ed25519 not-base64",
        f"h1.example ssh-rsa {text(A).split()[1]}",
        f"@unheard-of h1.example {text(A)}",
        "|1|broken ssh-ed25519 AAAA",
        f"|1|broken {text(A)}",
        f"|2|{hashed('h1.example')[3:]} {text(A)}",
        "\udcff",
    ],
)
def test_a_line_that_makes_no_sense_counts_for_nothing(tmp_path: Path, line: str) -> None:
    file = tmp_path / "known_hosts"
    file.write_text(f"{line}\nh1.example {text(B)}\n", errors="surrogateescape")
    found = known_hosts.look_up(known_hosts.read_lines([file]), "h1.example", 22)
    assert set(found.known) == {B}


def test_files_that_are_not_there_know_nobody(tmp_path: Path) -> None:
    assert known_hosts.read_lines([tmp_path / "missing", tmp_path]) == []


def test_what_is_recorded_is_found_again_and_kept_from_others(tmp_path: Path) -> None:
    file = tmp_path / "cluster" / "known_hosts"
    known_hosts.record(file, "H1.example", 22, A)
    known_hosts.record(file, "h1.example", 2222, B)
    lines = known_hosts.read_lines([file])
    assert known_hosts.look_up(lines, "h1.example", 22).trusts(A)
    assert known_hosts.look_up(lines, "h1.example", 2222).trusts(B)
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "key", ["", "ssh-ed25519", "ssh-ed25519 AAAA", f"ssh-rsa {text(A).split()[1]}", "x ü"]
)
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (whatever it says, the caller has a sentence)
        known_hosts.parse_key(key)
