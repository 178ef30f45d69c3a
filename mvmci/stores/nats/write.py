"""Streams written as nats-server's files, for a server that does not run: what `mvmci restore` does.

Sequences, times and the moment when a stream was made stay as they were, so a witness of the stream still
fits. See `blocks` for the files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mvmci.stores.nats.blocks import hash_key
from mvmci.stores.nats.highwayhash import Hasher
from mvmci.stores.nats.rows import Row
from mvmci.system.files import write_private

BLOCK_BYTES = 4 << 20
_HEAD = struct.Struct("<IQqH")
_HEADERS = 1 << 31


def write_stream(
    folder: Path,
    created: str,
    config: dict[str, Any],
    rows: Iterable[Row],
    consumers: Sequence[dict[str, Any]],
) -> None:
    """Write a stream with `rows`, in the order of their sequences, to `folder`, which is not there yet."""
    name = config["name"]
    _write_meta(folder, name, {"Created": created, **config})
    for one in consumers:
        told = {"Created": created, "Name": one["name"], **one}
        _write_meta(folder / "obs" / one["name"], f"{name}/{one['name']}", told)
    block, size, number = list[bytes](), 0, 1
    for row in rows:
        record = _record(row)
        if size + len(record) > BLOCK_BYTES and block:
            _write_block(folder, name, number, block)
            block, size, number = [], 0, number + 1
        block.append(record)
        size += len(record)
    if block:
        _write_block(folder, name, number, block)
    (folder / "msgs").mkdir(mode=0o700, exist_ok=True)


def _write_meta(folder: Path, key: str, told: dict[str, Any]) -> None:
    data = msgspec.json.encode(told)
    write_private(folder / "meta.inf", data)
    write_private(folder / "meta.sum", Hasher(hash_key(key), data).sum().hex().encode())


def _write_block(folder: Path, name: str, number: int, records: Sequence[bytes]) -> None:
    hasher = Hasher(hash_key(f"{name}-{number}"), b"".join(records))
    assert hasher.scan(seal=True) == hasher.size
    write_private(folder / "msgs" / f"{number}.blk", hasher.data)


def _record(row: Row) -> bytes:
    subject = row.subject.encode()
    headers = struct.pack("<I", len(row.headers)) + row.headers if row.headers else b""
    size = _HEAD.size + len(subject) + len(headers) + len(row.data) + 8
    flags = _HEADERS if row.headers else 0
    return _HEAD.pack(size | flags, row.seq, row.at, len(subject)) + subject + headers + row.data + bytes(8)
