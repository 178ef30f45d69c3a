"""The manifest of a workspace: which files a directory holds, as a value that has one digest.

A tree lists files (by the digest of their bytes), symbolic links (by their text) and those
directories that are empty; all others follow from the paths. Entries are sorted, so that equal
directories have equal trees. A user's directory has no more than that: modes are reduced to "executable or
not", and two checkouts of the same are one tree. What a program left has modes and times, all directories,
and which files are one (`same_as`), so that the next one finds what it left. Owners are left out in both.

A manifest comes from a store and is untrusted: `decode_tree` promises that no entry lies outside of the
root, beneath a file or a link, or twice at the same place. It does not promise that a link stays
inside (`leaves` tells): whoever walks a directory does not follow links.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from mvmci.errors import BadWorkspace
from mvmci.jobs.job import is_digest

FILES_MAX = 50_000
WORKSPACE_BYTES_MAX = 4 << 30
DEPTH_MAX = 128  # a walk holds a descriptor a level
PATH_BYTES_MAX = 4000
NAME_BYTES_MAX = 255
LINK_HOPS_MAX = 40
MANIFEST_BYTES_MAX = 64 << 20
TIME_NS_MAX = 2**63 - 1


class TreeEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing in a workspace, at the relative path `path`.

    A `file` has `digest`, `size` in bytes and `executable`, and with `same_as` is another name of the file at
    that path; a `link` has `target`; a `dir` without a `mode` is empty. `mode` has nine bits of permission.
    """

    path: str
    kind: Literal["file", "link", "dir"] = "file"
    digest: str = ""
    size: int = 0
    executable: bool = False
    target: str = ""
    mode: int | None = None
    mtime_ns: int = 0  # since 1970; 0: whatever it becomes
    same_as: str = ""


class Tree(msgspec.Struct, frozen=True, kw_only=True):
    """Entries in the order of their paths. Make one with `tree` or `decode_tree`."""

    entries: tuple[TreeEntry, ...] = ()

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(entry.size for entry in self.entries)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Tree)


def tree(entries: Iterable[TreeEntry]) -> Tree:
    """The tree of `entries`, in whatever order they come. Raises BadWorkspace."""
    made = Tree(entries=tuple(sorted(entries, key=lambda entry: entry.path)))
    check_tree(made)
    return made


def encode_tree(value: Tree) -> bytes:
    """The canonical bytes of a tree."""
    return _encoder.encode(value)


def decode_tree(data: bytes, *, bytes_max: int = WORKSPACE_BYTES_MAX) -> Tree:
    """The tree that `data` writes. Raises BadWorkspace unless it is whole and harmless."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise BadWorkspace(f"a manifest of {len(data)} bytes is over the limit of {MANIFEST_BYTES_MAX}")
    try:
        value = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        raise BadWorkspace(f"a workspace manifest cannot be read: {wrong}") from None
    check_tree(value, bytes_max=bytes_max)
    return value


def check_tree(value: Tree, *, bytes_max: int = WORKSPACE_BYTES_MAX) -> None:
    """Raises BadWorkspace unless every entry is well formed and all fit together."""
    if len(value.entries) > FILES_MAX:
        raise BadWorkspace(
            f"a workspace of {len(value.entries)} entries is over the limit of {FILES_MAX}",
            hint="leave some out with .mvmciignore",
        )
    leaves_: set[str] = set()  # whatever has nothing beneath it
    parents: set[str] = set()
    files: dict[str, str] = {}  # digests of those that are no other's
    before = ""
    for entry in value.entries:
        _check_entry(entry)
        if entry.same_as:
            if entry.kind != "file" or files.get(entry.same_as) != entry.digest:
                raise _bad(entry.path, "is another name of what is no file before it")
        elif entry.kind == "file":
            files[entry.path] = entry.digest
        if entry.path <= before:
            raise _bad(entry.path, "is there twice or out of order")
        before = entry.path
        if entry.kind != "dir" or entry.mode is None:
            leaves_.add(entry.path)
        above = entry.path.rpartition("/")[0]
        while above and above not in parents:
            parents.add(above)
            above = above.rpartition("/")[0]
    for path in sorted(leaves_ & parents):
        raise _bad(path, "has entries beneath it, but is not a directory that was left out")
    if value.size > bytes_max:
        raise BadWorkspace(f"a workspace of {value.size} bytes is over the limit of {bytes_max}")


def check_path(path: str) -> None:
    """Raises BadWorkspace unless `path` is relative, plain and not too long."""
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise BadWorkspace(f"{shown_path(path)}: a name that is not UTF-8") from None
    parts = path.split("/")
    if "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise _bad(path, "is not a plain relative path")
    longest = max(len(part.encode()) for part in parts)
    if size > PATH_BYTES_MAX or len(parts) > DEPTH_MAX or longest > NAME_BYTES_MAX:
        raise _bad(path, f"is too long or lies more than {DEPTH_MAX} directories deep")


def leaves(links: Mapping[str, str], path: str) -> bool:
    """Whether following the link at `path` may lead out of the root; `links` maps paths to targets.

    Links on the way are followed as the system would. A loop leads nowhere, and so not out.
    """
    todo = path.split("/")[::-1]
    at: list[str] = []
    hops = 0
    while todo:
        part = todo.pop()
        if part in ("", "."):
            continue
        if part == "..":
            if not at:
                return True
            at.pop()
            continue
        at.append(part)
        target = links.get("/".join(at))
        if target is None:
            continue
        hops += 1
        if hops > LINK_HOPS_MAX:
            return False
        if target.startswith("/"):
            return True
        at.pop()
        todo += target.split("/")[::-1]
    return False


def shown_path(path: str) -> str:
    """`path` as it can be printed: escaped, and cut in the middle when it is long."""
    text = path.encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 200 else f"{text[:100]}…{text[-80:]}"


def _check_entry(entry: TreeEntry) -> None:
    check_path(entry.path)
    is_file = entry.kind == "file"
    if is_file != is_digest(entry.digest) or entry.size < 0:
        raise _bad(entry.path, "has no valid digest or size")
    if not is_file and (entry.digest or entry.size or entry.executable):
        raise _bad(entry.path, "is not a file but has the properties of one")
    if not (0 <= (entry.mode or 0) <= 0o777 and 0 <= entry.mtime_ns <= TIME_NS_MAX):
        raise _bad(entry.path, "has no valid mode or time")
    target = entry.target.encode("utf-8", "replace")
    if (entry.kind == "link") != bool(target) or b"\0" in target or len(target) > PATH_BYTES_MAX:
        raise _bad(entry.path, "has no valid link target")


def _bad(path: str, what: str) -> BadWorkspace:
    return BadWorkspace(f"workspace: {shown_path(path)} {what}")
