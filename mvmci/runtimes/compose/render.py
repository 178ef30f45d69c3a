"""A folder that Docker ComposeSection makes a cluster of: rendered from units, and whole on its own.

    compose.yaml   Dockerfile   mvmci.pyz   .env (the project's name)   .dockerignore
    secrets/       0700, files 0600: what `mvmci.trust.sealed` lists, and engine.token for HTTP

It promises that no secret is in an image, in an environment or in what `docker inspect` shows; that the
same again changes no file; and that `docker compose`, `docker-compose` 1.29 and people can use the folder
without us. Units that are alike are one service, which can be scaled; one that others dial has a service,
and so a name in the network, of its own.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mvmci.cluster.broker import BrokerSettings
from mvmci.cluster.deployment import Role, Unit
from mvmci.cluster.identity import Login, decode
from mvmci.cluster.topology import ComposeSection
from mvmci.config import strict_yaml
from mvmci.errors import Usage
from mvmci.runtimes.compose.docker import AUTHORITY
from mvmci.store import ClusterSettings
from mvmci.system.files import write_private
from mvmci.trust import sealed
from mvmci.trust.authority import Authority

BORDER = "border"  # the network in which a port of this machine is; Docker takes the first by name
USER = 10_001  # of containers, where root renders; else whoever does, who can read the secrets
BROKER_PORT = 4222  # inside of the network
API_PORT = 27288
SEALED = "/run/secrets"
TOKEN, TOKEN_BYTES = "engine.token", 32  # what executors want to see over HTTP
STATE = "/var/lib/mvmci"
READY = "/tmp/mvmci-ready"  # noqa: S108 (of a container, and nobody else is there)
SPARE_BYTES = 512 << 20  # what a container takes beside its jobs
JOB_BYTES = 1 << 30  # of a job that does not say how much
BROKER_BYTES = 1 << 30
PROCESSES_MAX = 4096
HURRY_S = 10  # from the end of a unit's grace to SIGKILL
UNIT, ROLE, MARK = "mvmci.unit", "mvmci.role", "mvmci.mark"  # labels of containers
JOINING: tuple[Role, ...] = ("executor", "worker")  # they come with a ticket
_NUMBERED = re.compile(r"(.+)-([1-9][0-9]*)")


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """One service of the compose file. `unit` is the one that it is; None: its containers are numbered."""

    name: str
    role: Role
    count: int
    options: tuple[str, ...]
    unit: str | None = None


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """A folder. A service's mark changes when its containers are to be others."""

    image: str
    marks: dict[str, str]


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a folder is rendered from, besides the keys.

    `broker` is where the broker is reached from this machine (None: it is not ours), `settings` what a
    control plane is to make known (None: somebody else does), `grace_s` what a unit takes to stop.
    """

    cluster: str
    units: tuple[Unit, ...]  # without placeholders
    queues: tuple[str, ...]
    login: Login  # of nobody: how containers reach the broker
    broker: BrokerSettings | None
    compose: ComposeSection
    settings: ClusterSettings | None = None
    grace: str = "30s"
    grace_s: int = 30
    new_tickets: frozenset[Role] = frozenset()


def project_of(cluster: str) -> str:
    """The compose project of a cluster."""
    return f"mvmci-{cluster}"


def inside(authority: Authority) -> Login:
    """How containers reach a broker that is one of them."""
    return authority.login([f"tls://broker:{BROKER_PORT}"], tls=True)


def owner_of(authority: Authority) -> str:
    """What tells containers and volumes of this cluster from those of another one with its name."""
    external = authority.external
    return authority.issuer if external is None else _mark(msgspec.json.encode(external))


def render(folder: Path, authority: Authority, wanted: Wanted) -> Rendered:
    """Write all of it; what is right already is left alone. Raises Usage."""
    program = _program()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    sealed_marks = _seal(folder / "secrets", authority, wanted)
    recipe = dockerfile(wanted)
    image = f"{project_of(wanted.cluster)}:{_mark(recipe.encode() + _digest(program))}"
    body = compose_file(wanted, owner_of(authority), image, sealed_marks)
    _write(folder / "compose.yaml", f"{_HEAD.format(wanted.cluster)}\n{strict_yaml.write(body)}")
    _write(folder / "Dockerfile", recipe)
    _write(folder / ".env", f"COMPOSE_PROJECT_NAME={project_of(wanted.cluster)}\n")
    _write(folder / ".dockerignore", "*\n!mvmci.pyz\n")
    _write(folder / ".gitignore", "secrets/\nstate/\n")
    target = folder / "mvmci.pyz"
    if not target.exists() or _digest(target) != _digest(program):
        part = folder / ".mvmci.pyz"
        shutil.copyfile(program, part)
        part.chmod(0o755)
        part.replace(target)
    return Rendered(image=image, marks={name: one["labels"][MARK] for name, one in body["services"].items()})


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def check_program() -> None:
    """Raises Usage when there is no file that could go into an image."""
    _program()


def _program() -> Path:
    path = Path(sys.argv[0]).resolve()
    if not zipfile.is_zipfile(path):
        raise Usage(
            "containers get the one file that mvmci is, and this one runs from its source",
            hint="use mvmci.pyz, which `./just zipapp` builds",
        )
    return path


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


# ---- Secrets


def _seal(folder: Path, authority: Authority, wanted: Wanted) -> dict[Role, str]:
    """Write the secrets; for each role a mark that changes when its containers need to start anew."""
    folder.mkdir(mode=0o700, exist_ok=True)
    marks: dict[Role, str] = {}
    tickets = {}
    for role in JOINING:
        name = f"{role}.ticket"
        there = "" if role in wanted.new_tickets else _read(folder / name).decode(errors="replace")
        assert role in ("executor", "worker")
        text, record = sealed.ticket_for(authority, role, wanted.queues, wanted.login, there)
        _secret(folder / name, f"{text}\n".encode())
        tickets[decode(text).id] = record
    if wanted.broker is not None:
        marks["broker"] = _seal_broker(folder, authority, wanted.broker)
    plane = sealed.for_plane(authority, wanted.login, tickets, wanted.settings)
    data = msgspec.json.encode(plane)
    _secret(folder / "control-plane.json", data)
    marks["control-plane"] = _mark(data)
    token = _read(folder / TOKEN) or f"{secrets.token_hex(TOKEN_BYTES)}\n".encode()
    _secret(folder / TOKEN, token)
    return marks


def _seal_broker(folder: Path, authority: Authority, settings: BrokerSettings) -> str:
    inner = msgspec.structs.replace(settings, listen="0.0.0.0", port=BROKER_PORT)  # noqa: S104 (its network)
    made = sealed.for_broker(authority, inner, SEALED)
    path = folder / "broker.json"
    if path.exists():
        there = sealed.read(path, sealed.BrokerConfig)
        # Tokens of the same keys say the same, and only when they were made differs.
        if msgspec.structs.replace(made, operator=there.operator, accounts=there.accounts) == there:
            made = there if set(made.accounts) == set(there.accounts) else made
    data = msgspec.json.encode(made)
    _secret(path, data)
    guard = authority.guard()
    assert guard is not None
    for source in (guard.certificate, guard.key):
        _secret(folder / source.name, Path(source).read_bytes())
    return _mark(data)


def _secret(path: Path, data: bytes) -> None:
    """A file that only the user of the containers can read, and root."""
    if _read(path) != data:
        write_private(path, data)
    if os.geteuid() == 0 and path.stat().st_uid != USER:
        os.chown(path, USER, USER)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _mark(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# ---- The compose file


def service_name(unit: str) -> str:
    """The service, and so the name in the network, of a unit that has one of its own: `executor`."""
    return unit.removesuffix("-1")


def services(units: Sequence[Unit]) -> list[Service]:
    """What the units are in a compose file, in the order of their start."""
    found: list[Service] = []
    alike: dict[tuple[str, tuple[str, ...]], list[Unit]] = {}
    for unit in units:
        name = _NUMBERED.fullmatch(unit.name)
        if unit.role in JOINING and _listen(unit) is None and name is not None:
            alike.setdefault((name[1], unit.options), []).append(unit)
    scaled: dict[str, tuple[str, int]] = {}
    for (base, _), several in alike.items():
        if [unit.name for unit in several] == [f"{base}-{number + 1}" for number in range(len(several))]:
            scaled |= dict.fromkeys((unit.name for unit in several), (base, len(several)))
    for unit in units:
        base, count = scaled.get(unit.name, (service_name(unit.name), 1))
        if unit.name not in scaled:
            found.append(Service(name=base, role=unit.role, count=1, options=unit.options, unit=unit.name))
        elif unit.name == f"{base}-1":
            found.append(Service(name=base, role=unit.role, count=count, options=unit.options))
    return found


def unit_of(service: Service, number: int) -> str:
    """The unit that a container is."""
    return service.unit or f"{service.name}-{number}"


def compose_file(wanted: Wanted, owner: str, image: str, sealed_marks: Mapping[Role, str]) -> dict[str, Any]:
    """compose.yaml, for `docker compose` and `docker-compose` 1.29."""
    found = services(wanted.units)
    network, label = wanted.compose.network, {AUTHORITY: owner}
    body: dict[str, Any] = {"services": {}, "networks": {}, "volumes": {}, "secrets": {}}
    for one in found:
        service = _service(one, found, wanted, image)
        mark = _mark(msgspec.json.encode((service, network, sealed_marks.get(one.role))))
        service["labels"] = label | {ROLE: one.role, MARK: mark}
        if one.unit is not None:
            service["labels"][UNIT] = one.unit
        body["services"][one.name] = {**service, "scale": one.count}
        body["secrets"] |= {name: {"file": f"./secrets/{name}"} for name in service.get("secrets", ())}
        body["volumes"] |= {volume.partition(":")[0]: {"labels": label} for volume in service["volumes"]}
    body["networks"]["cluster"] = {"driver": network.driver, "labels": label}
    if network.options:
        body["networks"]["cluster"]["driver_opts"] = _literal(dict(network.options))
    if _is_apart(wanted):
        body["networks"][BORDER] = {"driver": "bridge", "labels": label}
    return body


_HEAD = """\
# The cluster {0}, rendered by `mvmci render`, which writes this file anew.
#
#   docker compose up -d              or docker-compose, 1.29 or newer
#   docker compose up -d --scale worker=5
#   mvmci submit MODULE --wait --state state      from this folder, on this machine"""


def _service(one: Service, all_: Sequence[Service], wanted: Wanted, image: str) -> dict[str, Any]:
    """All of a service but its labels, and how many containers it has."""
    parts: dict[str, Any] = {
        "image": image,
        "build": {"context": "."},
        "command": _literal(list(_command(one, wanted))),
        "init": one.role != "broker",  # the server is the first process, and finds that by itself
        "restart": "unless-stopped",
        "stop_grace_period": f"{wanted.grace_s + HURRY_S}s",
        "depends_on": _before(one, all_),
        "networks": ["cluster", BORDER] if one.role == "broker" and _is_apart(wanted) else ["cluster"],
        "volumes": [f"{'broker' if one.role == 'broker' else 'state'}:{STATE}"],
        "secrets": _secrets(one),
        "healthcheck": {"test": ["CMD-SHELL", _health(one)], "interval": "5s", "timeout": "5s", "retries": 3},
        "mem_limit": _memory(one, wanted),
        "pids_limit": PROCESSES_MAX,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "logging": {"driver": "json-file", "options": {"max-size": "16m", "max-file": "2"}},
    }
    if one.role == "broker" and wanted.broker is not None:
        published = wanted.broker
        address = f"[{published.listen}]" if ":" in published.listen else published.listen
        parts["ports"] = [f"{address}:{published.port}:{BROKER_PORT}"]
    return {key: value for key, value in parts.items() if value not in ([], None)}


def _before(one: Service, all_: Sequence[Service]) -> list[str]:
    """The services without which it could do nothing. What else comes and goes does not change it."""
    if one.role not in ("control-plane", *JOINING):
        return []
    needed = ("broker",) if one.role == "control-plane" else ("broker", "control-plane")
    return [other.name for other in all_ if other.role in needed]


def _command(one: Service, wanted: Wanted) -> Iterator[str]:
    yield one.role
    if one.role == "broker":
        yield f"--sealed={SEALED}/broker.json"
        return
    if one.role == "control-plane":
        yield f"--sealed={SEALED}/control-plane.json"
    elif one.role in JOINING:
        yield f"--join=@{SEALED}/{one.role}.ticket"
        yield "--patient"
    elif one.role == "balancer":
        yield f"--cluster={wanted.cluster}"
    yield f"--name={one.unit}" if one.unit is not None else f"--replica-of={one.name}"
    if one.role in JOINING:
        yield f"--token-file={SEALED}/{TOKEN}"
        yield f"--grace={wanted.grace}"
    yield from one.options


def _secrets(one: Service) -> list[str]:
    """The secrets that a service is given. The token is for who is, or dials, an engine, now or later."""
    if one.role == "broker":
        return ["broker.json", "broker.key", "broker.pem"]
    if one.role == "control-plane":
        return ["control-plane.json"]
    return [f"{one.role}.ticket", TOKEN] if one.role in JOINING else []


def _health(one: Service) -> str:
    """Whether it works: the server listens, a unit has reached the cluster just now."""
    if one.role == "broker":
        return f"ls {STATE}/*/broker/nats-server_*.ports"
    if one.role == "balancer":
        return f"bash -c '</dev/tcp/127.0.0.1/{API_PORT}'"
    return f'test -n "$$(find {READY} -mmin -0.5)"'


def _memory(one: Service, wanted: Wanted) -> int:
    """How much a container may take, in bytes."""
    if one.role == "broker":
        return BROKER_BYTES
    if one.role not in JOINING:
        return SPARE_BYTES
    if wanted.compose.memory_bytes is not None:
        return wanted.compose.memory_bytes
    told = next((option for option in one.options if option.startswith("--slots=")), "")
    slots = int(told.partition("=")[2]) if told else os.cpu_count() or 1
    return SPARE_BYTES + slots * JOB_BYTES


def _is_apart(wanted: Wanted) -> bool:
    """Whether this machine cannot reach the cluster's network: a broker is then in another one too."""
    return wanted.broker is not None and wanted.compose.network.driver != "bridge"


def _listen(unit: Unit) -> str | None:
    return next((one for one in unit.options if one.startswith("--listen=")), None)


def _literal(value: Any) -> Any:
    """Text that compose is not to look for variables in."""
    if isinstance(value, dict):
        return {key: _literal(one) for key, one in value.items()}
    return [_literal(one) for one in value] if isinstance(value, list) else value.replace("$", "$$")


def dockerfile(wanted: Wanted) -> str:
    """The one image of all roles."""
    user = os.geteuid() or USER
    programs = _WITH_BALANCER if any(unit.role == "balancer" for unit in wanted.units) else ""
    return _DOCKERFILE.format(
        base=wanted.compose.base, user=user, programs=programs, state=STATE, ready=READY
    )


_WITH_BALANCER = """
RUN command -v haproxy \\
    || { apt-get update && apt-get install -y --no-install-recommends haproxy; }
"""
_DOCKERFILE = """\
# All roles of a cluster, rendered by `mvmci render`. The base has a Python, 3.11 to 3.14, and what
# `allow.exec` names: `docker compose build --build-arg BASE=…` takes another one.
ARG BASE={base}
FROM ${{BASE}}
{programs}
ARG USER_ID={user}
RUN groupadd --non-unique --gid ${{USER_ID}} mvmci \\
    && useradd --non-unique --uid ${{USER_ID}} --gid ${{USER_ID}} --create-home mvmci \\
    && mkdir -p {state} \\
    && chown ${{USER_ID}}:${{USER_ID}} {state}
COPY mvmci.pyz /opt/mvmci.pyz
USER ${{USER_ID}}:${{USER_ID}}
ENV HOME=/home/mvmci MVMCI_STATE={state} MVMCI_READY_FILE={ready}
# It unpacks itself here, once, and not in each container.
RUN python3 -I -S /opt/mvmci.pyz version && python3 -m compileall -q /home/mvmci/.cache/mvmci
STOPSIGNAL SIGTERM
ENTRYPOINT ["python3", "-I", "-S", "/opt/mvmci.pyz"]
"""
