"""What a credential may do: the exact subjects that each role publishes and subscribes.

Lists of what is allowed and nothing else, narrowed to the unit's own name and queues. Only the control
plane and an administrator on the cluster's own machine make, change, purge or delete streams.

Not narrowed, because JetStream cannot: reading. Who may read a stream may read all of it, so teams that
must not see each other have clusters of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mvmci.cluster.identity import UnitRole
from mvmci.stores.nats.layout import Layout

Grantee = UnitRole | Literal["bootstrap"]  # the last is a ticket's: it may ask to enrol
JS_API = "$JS.API"
MANY_ANSWERS = ("$JS.API.DIRECT.GET.", "$JS.API.CONSUMER.MSG.NEXT.")  # to one request
SERVICE_ANSWERS = "_R_"  # what the broker names the inbox of who asks from another account
CLAIMS_UPDATE = "$SYS.REQ.CLAIMS.UPDATE"
CLAIMS_LOOKUP = "$SYS.REQ.ACCOUNT.{}.CLAIMS.LOOKUP"
VARZ, JSZ, CONNZ = (f"$SYS.REQ.SERVER.PING.{what}" for what in ("VARZ", "JSZ", "CONNZ"))

_ABOUT: dict[Grantee, str] = {
    "worker": "Takes the hints of its queues and runs their jobs.",
    "executor": "Runs jobs for workers; takes no hints. Over HTTP it submits and reads for others.",
    "client": "What `mvmci login` gives: submits, cancels and reads.",
    "control-plane": "Enrols units, looks after every queue, makes the streams.",
    "admin": "A verb on the machine that has the cluster's keys, for an hour.",
    "bootstrap": "What a ticket holds, until it expires. `UNIT` is the ticket's id.",
    "system": "For `revoke` and for the check that the broker syncs; in an account apart from all jobs.",
}


_AT_THE_STREAMS = ("control-plane", "admin", "system")  # the others have accounts without streams
_OF_QUEUES = ("worker", "executor")  # the others see to all queues, unless they are told otherwise


@dataclass(frozen=True)
class Permissions:
    """Subjects, as NATS writes them."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def inbox(role: Grantee, unit: str) -> str:
    """What every inbox of a unit begins with, so that nobody else can listen there."""
    return f"_INBOX.{role}.{unit}"


def api(layout: Layout, role: Grantee) -> str:
    """What requests to JetStream begin with; empty where that is its usual name. An account without streams
    has another for what it imports: under the usual one the server itself says that there is no JetStream.
    """
    return "" if role in _AT_THE_STREAMS else f"{layout.cluster}.api"


def permissions(layout: Layout, role: Grantee, unit: str, queues: Sequence[str] = ()) -> Permissions:
    """What `unit` may do in its `role`. No `queues` means every queue; a worker has at least one."""
    publish, subscribe = {
        "worker": _worker,
        "executor": _executor,
        "client": _client,
        "control-plane": _control_plane,
        "admin": _admin,
        "system": _system,
        "bootstrap": _bootstrap,
    }[role](layout, unit, tuple(queues) or ("*",))
    subscribe = [f"{inbox(role, unit)}.>", *subscribe]
    return Permissions(tuple(dict.fromkeys(publish)), tuple(dict.fromkeys(subscribe)))


_Lists = tuple[list[str], list[str]]


def _worker(layout: Layout, unit: str, queues: tuple[str, ...]) -> _Lists:
    """An engine of its own, the hints of its queues, and orders to executors."""
    assert unit == "*" or queues != ("*",), "a worker has queues of its own"
    publish, subscribe = _engine(layout, unit, queues)
    return (
        [*publish, *_pulls(layout, queues), layout.engine(unit, "*"), layout.ping(unit, "*")],
        [*subscribe, layout.reply(unit, "*"), layout.capacity()],
    )


def _executor(layout: Layout, unit: str, queues: tuple[str, ...]) -> _Lists:
    """An engine for others, and a client: who asks it over HTTP may submit and cancel."""
    publish, subscribe = _engine(layout, unit, queues)
    submits = [layout.message("*", kind, queue, unit) for kind in ("spec", "cancel") for queue in queues]
    return (
        [*publish, *submits, _info(layout, layout.jobs), layout.reply("*", "*"), layout.capacity()],
        [
            *subscribe,
            layout.engine("*", "*"),
            layout.ping("*", "*"),
            *_words(layout),
        ],
    )


def _engine(layout: Layout, unit: str, queues: tuple[str, ...]) -> _Lists:
    publish = [
        *(layout.message("*", kind, queue, unit) for kind in ("run", "done") for queue in queues),
        *(layout.log("*", queue) for queue in queues),
        *(subject(queue, "*") for subject in (layout.ready, layout.timer) for queue in queues),
        layout.member(unit, "*"),
        *_blobs(layout, unit),
        *_reads(layout),
        layout.renew(unit),
        layout.measured(unit, "*"),
    ]
    return publish, [*_hears(layout, unit), layout.measure()]


def _client(layout: Layout, unit: str, queues: tuple[str, ...]) -> _Lists:
    publish = [
        *(layout.message("*", kind, queue, unit) for kind in ("spec", "cancel") for queue in queues),
        *_blobs(layout, unit),
        *_reads(layout),
        _info(layout, layout.jobs),  # what jobs there are
        layout.renew(unit),
    ]
    return publish, [*_hears(layout, unit), *_words(layout)]


def _control_plane(layout: Layout, unit: str, queues: tuple[str, ...]) -> _Lists:
    del queues  # it looks after all of them
    publish = [
        layout.message("*", "end", "*", unit),
        *(layout.ready("*", "*"), layout.timer("*", "*")),
        layout.member(unit, "*"),
        layout.setting(">"),
        layout.blob_info("*"),  # to say of a damaged one that it is gone
        *_reads(layout),
        *_administers(layout),
        layout.renew(unit),
        layout.measured(unit, "*"),
        *(f"{asker}.>" for asker in (SERVICE_ANSWERS, inbox("control-plane", "*"), inbox("admin", "*"))),
    ]
    hears = [layout.member("*", "*"), layout.setting(">"), layout.enrol("*"), layout.renew("*")]
    return publish, [*hears, layout.measure()]


def _admin(layout: Layout, unit: str, queues: tuple[str, ...]) -> _Lists:
    """What the control plane may, and what a client may, but it serves nobody."""
    of_client, hears = _client(layout, unit, queues)
    of_plane, _ = _control_plane(layout, unit, queues)
    direct = [subject for subject in of_client if not subject.startswith(f"{api(layout, 'client')}.")]
    asks = [*direct, *of_plane, layout.measure()]
    return asks, [*hears, layout.setting(">"), layout.measured("*", "*")]


def _bootstrap(layout: Layout, unit: str, queues: tuple[str, ...]) -> _Lists:
    del queues
    return [layout.enrol(unit)], []


def _system(layout: Layout, unit: str, queues: tuple[str, ...]) -> _Lists:
    del layout, unit, queues
    return [CLAIMS_UPDATE, CLAIMS_LOOKUP.format("*"), VARZ, JSZ, CONNZ], []


def _info(layout: Layout, stream: str) -> str:
    """What a stream holds. Who has an account without streams asks that of the main one."""
    return f"{api(layout, 'client')}.STREAM.INFO.{stream}"


def _words(layout: Layout) -> tuple[str, str]:
    """That something was stored, of any job."""
    return (layout.stored("job", "*"), layout.stored("log", "*"))


def _reads(layout: Layout) -> Iterator[str]:
    """Direct gets, whose subject is in the body of the request."""
    streams = (layout.jobs, layout.logs, layout.blobs, layout.members, layout.config)
    return (f"$JS.API.DIRECT.GET.{stream}" for stream in streams)


def _hears(layout: Layout, unit: str) -> list[str]:
    """What the cluster allows, and whether this unit is to drain."""
    return [layout.setting("settings"), layout.setting(f"drain.{unit}")]


def _blobs(layout: Layout, unit: str) -> Iterator[str]:
    """Chunks and what tells of them; and how many there are."""
    yield layout.blob_chunks("*")
    yield layout.blob_info("*")
    yield _info(layout, layout.blobs)


def _pulls(layout: Layout, queues: tuple[str, ...]) -> Iterator[str]:
    """Taking hints from the two consumers of each queue, and answering them."""
    for queue in queues:
        for stream, consumer in layout.consumers(queue, 0):
            yield f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer['name']}"
            yield f"$JS.ACK.{stream}.{consumer['name']}.>"


def _administers(layout: Layout) -> Iterator[str]:
    """Streams and consumers of this cluster, and of no other."""
    yield from ("$JS.API.INFO", "$JS.API.STREAM.NAMES")
    for stream in (layout.jobs, layout.hints, layout.logs, layout.blobs, layout.members, layout.config):
        yield f"$JS.API.STREAM.*.{stream}"
    for stream in (layout.jobs, layout.hints):
        yield f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.*"
        yield f"$JS.API.CONSUMER.*.{stream}.*"
        yield f"$JS.API.CONSUMER.*.{stream}"
    yield f"$JS.API.DIRECT.GET.{layout.hints}"


def describe() -> str:
    """All of it as Markdown, for the cluster `demo`; `UNIT` and `QUEUE` stand for a unit's own."""
    layout = Layout("demo")
    parts = []
    for role, about in _ABOUT.items():
        granted = permissions(layout, role, "UNIT", ("QUEUE",) if role in _OF_QUEUES else ())
        rows = "\n".join(
            f"| {verb} | {', '.join(f'`{subject}`' for subject in subjects)} |"
            for verb, subjects in (("publish", granted.publish), ("subscribe", granted.subscribe))
        )
        parts.append(f"**{role}** — {about}\n\n| may | subjects |\n|---|---|\n{rows}")
    return "\n\n".join(parts)
