"""Every message that a build writes at a level, and what it lets whom do on the broker, as bytes to compare.

    python -m tests.contracts.golden.messages LEVEL > tests/contracts/golden/level-LEVEL.json

What lies beside this for level 0 was written so by the release before levels, whose commit is `RELEASE`: with
this file copied into a checkout of it, since it takes nothing of mvmci that is not there as well.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec

from mvmci.cluster.identity import Login, Ticket, encode_ticket
from mvmci.cluster.witness import Loss, Removal, Seen, Witness
from mvmci.engine import Outcome
from mvmci.engines.remote import Accepted, Failed, Rejected, RunRequest
from mvmci.jobs.job import Artifact, Limits, Payload
from mvmci.jobs.journal import (
    AnyRecord,
    Cancel,
    Done,
    Entry,
    Intent,
    Journal,
    Lease,
    Progress,
    Released,
    Response,
    Result,
    Spec,
)
from mvmci.store import About, Chunk, ClusterSettings, Member
from mvmci.stores.nats.layout import Layout
from mvmci.trust.accounts import ACCOUNTS, imports
from mvmci.trust.enrol.client import EnrolReply, EnrolRequest
from mvmci.trust.permissions import permissions
from mvmci.trust.registry import TicketRecord, UnitRecord

RELEASE = "2470b8c1606daeef8812084099c36fbd18bba5e9"
ENROLMENT = 4  # the number of its messages at level 0
DIGEST = "sha256:" + "0123456789abcdef" * 4
SETTINGS = {
    "allow_http": ("https://a.example/*",),
    "allow_exec": ("git *",),
    "jobs_ms": 1_000,
    "logs_ms": 2_000,
    "store_bytes": 1 << 30,
    "queues": ("default", "other"),
    "min_isolation": "confined",
    "isolation": "per-job",
    "engine": "broker",
}
ROLES = ("worker", "executor", "client", "control-plane", "admin", "bootstrap", "system")

_encode = msgspec.json.Encoder().encode


def journal() -> list[tuple[AnyRecord, ...]]:
    """The records of a job's messages: each kind, with every field that it may have, and with none."""
    spec = Spec(
        at=1,
        id="j",
        queue="default",
        kind="command",
        module=DIGEST,
        name="tool.wasm",
        component=True,
        input=Payload(text='{"a": "é\\n"}'),
        args=("one", "--two=3"),
        env=(("K", "v"),),
        stdin=DIGEST,
        tree=DIGEST,
        artifacts=("out/**",),
        limits=Limits(timeout_ms=1, memory_bytes=2, output_bytes=3, workspace_bytes=4, attempts=5, fuel=6),
        seed=7,
        by="me",
    )
    lease = Lease(at=2, epoch=1, unit="w1", incarnation="i1", run="r1", why="first", worker="w2")
    request = {"kind": "http", "method": "GET", "url": "http://a/"}
    return [
        (spec,),
        (lease, Intent(at=3, index=0, kind="http", digest="d0", idempotent=True, request=request)),
        (
            Result(at=4, index=0, value={"kind": "http", "status": 200}, blob=DIGEST, tree=DIGEST),
            Intent(at=5, index=1, kind="sleep", digest="d1"),
        ),
        (Released(at=6, why="sleep", until=7),),
        (Lease(at=8, epoch=2, unit="w1", incarnation="i2", run="r2", why="resumed"),),
        (Released(at=9, why="drain"),),
        (Lease(at=10, epoch=3, unit="w1", incarnation="i2", run="r3", why="recovered"),),
        (Response(at=11, value=Payload(blob=DIGEST)), Progress(at=12, done=1, total=2, message="half")),
        (Result(at=13, index=1),),
        (Cancel(at=14, by="me"),),
        (
            Done(
                at=15,
                status="cancelled",
                reason="cancelled by me",
                exit_code=1,
                result=Payload(text="null"),
                artifacts=Payload(text="[]"),
                chunks=3,
            ),
        ),
    ]


def messages(wire: int) -> dict[str, str]:
    """The bytes of each message at level `wire`, by a name."""
    said = {"wire": wire} if wire else {}
    found: dict[str, bytes] = {}

    there = Journal("j")
    for number, records in enumerate(journal(), 1):
        message_id = f"{wire}:m{number}" if wire else f"m{number}"
        data = there.encode(records, message_id)
        there.extend(Entry(seq=number, data=data), message_id, records)
        found[f"journal {number}"] = data

    about = About(
        role="worker",
        host="h",
        pid=1,
        slots=2,
        queues=("default",),
        labels={"a": "b"},
        isolation="isolated",
        version="0.1.0",
        engine="embedded",
        state="draining",
        trouble="no room",
        drained=True,
    )
    member = Member(
        unit="w1",
        incarnation="i1",
        holds=("j@1",),
        keeps=("k",),
        waits={"k": "executors busy"},
        about=about,
        first=1,
        last=2,
        **said,
    )
    found["member"] = _encode(member)
    found["member that says little"] = _encode(Member(unit="w1", incarnation="i1", **said))
    found["settings"] = _encode(ClusterSettings(**SETTINGS, **said))  # type: ignore[arg-type]
    found["settings of old"] = _encode(ClusterSettings(**said))

    found["request"] = _encode(RunRequest(job="j", worker="w1", spec_seq=7, **said))
    found["request again"] = _encode(RunRequest(job="j", worker="w1", **said))
    replies: dict[str, Any] = {
        "accepted": Accepted(unit="x1", incarnation="i1", **said),
        "failed": Failed(why="not-found", message="there is no job j", **said),
        "rejected": Rejected(**said),
    }
    for kind in ("ended", "released", "held", "fenced"):
        replies[kind] = Outcome(kind, 5 if kind == "released" else 0, **said)  # type: ignore[arg-type]
    found |= {f"reply {name}": _encode(reply) for name, reply in replies.items()}

    found["enrolment"] = _encode(
        EnrolRequest(
            protocol=ENROLMENT, version="0.1.0", token="t", key="K", proof="p", name="n", host="h", **said
        )
    )
    found["enrolled"] = _encode(
        EnrolReply(
            protocol=ENROLMENT + wire,
            version="0.1.0",
            unit="w1",
            role="worker",
            queues=("default",),
            jwt="t",
            urls=("tls://a:1",),
        )
    )
    refused = {"refused": "no", "hint": "why not", "because": "key"}
    found["not enrolled"] = _encode(EnrolReply(protocol=ENROLMENT + wire, version="0.1.0", **refused))  # type: ignore[arg-type]

    found["ticket's record"] = _encode(
        TicketRecord(
            role="worker", queues=("a",), expires_at=1, uses=2, used_by=("K",), key="T", since=3, revoked=4
        )
    )
    unit = {
        "key": "K",
        "role": "worker",
        "queues": ("a",),
        "ticket": "t",
        "host": "h",
        "since": 1,
        "revoked": 2,
    }
    found["unit's record"] = _encode(UnitRecord(**unit))  # type: ignore[arg-type]
    login = Login(urls=("tls://a:1",), ca="CA", jwt="t", seed="S", inbox="_INBOX.b.t", api="demo.api")
    ticket = Ticket(id="t", cluster="demo", role="worker", queues=("a",), expires_at=1, login=login)
    found["ticket"] = encode_ticket(ticket).encode()

    seen = Seen("2026-01-01T00:00:00Z", 7, 5)
    found["witness"] = _encode(
        Witness(
            jobs=seen, blobs=seen, config=seen, removals=(Removal("j", 3, 2),), sweeping=("c",), accepted=1
        )
    )
    found["loss"] = _encode(Loss(at=1, what=("JOBS is gone",), jobs=("j",), last=9))
    found["chunk"] = _encode(Chunk(attempt=1, number=2, stream="stderr", data=b"\x00out", at=3))
    found["artifact"] = _encode(Artifact(path="out/a", digest=DIGEST, size=1, executable=True))
    return {name: data.decode() for name, data in found.items()}


def rights() -> dict[str, Any]:
    """What lies on the broker, and who may do what there."""
    layout = Layout("demo")
    of = {role: ("default",) if role in ("worker", "executor") else () for role in ROLES}
    granted = {role: permissions(layout, role, "unit", queues) for role, queues in of.items()}  # type: ignore[arg-type]
    return {
        "streams": {stream["name"]: stream for stream in layout.streams(1 << 30)},
        "consumers": {one["name"]: {"stream": stream, **one} for stream, one in layout.consumers("default")},
        "publish": {role: list(one.publish) for role, one in granted.items()},
        "subscribe": {role: list(one.subscribe) for role, one in granted.items()},
        "imports": {
            account: sorted(
                f"{one.kind} {one.exporter} {one.subject} {one.local}" for one in imports(layout, account)
            )
            for account in dict.fromkeys(ACCOUNTS.values())
        },
    }


def main() -> None:
    """Print the messages of a level, and of level 0 the rights as well."""
    wire = int(sys.argv[1])
    found: dict[str, Any] = {"messages": messages(wire)} | ({} if wire else {"rights": rights()})
    print(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
