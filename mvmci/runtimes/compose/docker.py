"""The Docker command line: which there is, whether it will do, and the few things that are asked of it.

Two programs can be there: `docker`, with or without its plugin `compose`, and `docker-compose`, of which
1.29 is the last of its kind. Whichever is there does; both are told to work on one folder and its project.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mvmci.errors import MvmciError, Usage
from mvmci.system.tasks import cancel

API_MIN = (1, 40)  # of Docker 19.03
COMPOSE_MIN = (1, 29)
_ANSWER_S = 30.0
WORDS_CHARS_MAX = 500
EVENTS_SINCE = "5m"
_LINE_BYTES = 100  # of a line of a log, about
LINES = 2  # of what a program said before it failed: the last may say what, and not of which
PROJECT, SERVICE, NUMBER = (
    f"com.docker.compose.{name}" for name in ("project", "service", "container-number")
)
AUTHORITY = "mvmci.authority"  # our label: whose cluster it is


class Container(msgspec.Struct, frozen=True, kw_only=True):
    """A container of a project, as it is now. `pid` is that of this machine."""

    id: str
    service: str
    number: int
    labels: dict[str, str]
    state: str  # created, running, restarting, exited, …
    health: str  # healthy, unhealthy, starting, or empty
    pid: int
    exit_code: int
    restarts: int
    since: str  # when it was started or ended, RFC 3339

    @property
    def hostname(self) -> str:
        """What it calls itself."""
        return self.id[:12]


@functools.cache
def check_docker() -> Compose:
    """The compose program to use. Raises Usage when Docker is not there, will not let us, or is too old."""
    if shutil.which("docker") is None:
        raise Usage(
            "runtime `compose` needs Docker, and there is no `docker` here",
            hint="install Docker and its compose plugin; on Debian: apt-get install docker.io docker-compose",
        )
    _check_engine(_run(["docker", "version", "--format", "{{json .}}"]))
    _check_shares_files()
    plugin = _run(["docker", "compose", "version", "--short"])
    if plugin.returncode == 0:
        return Compose(("docker", "compose"), _version(plugin.stdout))
    if shutil.which("docker-compose") is None:
        raise Usage(
            "runtime `compose` needs Docker's compose, and there is neither its plugin nor `docker-compose`",
            hint="install one: the package is docker-compose-plugin or docker-compose",
        )
    found = _version(_run(["docker-compose", "version", "--short"]).stdout)
    if found < COMPOSE_MIN:
        raise Usage(
            f"docker-compose is {_dotted(found)}, and {_dotted(COMPOSE_MIN)} is the oldest that will do",
            hint="install a newer one, or Docker's compose plugin",
        )
    return Compose(("docker-compose",), found)


def _check_engine(answer: subprocess.CompletedProcess[str]) -> None:
    """Raises Usage when no engine answered, or one that is too old."""
    try:
        server = json.loads(answer.stdout)["Server"]
        found = _version(server["ApiVersion"])
    except (ValueError, KeyError, TypeError):
        said = answer.stderr.strip()
        if "permission denied" in said.lower():
            raise Usage(
                "this user may not use Docker: permission to its socket is denied",
                hint="a member of the group `docker` may, and so may root",
            ) from None
        raise Usage(
            f"Docker's daemon does not answer: {_last_line(said) or 'it said nothing'}",
            hint="start it, for example with `systemctl start docker`; DOCKER_HOST says where it is",
        ) from None
    if found < API_MIN:
        raise Usage(
            f"Docker is {server.get('Version', 'too old')}, and 19.03 is the oldest that will do",
            hint="install a newer one",
        )


def _check_shares_files() -> None:
    """Raises Usage when containers could not read what we write for them alone."""
    where = _run(["docker", "context", "inspect", "--format", "{{.Endpoints.docker.Host}}"]).stdout.strip()
    if where.startswith(("ssh://", "tcp://", "http://", "https://")):
        raise Usage(
            f"Docker's daemon is at {where}, and containers get their secrets from files of its machine",
            hint="do this on that machine",
        )
    options = _run(["docker", "info", "--format", "{{json .SecurityOptions}}"]).stdout
    if "name=rootless" in options or "name=userns" in options:
        raise Usage(
            "Docker gives containers other user ids than this machine has, and so none of its secrets",
            hint="use a daemon without `userns-remap`, and not a rootless one",
        )


class Compose:
    """One of the two compose programs."""

    def __init__(self, command: tuple[str, ...], version: tuple[int, ...]) -> None:
        self.command = command
        self.version = version

    async def __call__(self, folder: Path, *args: str) -> None:
        """Do something with the project of `folder`. Raises MvmciError."""
        await run([*self.command, *args], folder)


async def run(command: Sequence[str], folder: Path | None = None) -> str:
    """Run it to its end; what it printed. Cancelled, it ends too. Raises MvmciError."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us: what goes down then, and how, is ours to say
    )
    try:
        out, err = await process.communicate()
    except asyncio.CancelledError:
        process.terminate()
        await process.wait()
        raise
    if process.returncode:
        words = _last_line(err.decode(errors="replace"), LINES)
        raise MvmciError(f"`{' '.join(command[:3])}` failed with exit code {process.returncode}: {words}")
    return out.decode(errors="replace")


async def containers(project: str) -> list[Container]:
    """All containers of `project`, also those that do not run. Raises MvmciError."""
    listing = ["docker", "ps", "-aq", "--no-trunc", "--filter", f"label={PROJECT}={project}"]
    ids = (await asyncio.to_thread(_checked, listing)).split()
    if not ids:
        return []
    answer = await asyncio.to_thread(_run, ["docker", "inspect", "--type", "container", *ids])
    try:  # one that has gone meanwhile is an error, and the others are told of all the same
        return [_container(one) for one in json.loads(answer.stdout)]
    except ValueError:
        raise MvmciError(f"`docker inspect` failed: {_last_line(answer.stderr)}") from None


async def events(project: str) -> AsyncGenerator[None, None]:
    """Whenever something became of a container of `project`. Ends with the daemon."""
    command = ["docker", "events", "--filter", "type=container", "--filter", f"label={PROJECT}={project}"]
    for kind in ("create", "start", "die", "destroy", "pause", "unpause", "health_status"):
        command += ["--filter", f"event={kind}"]
    async with _reading([*command, "--format={{.Action}}"], stderr=subprocess.DEVNULL) as output:
        while await output.readline():
            yield


async def logs(container: str, *, follow: bool, last: int | None = None) -> AsyncGenerator[bytes, None]:
    """What a container printed, on both streams, in pieces; with `follow`, until it ends. `last`: of what is
    there, about so many bytes."""
    less = [] if last is None else ["--tail", str(last // _LINE_BYTES + 1)]
    command = ["docker", "logs", *(["--follow"] if follow else []), *less, container]
    async with _reading(command, stderr=subprocess.STDOUT) as output:
        while data := await output.read(1 << 16):
            yield data


@contextlib.asynccontextmanager
async def _reading(command: Sequence[str], *, stderr: int) -> AsyncIterator[asyncio.StreamReader]:
    """What a command prints, for as long as one reads."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def owners(project: str) -> dict[str, str]:
    """Whose the containers and volumes of `project` are: the label of each, by its name."""
    found: dict[str, str] = {}
    for what, listing in (("container", ["ps", "-a"]), ("volume", ["volume", "ls"])):
        name = "{{.Names}}" if what == "container" else "{{.Name}}"
        form = f'{what} {name}\t{{{{.Label "{AUTHORITY}"}}}}'
        command = ["docker", *listing, "--filter", f"label={PROJECT}={project}", "--format", form]
        for line in (await asyncio.to_thread(_checked, command)).splitlines():
            who, _, label = line.partition("\t")
            found[who] = label
    return found


async def stop(ids: Sequence[str], grace_s: float, hurry_s: int) -> None:
    """Stop containers and remove them: asked, asked again after `grace_s`, and then not asked.

    Raises MvmciError.
    """
    whole_s = str(int(grace_s) + hurry_s) if grace_s else "0"
    stopping = asyncio.ensure_future(run(["docker", "stop", "--time", whole_s, *ids]))
    try:
        await asyncio.wait([stopping], timeout=grace_s)
        if not stopping.done():
            with contextlib.suppress(MvmciError):  # some of them have ended
                await run(["docker", "kill", "--signal", "TERM", *ids])
        await stopping
    finally:
        await cancel(stopping)
    await run(["docker", "rm", "--force", *ids])


async def has_image(name: str) -> bool:
    """Whether there is an image of that name. Raises MvmciError."""
    return bool((await run(["docker", "image", "ls", "--quiet", name])).strip())


async def remove_networks(project: str) -> None:
    """Remove the networks of a project that has no containers any more. Raises MvmciError."""
    await _remove("network", ["--quiet", f"--filter=label={PROJECT}={project}"])


async def remove_data(project: str) -> None:
    """Remove the volumes and images of a project that has no containers any more. Raises MvmciError.

    Images go by their names: what has another one too, or is built upon, was not made for us alone.
    """
    await _remove("volume", ["--quiet", f"--filter=label={PROJECT}={project}"])
    names = "--format={{.Repository}}:{{.Tag}}"
    await _remove("image", [names, f"--filter=reference={project}"], "--force")


async def _remove(what: str, which: Sequence[str], *options: str) -> None:
    if found := (await run(["docker", what, "ls", *which])).split():
        await run(["docker", what, "rm", *options, *found])


async def last_exit(container: str) -> int | None:
    """How the last process of a container ended that runs again; None if Docker has forgotten it."""
    until = f"{time.time():.9f}"  # by the second, as `0s` is, Docker leaves out what has just been
    command = ["docker", "events", "--since", EVENTS_SINCE, "--until", until, "--filter", "event=die"]
    command += ["--filter", f"container={container}", "--format", "{{.Actor.Attributes.exitCode}}"]
    codes = (await asyncio.to_thread(_run, command)).stdout.split()
    return int(codes[-1]) if codes and codes[-1].isdecimal() else None


async def last_words(container: str, lines: int = 20) -> list[str]:
    """The last lines that a container printed; none if that cannot be told."""
    answer = await asyncio.to_thread(_run, ["docker", "logs", "--tail", str(lines), container])
    return (answer.stdout + answer.stderr).splitlines()


def _container(told: dict[str, Any]) -> Container:
    labels, state = told["Config"]["Labels"], told["State"]
    return Container(
        id=told["Id"],
        service=labels.get(SERVICE, ""),
        number=int(labels.get(NUMBER, 1)),
        labels=labels,
        state=state["Status"],
        health=state.get("Health", {}).get("Status", ""),
        pid=state["Pid"],
        exit_code=state["ExitCode"],
        restarts=told["RestartCount"],
        since=state["StartedAt"] if state["Running"] else state["FinishedAt"],
    )


def _checked(command: Sequence[str]) -> str:
    answer = _run(command)
    if answer.returncode:
        raise MvmciError(f"`{' '.join(command[:3])}` failed: {_last_line(answer.stderr)}")
    return answer.stdout


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MvmciError(f"`{' '.join(command[:3])}` does not answer within {_ANSWER_S:.0f} s") from None
    except OSError as error:
        raise MvmciError(f"`{command[0]}` cannot be started: {error.strerror}") from None


def _environment() -> dict[str, str]:
    """Ours, without what would make compose look at another project or file."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("COMPOSE_", "MVMCI_"))}


def _version(text: str) -> tuple[int, ...]:
    numbers = re.match(r"v?(\d+)\.(\d+)", text.strip())
    return tuple(int(number) for number in numbers.groups()) if numbers else (0, 0)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in version)


def _last_line(text: str, lines: int = 1) -> str:
    """The last lines of `text` that say something, as one."""
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(said[-lines:])[-WORDS_CHARS_MAX:]
