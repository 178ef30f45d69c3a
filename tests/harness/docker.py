"""A Docker engine, and the image that the tests' containers are made on."""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.harness import image
from tests.harness.places import need

KEPT = "mvmci-tests-kept"
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

    def base_of(self, project: str) -> str:
        """The same image as another one: Docker's builder misses layers that another's clean-up removes."""
        name = f"{self.base}-{project}"
        command = ["docker", "build", "--tag", name, "-"]
        recipe = f"FROM {self.base}\nLABEL project={project}\n".encode()
        subprocess.run(command, env=self.environment, input=recipe, capture_output=True, check=True)
        return name

    def keep(self, project: str) -> None:
        """Give the images of `project` another name, so that the same are built from their layers again."""
        for found in self("image", "ls", "--quiet", project).split():
            self("image", "tag", found, f"{KEPT}:{project}-{found}")

    def kept(self, project: str) -> list[str]:
        """What was kept of `project`."""
        form = "{{.Repository}}:{{.Tag}}"
        return self("image", "ls", "--format", form, f"{KEPT}:{project}-*").split()

    @property
    def volumes(self) -> Path:
        """Where the engine keeps volumes, on this machine."""
        return Path(self("info", "--format", "{{.DockerRootDir}}").strip()) / "volumes"

    @property
    def gateway(self) -> str:
        """This machine, as containers of any bridge reach it."""
        subnet = self("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Subnet}}")
        return str(ipaddress.ip_network(subnet.strip())[1])


def find_docker() -> Docker:
    """The engine that this machine has; else the test is skipped."""
    environment = {key: os.environ[key] for key in ("PATH", "HOME", *HERE) if key in os.environ}
    need(shutil.which("docker"), "no docker: apt-get install docker.io docker-compose")
    answer = subprocess.run(["docker", "version"], env=environment, capture_output=True, check=False)
    need(answer.returncode == 0, "no Docker engine answers: start dockerd")
    need(os.geteuid() == 0, "only root can make an image without pulling one")
    need(shutil.which("debootstrap"), "no debootstrap: apt-get install debootstrap")
    return Docker(environment, image.make(environment))
