"""A Docker that is not as it has to be is refused in a sentence, before anything is changed."""

from __future__ import annotations

import asyncio
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mvmci.deploy.plan import make_plan
from mvmci.errors import Usage
from mvmci.runtimes.compose import docker, render
from mvmci.trust.authority import Authority

Program = Callable[[str, str], None]
GOOD = json.dumps({"Server": {"Version": "20.10.24", "ApiVersion": "1.41"}})
FILE = "cluster: demo\nruntime: compose\nworkers: {}\n"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    docker.check_docker.cache_clear()
    yield
    docker.check_docker.cache_clear()


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Makes a program that is all there is on PATH: a shell script, which looks at its arguments."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", str(place))
    zipapp = tmp_path / "mvmci.pyz"
    with zipfile.ZipFile(zipapp, "w") as archive:
        archive.writestr("__main__.py", "")
    monkeypatch.setattr(sys, "argv", [str(zipapp)])

    def make(name: str, body: str) -> None:
        (place / name).write_text(f"#!/bin/sh\n{body}\n")
        (place / name).chmod(0o755)

    return make


def refused(tmp_path: Path) -> str:
    """What `up` says; nothing was changed."""
    file = tmp_path / "topology.yaml"
    file.write_text(FILE)
    with pytest.raises(Usage) as error:
        asyncio.run(make_plan(tmp_path / "state", file))
    assert not (tmp_path / "state" / "demo" / "compose").exists()
    assert error.value.hint
    return error.value.message


def engine(compose: str = "exit 1", rest: str = "") -> str:
    """A `docker` that answers; `compose` is what its plugin does."""
    return f"""
case "$1" in
version) echo '{GOOD}' ;;
compose) {compose} ;;
{rest}
esac"""


def test_no_docker(program: Program, tmp_path: Path) -> None:
    assert refused(tmp_path) == "runtime `compose` needs Docker, and there is no `docker` here"


def test_a_daemon_that_does_not_run(program: Program, tmp_path: Path) -> None:
    said = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is it running?"
    program("docker", f'echo \'{{"Client": {{}}, "Server": null}}\'; echo "{said}" >&2; exit 1')
    assert refused(tmp_path) == f"Docker's daemon does not answer: {said}"


def test_a_user_who_may_not(program: Program, tmp_path: Path) -> None:
    program("docker", "echo 'permission denied while trying to connect to the socket' >&2; exit 1")
    assert refused(tmp_path) == "this user may not use Docker: permission to its socket is denied"


def test_an_engine_that_is_too_old(program: Program, tmp_path: Path) -> None:
    old = json.dumps({"Server": {"Version": "18.09.1", "ApiVersion": "1.39"}})
    program("docker", f"echo '{old}'")
    assert refused(tmp_path) == "Docker is 18.09.1, and 19.03 is the oldest that will do"


@pytest.mark.parametrize("where", ["tcp://10.0.0.5:2376", "ssh://ci@host"])
def test_an_engine_on_another_machine(where: str, program: Program, tmp_path: Path) -> None:
    program("docker", engine("echo 2.40.3", f"context) echo {where} ;;"))
    assert refused(tmp_path).startswith(f"Docker's daemon is at {where}, and containers get their secrets")


@pytest.mark.parametrize("option", ["name=rootless", "name=userns"])
def test_an_engine_with_user_ids_of_its_own(option: str, program: Program, tmp_path: Path) -> None:
    program("docker", engine("echo 2.40.3", f'info) echo \'["name=seccomp","{option}"]\' ;;'))
    assert refused(tmp_path).startswith("Docker gives containers other user ids than this machine has")


def test_no_compose(program: Program, tmp_path: Path) -> None:
    program("docker", engine())
    assert "there is neither its plugin nor `docker-compose`" in refused(tmp_path)


@pytest.mark.parametrize("version", ["1.25.0", "nonsense"])
def test_a_compose_that_is_too_old(version: str, program: Program, tmp_path: Path) -> None:
    program("docker", engine())
    program("docker-compose", f"echo {version}")
    assert "1.29 is the oldest that will do" in refused(tmp_path)


@pytest.mark.parametrize(
    ("plugin", "alone", "command"),
    [
        ("echo 2.40.3", "echo 1.29.2", ("docker", "compose")),
        ("echo v2.5.0", "exit 1", ("docker", "compose")),
        ("exit 1", "echo 1.29.2", ("docker-compose",)),
        ("exit 1", "echo 2.29.7", ("docker-compose",)),
    ],
)
def test_whichever_compose_is_there_does(
    plugin: str, alone: str, command: tuple[str, ...], program: Program
) -> None:
    program("docker", engine(plugin))
    program("docker-compose", alone)
    assert docker.check_docker().command == command


@pytest.mark.parametrize("ours", [False, True])
def test_a_project_of_another_cluster_with_the_same_name(
    ours: bool, program: Program, tmp_path: Path
) -> None:
    owner = "ANOTHER"
    if ours:
        authority = Authority.create(tmp_path / "state" / "demo")
        owner = render.owner_of(authority)
    rest = f"volume) printf 'volume mvmci-demo_state\\t%s\\n' {owner} ;;"
    program("docker", engine("echo 2.40.3", rest))
    file = tmp_path / "topology.yaml"
    file.write_text(FILE)
    if ours:
        asyncio.run(make_plan(tmp_path / "state", file))
        return
    said = refused(tmp_path)
    assert "the compose project mvmci-demo is there, and is not this cluster's" in said
    assert "it has the volume mvmci-demo_state" in said


def test_a_port_that_is_bound(program: Program, tmp_path: Path) -> None:
    import socket

    program("docker", engine("echo 2.40.3"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        file = tmp_path / "topology.yaml"
        file.write_text(FILE + f"broker: {{listen: '127.0.0.1:{port}'}}\n")
        with pytest.raises(Usage, match=f"port {port} of 127.0.0.1 is in use"):
            asyncio.run(make_plan(tmp_path / "state", file))
    assert not (tmp_path / "state" / "demo").exists()
