"""The cluster file: which machines there are, and how workers reach the engine that runs their modules.

It owns the values of a topology, their defaults, and the checks across them. It promises one answer for
a text: a `Topology`, or a `BadTopology` with *every* problem of the file and where it is. The structs are
the only place that names the keys: the reader and the JSON Schema both come from them.

What units a topology means (its plan), and whether its hosts can be reached, is not decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from mvmci import errors
from mvmci.config import quantity
from mvmci.config.reader import KeyPath, Reading, did_you_mean
from mvmci.config.strict_yaml import Problem
from mvmci.jobs import allow
from mvmci.jobs.job import ID_PATTERN
from mvmci.system.ports import is_loopback

PROBLEMS_SHOWN_MAX = 50
STORE_BYTES_MIN = 64 << 20
MEMORY_BYTES_MIN = 128 << 20

# The values. Each description completes the sentence "`workers.count` must be …".

Name = Annotated[
    str,
    Meta(
        pattern=f"^{ID_PATTERN}$",
        description="a name of at most 63 small letters, digits and dashes",
    ),
]
AccessName = Annotated[
    str,
    Meta(
        pattern=f"^{ID_PATTERN}$",
        description="the name of an access, for example pool",
        examples=["per-worker", "peer", "pool", "shared"],
    ),
]
LabelKey = Annotated[
    str,
    Meta(
        pattern="^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$",
        description="a label of at most 63 letters, digits and ._/-",
    ),
]
LabelValue = Annotated[str, Meta(max_length=253, description="text")]
Count = Annotated[int, Meta(ge=1, le=10_000, description="a whole number from 1 to 10000")]
SlotCount = Annotated[int, Meta(ge=1, le=1024, description="a whole number from 1 to 1024")]
Port = Annotated[int, Meta(ge=1, le=65_535, description="a port from 1 to 65535")]
Address = Annotated[
    str,
    Meta(pattern=r"^[A-Za-z0-9:_\[][A-Za-z0-9.:_\[\]-]{0,252}$", description="a host name or an IP address"),
]
User = Annotated[str, Meta(pattern="^[A-Za-z_][A-Za-z0-9_.-]{0,31}$", description="a user's name")]
Jump = Annotated[
    str,
    Meta(
        pattern=r"^([A-Za-z_][A-Za-z0-9_.-]{0,31}@)?(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9_][A-Za-z0-9._-]{0,252})(:[0-9]{1,5})?$",
        description="another host of the file, or USER@ADDRESS:PORT of one that is not in it",
    ),
]
HostKey = Annotated[
    str,
    Meta(
        pattern=r"^(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp\d+) [A-Za-z0-9+/]{16,4096}={0,2}( [^\n]*)?$",
        description="a host's public key, as `ssh-keyscan` prints it: ssh-ed25519 AAAA…",
    ),
]
PythonName = Annotated[
    str,
    Meta(
        pattern=r"^(/[^\x00-\x1f\x7f]{1,4095}|[A-Za-z0-9._-]{1,255})$",
        description="a Python's name or its absolute path",
    ),
]
Folder = Annotated[
    str, Meta(pattern=r"^/[^\x00-\x1f\x7f]{1,1023}$", description="the absolute path of a directory")
]
Listen = Annotated[
    str,
    Meta(
        pattern=r"^(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?$",
        description="an address, as 0.0.0.0 or 10.0.0.5:4222",
    ),
]
Advertised = Annotated[
    tuple[Listen, ...], Meta(max_length=20, description="an address or a list of at most 20")
]
BrokerUrl = Annotated[
    str,
    Meta(
        pattern=r"^(tls|nats)://[^@\s]+$",
        description="a URL that begins with tls:// or nats:// and holds no password",
    ),
]
HttpUrl = Annotated[
    str,
    Meta(
        pattern=r"^https?://[^@\s]+$",
        description="a URL that begins with http:// or https:// and holds no password",
    ),
]
HttpRule = Annotated[str, Meta(max_length=8192, description="a URL, in which * stands for any characters")]
Program = Annotated[str, Meta(max_length=4096, description="a program's name or its absolute path")]
DurationText = Annotated[
    Annotated[str, Meta(pattern=quantity.DURATION_PATTERN)] | int | float,
    Meta(description="a duration: seconds, or a number with ms, s, m, h or d"),
]
SizeText = Annotated[
    Annotated[str, Meta(pattern=quantity.SIZE_PATTERN)] | int,
    Meta(description="a size: bytes, or a number with KiB, MiB or GiB"),
]
Image = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}$", description="an image, as python:3.12-slim-bookworm"
    ),
]
Driver = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,126}$", description="a network driver, as macvlan")
]
FilePath = Annotated[str, Meta(min_length=1, max_length=4096, description="the path of a file")]
HostNames = Annotated[tuple[Name, ...], Meta(max_length=1000, description="a list of at most 1000 hosts")]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all mappings of the file."""


class HostSection(_Section, frozen=True, kw_only=True, omit_defaults=True):
    """One machine. Under `local` and `compose` it is only a name.

    Under `ssh`, its `address` is where it is dialled, by us and by the other hosts; its name, if absent.
    `key` is the file of a private key, relative to the cluster file's folder; without one, those of the
    agent and of ~/.ssh count. `host_key` is the only key that the host may have; without one, known_hosts
    says. `directory` is what mvmci keeps there. Every worker on it has its `labels`. An `absent` one is
    emptied. A `lost` one is dead for good: nobody asks it any more, and the keys of its units are revoked.
    """

    address: Address | None = None
    user: User | None = None
    port: Port = 22
    key: FilePath | None = None
    jump: Jump | None = None
    host_key: HostKey | None = None
    python: PythonName | None = None
    directory: Folder | None = None
    service: Literal["auto", "system", "user", "none"] = "auto"
    labels: dict[LabelKey, LabelValue] = {}
    state: Literal["present", "absent", "lost"] = "present"


class BrokerSection(_Section, frozen=True, kw_only=True):
    """Where nats-server runs: on one host, or at the URL of one that you run yourself.

    Other machines are told to dial what it listens at, or where you `advertise` it: one address or several.
    `credentials` are those that a broker of yours gave you, in a .creds file; its path is relative to
    the cluster file's folder.
    """

    hosts: HostNames = ()
    url: BrokerUrl | None = None
    credentials: FilePath | None = None
    listen: Listen | None = None
    advertise: Listen | Advertised = ()
    store: SizeText = "10GiB"

    @property
    def address(self) -> str | None:
        """The address of `listen`, without brackets; None is the loopback."""
        return host_and_port(self.listen)[0].strip("[]") if self.listen else None

    @property
    def port(self) -> int | None:
        """The port of `listen`; None is any free one."""
        port = host_and_port(self.listen)[1] if self.listen else ""
        return int(port) if port else None

    @property
    def advertised(self) -> tuple[str, ...]:
        """What `advertise` says, each as HOST or HOST:PORT."""
        return (self.advertise,) if isinstance(self.advertise, str) else self.advertise

    @property
    def store_bytes(self) -> int:
        """What the broker may keep on disk, in bytes."""
        return quantity.parse_size(self.store, minimum_bytes=STORE_BYTES_MIN)


def host_and_port(listen: str) -> tuple[str, str]:
    """The two parts of `listen`; the colons of an address stand in brackets."""
    host, colon, port = listen.rpartition(":")
    return (host, port) if colon and not port.endswith("]") else (listen, "")


class ControlPlaneSection(_Section, frozen=True, kw_only=True):
    """Where the control plane runs."""

    hosts: HostNames = ()


class ExecutorsSection(_Section, frozen=True, kw_only=True):
    """The engines that workers share. No `slots` means as many as the host has processors.

    Those of a `pool` are balanced by the broker, unless there is the `url` of a balancer that you run
    yourself, or a `balancer` that is to be started.
    """

    hosts: HostNames = ()
    count: Count = 1
    slots: SlotCount | None = None
    url: HttpUrl | None = None
    balancer: Literal["haproxy"] | None = None


class WorkersSection(_Section, frozen=True, kw_only=True):
    """Workers that are alike, `name`-1 to `name`-`count`, dealt round the hosts.

    No `slots` means as many as the host has processors.
    """

    name: Name = "worker"
    hosts: HostNames = ()
    count: Count = 1
    slots: SlotCount | None = None
    queues: Annotated[
        tuple[Name, ...], Meta(min_length=1, max_length=100, description="a list of 1 to 100 queues")
    ] = ("default",)
    labels: dict[LabelKey, LabelValue] = {}


class AllowSection(_Section, frozen=True, kw_only=True):
    """Which effects workflows may have, on every engine. Nothing by default."""

    http: Annotated[
        tuple[HttpRule, ...], Meta(max_length=1000, description="a list of at most 1000 URLs")
    ] = ()
    exec: Annotated[
        tuple[Program, ...], Meta(max_length=1000, description="a list of at most 1000 programs")
    ] = ()


class RetainSection(_Section, frozen=True, kw_only=True):
    """How long ended jobs and their output are kept."""

    jobs: DurationText = "7d"
    logs: DurationText = "2d"

    @property
    def jobs_ms(self) -> int:
        """How long ended jobs are kept, in milliseconds."""
        return quantity.parse_duration(self.jobs)

    @property
    def logs_ms(self) -> int:
        """How long output is kept, in milliseconds."""
        return quantity.parse_duration(self.logs)


class NetworkSection(_Section, frozen=True, kw_only=True):
    """The network that containers share, as Docker's `driver` and its options make it."""

    driver: Driver = "bridge"
    options: dict[LabelKey, LabelValue] = {}


class ComposeSection(_Section, frozen=True, kw_only=True):
    """Containers. `base` has a Python, and what `allow.exec` names; `memory` is for each that has an engine.

    Left out, that is what its slots may take, each with a job of the usual size.
    """

    base: Image = "python:3.12-slim-bookworm"
    network: NetworkSection = NetworkSection()
    memory: SizeText | None = None

    @property
    def memory_bytes(self) -> int | None:
        """How much memory a container with an engine may take, in bytes."""
        return (
            None if self.memory is None else quantity.parse_size(self.memory, minimum_bytes=MEMORY_BYTES_MIN)
        )


class Topology(_Section, frozen=True, kw_only=True):
    """A cluster, as its file says it. An empty `hosts` of a role means every present host.

    `access` is one that is installed, or with `plugin` only a name: that Python file, relative to the
    cluster file's folder, then makes the plan.
    """

    cluster: Name
    access: AccessName = "per-worker"
    plugin: FilePath | None = None
    runtime: Literal["local", "ssh", "compose"] = "local"
    hosts: Annotated[
        dict[Name, HostSection],
        Meta(max_length=1000, description="a mapping from names to at most 1000 hosts"),
    ] = {}
    broker: BrokerSection = BrokerSection()
    control_plane: ControlPlaneSection = ControlPlaneSection()
    executors: ExecutorsSection | None = None
    workers: (
        WorkersSection
        | Annotated[
            tuple[WorkersSection, ...],
            Meta(min_length=1, max_length=100, description="a list of 1 to 100 groups of workers"),
        ]
    )
    compose: ComposeSection = ComposeSection()
    allow: AllowSection = AllowSection()
    retain: RetainSection = RetainSection()
    durability: Literal["strict", "relaxed"] = "strict"
    min_isolation: Literal["process", "filtered", "confined", "isolated"] = "process"
    isolation: Literal["reuse", "per-job"] = "reuse"

    @property
    def groups(self) -> tuple[WorkersSection, ...]:
        """The groups of workers: one, where the file has no list of them."""
        return (self.workers,) if isinstance(self.workers, WorkersSection) else self.workers

    @property
    def queues(self) -> tuple[str, ...]:
        """The queues of all groups, each once, in the order of the file."""
        return tuple(dict.fromkeys(queue for group in self.groups for queue in group.queues))


class BadTopology(errors.Usage):
    """A cluster file that cannot be used, with all of its problems in the order of the file."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        # The last problem's hint is the error's own, so that whoever prints an error prints this one right.
        assert problems
        shown = problems[:PROBLEMS_SHOWN_MAX]
        lines = [f"{p.where}: {p.message}" + (f"\nhint: {p.hint}" if p.hint else "") for p in shown[:-1]]
        lines.append(f"{shown[-1].where}: {shown[-1].message}")
        if len(problems) > len(shown):
            lines.insert(0, f"{len(problems)} problems, of which the first {len(shown)} are:")
        super().__init__("\n".join(lines), hint=shown[-1].hint)
        self.problems = problems


def read_topology(text: str | bytes, *, name: str, accesses: Collection[str] | None = None) -> Topology:
    """The topology that `text` says. `name` is the file's, for messages. Raises `BadTopology`.

    `accesses` are those that are installed; None: any may be named.
    """
    reading = Reading(text, Topology, name=name, examples={"workers": "{count: 3}"})
    if reading.values is not None:
        # Where a section is broken its defaults stand in, so that the checks can look at the others.
        stand_ins = {"cluster": "x", "workers": {}} if reading else {}
        plugin = {"access": "plugin"} if "plugin" in reading.values else {}
        topology = msgspec.convert(stand_ins | plugin | reading.values, Topology)
        checks: list[_Check] = [(("access",), partial(_check_access, accesses)), *_CHECKS]
        for needed, check in checks:
            if not reading.broken & set(needed):
                for path, message, hint in check(topology):
                    reading.refuse(path, message, hint)
        if not reading:
            return topology
    raise BadTopology(reading.ordered())


def refused(text: str | bytes, path: KeyPath, message: str, hint: str, *, name: str) -> BadTopology:
    """What is to be raised where the value at `path` of a sound file cannot be, by what else is known."""
    reading = Reading(text, Topology, name=name, examples={})
    reading.refuse(path, message, hint)
    return BadTopology(reading.ordered())


def schema() -> dict[str, Any]:
    """The JSON Schema of the file, of draft 7, made from the structs above."""
    (body,), parts = msgspec.json.schema_components((Topology,), ref_template="#/definitions/{name}")
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "mvmci topology"}
    whole = msgspec.json.encode(head | body | {"definitions": parts})  # its defaults are structs and tuples
    found: dict[str, Any] = _without_ref_siblings(msgspec.json.decode(whole))
    # Who writes what a later version will do gets a sentence, but nobody is told to.
    found["definitions"]["BrokerSection"]["properties"]["hosts"]["maxItems"] = 1
    return found


def _without_ref_siblings(value: Any) -> Any:
    """`value`, where no `$ref` has keys beside it: in draft 7, which editors know, they would not count."""
    if isinstance(value, list):
        return [_without_ref_siblings(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {key: _without_ref_siblings(one) for key, one in value.items()}
    if len(found) > 1 and isinstance(found.get("$ref"), str):
        found["allOf"] = [{"$ref": found.pop("$ref")}]
    return found


# Checks across keys. Each yields (path, message, hint) and needs the named sections to be sound.

_Finding = tuple[KeyPath, str, str | None]
_Check = tuple[tuple[str, ...], Callable[[Topology], Iterator[_Finding]]]


def _check_hosts(topology: Topology) -> Iterator[_Finding]:
    if topology.hosts and all(host.state == "absent" for host in topology.hosts.values()):
        yield ("hosts",), "every host is absent", "Leave one present; `mvmci down` removes a whole cluster."
    if topology.runtime == "ssh" and not topology.hosts:
        hint = "Add hosts: {a: {address: 10.0.0.5, user: ci}}."
        yield ("runtime",), "runtime ssh needs hosts", hint
    for name, host in topology.hosts.items():
        seen = [name]
        while (jump := topology.hosts[seen[-1]].jump) in topology.hosts:
            seen.append(jump)
            if jump == name:
                hint = "One of them must be reached without the other."
                yield ("hosts", name, "jump"), f"the jumps go in a circle: {' → '.join(seen)}", hint
            if seen.count(jump) > 1:
                break
        if host.state != "lost" and host.jump in topology.hosts and topology.hosts[host.jump].state == "lost":
            hint = "Name another way to it."
            yield ("hosts", name, "jump"), f"the jump leads over host `{host.jump}`, which is lost", hint
        if host.jump is not None and not 1 <= int(host_and_port(host.jump)[1] or 22) <= 65_535:
            yield ("hosts", name, "jump"), f"the port of `{host.jump}` must be from 1 to 65535", None


def _check_host_names(role: str) -> Callable[[Topology], Iterator[_Finding]]:
    def check(topology: Topology) -> Iterator[_Finding]:
        section = getattr(topology, role)
        if section is not None:
            yield from _named_hosts(topology, (role, "hosts"), section.hosts)

    return check


def _named_hosts(topology: Topology, path: KeyPath, names: tuple[str, ...]) -> Iterator[_Finding]:
    for index, name in enumerate(names):
        where = (*path, index)
        if name not in topology.hosts:
            hint = did_you_mean(name, topology.hosts) or "Add it to `hosts`."
            yield where, f"there is no host `{name}`", hint
        elif (state := topology.hosts[name].state) != "present":
            yield where, f"host `{name}` is {state}", "Name another one here, or make it `state: present`."
        elif name in names[:index]:
            hint = "Name it once; `count` says how many units there are."
            yield where, f"host `{name}` is listed twice", hint


def _check_access(accesses: Collection[str] | None, topology: Topology) -> Iterator[_Finding]:
    access = topology.access
    if accesses is not None and topology.plugin is None and access not in accesses:
        known = ", ".join(accesses)
        hint = did_you_mean(access, accesses) or "A file of your own can make the plan: plugin: ./mine.py."
        yield ("access",), f"`access` must be one of {known}, not `{access}`", hint


def _check_executors(topology: Topology) -> Iterator[_Finding]:
    access, executors = topology.access, topology.executors
    if topology.plugin is not None or access not in ("per-worker", "peer", "pool", "shared"):
        return  # whoever wrote it knows what it takes
    if executors is None:
        if access == "pool":
            yield ("access",), "access `pool` needs executors", "Add executors: {count: 2}."
        return
    if access == "per-worker":
        hint = "Remove `executors`, or choose access peer, pool or shared."
        yield ("executors",), "access `per-worker` has no executors: each worker has its engine inside", hint
        return
    if access != "pool" and executors.count > 1:
        yield ("executors", "count"), f"access `{access}` has one executor", "Several are access `pool`."
    if access != "pool" and executors.url is not None:
        yield (
            ("executors", "url"),
            f"access `{access}` takes no URL",
            "One URL in front of many is access `pool`.",
        )
    if access != "pool" and executors.balancer is not None:
        yield (
            ("executors", "balancer"),
            f"access `{access}` takes no balancer",
            "A balancer in front of many is access `pool`.",
        )
    if executors.url is not None and executors.balancer is not None:
        yield (
            ("executors", "balancer"),
            "`executors.balancer` and `executors.url` exclude each other",
            "A URL is that of a balancer which you run yourself.",
        )


def _check_broker(topology: Topology) -> Iterator[_Finding]:
    broker = topology.broker
    if broker.url is not None and (broker.hosts or broker.listen or broker.advertised):
        what = "hosts" if broker.hosts else "listen" if broker.listen else "advertise"
        hint = "A URL is that of a broker which you run yourself."
        yield ("broker", what), f"`broker.{what}` and `broker.url` exclude each other", hint
    if len(broker.hosts) > 1:
        hint = "Name one host in `broker.hosts`."
        yield ("broker", "hosts"), "a replicated broker is not in this version", hint
    if broker.credentials is not None and broker.url is None:
        hint = "Add url: tls://…, or remove it: a broker that `up` starts makes its own."
        yield ("broker", "credentials"), "`broker.credentials` goes with `broker.url`", hint
    if broker.port is not None and not 1 <= broker.port <= 65_535:
        yield ("broker", "listen"), "the port of `broker.listen` must be from 1 to 65535", None
    if broker.advertised and broker.url is None and is_loopback(broker.address or "localhost"):
        hint = "Add listen: 0.0.0.0; a broker on the loopback can be reached from this machine alone."
        yield ("broker", "advertise"), "`broker.advertise` goes with `broker.listen`", hint
    for place in broker.advertised:
        port = host_and_port(place)[1]
        if port and not 1 <= int(port) <= 65_535:
            yield ("broker", "advertise"), f"the port of `{place}` must be from 1 to 65535", None
    yield from _accepted(("broker", "store"), lambda: broker.store_bytes)


def _check_compose(topology: Topology) -> Iterator[_Finding]:
    yield from _accepted(("compose", "memory"), lambda: topology.compose.memory_bytes)


def _check_retain(topology: Topology) -> Iterator[_Finding]:
    yield from _accepted(("retain", "jobs"), lambda: topology.retain.jobs_ms)
    yield from _accepted(("retain", "logs"), lambda: topology.retain.logs_ms)


def _check_workers(topology: Topology) -> Iterator[_Finding]:
    listed = not isinstance(topology.workers, WorkersSection)
    seen: set[str] = set()
    for number, group in enumerate(topology.groups):
        path: KeyPath = ("workers", number) if listed else ("workers",)
        if group.name in seen:
            hint = "Each group has a `name` of its own; one may do without, and is `worker`."
            yield (*path, "name"), f"two groups of workers have the name `{group.name}`", hint
        if group.name in ("broker", "control-plane", "executor", "balancer"):
            yield (*path, "name"), f"`{group.name}` is the name of another unit", "Choose another one."
        seen.add(group.name)
        yield from _named_hosts(topology, (*path, "hosts"), group.hosts)
        for index, queue in enumerate(group.queues):
            if queue in group.queues[:index]:
                yield (*path, "queues", index), f"queue `{queue}` is listed twice", None


def _check_allow(topology: Topology) -> Iterator[_Finding]:
    rules = topology.allow
    for index, rule in enumerate(rules.http):
        yield from _accepted(("allow", "http", index), partial(allow.Allow, http=(rule,)))
    for index, program in enumerate(rules.exec):
        yield from _accepted(("allow", "exec", index), partial(allow.Allow, exec=(program,)))
    if len(rules.http) + len(rules.exec) > allow.RULES_MAX:
        yield ("allow",), f"`allow` has more than {allow.RULES_MAX} rules", "A `*` stands for any characters."


def _accepted(path: KeyPath, value: Callable[[], object]) -> Iterator[_Finding]:
    try:
        value()
    except errors.Usage as error:
        yield path, error.message, error.hint


_ROLES = ("broker", "control_plane", "executors")
_CHECKS: Final = (
    (("runtime", "hosts"), _check_hosts),
    *((("hosts", role), _check_host_names(role)) for role in _ROLES),
    (("access", "executors"), _check_executors),
    (("broker",), _check_broker),
    (("hosts", "workers"), _check_workers),
    (("allow",), _check_allow),
    (("retain",), _check_retain),
    (("compose",), _check_compose),
)
