"""Text that a person wrote, in whatever dress an editor or a shell gave it."""

from __future__ import annotations

import codecs

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode_text(data: bytes) -> str:
    """What `data` says: UTF-8, or UTF-16 where it begins with that mark. The mark is no part of the text.

    Raises UnicodeDecodeError.
    """
    return data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")


def plain_text(data: bytes) -> bytes:
    """The same as UTF-8 without a mark; what has none is returned as it is. Raises UnicodeDecodeError."""
    return decode_text(data).encode() if data.startswith((*_UTF16, codecs.BOM_UTF8)) else data
