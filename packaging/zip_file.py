"""Zip files that are a function of what is in them.

The standard library's writer compresses with the zlib that it finds, and distributions have several. Ours
comes, pinned, from a wheel; nor is there a date, an owner or an order that the machine has a say in.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

from deflate import deflate_compress

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
STORED, DEFLATED = 0, 8
VERSION = 20
UNIX = 3 << 8
DATE = 1 << 5 | 1  # the first of January 1980, the first that a zip file knows
LEVEL = 9  # level 12 takes four times as long, for less than a hundredth


class Entry(NamedTuple):
    """One file: its name in the archive, what is in it, and its mode with the type, as `stat` gives it."""

    name: str
    data: bytes
    mode: int


def write(file: BinaryIO, entries: Iterable[Entry]) -> None:
    """Write `entries` in their order behind what was written to `file`. Names are ASCII; 4 GB at most."""
    directory, count = bytearray(), 0
    for entry in entries:
        name, offset = entry.name.encode("ascii"), file.tell()
        packed, method = bytes(deflate_compress(entry.data, LEVEL)), DEFLATED
        if len(packed) >= len(entry.data):
            packed, method = entry.data, STORED
        fields = (VERSION, 0, method, 0, DATE, zlib.crc32(entry.data), len(packed), len(entry.data))
        file.write(LOCAL.pack(b"PK\3\4", *fields, len(name), 0) + name + packed)
        more = (len(name), 0, 0, 0, 0, entry.mode << 16, offset)
        directory += CENTRAL.pack(b"PK\1\2", UNIX | VERSION, *fields, *more) + name
        count += 1
    where = file.tell()
    file.write(directory + END.pack(b"PK\5\6", 0, 0, count, count, len(directory), where, 0))
