"""Blobs in a JetStream object store, each named by its digest.

The format is that of every NATS client: chunks under a subject of their own, and one message that
tells of them, which is written last. So a blob is there whole or not at all, and two writers of the
same blob are both right. Bytes are checked against the digest whenever they are read.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import secrets
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec

from mvmci.config.quantity import rough_size
from mvmci.errors import NotFound, StoreFull, StoreUnavailable
from mvmci.jobs.job import Count
from mvmci.store import Source
from mvmci.stores.nats.append import FULL, MAKE_ROOM
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import LASTS_MAX, ApiError, Link, Stored
from mvmci.system.clock import boottime_s
from mvmci.system.files import create_private
from mvmci.system.tasks import all_of, in_thread

CHUNK_BYTES = 128 << 10
_FILES_AT_ONCE = 64
_CHUNK_COST, _BLOB_COST = 128, 1024  # bytes that the store needs beside those that are kept, about
UNSURE_S = 60.0  # far below the time after which an upload that does not move is taken for dead
UPLOAD_CHARS = 12  # with which the names of the chunks of one upload begin
TOUCH_AGE_MS = 6 * 3600 * 1000  # far below the age at which blobs are swept: clocks may be wrong


class _Info(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an object store says of one object."""

    name: str
    bucket: str
    nuid: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9]{1,64}\Z")]
    size: Count
    chunks: Count
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
        self._told: set[str] = set()  # the names of chunks of which something was told, up to `_told_to`
        self._told_to = 0

    async def put(self, data: bytes) -> str:
        digest = _name(hashlib.sha256(data))
        if not await self.has(digest):
            await self._tell(await self._send([Source(len(data), lambda: io.BytesIO(data))]))
        return digest

    async def put_file(self, path: Path) -> str:
        """Should the file change meanwhile, it is kept under the name of what was really sent."""

        def open_file() -> BinaryIO:
            return path.open("rb")

        digest = await asyncio.to_thread(_hash_file, path)
        if await self.has(digest):
            return digest
        infos = await self._send([Source(path.stat().st_size, open_file)])
        await self._tell(infos)
        return infos[0].name

    async def put_all(self, sources: Mapping[str, Source]) -> set[str]:
        missing = sorted(await self.missing(sources))
        infos = await self._send([sources[digest] for digest in missing])
        changed = {digest for digest, info in zip(missing, infos, strict=True) if info.name != digest}
        if not changed:
            await self._tell(infos)
        return changed

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

    async def _send(self, sources: Sequence[Source]) -> list[_Info]:
        """Store the chunks of all, of which nothing is told yet: whoever is stopped here leaves no blob.

        Their names begin alike, so that a sweep knows what belongs to an upload that is under way.
        """
        await self._check_room(sources)
        begun = boottime_s()
        upload = secrets.token_hex(UPLOAD_CHARS // 2)
        infos: list[_Info] = []
        for start in range(0, len(sources), _FILES_AT_ONCE):
            batch = enumerate(sources[start : start + _FILES_AT_ONCE], start)
            sending = [self._send_one(source, f"{upload}{number:010x}") for number, source in batch]
            infos += await all_of(*sending)
        if boottime_s() - begun > UNSURE_S:  # a machine that slept meanwhile may have been taken for dead
            counts = await all_of(*(self._count(info) for info in infos))
            if counts != [info.chunks for info in infos]:
                raise StoreUnavailable("the upload paused for too long", hint="submit it again")
        return infos

    async def _check_room(self, sources: Sequence[Source]) -> None:
        """Raises StoreFull. What is no larger than a chunk leaves nothing behind where it is refused."""
        size = sum(source.size + _CHUNK_COST * (source.size // CHUNK_BYTES) for source in sources)
        size += _BLOB_COST * len(sources)
        if size <= CHUNK_BYTES:
            return
        answer = await self._link.api(f"STREAM.INFO.{self._layout.blobs}")
        room = answer["config"]["max_bytes"]
        free = max(room - answer["state"]["bytes"], 0)
        if room >= 0 and size > free:
            raise StoreFull(
                f"{rough_size(size)} do not fit into the store: of {rough_size(room)} for files and modules"
                f" {rough_size(free)} are free",
                hint=MAKE_ROOM,
            )

    async def _send_one(self, source: Source, nuid: str) -> _Info:
        hashed, size, count = hashlib.sha256(), 0, 0

        def pieces(file: BinaryIO) -> Iterator[bytes]:
            nonlocal size, count
            while piece := file.read(CHUNK_BYTES):  # a regular file never blocks for long
                hashed.update(piece)
                size += len(piece)
                count += 1
                yield piece

        with source.open() as file, _full():
            await self._link.request_all(self._layout.blob_chunks(nuid), pieces(file))
        return _Info(
            name=_name(hashed),
            bucket=self._layout.blobs_bucket,
            nuid=nuid,
            size=size,
            chunks=count,
            digest="SHA-256=" + base64.urlsafe_b64encode(hashed.digest()).decode(),
            options={"max_chunk_size": CHUNK_BYTES},
        )

    async def _touch(self, found: Iterable[Stored]) -> None:
        """Somebody counts on these: what was told long ago is told again, so that no sweep takes it."""
        now = datetime.now(UTC)
        old = [stored for stored in found if _age_ms(stored, now) > TOUCH_AGE_MS]
        await asyncio.gather(*(self._link.request(stored.subject, stored.data) for stored in old))

    async def older_than(self, age_ms: int) -> list[Old]:
        """The blobs that nobody touched for `age_ms`.

        Ages are by the broker's clock alone. Chunks of which nothing was ever told count as a blob.
        """
        stream, found, young = self._layout.blobs, list[Old](), set[str]()
        chunks, now = await self._all_chunks()
        async for stored in self._link.read(stream, self._layout.blob_info("*")):
            info = _info(stored)
            if info is None:
                continue
            told = self._layout.blob_chunks(info.nuid)
            chunks.discard(told)
            if _age_ms(stored, now) > age_ms:
                found.append(Old(info.name, told, stored))
            else:
                young.add(told)  # whoever tells of them as his own does not take them along
        found = [old for old in found if old.chunks not in young]
        for subject in chunks:
            last = await self._link.last(stream, subject)
            if last is not None and _age_ms(last, now) > age_ms:
                found.append(Old("", subject, None))
        return found

    async def abandoned(self, age_ms: int) -> tuple[list[Old], bool]:
        """The chunks of uploads of which nothing was told and which have not moved for `age_ms`.

        And whether others are under way.
        """
        chunks, now = await self._all_chunks()
        await self._learn_told()
        uploads: dict[str, list[str]] = {}
        for subject in sorted(chunks):
            nuid = subject.rpartition(".")[2]
            if nuid not in self._told:
                uploads.setdefault(nuid[:UPLOAD_CHARS], []).append(subject)
        found: list[Old] = []
        moving = False
        for subjects in uploads.values():
            if await self._moves(subjects[-_FILES_AT_ONCE:], age_ms, now):
                moving = True
            else:
                found += [Old("", subject, None) for subject in subjects]
        return found, moving

    async def _moves(self, subjects: Sequence[str], age_ms: int, now: datetime) -> bool:
        for subject in reversed(subjects):
            last = await self._link.last(self._layout.blobs, subject)
            if last is not None and _age_ms(last, now) <= age_ms:
                return True
        return False

    async def _learn_told(self) -> None:
        """Read on, since the last time, which chunks were told of."""
        async for stored in self._link.read(self._layout.blobs, self._layout.blob_info("*"), self._told_to):
            self._told_to = stored.seq
            info = _info(stored)
            if info is not None:
                self._told.add(info.nuid)

    async def last_seq(self) -> int:
        """The sequence of the newest message: where it is the same, nothing has come."""
        answer = await self._link.api(f"STREAM.INFO.{self._layout.blobs}")
        return int(answer["state"]["last_seq"])

    async def remove(self, old: Old) -> None:
        """Remove a blob, unless somebody has touched it meanwhile."""
        if old.told is not None:
            subject = old.told.subject
            await self._purge(subject, seq=old.told.seq + 1)
            if await self._link.last(self._layout.blobs, subject) is not None:
                return
        else:
            await self._learn_told()
            if old.chunks.rpartition(".")[2] in self._told:
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

    async def _tell(self, infos: Sequence[_Info]) -> None:
        with _full():
            for start in range(0, len(infos), _FILES_AT_ONCE):
                batch = infos[start : start + _FILES_AT_ONCE]
                await all_of(*(self._tell_one(info) for info in batch))

    async def _tell_one(self, info: _Info) -> None:
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
            chunks = self._layout.blob_chunks(info.nuid)
            async for stored in self._link.read(self._layout.blobs, chunks, size=info.size):
                hashed.update(stored.data)
                yield stored.data
        if _name(hashed) != digest:
            await self._tell_one(msgspec.structs.replace(info, deleted=True))
            raise NotFound(
                f"blob {digest} was damaged in the store", hint="submit the job again under a new id"
            )


def _told(stored: Stored) -> _Info | None:
    """What a message tells of a blob; None if it is of none, or deleted."""
    info = _info(stored)
    return None if info is None or info.deleted else info


def _info(stored: Stored) -> _Info | None:
    """What a message tells, if it tells of the blob of its subject: anybody may write there."""
    try:
        info = _infos.decode(stored.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return info if stored.subject.endswith(f".M.{_token(info.name)}") else None


def _age_ms(stored: Stored, now: datetime) -> float:
    return (now - datetime.fromisoformat(stored.headers["Nats-Time-Stamp"])).total_seconds() * 1000


def _name(hashed: hashlib._Hash) -> str:
    return f"sha256:{hashed.hexdigest()}"


def _token(name: str) -> str:
    """A name as a part of a subject."""
    return base64.urlsafe_b64encode(name.encode()).decode()


@contextlib.contextmanager
def _full() -> Iterator[None]:
    """Where the broker refuses for lack of room, raises StoreFull."""
    try:
        yield
    except ApiError as refused:
        if refused.code in FULL:
            raise StoreFull(f"the store is full: {refused.message}", hint=MAKE_ROOM) from None
        raise


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return _name(hashlib.file_digest(file, "sha256"))
