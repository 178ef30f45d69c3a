"""The files of nats-server's streams: read before it starts, so that one bad bit costs one bit.

    jetstream/<account>/streams/<stream>/meta.inf, meta.sum        what the stream is, and the hash of that
                                         msgs/<number>.blk         its records, in the order of sequences
                                         msgs/index.db             what the server remembers of them

A server that finds a record whose hash is wrong cuts off the block there. So each block is read whole first.
One bit that was turned is turned back: the hash says which it was. A record that cannot be mended becomes one
that was erased, and all behind it stay. What lies at the end and is cut short was never acknowledged.

No hash covers the size of a subject. Where headers follow, as in JOBS and CONFIG, a wrong one shows all the
same. In a blob or in output it does not: the one is vouched for by its digest, the other counted by its end.

Tried with nats-server 2.15.1; a block in another format is left as it is.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from mvmci.stores.nats.highwayhash import Hasher
from mvmci.system.files import write_private

MEND_BYTES_MAX = 16 << 10  # of a record: each of its bits is tried
REST_S = 20.0  # for so long what is neither a journal nor configuration is read
_HEAD = struct.Struct("<IQqH")  # size, sequence, time in ns, size of the subject
_RECORD_BYTES_MIN = _HEAD.size + 8
_ERASED = 1 << 63
_MARKS = 3 << 62
_FIRST = ("-JOBS", "-CONFIG")

log = logging.getLogger(__name__)


class Damage(msgspec.Struct, frozen=True):
    """A record of a stream that was not whole; `mended` is one that is again. `subject` is what it seems."""

    stream: str
    file: str
    seq: int
    subject: str
    mended: bool


def check_store(store: Path, aside: Path) -> list[Damage]:
    """Read every stream beneath `store`, mend what can be, and say what was not whole.

    A file that is changed is copied to `aside` before.
    """
    folders = sorted(store.glob("jetstream/*/streams/*"), key=lambda one: not one.name.endswith(_FIRST))
    found: list[Damage] = []
    limit = None
    for folder in folders:
        if not folder.name.endswith(_FIRST) and limit is None:
            limit = time.monotonic() + REST_S
        found += _check_meta(folder, folder.name, aside)
        for consumer in sorted(folder.glob("obs/*")):
            found += _check_meta(consumer, f"{folder.name}/{consumer.name}", aside)
        for file in _blocks(folder):
            if limit is not None and time.monotonic() > limit:
                log.warning("%s is too large to be read before the start: what is bad shows later", folder)
                break
            found += _check_block(folder, file, aside)
    return found


def _blocks(folder: Path) -> Iterator[Path]:
    numbered = [file for file in folder.glob("msgs/*.blk") if file.stem.isdecimal()]
    yield from sorted(numbered, key=lambda file: int(file.stem))


def _check_meta(folder: Path, name: str, aside: Path) -> list[Damage]:
    """Without its hash a server passes a stream over, with all that is in it."""
    file, sums = folder / "meta.inf", folder / "meta.sum"
    try:
        data, expected = file.read_bytes(), bytes.fromhex(sums.read_text())
    except (OSError, ValueError):
        expected = b""
        data = file.read_bytes() if file.exists() else b""
    hasher = Hasher(hash_key(name), data)
    found = hasher.sum()
    if not data or found == expected:
        return []
    mended = len(expected) == 8 and hasher.mend_all(expected) >= 0
    if not mended and _is_named(data, folder.name):
        hasher.write(0, data)
        mended = True  # then it is the hash that is wrong
    if mended:
        for one in (file, sums):
            _keep(one, aside)
        write_private(file, hasher.data)
        write_private(sums, hasher.sum().hex().encode())
    return [Damage(name, file.name, 0, "", mended)]


def _is_named(data: bytes, name: str) -> bool:
    try:
        return bool(msgspec.json.decode(data, type=dict[str, object]).get("name") == name)
    except msgspec.DecodeError:
        return False


def _check_block(folder: Path, file: Path, aside: Path) -> list[Damage]:
    data = file.read_bytes()
    key = hash_key(f"{folder.name}-{file.stem}")
    hasher = Hasher(key, data)
    found: list[Damage] = []
    at = hasher.scan()
    if data and at == 0 and hasher.find(1) == len(data) and hasher.mend(0, _mendable(data, 0)) < 0:
        return []  # not one record in it is whole: that is no block of a format that is known here
    while at < len(data):
        _, seq, _, length = _HEAD.unpack_from(data.ljust(at + _HEAD.size, b"\0"), at)
        subject = data[at + _HEAD.size : at + _HEAD.size + length][:500].decode(errors="replace")
        mended = hasher.mend(at, _mendable(data, at)) >= 0
        if mended:
            _, seq, _, length = _HEAD.unpack_from(hasher.data, at)
            subject = hasher.data[at + _HEAD.size : at + _HEAD.size + length].decode(errors="replace")
        else:
            following = hasher.find(at + 1)
            if following == len(data):
                if _size(data, at):  # it is complete, and so was not cut short by a stop
                    found.append(Damage(folder.name, file.name, seq, subject, False))
                break
            seq = _erase(hasher, key, data, at, following)
        found.append(Damage(folder.name, file.name, seq, subject, mended))
        at = hasher.scan(at)
    if hasher.data != data:
        _keep(file, aside)
        write_private(file, hasher.data)
        (folder / "msgs" / "index.db").unlink(missing_ok=True)  # it is made again of the blocks
    return found


def _size(data: bytes, at: int) -> int:
    """The size that the record there says it has, where that can be."""
    if at + _RECORD_BYTES_MIN > len(data):
        return 0
    size, _, _, length = _HEAD.unpack_from(data, at)
    size &= 0x7FFFFFFF
    return size if length + _RECORD_BYTES_MIN <= size <= len(data) - at else 0


def _mendable(data: bytes, at: int) -> int:
    """How many bytes from there on may hold the bit. If it is one of the sizes, they stand at the head."""
    size = _size(data, at) or _HEAD.size
    return min(size if size <= MEND_BYTES_MAX else _HEAD.size, len(data) - at)


def _erase(hasher: Hasher, key: bytes, data: bytes, at: int, following: int) -> int:
    """Put one erased record over what cannot be read; its sequence, that before the `following` one."""
    head: tuple[int, int, int, int] = _HEAD.unpack_from(data, following)
    seq, when = (head[1] & ~_MARKS) - 1, head[2]
    erased = _HEAD.pack(following - at, seq | _ERASED, when, 0)
    record = Hasher(key, erased.ljust(following - at, b"\0"))
    record.scan(seal=True)
    hasher.write(at, record.data)
    return seq


def _keep(file: Path, aside: Path) -> None:
    """Copy a file to `aside` as it was found, where there is room."""
    inside = file.parts[len(file.parts) - 1 - file.parts[::-1].index("streams") + 1 :]
    try:
        write_private(aside.joinpath(*inside), file.read_bytes())
    except OSError as error:
        log.error("%s cannot be copied to %s before it is mended: %s", file, aside, error.strerror)


def hash_key(name: str) -> bytes:
    """The key of the hashes of a stream's files: `<stream>`, `<stream>-<block>`, `<stream>/<consumer>`."""
    return hashlib.sha256(name.encode()).digest()
