"""What a cache of blobs promises beyond the blobs themselves: `mvmci.stores.cached`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

from mvmci.errors import NotFound
from mvmci.store import Blobs, Source, digest_of
from mvmci.stores.cached import DRAFT_S, CachedBlobs
from tests.harness.memory import Memory

BYTES_MAX = 1 << 20
PIECE = 50_000


class Counted:
    """Blobs behind a cache, which write down what is read from them."""

    def __init__(self) -> None:
        self.blobs: Blobs = Memory().store("u1").blobs
        self.read: list[str] = []

    async def put(self, data: bytes) -> str:
        return await self.blobs.put(data)

    async def put_file(self, path: Path) -> str:
        return await self.blobs.put_file(path)

    async def put_all(self, sources: Mapping[str, Source]) -> set[str]:
        return await self.blobs.put_all(sources)

    async def has(self, digest: str) -> bool:
        return await self.blobs.has(digest)

    async def missing(self, digests: Collection[str]) -> set[str]:
        return await self.blobs.missing(digests)

    async def get(self, digest: str) -> bytes:
        self.read.append(digest)
        return await self.blobs.get(digest)

    async def fetch(self, digest: str, to: Path) -> None:
        self.read.append(digest)
        await self.blobs.fetch(digest, to)


@pytest.fixture
def behind() -> Counted:
    return Counted()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(behind: Counted, folder: Path) -> CachedBlobs:
    return CachedBlobs(behind, folder, BYTES_MAX)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


async def read(cache: CachedBlobs, digest: str, how: str, to: Path) -> bytes:
    if how == "get":
        return await cache.get(digest)
    to.unlink(missing_ok=True)
    await cache.fetch(digest, to)
    return to.read_bytes()


@pytest.mark.parametrize("first", ["get", "fetch"])
@pytest.mark.parametrize("then", ["get", "fetch"])
async def test_a_blob_is_fetched_once(
    behind: Counted, folder: Path, cache: CachedBlobs, tmp_path: Path, first: str, then: str
) -> None:
    digest = await cache.put(b"data")
    again = CachedBlobs(behind, folder, BYTES_MAX)  # another process, or the same one later
    for one in (cache, cache, again):
        how = first if one is cache and not behind.read else then
        assert await read(one, digest, how, tmp_path / "file") == b"data"
    assert behind.read == [digest]


@pytest.mark.parametrize("how", ["get", "fetch"])
async def test_a_damaged_file_is_fetched_again(
    behind: Counted, folder: Path, cache: CachedBlobs, tmp_path: Path, how: str
) -> None:
    digest = await cache.put(b"data")
    await cache.get(digest)
    (kept,) = files(folder)
    for damage in (b"dat", b"DATA", b"data and more", b""):
        kept.write_bytes(damage)
        assert await read(cache, digest, how, tmp_path / "file") == b"data"
        assert kept.read_bytes() == b"data"
    assert len(behind.read) == 5


async def test_what_is_there_is_for_the_store_behind_to_say(behind: Counted, cache: CachedBlobs) -> None:
    digest = await cache.put(b"data")
    await cache.get(digest)
    behind.blobs = Memory().store("u2").blobs
    assert not await cache.has(digest)
    assert await cache.missing([digest]) == {digest}


async def test_the_cache_stays_within_its_bytes(behind: Counted, folder: Path, cache: CachedBlobs) -> None:
    for _ in range(100):
        digest = await behind.put(os.urandom(PIECE))
        assert len(await cache.get(digest)) == PIECE
        assert size(folder) <= BYTES_MAX + BYTES_MAX // 16 + PIECE
    assert size(folder) > BYTES_MAX // 2


async def test_many_tiny_files_count_for_what_they_take_on_disk(behind: Counted, folder: Path) -> None:
    cache = CachedBlobs(behind, folder, BYTES_MAX)
    for number in range(500):
        await cache.get(await behind.put(b"%d" % number))
    assert len(files(folder)) <= BYTES_MAX // 4096 * 17 // 16 + 1


async def test_what_was_not_used_for_longest_goes_first(
    behind: Counted, folder: Path, cache: CachedBlobs
) -> None:
    digests = [await behind.put(os.urandom(PIECE)) for _ in range(15)]
    for age, digest in enumerate(digests):
        await cache.get(digest)
        long_ago = time.time() - 10_000 + age
        os.utime(folder / digest[7:9] / digest[7:], (long_ago, long_ago))
    await cache.get(digests[0])  # the oldest, and just used
    behind.read.clear()
    for _ in range(8):
        await cache.get(await behind.put(os.urandom(PIECE)))
    behind.read.clear()
    for digest in (digests[0], digests[-1], digests[1]):
        await cache.get(digest)
    assert behind.read == [digests[1]]


async def test_a_blob_that_would_push_out_much_else_is_not_kept(
    behind: Counted, folder: Path, cache: CachedBlobs, tmp_path: Path
) -> None:
    digest = await behind.put(bytes(BYTES_MAX // 2))
    await cache.get(digest)
    await cache.fetch(digest, tmp_path / "file")
    assert files(folder) == []


async def test_what_a_process_left_that_died_is_cleared_away(
    behind: Counted, folder: Path, cache: CachedBlobs
) -> None:
    folder.mkdir()
    old, new = folder / ".old", folder / ".new"
    for path in (old, new):
        path.write_bytes(b"half")
    long_ago = time.time() - DRAFT_S - 1
    os.utime(old, (long_ago, long_ago))
    await cache.get(await behind.put(b"data"))
    assert not old.exists()
    assert new.exists()


async def test_a_folder_that_cannot_be_written_is_as_good_as_none(behind: Counted, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = CachedBlobs(behind, tmp_path / "file" / "cache", BYTES_MAX)
    digest = await cache.put(b"data")
    assert await cache.get(digest) == b"data"
    await cache.fetch(digest, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == b"data"


async def test_what_lies_there_is_nobody_elses_to_read(
    behind: Counted, folder: Path, cache: CachedBlobs
) -> None:
    await cache.get(await cache.put(b"data"))
    assert {path.stat().st_mode & 0o077 for path in [folder, *folder.rglob("*")]} == {0}


async def test_processes_that_share_a_folder_do_each_other_no_harm(
    behind: Counted, folder: Path, tmp_path: Path
) -> None:
    digests = [await behind.put(os.urandom(PIECE)) for _ in range(60)]
    caches = [CachedBlobs(behind, folder, BYTES_MAX) for _ in range(4)]

    async def use(number: int) -> None:
        for turn in range(60):
            digest = digests[(turn * 7 + number * 13) % len(digests)]
            if turn % 2:
                assert digest_of(await caches[number].get(digest)) == digest
            else:
                to = tmp_path / f"{number}-{turn}"
                await caches[number].fetch(digest, to)
                assert digest_of(to.read_bytes()) == digest

    await asyncio.gather(*(use(number) for number in range(4)))
    assert size(folder) <= BYTES_MAX + 4 * (BYTES_MAX // 16 + PIECE)
    assert not list(folder.glob(".*"))


async def test_what_is_nowhere_is_not_found(cache: CachedBlobs, tmp_path: Path) -> None:
    for digest in (digest_of(b"none"), "../../etc/passwd", "sha256:"):
        with pytest.raises(NotFound):
            await cache.get(digest)
        with pytest.raises(NotFound):
            await cache.fetch(digest, tmp_path / "file")
