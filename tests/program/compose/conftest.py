"""A Docker engine, an image to build on, and the program that is told where they are.

All of this stays on one worker: there is one engine, and one project at a time.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness.cluster import Cluster
from tests.harness.places import need
from tests.harness.program import Mvmci
from tests.program.compose import base

HERE = ("DOCKER_HOST", "DOCKER_CONFIG", "DOCKER_CONTEXT")


@dataclass(frozen=True)
class Docker:
    """The engine, as its command line reaches it, and the image that containers are made on."""

    environment: dict[str, str]
    base: str

    def __call__(self, *args: str | Path, cwd: Path | None = None) -> str:
        """What `docker` says, which has to succeed."""
        return self.run("docker", *args, cwd=cwd)

    def compose(self, folder: Path, *args: str) -> str:
        """What compose says of the project in `folder`, as somebody types it there."""
        return self.run(*self.programs()[0], *args, cwd=folder)

    def programs(self) -> list[tuple[str, ...]]:
        """The compose programs that are here."""
        known = (("docker", "compose"), ("docker-compose",))
        return [one for one in known if self._ends([*one, "version"])]

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, check=False)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout.decode()

    def _ends(self, command: list[str]) -> bool:
        return subprocess.run(command, env=self.environment, capture_output=True, check=False).returncode == 0

    @property
    def gateway(self) -> str:
        """This machine, as containers of any bridge reach it."""
        subnet = self("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Subnet}}")
        return str(ipaddress.ip_network(subnet.strip())[1])


@pytest.fixture(scope="session")
def docker() -> Docker:
    environment = {key: os.environ[key] for key in ("PATH", "HOME", *HERE) if key in os.environ}
    need(shutil.which("docker"), "no docker: apt-get install docker.io docker-compose")
    answer = subprocess.run(["docker", "version"], env=environment, capture_output=True, check=False)
    need(answer.returncode == 0, "no Docker engine answers: start dockerd")
    need(os.geteuid() == 0, "only root can make an image without pulling one")
    need(shutil.which("debootstrap"), "no debootstrap: apt-get install debootstrap")
    return Docker(environment, base.make(environment))


@pytest.fixture(scope="session")
def contained(program: Mvmci, docker: Docker) -> Mvmci:
    """The program, which finds the engine."""
    told = {key: value for key, value in docker.environment.items() if key in HERE}
    return dataclasses.replace(program, env=told)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compose")


@pytest.fixture(scope="module")
def cluster(contained: Mvmci, docker: Docker, folder: Path) -> Iterator[Cluster]:
    """A cluster with a state directory of its own, not yet started; nothing is left of it at the end."""
    made = Cluster(dataclasses.replace(contained, state=folder / "state"), folder / "topology.yaml")
    yield made
    if made.folder.exists():
        made.mvmci("down", "--cluster", made.name, "--purge")
    assert_nothing_is_left(docker)


def assert_nothing_is_left(docker: Docker) -> None:
    """No container, network, volume or image of the project."""
    label = "label=com.docker.compose.project=mvmci-demo"
    assert docker("ps", "-aq", "--filter", label) == ""
    for what in ("network", "volume"):
        assert docker(what, "ls", "-q", "--filter", label) == ""
    assert docker("image", "ls", "-q", "mvmci-demo") == ""


def containers(docker: Docker) -> dict[str, Any]:
    """The containers of the project that run: their ids, by their names without the project's."""
    listed = docker("ps", "--format", "{{.Names}} {{.ID}}", "--filter", "name=mvmci-demo").splitlines()
    names = (line.split() for line in listed)
    return {name.removeprefix("mvmci-demo")[1:].replace("_", "-"): one for name, one in names}


Guest = Callable[[str], Path]
