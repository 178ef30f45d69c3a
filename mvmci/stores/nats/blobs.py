"""Blobs in a JetStream object store, each named by its digest.

The format is that of every NATS client: chunks under a subject of their own, and one message that
tells of them, which is written last. So a blob is there whole or not at all, and two writers of the
same blob are both right. Bytes are checked against the digest whenever they are read.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from mvmci.errors import NotFound, StoreFull
from mvmci.stores.nats.append import FULL, MAKE_ROOM
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import LASTS_MAX, ApiError, Link, Stored
from mvmci.system.files import create_private
from mvmci.system.tasks import in_thread

CHUNK_BYTES = 128 << 10
_CHUNKS_IN_FLIGHT = 16
TOUCH_AGE_MS = 6 * 3600 * 1000  # far below the age at which blobs are swept: clocks may be wrong


class _Info(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an object store says of one object."""

    name: str
    bucket: str
    nuid: str
    size: int
    chunks: int
    digest: str = ""
    deleted: bool = False
    options: dict[str, int] = {}


_infos = msgspec.json.Decoder(_Info)


@dataclass(frozen=True)
class Old:
    """A blob that was not touched for long: where its bytes lie, and what was told of it."""

    name: str  # empty for bytes of which nothing was told
    chunks: str
    told: Stored | None


class NatsBlobs:
    """The port `mvmci.store.Blobs`. It removes nothing: that is the control plane's."""

    def __init__(self, link: Link, layout: Layout) -> None:
        self._link = link
        self._layout = layout

    async def put(self, data: bytes) -> str:
        digest = _name(hashlib.sha256(data))
        if not await self.has(digest):
            view = memoryview(data)
            await self._store(bytes(view[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES))
        return digest

    async def put_file(self, path: Path) -> str:
        digest = await asyncio.to_thread(_hash_file, path)
        if await self.has(digest):
            return digest
        with open(path, "rb") as file:  # noqa: ASYNC230 (a regular file never blocks for long)
            return await self._store(iter(lambda: file.read(CHUNK_BYTES), b""))

    async def has(self, digest: str) -> bool:
        stored = await self._stored(digest)
        info = None if stored is None else _told(stored)
        if stored is None or info is None or await self._count(info) != info.chunks:
            return False
        await self._touch([stored])
        return True

    async def missing(self, digests: Collection[str]) -> set[str]:
        """By what was told of them: it is told last, once all the bytes are there."""
        subjects = {self._layout.blob_info(_token(digest)): digest for digest in digests}
        there: set[str] = set()
        asked = list(subjects)
        for start in range(0, len(asked), LASTS_MAX):
            found = await self._link.lasts(self._layout.blobs, asked[start : start + LASTS_MAX])
            whole = {subject: stored for subject, stored in found.items() if _told(stored) is not None}
            await self._touch(whole.values())
            there |= {subjects[subject] for subject in whole}
        return set(digests) - there

    async def get(self, digest: str) -> bytes:
        return b"".join([piece async for piece in self._pieces(digest)])

    async def fetch(self, digest: str, to: Path) -> None:
        file = create_private(to)  # what was there is not ours to remove
        try:
            with file:
                async for piece in self._pieces(digest):
                    await in_thread(file.write, piece)
        except BaseException:
            to.unlink(missing_ok=True)
            raise

    async def _store(self, pieces: Iterable[bytes]) -> str:
        """Store the chunks, then tell of them under the name of what was really sent."""
        nuid, hashed, size, count = secrets.token_hex(11), hashlib.sha256(), 0, 0
        try:
            for group in _groups(iter(pieces)):
                for piece in group:
                    hashed.update(piece)
                    size += len(piece)
                    count += 1
                await self._link.request_all(self._layout.blob_chunks(nuid), group)
            info = _Info(
                name=_name(hashed),
                bucket=self._layout.blobs_bucket,
                nuid=nuid,
                size=size,
                chunks=count,
                digest="SHA-256=" + base64.urlsafe_b64encode(hashed.digest()).decode(),
                options={"max_chunk_size": CHUNK_BYTES},
            )
            await self._tell(info)
        except ApiError as refused:
            if refused.code in FULL:
                raise StoreFull(refused.message, hint=MAKE_ROOM) from None
            raise
        return info.name

    async def _touch(self, found: Iterable[Stored]) -> None:
        """Somebody counts on these: what was told long ago is told again, so that no sweep takes it."""
        now = datetime.now(UTC)
        old = [stored for stored in found if _age_ms(stored, now) > TOUCH_AGE_MS]
        await asyncio.gather(*(self._link.request(stored.subject, stored.data) for stored in old))

    async def older_than(self, age_ms: int) -> list[Old]:
        """The blobs that nobody touched for `age_ms`.

        Ages are by the broker's clock alone. Chunks of which nothing was ever told count as a blob.
        """
        stream, found = self._layout.blobs, []
        chunks, now = await self._all_chunks()
        async for stored in self._link.read(stream, self._layout.blob_info("*")):
            try:
                info = _infos.decode(stored.data)
            except msgspec.DecodeError:
                continue
            told = self._layout.blob_chunks(info.nuid)
            chunks.discard(told)
            if _age_ms(stored, now) > age_ms:
                found.append(Old(info.name, told, stored))
        for subject in chunks:
            last = await self._link.last(stream, subject)
            if last is not None and _age_ms(last, now) > age_ms:
                found.append(Old("", subject, None))
        return found

    async def remove(self, old: Old) -> None:
        """Remove a blob, unless somebody has touched it meanwhile."""
        if old.told is not None:
            subject = old.told.subject
            await self._purge(subject, seq=old.told.seq + 1)
            if await self._link.last(self._layout.blobs, subject) is not None:
                return
        await self._purge(old.chunks)

    async def _purge(self, subject: str, **more: int) -> None:
        await self._link.api(f"STREAM.PURGE.{self._layout.blobs}", filter=subject, **more)

    async def _all_chunks(self) -> tuple[set[str], datetime]:
        """The subjects of all chunks, and what time it is for the broker."""
        subjects: set[str] = set()
        while True:
            answer = await self._link.api(
                f"STREAM.INFO.{self._layout.blobs}",
                subjects_filter=self._layout.blob_chunks("*"),
                offset=len(subjects),
            )
            page = answer["state"].get("subjects") or {}
            subjects.update(page)
            if not page or len(subjects) >= answer.get("total", 0):
                return subjects, datetime.fromisoformat(answer["ts"])

    async def _tell(self, info: _Info) -> None:
        await self._link.request(self._layout.blob_info(_token(info.name)), msgspec.json.encode(info))

    async def _stored(self, digest: str) -> Stored | None:
        """What was told of a blob last."""
        return await self._link.last(self._layout.blobs, self._layout.blob_info(_token(digest)))

    async def _count(self, info: _Info) -> int:
        """How many of its chunks are there."""
        chunks = self._layout.blob_chunks(info.nuid)
        if not info.chunks:
            return 0
        answer = await self._link.api(f"STREAM.INFO.{self._layout.blobs}", subjects_filter=chunks)
        return int((answer["state"].get("subjects") or {}).get(chunks, 0))

    async def _pieces(self, digest: str) -> AsyncIterator[bytes]:
        """The bytes of a blob. One that was damaged counts as deleted, so that it can be put again."""
        stored = await self._stored(digest)
        info = None if stored is None else _told(stored)
        if info is None:
            raise NotFound(f"there is no blob {digest[:80]}")
        hashed = hashlib.sha256()
        if info.chunks:
            async for stored in self._link.read(self._layout.blobs, self._layout.blob_chunks(info.nuid)):
                hashed.update(stored.data)
                yield stored.data
        if _name(hashed) != digest:
            await self._tell(msgspec.structs.replace(info, deleted=True))
            raise NotFound(
                f"blob {digest} was damaged in the store", hint="submit the job again under a new id"
            )


def _told(stored: Stored) -> _Info | None:
    """What a message tells of a blob; None if it is of none, or deleted."""
    try:
        info = _infos.decode(stored.data)
    except msgspec.DecodeError:
        return None
    return None if info.deleted else info


def _age_ms(stored: Stored, now: datetime) -> float:
    return (now - datetime.fromisoformat(stored.headers["Nats-Time-Stamp"])).total_seconds() * 1000


def _name(hashed: hashlib._Hash) -> str:
    return f"sha256:{hashed.hexdigest()}"


def _token(name: str) -> str:
    """A name as a part of a subject."""
    return base64.urlsafe_b64encode(name.encode()).decode()


def _groups(pieces: Iterator[bytes]) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    for piece in pieces:
        group.append(piece)
        if len(group) == _CHUNKS_IN_FLIGHT:
            yield group
            group = []
    if group:
        yield group


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return _name(hashlib.file_digest(file, "sha256"))
