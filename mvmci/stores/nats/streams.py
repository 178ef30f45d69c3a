"""What a cluster has on its broker: streams, buckets and consumers, made and brought up to date."""

from __future__ import annotations

from collections.abc import Iterable

from mvmci.cluster.witness import Seen
from mvmci.errors import Usage
from mvmci.store import HINT_LAPSE_S, ClusterSettings
from mvmci.stores.nats.hints import make_consumer
from mvmci.stores.nats.layout import STORE_BYTES, Layout
from mvmci.stores.nats.link import ApiError, Link, NoStream

NOT_FOUND = 10059
NOT_MADE = 10049
TRIES_TO_MAKE = 4
API_LEVEL_MIN = 2  # of JetStream: that of nats-server 2.12, with atomic batches and schedules


async def maintain(link: Link, layout: Layout, settings: ClusterSettings, queues: Iterable[str]) -> None:
    """Make or bring up to date every stream, and the consumers of `queues`. Again is free.

    Raises StoreUnavailable, Usage when the broker will not have it so.
    """
    for stream in layout.streams(settings.store_bytes, settings.logs_ms):
        try:
            await _make(link, stream)
        except ApiError as refused:
            raise Usage(
                f"the broker at {link.url} refuses stream {stream['name']}: {refused.message}",
                hint="nats-server 2.12 or later with JetStream is needed, with room for the streams",
            ) from refused
    for queue in queues:
        await make_consumers(link, layout, queue)


async def make_consumers(link: Link, layout: Layout, queue: str, lapse_s: float = HINT_LAPSE_S) -> None:
    """Let workers pull from `queue`. Raises StoreUnavailable."""
    for stream, settings in layout.consumers(queue, lapse_s):
        await make_consumer(link, stream, settings)


async def _make(link: Link, stream: dict[str, object]) -> None:
    """Update first: to create one that is there reserves its bytes twice, and may be refused for that."""
    try:
        await link.api(f"STREAM.UPDATE.{stream['name']}", **stream)
    except ApiError as refused:
        if refused.code != NOT_FOUND:
            raise
        await _create(link, stream)


async def _create(link: Link, stream: dict[str, object]) -> None:
    """Again, if it fails: who deletes an account's last stream is answered before the server has removed
    the account's folder, and that may take the one of the next stream with it (seen with 2.15.1).
    """
    for left in reversed(range(TRIES_TO_MAKE)):
        try:
            await link.api(f"STREAM.CREATE.{stream['name']}", **stream)
            return
        except ApiError as refused:
            if refused.code != NOT_MADE or not left:
                raise


async def lacks(link: Link, layout: Layout, queues: Iterable[str]) -> bool:
    """Whether a stream, or a consumer of `queues`, is not there. Raises StoreUnavailable."""
    streams = await link.api("STREAM.NAMES")
    if not {stream["name"] for stream in layout.streams(STORE_BYTES)} <= set(streams["streams"] or ()):
        return True
    wanted = {(stream, one["name"]) for queue in queues for stream, one in layout.consumers(queue)}
    for stream in {stream for stream, _ in wanted}:
        there = await link.api(f"CONSUMER.NAMES.{stream}")
        if not {name for of, name in wanted if of == stream} <= set(there["consumers"] or ()):
            return True
    return False


async def look(link: Link, stream: str) -> Seen | None:
    """How `stream` is now; None where it is not there. Raises StoreUnavailable."""
    try:
        told = await link.api(f"STREAM.INFO.{stream}")
    except ApiError as refused:
        if refused.code != NOT_FOUND:
            raise
        return None
    state = told["state"]
    return Seen(told["created"], state["last_seq"], state["messages"])


async def room(link: Link, stream: str) -> tuple[int, int]:
    """The bytes that `stream` takes, and those that it may. Raises StoreUnavailable."""
    told = await link.api(f"STREAM.INFO.{stream}")
    return told["state"]["bytes"], told["config"]["max_bytes"]


async def subjects(link: Link, stream: str, pattern: str) -> set[str]:
    """Those of `stream` that fit `pattern` and have a message. Raises StoreUnavailable."""
    found: set[str] = set()
    while True:
        told = await link.api(f"STREAM.INFO.{stream}", subjects_filter=pattern, offset=len(found))
        page = told["state"].get("subjects") or {}
        found.update(page)
        if not page or len(found) >= told.get("total", 0):
            return found


async def delete_streams(link: Link, layout: Layout) -> None:
    """Delete every stream with all that is in it. Raises StoreUnavailable."""
    for stream in layout.streams(STORE_BYTES):
        try:
            await link.api(f"STREAM.DELETE.{stream['name']}")
        except ApiError:
            pass  # it is not there


async def missing_features(link: Link) -> list[str]:
    """What a broker, or the account on it, does not offer that a cluster needs. Raises StoreUnavailable."""
    try:
        told = await link.api("INFO")
    except NoStream:
        return ["it has no JetStream"]
    except ApiError as refused:
        return [f"JetStream says: {refused.message}"]
    if told.get("api", {}).get("level", 0) < API_LEVEL_MIN:
        return ["it is older than 2.12, and has no atomic batches and no scheduled messages"]
    return []
