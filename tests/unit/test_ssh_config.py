"""What of ~/.ssh/config does not count is said where ssh would have heeded it, and only there."""

from __future__ import annotations

import getpass
from pathlib import Path

import pytest

from mvmci.cluster.topology import HostSection
from mvmci.runtimes.ssh import user_config

SILENT = HostSection()


def said(config: str, host: HostSection = SILENT, name: str = "h1") -> str:
    Path("~/.ssh/config").expanduser().write_text(config)
    return "; ".join(user_config.ignored({name: host}))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    return tmp_path


def test_without_such_a_file_there_is_nothing_to_say() -> None:
    assert user_config.ignored({"h1": HostSection()}) == []


def test_it_is_said_what_does_not_count_and_what_does() -> None:
    found = said("Host h?\n  User ci\n  proxyjump = bastion\n")
    assert found == (
        "~/.ssh/config does not count, and has User, ProxyJump for h1; what counts is `user:`, `jump:`"
    )


@pytest.mark.parametrize(
    "config",
    [
        "Host h2\n User ci\n",
        "Host * !h1\n User ci\n",
        "Match host h1\n User ci\n",
        "Host h1\n ServerAliveInterval 10\n",
        "Host h1\n User\n",
        "Host h1\n ProxyJump none\n Port 22\n StrictHostKeyChecking ask\n IdentityFile ~/.ssh/id_rsa\n",
        f"User {getpass.getuser()}\n",
    ],
)
def test_what_would_make_no_difference_is_not_said(config: str) -> None:
    assert said(config) == ""


@pytest.mark.parametrize(
    ("option", "field", "settled"),
    [
        ("HostName 10.0.0.1", "`address:`", HostSection(address="10.0.0.1")),
        ("User ci", "`user:`", HostSection(user="root")),
        ("Port 2222", "`port:`", HostSection(port=2223)),
        ("IdentityFile ~/ci", "`key:`", HostSection(key="other")),
        ("ProxyJump b", "`jump:`", HostSection(jump="b")),
        ("StrictHostKeyChecking no", "`host_key:`", HostSection(host_key="ssh-ed25519 AAAAAAAAAAAAAAAA")),
        ("UserKnownHostsFile /dev/null", "`host_key:`", HostSection(host_key="ssh-ed25519 AAAAAAAAAAAAAAAA")),
    ],
)
def test_an_option_matters_where_the_cluster_file_is_silent(
    option: str, field: str, settled: HostSection
) -> None:
    assert said(f"Host *\n{option}\n").endswith(f"what counts is {field}")
    assert said(f"Host *\n{option}\n", settled) == ""


def test_included_files_and_the_address_count_too(home: Path) -> None:
    (home / ".ssh/ci.conf").write_text('Host "10.0.*"\n\tUser ci\n')
    (home / ".ssh/loop.conf").write_text("Include loop.conf\n")
    assert "User" in said("Include loop.conf *.conf\n", HostSection(address="10.0.0.1"))
    assert said("Include ci.conf\n") == ""
    assert said("Host h2\nInclude ci.conf\n", HostSection(address="10.0.0.1")) == ""


def test_hosts_that_are_alike_share_a_sentence() -> None:
    Path("~/.ssh/config").expanduser().write_text("Host *\n User ci\n")
    (found,) = user_config.ignored({f"h{number}": HostSection() for number in range(100)})
    assert "for h0, h1, h2 and 97 more;" in found


def test_a_file_that_makes_no_sense_is_no_trouble() -> None:
    assert said("Host h1 'x\n User 'ci\n = \n\x00\xff\nMatch\n") == said("Host h1\n User ci\n")
