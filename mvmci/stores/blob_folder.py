"""Blobs as files in a folder: those of `mvmci run`, and those that a host keeps of its cluster's.

    <folder>/<xx>/<hex>     a blob by its SHA-256
    <folder>/.<token>       one on its way in, or what a process left that died

Files appear whole, by rename, and are never changed, so that several processes may share a folder without
a lock: one that removes a file takes nothing from one that is reading it. Bytes are checked against their
digest whenever they are read.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from mvmci.errors import HostFull, NotFound
from mvmci.jobs.job import is_digest
from mvmci.system.files import create_private, private_folder

COPY_BYTES = 1 << 20


class BlobFolder:
    """One such folder. It is made by the first blob that comes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, digest: str) -> Path:
        """Where a blob lies, if it is there. Raises NotFound for what cannot be a digest."""
        if not is_digest(digest):
            raise no_blob(digest)
        return self.folder / digest[7:9] / digest[7:]

    def keep(self, pieces: Iterable[bytes]) -> str:
        """Write a blob, which is then not synced, and return its digest. Raises OSError."""
        private_folder(self.folder)
        draft = self.folder / f".{secrets.token_hex(8)}"
        hashed = hashlib.sha256()
        try:
            with create_private(draft) as file:
                for piece in pieces:
                    hashed.update(piece)
                    file.write(piece)
            digest = f"sha256:{hashed.hexdigest()}"
            path = self.path(digest)
            private_folder(path.parent)
            draft.rename(path)
        finally:
            draft.unlink(missing_ok=True)
        return digest

    def read(self, digest: str) -> Iterator[bytes]:
        """The bytes of a blob, in parts. One that was damaged is removed, so that it can be put again.

        Raises NotFound: before the first part where it is not there, behind the last where it was damaged.
        """
        path, hashed = self.path(digest), hashlib.sha256()
        try:
            with open(path, "rb") as file:
                for piece in pieces_of(file):
                    hashed.update(piece)
                    yield piece
        except FileNotFoundError:
            raise no_blob(digest) from None
        if f"sha256:{hashed.hexdigest()}" != digest:
            path.unlink(missing_ok=True)
            raise NotFound(f"blob {digest} was damaged on disk", hint="submit the job again under a new id")


def no_blob(digest: str) -> NotFound:
    """The sentence for one that is not there."""
    return NotFound(f"there is no blob {digest[:80]}")


def pieces_of(file: BinaryIO) -> Iterator[bytes]:
    """The rest of `file`, a part at a time."""
    return iter(lambda: file.read(COPY_BYTES), b"")


def write_new(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a new file, whole or not at all. Raises FileExistsError, HostFull, and what `pieces` does."""
    file = create_private(path)  # what was there is not ours to remove
    try:
        with file:
            for piece in pieces:
                file.write(piece)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise HostFull(f"{path} cannot be written: {error.strerror}") from error
        raise
