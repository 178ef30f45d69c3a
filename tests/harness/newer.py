"""Messages as a later build may write them: of levels, kinds and with fields that this one does not know."""

from __future__ import annotations

import hashlib
import time

import msgspec

from mvmci.jobs.journal import Entry, Journal, MessageKind
from mvmci.store import Store
from mvmci.wire import WIRE, mark

NEWER = (WIRE + 1, WIRE + 98)
BLOB = "sha256:" + "a" * 64
RECORDS = msgspec.json.encode(
    [{"record": "overheard", "at": {"clock": "of another kind"}, "by": ["somebody"], "tree": BLOB}]
)


def newer_message(head: str, wire: int, records: bytes = RECORDS, **more: object) -> bytes:
    """A message of level `wire` that follows the one with the hash `head`."""
    message_id = mark(wire, "3f2a9c")
    told = hashlib.sha256(f"{head} {message_id} ".encode() + records).hexdigest()
    envelope = {"prev": head, "sum": told, "id": message_id, "records": msgspec.Raw(records)}
    return msgspec.json.encode({"colour": "blue"} | envelope | more)


async def append_newer(
    store: Store, job: str, wire: int, kind: MessageKind = "run", queue: str = "default"
) -> None:
    """Write such a message behind what stands in the journal of `job`."""
    journal = Journal(job)
    journal.absorb(await store.journals.read(job))
    data = newer_message(journal.head, wire)
    await store.journals.append(job, kind, queue, data, expect=journal.tail)


def newer_entry(journal: Journal, wire: int) -> Entry:
    """What would stand next in `journal`."""
    return Entry(seq=journal.tail + 1, data=newer_message(journal.head, wire))


def newer_settings(wire: int) -> bytes:
    """What a cluster is and allows, of a level `wire`."""
    return msgspec.json.encode({"wire": wire, "isolation": {"of": "another kind"}, "since": time.time_ns()})
