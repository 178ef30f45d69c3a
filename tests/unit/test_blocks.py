"""What `mvmci.stores.nats.blocks` promises of a block: whole stays, one bit is mended, the rest is kept."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mvmci.stores.nats.blocks import MEND_BYTES_MAX, check_store
from mvmci.stores.nats.highwayhash import Hasher

KEY = bytes(range(32))
PUBLISHED = {0: 0x907A56DE22C26E53, 1: 0x7EAB43AAC7CDDD78, 2: 0xB8D0569AB0B53D62}


@pytest.mark.parametrize(("size", "expected"), PUBLISHED.items())
def test_the_hash_is_that_of_its_authors(size: int, expected: int) -> None:
    assert int.from_bytes(Hasher(KEY, bytes(range(size))).sum(), "little") == expected


def record(seq: int, message: bytes) -> bytes:
    """One as JOBS and CONFIG have them: with headers, or no hash would guard the subject's size."""
    headers = b"NATS/1.0\r\n\r\n"
    subject = f"demo.job.job-{seq}.spec.default.u".encode()
    more = struct.pack("<I", len(headers)) + headers
    size = 22 + len(subject) + len(more) + len(message) + 8
    return (
        struct.pack("<IQqH", size | 1 << 31, seq, 1_000 + seq, len(subject))
        + subject
        + more
        + message
        + bytes(8)
    )


def block(store: Path, messages: list[bytes]) -> tuple[Path, bytes]:
    """A stream of one block with these messages."""
    folder = store / "jetstream" / "A" / "streams" / "demo-JOBS"
    (folder / "msgs").mkdir(parents=True, exist_ok=True)
    meta = b'{"name":"demo-JOBS"}'
    (folder / "meta.inf").write_bytes(meta)
    (folder / "meta.sum").write_text(Hasher(hashlib.sha256(b"demo-JOBS").digest(), meta).sum().hex())
    rows = [record(n, message) for n, message in enumerate(messages, 1)]
    hasher = Hasher(hashlib.sha256(b"demo-JOBS-1").digest(), b"".join(rows))
    assert hasher.scan(seal=True) == hasher.size
    file = folder / "msgs" / "1.blk"
    file.write_bytes(hasher.data)
    return file, hasher.data


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


@settings(max_examples=30)
@given(bit=st.integers(0, 3 * 8 * 165 - 1))
@example(bit=95)  # the mark of what was erased
def test_any_bit_of_a_block_is_mended(tmp_path_factory: pytest.TempPathFactory, bit: int) -> None:
    store = tmp_path_factory.mktemp("store")
    file, data = block(store, [b"a" * 90, b"b" * 91, b"c" * 92])
    flip(file, bit)
    (found,) = check_store(store, store / "aside")
    assert found.mended
    assert file.read_bytes() == data
    assert (store / "aside" / "demo-JOBS" / "msgs" / "1.blk").read_bytes() != data
    assert check_store(store, store / "aside") == []


def test_what_cannot_be_mended_takes_nothing_else_with_it(tmp_path: Path) -> None:
    file, data = block(tmp_path, [b"a" * 90, b"b" * 91, b"c" * 92])
    at = data.index(b"bbb")
    file.write_bytes(data[:at] + bytes(40) + data[at + 40 :])
    (found,) = check_store(tmp_path, tmp_path / "aside")
    assert (found.seq, found.subject, found.mended) == (2, "demo.job.job-2.spec.default.u", False)
    before = len(record(1, b"a" * 90))
    assert data[:before] == file.read_bytes()[:before]
    assert file.read_bytes().endswith(data[data.index(b"ccc") :])
    assert check_store(tmp_path, tmp_path / "again") == []


def test_what_a_stop_cut_short_is_left_to_the_server(tmp_path: Path) -> None:
    file, data = block(tmp_path, [b"a" * 90, b"b" * 91])
    file.write_bytes(data[:-20])
    assert check_store(tmp_path, tmp_path / "aside") == []
    assert file.read_bytes() == data[:-20]


def test_a_file_in_another_format_is_left_as_it_is(tmp_path: Path) -> None:
    file, _ = block(tmp_path, [b"a"])
    file.write_bytes(b"\x07" * 4_000)
    assert check_store(tmp_path, tmp_path / "aside") == []
    assert file.read_bytes() == b"\x07" * 4_000


def test_a_large_record_is_mended_in_what_says_where_it_ends(tmp_path: Path) -> None:
    file, data = block(tmp_path, [b"a" * (2 * MEND_BYTES_MAX), b"b"])
    flip(file, 17)
    (found,) = check_store(tmp_path, tmp_path / "aside")
    assert found.mended
    assert file.read_bytes() == data


@pytest.mark.parametrize(("name", "bit"), [("meta.inf", 50), ("meta.sum", 2)])
def test_what_a_stream_is_is_mended(tmp_path: Path, name: str, bit: int) -> None:
    file, _ = block(tmp_path, [b"a"])
    meta = file.parent.parent / name
    was = meta.read_bytes()
    flip(meta, bit)
    (found,) = check_store(tmp_path, tmp_path / "aside")
    assert found.mended
    assert meta.read_bytes() == was
