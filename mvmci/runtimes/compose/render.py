"""A folder that Docker Compose makes a cluster of: rendered from units, and whole on its own.

    compose.yaml   Dockerfile   mvmci.pyz   .env (the project's name)   .dockerignore
    secrets/       0700, files 0600: what `mvmci.trust.provision` lists, and engine.token for HTTP

It promises that no secret is in an image, in an environment or in what `docker inspect` shows; that the
same again changes no file; and that `docker compose`, `docker-compose` 1.29 and people can use the folder
without us. For people, units that are alike are one service, which can be scaled; one that others dial has
a service, and so a name in the network, of its own. For `up`, each unit has one: so it can be started, and
given a file, alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mvmci.cluster.broker import BrokerSettings
from mvmci.cluster.deployment import RoleName, Unit, UnitConfig
from mvmci.cluster.identity import decode_ticket
from mvmci.cluster.topology import ComposeSection
from mvmci.config import strict_yaml
from mvmci.runtime import GRACE_S
from mvmci.runtimes.compose.docker import AUTHORITY
from mvmci.store import ClusterSettings
from mvmci.system.files import private_folder, write_private
from mvmci.system.processes import program_file
from mvmci.trust.authority import Authority
from mvmci.trust.provision import make_config, ticket_for
from mvmci.trust.registry import TicketRecord

BORDER = "border"  # the network in which a port of this machine is; Docker takes the first by name
USER = 10_001  # of containers, where root renders; else whoever does, who can read the secrets
BROKER, BROKER_PORT = "broker", 4222  # inside of the network
API_PORT = 27288
GIVEN = "/run/secrets"  # where a container finds its secrets
TOKEN, TOKEN_BYTES = "engine.token", 32  # what executors want to see over HTTP
STATE = "/var/lib/mvmci"
_READY = "/tmp/mvmci-ready"  # noqa: S108 (of a container, and nobody else is there)
SPARE_BYTES = 512 << 20  # what a container takes beside its jobs
JOB_BYTES = 1 << 30  # of a job that does not say how much
BROKER_BYTES = 1 << 30
_PROCESSES_MAX = 4096
_HURRY_S = 15  # from the end of a unit's grace to SIGKILL
UNIT, ROLE, CONFIG = "mvmci.unit", "mvmci.role", "mvmci.config"  # labels of containers
JOINING: tuple[RoleName, ...] = ("executor", "worker")
_NUMBERED = re.compile(r"(.+)-([1-9][0-9]*)")


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """One service of the compose file. `config` is that of its unit; None: its containers are numbered."""

    name: str
    role: RoleName
    count: int
    options: tuple[str, ...]
    config: UnitConfig | None = None


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a folder is rendered from, besides the keys.

    With `settings`, which a control plane is to make known, it is for people, who start it when they like
    and scale what is in it; without, it is for `up`, and each unit is a service of its own.
    """

    cluster: str
    units: tuple[UnitConfig, ...]  # without placeholders
    queues: tuple[str, ...]
    compose: ComposeSection
    settings: ClusterSettings | None = None

    @property
    def broker(self) -> BrokerSettings | None:
        """Where the broker is reached from this machine; None: it is not ours."""
        return next((one.broker for one in self.units if one.broker is not None), None)

    @property
    def has_ca(self) -> bool:
        """Whether units know each other by certificates over HTTP: who has no broker of ours has no CA."""
        return self.broker is not None

    @property
    def grace(self) -> str:
        """What a unit is told that it may take to stop. Those of `up` are cut short when it is time."""
        return "1d" if self.settings is None else f"{GRACE_S:.0f}s"


def project_of(cluster: str) -> str:
    """The compose project of a cluster."""
    return f"mvmci-{cluster}"


def owner_of(authority: Authority) -> str:
    """What tells containers and volumes of this cluster from those of another one with its name."""
    external = authority.external
    return authority.issuer if external is None else _mark(msgspec.json.encode(external))


def render(
    folder: Path, authority: Authority, wanted: Wanted, starting: Collection[str] | None = None
) -> dict[str, str]:
    """Write all of it; what is right already is left alone. Only units in `starting` are given files anew.

    The images that it needs, each with a service of it. Raises Usage.
    """
    program = program_file()
    private_folder(folder)
    found = services(wanted)
    _give(folder / "secrets", authority, wanted, found, starting)
    digest = _digest(program)
    images = {stage: _image(wanted, stage, digest) for stage in ("unit", "balancer")}
    body = compose_file(wanted, owner_of(authority), images)
    _write(folder / "compose.yaml", f"{_HEAD.format(wanted.cluster)}\n{strict_yaml.write_yaml(body)}")
    _write(folder / "Dockerfile", dockerfile(wanted))
    _write(folder / ".env", f"COMPOSE_PROJECT_NAME={project_of(wanted.cluster)}\n")
    _write(folder / ".dockerignore", "*\n!mvmci.pyz\n")
    _write(folder / ".gitignore", "secrets/\nstate/\n")
    target = folder / "mvmci.pyz"
    if not target.exists() or _digest(target) != digest:
        part = folder / ".mvmci.pyz"
        shutil.copyfile(program, part)
        part.chmod(0o755)
        part.replace(target)
    return {images[_stage(one.role)]: one.name for one in found}


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


# ---- What containers are given


def _give(
    folder: Path,
    authority: Authority,
    wanted: Wanted,
    found: Sequence[Service],
    starting: Collection[str] | None,
) -> None:
    """Write what units find when they start."""
    private_folder(folder)
    tickets = dict(_tickets(folder, authority, wanted)) if wanted.settings is not None else {}
    for one in sorted(found, key=lambda one: one.role != "control-plane"):  # the others' say who signs
        if one.config is None or _joins(one, wanted):
            continue
        if starting is not None and one.config.unit.name not in starting:
            continue
        config, path = one.config, folder / f"{one.name}.json"
        if config.broker is not None:  # in its network, which is its own
            inner = msgspec.structs.replace(config.broker, listen="0.0.0.0", port=BROKER_PORT)  # noqa: S104
            config = msgspec.structs.replace(config, broker=inner)
        there, keys = _read(path), Path(GIVEN)
        data = make_config(config, authority, there, keys_in=keys, tickets=tickets, settings=wanted.settings)
        if data is not None:
            _secret(path, data)
    guard = authority.guard()
    if guard is not None:
        for source in (guard.certificate, guard.key):
            _secret(folder / source.name, Path(source).read_bytes())
    _secret(folder / TOKEN, _read(folder / TOKEN) or f"{secrets.token_hex(TOKEN_BYTES)}\n".encode())


def _tickets(folder: Path, authority: Authority, wanted: Wanted) -> Iterator[tuple[str, TicketRecord]]:
    """A ticket for each role that joins, and its record."""
    for role in JOINING:
        path = folder / f"{role}.ticket"
        dial = next(one.dial for one in wanted.units if one.unit.role == "control-plane")
        login = authority.login(dial, tls=True)
        assert role in ("executor", "worker")
        text, record = ticket_for(authority, role, wanted.queues, login, _read(path).decode(errors="replace"))
        _secret(path, f"{text}\n".encode())
        yield decode_ticket(text).id, record


def _joins(one: Service, wanted: Wanted) -> bool:
    """Whether its containers come with a ticket: people may scale them, or start them in a year."""
    return wanted.settings is not None and one.role in JOINING


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


def services(wanted: Wanted) -> list[Service]:
    """What the units are in a compose file, in the order of their start."""
    scaled = _scaled([one.unit for one in wanted.units]) if wanted.settings is not None else {}
    found: list[Service] = []
    for config in wanted.units:
        unit = config.unit
        if unit.name not in scaled:
            name = service_name(unit.name)
            found.append(Service(name=name, role=unit.role, count=1, options=unit.options, config=config))
        elif unit.name == f"{scaled[unit.name][0]}-1":
            name, count = scaled[unit.name]
            found.append(Service(name=name, role=unit.role, count=count, options=unit.options))
    return found


def _scaled(units: Sequence[Unit]) -> dict[str, tuple[str, int]]:
    """The units of which several are one service, which people can scale: its name, and how many they are."""
    alike: dict[tuple[str, tuple[str, ...]], list[Unit]] = {}
    for unit in units:
        name = _NUMBERED.fullmatch(unit.name)
        if unit.role in JOINING and unit.listen is None and name is not None:
            alike.setdefault((name[1], unit.options), []).append(unit)
    scaled: dict[str, tuple[str, int]] = {}
    for (base, _), several in alike.items():
        if [unit.name for unit in several] == [f"{base}-{number + 1}" for number in range(len(several))]:
            scaled |= dict.fromkeys((unit.name for unit in several), (base, len(several)))
    return scaled


def compose_file(wanted: Wanted, owner: str, images: Mapping[str, str]) -> dict[str, Any]:
    """compose.yaml, for `docker compose` and `docker-compose` 1.29. `images` are those of the stages."""
    found = services(wanted)
    network, label = wanted.compose.network, {AUTHORITY: owner}
    body: dict[str, Any] = {"services": {}, "networks": {}, "volumes": {}, "secrets": {}}
    for one in found:
        service = _service(one, found, wanted) | {"labels": label | {ROLE: one.role}, "scale": one.count}
        stage = _stage(one.role)
        service |= {"image": images[stage], "build": {"context": ".", "target": stage}}
        if one.config is not None:
            service["labels"][UNIT] = one.config.unit.name
        if one.config is not None and wanted.settings is None:
            service["container_name"] = f"{project_of(wanted.cluster)}-{one.config.unit.name}"
            service["labels"][CONFIG] = _literal(msgspec.json.encode(one.config).decode())
        body["services"][one.name] = service
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


def _service(one: Service, all_: Sequence[Service], wanted: Wanted) -> dict[str, Any]:
    """All of a service but its image, its labels, and how many containers it has."""
    parts: dict[str, Any] = {
        "command": _literal(list(_command(one, wanted))),
        "init": one.role != "broker",  # the server is the first process, and finds that by itself
        "restart": "unless-stopped",
        "stop_grace_period": f"{int(GRACE_S) + _HURRY_S}s",
        "depends_on": _before(one, all_),
        "networks": ["cluster", BORDER] if one.role == "broker" and _is_apart(wanted) else ["cluster"],
        "volumes": [f"{'broker' if one.role == 'broker' else 'state'}:{STATE}"],
        "secrets": _secrets(one, wanted),
        "healthcheck": {"test": ["CMD-SHELL", _health(one)], "interval": "5s", "timeout": "5s", "retries": 3},
        "mem_limit": _memory(one, wanted),
        "pids_limit": _PROCESSES_MAX,
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
    if one.config is not None and one.role == "balancer":
        yield f"--cluster={wanted.cluster}"
        yield f"--name={one.config.unit.name}"
        if wanted.has_ca:
            yield f"--config={GIVEN}/{one.name}.json"
    elif not _joins(one, wanted):
        yield f"--config={GIVEN}/{one.name}.json"
    else:
        yield f"--join=@{GIVEN}/{one.role}.ticket"
        yield "--patient"
        yield f"--name={one.config.unit.name}" if one.config is not None else f"--replica-of={one.name}"
    if one.role in JOINING:
        yield f"--token-file={GIVEN}/{TOKEN}"
        yield f"--grace={wanted.grace}"
    yield from one.options


def _secrets(one: Service, wanted: Wanted) -> list[str]:
    """What a service is given. The token is for who is, or dials, an engine, now or later."""
    given = f"{one.role}.ticket" if _joins(one, wanted) else f"{one.name}.json"
    if one.role == "broker":
        return [given, "broker.key", "broker.pem"]
    if one.role == "balancer":
        return [given] if wanted.has_ca else []
    return [given, TOKEN] if one.role in JOINING else [given]


def _health(one: Service) -> str:
    """Whether it works: the server listens, a unit has reached the cluster just now."""
    if one.role == "broker":
        return f"ls {STATE}/*/broker/nats-server_*.ports"
    if one.role == "balancer":
        return f"bash -c '</dev/tcp/127.0.0.1/{API_PORT}'"
    return f'test -n "$$(find {_READY} -mmin -0.5)"'


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


def _literal(value: Any) -> Any:
    """Text that compose is not to look for variables in."""
    if isinstance(value, dict):
        return {key: _literal(one) for key, one in value.items()}
    return [_literal(one) for one in value] if isinstance(value, list) else value.replace("$", "$$")


def _stage(role: RoleName) -> str:
    """The part of the Dockerfile that makes the image of a role: one for all but a balancer."""
    return "balancer" if role == "balancer" else "unit"


def _image(wanted: Wanted, stage: str, program: bytes) -> str:
    """An image's name, which another content would not have."""
    recipe = _dockerfile(wanted, balancer=stage == "balancer")
    return f"{project_of(wanted.cluster)}:{_mark(recipe.encode() + program)}"


def dockerfile(wanted: Wanted) -> str:
    """The image of all roles, and on it that of a balancer, where there is one."""
    return _dockerfile(wanted, balancer=any(one.unit.role == "balancer" for one in wanted.units))


def _dockerfile(wanted: Wanted, *, balancer: bool) -> str:
    user = os.geteuid() or USER
    recipe = _DOCKERFILE.format(base=wanted.compose.base, user=user, state=STATE, ready=_READY)
    return recipe + (_BALANCER.format(user=user) if balancer else "")


_BALANCER = """
FROM unit AS balancer
USER 0:0
RUN command -v haproxy \\
    || {{ apt-get update && apt-get install -y --no-install-recommends haproxy; }}
USER {user}:{user}
"""
_DOCKERFILE = """\
# All roles of a cluster, rendered by `mvmci render`. The base has a Python, 3.11 to 3.14, and what
# `allow.exec` names: `docker compose build --build-arg BASE=…` takes another one.
ARG BASE={base}
FROM ${{BASE}} AS unit
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
