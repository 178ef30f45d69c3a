"""What every store promises of blobs, also behind a cache: `mvmci.store.Blobs`."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mvmci.errors import NotFound
from mvmci.store import Source, Store, digest_of
from mvmci.stores.cached import CachedBlobs
from tests.conftest import OpenStore, Place

SIZES = (0, 1, 128 << 10, (128 << 10) + 1, 5_000_000)
CACHE_BYTES = 64 << 20
STEPS = 12  # of a fetch, within which it is called off


@pytest.fixture(params=["plain", "cached"])
def open_store(request: pytest.FixtureRequest, place: Place, tmp_path: Path) -> OpenStore:
    """A way in as every test has it, and one that goes through a cache."""

    async def open_cached(unit: str) -> Store:
        store = await place.store(unit)
        blobs = CachedBlobs(store.blobs, tmp_path / "cache", CACHE_BYTES)
        return dataclasses.replace(store, blobs=blobs)

    return open_cached if request.param == "cached" else place.store


@pytest.fixture
async def store(open_store: OpenStore) -> Store:
    return await open_store("u1")


@pytest.mark.parametrize("size", SIZES)
async def test_bytes_come_back_to_everyone(open_store: OpenStore, tmp_path: Path, size: int) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    data = os.urandom(size)
    digest = await one.blobs.put(data)
    assert digest == digest_of(data)
    assert await two.blobs.has(digest)
    assert await two.blobs.get(digest) == data
    await two.blobs.fetch(digest, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == data


@pytest.mark.parametrize("size", SIZES)
async def test_a_file_is_kept_like_bytes(store: Store, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    digest = await store.blobs.put_file(tmp_path / "file")
    assert digest == digest_of(data)
    assert await store.blobs.get(digest) == data


async def test_many_are_kept_at_once_and_what_turns_out_to_be_other_bytes_is_named(store: Store) -> None:
    contents = [b"", b"same", b"same", *(b"%d" % number * 100_000 for number in range(3))]
    sources = {digest_of(data): Source(len(data), functools.partial(io.BytesIO, data)) for data in contents}
    assert await store.blobs.put_all(sources) == set()
    assert await store.blobs.put_all(sources) == set()
    for data in contents:
        assert await store.blobs.get(digest_of(data)) == data
    changed = digest_of(b"before")
    assert await store.blobs.put_all({changed: Source(6, lambda: io.BytesIO(b"behind"))}) == {changed}
    assert await store.blobs.missing([changed]) == {changed}


async def test_after_a_fetch_was_called_off_nothing_of_it_writes_any_more(
    store: Store, tmp_path: Path
) -> None:
    digest = await store.blobs.put(os.urandom(SIZES[-1]))
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    called_off = 0
    for steps in range(STEPS):
        to = tmp_path / f"{steps}"
        fetching = asyncio.create_task(store.blobs.fetch(digest, to))
        for _ in range(steps):
            await asyncio.sleep(0)
        fetching.cancel()
        await asyncio.wait([fetching])
        called_off += fetching.cancelled()
        left = to.stat() if to.exists() else None
        await asyncio.to_thread(int)  # what the thread had still to do, it has done
        assert left == (to.stat() if to.exists() else None)
    assert called_off


async def test_putting_again_changes_nothing(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"same")
    digests = await asyncio.gather(
        *(store.blobs.put(b"same") for _ in range(5)),
        *(store.blobs.put_file(tmp_path / "file") for _ in range(5)),
    )
    assert set(digests) == {digest_of(b"same")}
    assert await store.blobs.get(digests[0]) == b"same"


@pytest.mark.parametrize("digest", [digest_of(b"missing"), "sha256:", "", "../../etc/passwd", "a.>", "*"])
async def test_what_is_not_there_is_not_found(store: Store, tmp_path: Path, digest: str) -> None:
    with pytest.raises(NotFound):
        await store.blobs.get(digest)
    with pytest.raises(NotFound):
        await store.blobs.fetch(digest, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


async def test_a_blob_that_is_missing_is_not_had(store: Store) -> None:
    assert not await store.blobs.has(digest_of(b"missing"))


@pytest.mark.parametrize("count", [0, 1, 1200])
async def test_what_is_missing_of_many_is_told_at_once(store: Store, count: int) -> None:
    there = [await store.blobs.put(b"there %d" % number) for number in range(count)]
    gone = {digest_of(b"gone %d" % number) for number in range(count)}
    assert await store.blobs.missing([*there, *gone]) == gone
    assert await store.blobs.missing(there) == set()


@pytest.mark.parametrize("size", [0, 10, 1_000_000])
async def test_a_damaged_blob_is_not_given_out_and_can_be_put_again(
    place: Place, store: Store, tmp_path: Path, size: int
) -> None:
    data = os.urandom(size)
    digest = await store.blobs.put(data)
    await place.damage(digest)
    if size:  # an empty blob has no bytes to look at
        with pytest.raises(NotFound):
            await store.blobs.fetch(digest, tmp_path / "fetched")
        assert not (tmp_path / "fetched").exists()
        assert await store.blobs.missing([digest]) == {digest}
    await store.blobs.put(data)
    assert await store.blobs.has(digest)
    assert await store.blobs.missing([digest]) == set()
    assert await store.blobs.get(digest) == data


async def test_fetch_never_touches_a_file_that_is_there(store: Store, tmp_path: Path) -> None:
    digest = await store.blobs.put(b"new")
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        await store.blobs.fetch(digest, tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == b"old"
