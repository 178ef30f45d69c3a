"""Directories as trees of blobs, and back: what a job starts from, and what it leaves.

A directory here may have been made by a hostile guest. Nothing in this module follows a symbolic
link, opens a device or a pipe, or recurses, and every walk is bounded in entries and in depth. All
functions that walk do so in a thread, and one that is cancelled waits for its thread. Nobody else
writes to the directory meanwhile, `watch` aside; a file that changes while it is read is noticed where
it matters.

`scan` and `materialise` are each other's inverse up to what a tree leaves out: owners, and of a user's
directory also times, and modes other than "executable". `clear` promises an empty directory, whatever it
held.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NoReturn

import msgspec

from mvmci.config.quantity import format_size
from mvmci.config.text import decode_text
from mvmci.engines.embedded.limits import LimitReached
from mvmci.errors import BadWorkspace, HostFull, Usage
from mvmci.jobs import tree
from mvmci.jobs.glob import Pattern
from mvmci.jobs.job import Artifact
from mvmci.jobs.tree import DEPTH_MAX, FILES_MAX, WORKSPACE_BYTES_MAX, Tree, TreeEntry
from mvmci.store import Blobs, Source
from mvmci.system.tasks import all_of, go_on, in_thread, to_its_end

IGNORE_FILE = ".mvmciignore"
IGNORE_BYTES_MAX = 1 << 20
COUNTED_MAX = 1_000_000  # where counting stops for a message that says how many there are
ARTIFACTS_MAX = 10_000
PATTERNS_MAX = 100
SMALL_BYTES_MAX = 256 << 10  # such files pass through memory, larger ones from file to file
_BATCH_MAX = 64  # blobs under way at a time
_READ_BYTES = 1 << 20
WATCH_INTERVAL_S = 0.1
WATCH_INTERVAL_S_MAX = 5.0
WATCH_SHARE = 10  # watching takes at most one part in so many of the time
RACY_NS = 20_000_000  # a change so soon after the last one may not show in the times of a file

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

Stamp = tuple[int, int, int, int]
"""Inode, size, and the times of change of content and of inode in ns: the same ⇒ the same bytes."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A directory as it was: its tree, and the stamps of those files that can be told from later ones."""

    tree: Tree
    stats: dict[str, Stamp] = {}


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """What a directory takes: bytes (of sparse files the apparent ones) and entries."""

    bytes: int
    entries: int
    too_deep: bool = False


# ---- Out of a directory


async def scan(
    directory: Path,
    blobs: Blobs,
    *,
    previous: Snapshot | None = None,
    strict: bool = True,
    without: str | None = None,
    bytes_max: int = WORKSPACE_BYTES_MAX,
) -> Snapshot:
    """The tree of `directory`; every file of it is in `blobs` afterwards.

    `strict` is for a user's directory: it honours `.mvmciignore`, and raises BadWorkspace for links
    that leave the directory, devices, pipes and sockets, and unreadable files. Without it, for what a
    program left, special files are skipped and links are kept as the text that they are. Names that
    are not UTF-8, and more than a tree can hold, raise BadWorkspace in both. What lies at the relative path
    `without` is left out.

    Files whose stamps stand in `previous` are not read again.
    """
    root = _open_root(directory, strict)
    try:
        survey = await in_thread(_survey, root, directory, strict, without, bytes_max)
        entries, stats = await in_thread(_digest_all, root, directory, survey, previous, strict)
        made = tree.tree(entries)
        tree.check_tree(made, bytes_max=bytes_max)
        known = {entry.digest for entry in previous.tree.entries} if previous else set()
        new = [entry for entry in made.entries if entry.kind == "file" and entry.digest not in known]
        await _keep_all(root, directory, new, blobs)
    finally:
        os.close(root)
    return Snapshot(tree=made, stats=stats)


@dataclass
class _Survey:
    """What a directory holds, not yet read."""

    files: dict[str, os.stat_result] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    directories: dict[str, os.stat_result] = field(default_factory=dict)
    offences: list[tuple[str, str]] = field(default_factory=list)


def _survey(root: int, directory: Path, strict: bool, without: str | None, bytes_max: int) -> _Survey:
    """Raises BadWorkspace for the first thing that cannot be in a tree, and says how many there are."""
    rules = _ignored(root, directory) if strict else lambda path: False

    def ignored(path: str) -> bool:
        return path.rstrip("/") == without or rules(path)

    survey = _Survey()
    walk = _Walk(root, enter=lambda path: not ignored(f"{path}/"), force=not strict)
    kept = 0
    for found in walk:
        is_directory = stat.S_ISDIR(found.status.st_mode)
        if ignored(f"{found.path}/" if is_directory else found.path):
            continue
        kept += 1
        if kept > FILES_MAX:
            if kept > COUNTED_MAX:
                break
            continue  # only counted
        _sort(found, survey, strict)
    if kept > FILES_MAX:
        count = f"more than {COUNTED_MAX}" if kept > COUNTED_MAX else str(kept)
        raise BadWorkspace(
            f"{directory}: {count} entries, and a workspace has at most {FILES_MAX}", hint=_HINT
        )
    if strict:
        survey.offences += [
            (path, "a link that leaves the directory")
            for path in survey.links
            if tree.leaves(survey.links, path)
        ]
    survey.offences += [(path, "a directory that cannot be read") for path in walk.unreadable]
    survey.offences += [(path, f"more than {DEPTH_MAX} directories deep") for path in walk.too_deep]
    _refuse(directory, survey.offences)
    size = sum(status.st_size for status in survey.files.values())
    if size > bytes_max:
        raise BadWorkspace(
            f"{directory}: {size} bytes, and the workspace has {format_size(bytes_max)}", hint=_HINT
        )
    return survey


_HINT = f"leave out what the job does not need with {IGNORE_FILE} (as .gitignore)"


def _sort(found: _Found, survey: _Survey, strict: bool) -> None:
    mode, path = found.status.st_mode, found.path
    try:
        tree.check_path(path)
    except BadWorkspace:
        survey.offences.append(
            (path, "its name is not UTF-8" if _undecodable(path) else "its path is too long or too deep")
        )
        return
    if stat.S_ISDIR(mode):
        survey.directories[path] = found.status
    elif stat.S_ISREG(mode):
        survey.files[path] = found.status
    elif stat.S_ISLNK(mode):
        try:
            target = os.readlink(found.name, dir_fd=found.parent)
        except OSError as error:  # in /proc, or gone since
            survey.offences.append((path, f"a link that cannot be read ({error.strerror})"))
            return
        if _undecodable(target):
            survey.offences.append((path, "a link whose target is not UTF-8"))
        else:
            survey.links[path] = target
    elif strict:
        survey.offences.append((path, _SPECIAL.get(stat.S_IFMT(mode), "a special file")))


def _undecodable(name: str) -> bool:
    """Whether the bytes of a name in a directory are not UTF-8; Python has them as lone surrogates."""
    return any("\ud800" <= character <= "\udfff" for character in name)


_SPECIAL = {
    stat.S_IFCHR: "a device file",
    stat.S_IFBLK: "a device file",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


def _refuse(directory: Path, offences: list[tuple[str, str]]) -> None:
    if not offences:
        return
    path, what = min(offences)
    more = f", and {len(offences) - 1} more like it" if len(offences) > 1 else ""
    raise BadWorkspace(
        f"{directory}: {tree.shown_path(path)} cannot be in a workspace: {what}{more}", hint=_HINT
    )


def _ignored(root: int, directory: Path) -> Callable[[str], bool]:
    """What `.mvmciignore` leaves out. Raises BadWorkspace if it cannot be read."""
    try:
        with os.fdopen(os.open(IGNORE_FILE, _FILE, dir_fd=root), "rb") as file:
            data = (
                file.read(IGNORE_BYTES_MAX + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b"\xff"
            )
    except FileNotFoundError:
        return lambda path: False
    except OSError as error:
        raise BadWorkspace(f"{directory}/{IGNORE_FILE}: {error.strerror}") from None
    try:
        if len(data) > IGNORE_BYTES_MAX:
            raise ValueError(f"over the limit of {IGNORE_BYTES_MAX} bytes")
        import pathspec  # takes as long as all else here, and most trees have no such file

        rules = pathspec.GitIgnoreSpec.from_lines(decode_text(data).splitlines())
    except ValueError as wrong:
        raise BadWorkspace(f"{directory}/{IGNORE_FILE}: {wrong}") from None
    return rules.match_file


def _digest_all(
    root: int, directory: Path, survey: _Survey, previous: Snapshot | None, strict: bool
) -> tuple[list[TreeEntry], dict[str, Stamp]]:
    """The entries of the tree, every file of it read unless `previous` knows it."""
    before = {entry.path: entry for entry in previous.tree.entries} if previous else {}
    stamps = previous.stats if previous else {}
    entries = [TreeEntry(path=path, kind="link", target=target) for path, target in survey.links.items()]
    stats: dict[str, Stamp] = {}
    names: dict[tuple[int, int], str] = {}  # of files that have several, the first
    for path, status in sorted(survey.files.items()):
        stamp = _stamp(status)
        if stamps.get(path) == stamp:
            digest = before[path].digest
        else:
            try:
                digest, stamp = _digest(root, path, force=not strict)
            except OSError as error:
                survey.offences.append((path, f"it cannot be read ({error.strerror})"))
                continue
        if time.time_ns() - stamp[3] > RACY_NS:
            stats[path] = stamp
        executable = bool(status.st_mode & 0o111)
        entry = TreeEntry(path=path, digest=digest, size=stamp[1], executable=executable)
        if not strict:
            first = names.setdefault((status.st_dev, status.st_ino), path) if status.st_nlink > 1 else path
            entry = _left(msgspec.structs.replace(entry, same_as=first if first != path else ""), status)
        entries.append(entry)
    _refuse(directory, survey.offences)
    occupied: set[str] = set()
    for entry in entries:
        _add_parents(occupied, entry.path)
    for path, status in sorted(survey.directories.items(), reverse=True):
        if not strict:
            entries.append(_left(TreeEntry(path=path, kind="dir"), status))
        elif path not in occupied:
            entries.append(TreeEntry(path=path, kind="dir"))
            _add_parents(occupied, path)
    return entries, stats


def _left(entry: TreeEntry, status: os.stat_result) -> TreeEntry:
    """`entry` as a program left it, so that the next one finds it again."""
    mtime_ns = min(max(status.st_mtime_ns, 0), tree.TIME_NS_MAX)
    return msgspec.structs.replace(entry, mode=status.st_mode & 0o777, mtime_ns=mtime_ns)


def _add_parents(paths: set[str], path: str) -> None:
    above = path.rpartition("/")[0]
    while above and above not in paths:
        paths.add(above)
        above = above.rpartition("/")[0]


def _digest(root: int, path: str, *, force: bool) -> tuple[str, Stamp]:
    """The digest of a regular file and its stamp. Raises OSError, also when it changes meanwhile."""
    fd = _open_file(root, path, force=force)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is no longer a file")
        digest = hashlib.sha256()
        while data := os.read(fd, _READ_BYTES):
            go_on()
            digest.update(data)
        if _stamp(os.fstat(fd)) != _stamp(status):
            raise OSError(0, "it changed while it was read")
    finally:
        os.close(fd)
    return f"sha256:{digest.hexdigest()}", _stamp(status)


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


async def _keep_all(root: int, directory: Path, files: Iterable[TreeEntry | Artifact], blobs: Blobs) -> None:
    """Put those files that are not kept yet, all or none. Raises StoreFull, BadWorkspace.

    Each is opened by a descriptor: no path is walked a second time, or is too long.
    """
    paths = {file.digest: file.path for file in files}
    sources = {
        file.digest: Source(file.size, functools.partial(_open_binary, root, file.path)) for file in files
    }
    for digest in await blobs.put_all(sources) if sources else ():
        raise BadWorkspace(f"{directory}: {tree.shown_path(paths[digest])} changed while it was read")


def _open_binary(root: int, path: str) -> BinaryIO:
    return os.fdopen(_open_file(root, path, force=False), "rb")  # it was read before


async def collect(directory: Path, patterns: Sequence[str], blobs: Blobs) -> tuple[Artifact, ...]:
    """Keep the files that match any of `patterns`, in the order of their paths.

    A pattern is a relative path. In it `*` and `?` match within one name, `**` any number of
    directories, `[…]` one of some characters; one that matches a directory takes all that is beneath
    it. Regular files only: links are not followed. Raises Usage for a pattern that cannot be one,
    BadWorkspace for more than `ARTIFACTS_MAX` files.
    """
    if not patterns:
        return ()
    if len(patterns) > PATTERNS_MAX:
        raise Usage(f"more than {PATTERNS_MAX} artifact patterns")
    wanted = [Pattern(pattern) for pattern in patterns]
    root = _open_root(directory, False)
    try:
        found = await in_thread(_matching, root, wanted)
        artifacts = await in_thread(_digested, root, found)
        await _keep_all(root, directory, artifacts, blobs)
    finally:
        os.close(root)
    return artifacts


def _digested(root: int, found: list[tuple[str, bool]]) -> tuple[Artifact, ...]:
    artifacts = []
    for path, executable in found:
        try:
            digest, stamp = _digest(root, path, force=True)
        except OSError as error:
            raise BadWorkspace(f"{tree.shown_path(path)} cannot be read: {error.strerror}") from None
        artifacts.append(Artifact(path=path, digest=digest, size=stamp[1], executable=executable))
    return tuple(artifacts)


def _matching(root: int, wanted: list[Pattern]) -> list[tuple[str, bool]]:
    """The paths of the files that match, and whether each is executable."""
    walk = _Walk(root, force=True)
    found: list[tuple[str, bool]] = []
    for one in walk:
        if not stat.S_ISREG(one.status.st_mode) or not any(each.matches(one.path) for each in wanted):
            continue
        if len(found) == ARTIFACTS_MAX:
            raise BadWorkspace(f"more than {ARTIFACTS_MAX} files match the artifact patterns")
        tree.check_path(one.path)
        found.append((one.path, bool(one.status.st_mode & 0o111)))
    if walk.too_deep:
        raise BadWorkspace(f"{tree.shown_path(walk.too_deep[0])} is more than {DEPTH_MAX} directories deep")
    return sorted(found)


# ---- Into a directory


async def materialise(value: Tree, directory: Path, blobs: Blobs, *, owner: int | None = None) -> Snapshot:
    """Write the tree into `directory`, which is empty, as files of user and group `owner`.

    Where the tree says no modes, directories and executables get 0755, other files 0644. The links come
    last, so that nothing is ever written through one. Raises BadWorkspace, NotFound, and HostFull when the
    disk is full.
    """
    tree.check_tree(value, bytes_max=max(WORKSPACE_BYTES_MAX, value.size))
    root = _open_root(directory, False)
    try:
        await in_thread(_lay_directories, root, value, owner)
        files = [entry for entry in value.entries if entry.kind == "file" and not entry.same_as]
        small = [entry for entry in files if entry.size <= SMALL_BYTES_MAX]
        for start in range(0, len(small), _BATCH_MAX):
            batch = small[start : start + _BATCH_MAX]
            contents = await all_of(*(blobs.get(entry.digest) for entry in batch))
            await in_thread(_write_files, root, batch, contents, owner)
        for entry in files:
            if entry.size > SMALL_BYTES_MAX:
                place = Path(f"/proc/self/fd/{root}") / entry.path
                await to_its_end(blobs.fetch(entry.digest, place))
                await in_thread(_finish_file, root, entry, owner)
        stats = await in_thread(_finish, root, value, owner)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise HostFull(f"the workspace cannot be laid out in {directory}: {error.strerror}") from None
    finally:
        os.close(root)
    return Snapshot(tree=value, stats=stats)


def _lay_directories(root: int, value: Tree, owner: int | None) -> None:
    assert not os.listdir(root), "a workspace is laid out in an empty directory"
    paths: set[str] = set()
    for entry in value.entries:
        _add_parents(paths, entry.path)
        if entry.kind == "dir":
            paths.add(entry.path)
    for path in sorted(paths):
        go_on()
        os.mkdir(path, 0o755, dir_fd=root)
        os.chmod(path, 0o755, dir_fd=root)  # noqa: S103 -- whatever the umask
        if owner is not None:
            os.chown(path, owner, owner, dir_fd=root, follow_symlinks=False)


def _write_files(root: int, batch: list[TreeEntry], contents: list[bytes], owner: int | None) -> None:
    for entry, data in zip(batch, contents, strict=True):
        go_on()
        with os.fdopen(os.open(entry.path, _NEW, 0o600, dir_fd=root), "wb") as file:
            file.write(data)
        _finish_file(root, entry, owner)


def _finish_file(root: int, entry: TreeEntry, owner: int | None) -> None:
    fd = os.open(entry.path, _FILE, dir_fd=root)
    try:
        size = os.fstat(fd).st_size
        if size != entry.size:
            raise BadWorkspace(
                f"workspace: {tree.shown_path(entry.path)} has {size} bytes instead of {entry.size}"
            )
        if owner is not None:
            os.fchown(fd, owner, owner)
        usual = 0o755 if entry.executable else 0o644
        os.fchmod(fd, usual if entry.mode is None else entry.mode)
        _set_time(fd, entry)
    finally:
        os.close(fd)


def _set_time(fd: int, entry: TreeEntry) -> None:
    if entry.mtime_ns:
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))


def _finish(root: int, value: Tree, owner: int | None) -> dict[str, Stamp]:
    stats: dict[str, Stamp] = {}
    for entry in value.entries:
        go_on()
        if entry.kind == "link":
            os.symlink(entry.target, entry.path, dir_fd=root)
            if owner is not None:
                os.chown(entry.path, owner, owner, dir_fd=root, follow_symlinks=False)
        elif entry.same_as:
            os.link(entry.same_as, entry.path, src_dir_fd=root, dst_dir_fd=root, follow_symlinks=False)
    for entry in reversed(value.entries):  # what lies in a directory changes its time
        go_on()
        if entry.kind == "dir" and entry.mode is not None:
            fd = os.open(entry.path, _DIRECTORY, dir_fd=root)
            try:
                os.fchmod(fd, entry.mode)
                _set_time(fd, entry)
            finally:
                os.close(fd)
        elif entry.kind == "file":
            stamp = _stamp(os.stat(entry.path, dir_fd=root, follow_symlinks=False))
            if time.time_ns() - stamp[3] > RACY_NS:
                stats[entry.path] = stamp
    return stats


# ---- Watching and clearing


def measure(directory: Path, *, entries_max: int = COUNTED_MAX) -> Use:
    """What `directory` takes, others at work in it or not; counting stops beyond `entries_max`."""
    root = _open_root(directory, False)
    try:
        size = 0
        linked: set[tuple[int, int]] = set()
        walk = _Walk(root)
        for found in walk:
            status = found.status
            if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                if (status.st_dev, status.st_ino) in linked:
                    continue
                linked.add((status.st_dev, status.st_ino))
            size += max(status.st_size, status.st_blocks * 512)
            if walk.entries > entries_max:
                break
    finally:
        os.close(root)
    return Use(bytes=size, entries=walk.entries, too_deep=bool(walk.too_deep))


async def watch(directory: Path, bytes_max: int, *, entries_max: int = FILES_MAX) -> NoReturn:
    """Raises LimitReached `workspace` once `directory` takes more than it may; else it never ends.

    It looks again after `WATCH_INTERVAL_S`, or after `WATCH_SHARE` times what the last look took.
    """
    while True:
        started = time.monotonic()
        use = await in_thread(measure, directory, entries_max=entries_max)
        if use.bytes > bytes_max:
            raise LimitReached("workspace", f"more than {format_size(bytes_max)}")
        if use.entries > entries_max:
            raise LimitReached("workspace", f"more than {entries_max} entries")
        if use.too_deep:
            raise LimitReached("workspace", f"more than {DEPTH_MAX} directories deep")
        pause = (time.monotonic() - started) * WATCH_SHARE
        await asyncio.sleep(min(max(pause, WATCH_INTERVAL_S), WATCH_INTERVAL_S_MAX))


def clear(directory: Path) -> None:
    """Empty `directory`, whatever a guest has made in it.

    Nothing recurses and no path grows: a directory within is moved up to the top first, and its own
    directories after it, so that two descriptors are enough for any depth.
    """
    root = _open_root(directory, False)
    token = secrets.token_hex(8)  # no guest knows the names that things are moved to
    moved = 0
    try:
        while names := os.listdir(root):
            for name in names:
                if not _removed(root, name):
                    moved = _flatten(root, name, token, moved)
    finally:
        os.close(root)


def _removed(parent: int, name: str) -> bool:
    """Remove a file, a link or an empty directory; False if there is something in it."""
    try:
        os.unlink(name, dir_fd=parent)
        return True
    except IsADirectoryError:
        pass
    try:
        os.rmdir(name, dir_fd=parent)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _flatten(root: int, name: str, token: str, moved: int) -> int:
    """Empty the directory `name` of the top: files go, directories move up. The next free number."""
    fd = _enter_by_force(root, name)
    try:
        for inner in os.listdir(fd):
            if not _removed(fd, inner):
                os.close(_enter_by_force(fd, inner))  # to move a directory takes the right to write to it
                os.rename(inner, f"{token}-{moved}", src_dir_fd=fd, dst_dir_fd=root)
                moved += 1
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=root)
    return moved


# ---- Opening and walking


def _open_root(directory: Path, follow: bool) -> int:
    """A descriptor of `directory`; a link at its end is followed only if it is the user's own."""
    try:
        return os.open(directory, _DIRECTORY & ~os.O_NOFOLLOW if follow else _DIRECTORY)
    except OSError as error:
        raise BadWorkspace(f"{directory}: {error.strerror}") from None


def _open_file(root: int, path: str, *, force: bool) -> int:
    """A regular file beneath `root`. With `force` its mode is changed where it keeps its owner, us, out.

    Raises OSError.
    """
    try:
        return os.open(path, _FILE, dir_fd=root)
    except PermissionError:
        if not force:
            raise
        _permit(root, path, 0o400)
        return os.open(path, _FILE, dir_fd=root)


def _enter_by_force(parent: int, name: str) -> int:
    _permit(parent, name, 0o700)
    return os.open(name, _DIRECTORY, dir_fd=parent)


def _permit(parent: int, name: str, bits: int) -> None:
    """Add `bits` to the mode of something of ours, never through a link."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        if mode & bits != bits:
            os.chmod(f"/proc/self/fd/{fd}", mode | bits)
    finally:
        os.close(fd)


@dataclass
class _Found:
    """One entry of a directory, not opened. `parent` is open while the walk stands at it."""

    path: str
    name: str
    parent: int
    status: os.stat_result


_Level = tuple[int, str, Iterator[str]]


@dataclass
class _Walk:
    """Everything beneath `root`, in the order of names, with one descriptor a level.

    Directories for which `enter` is false are seen and not entered; `too_deep` and `unreadable` are
    those that could not be.
    """

    root: int
    enter: Callable[[str], bool] = lambda path: True
    force: bool = False  # change the modes of directories of ours that keep us out
    entries: int = 0
    too_deep: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[_Found]:
        first = os.open(".", _DIRECTORY, dir_fd=self.root)
        stack: list[_Level] = [(first, "", iter(sorted(os.listdir(first))))]
        try:
            while stack:
                go_on()
                parent, prefix, names = stack[-1]
                name = next(names, None)
                if name is None:
                    os.close(stack.pop()[0])
                    continue
                try:
                    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
                except OSError:
                    continue  # gone since: `measure` looks while others write
                self.entries += 1
                path = prefix + name
                yield _Found(path, name, parent, status)
                if stat.S_ISDIR(status.st_mode) and self.enter(path):
                    self._descend(stack, parent, name, path)
        finally:
            for level in stack:
                os.close(level[0])

    def _descend(self, stack: list[_Level], parent: int, name: str, path: str) -> None:
        if len(stack) > DEPTH_MAX:
            self.too_deep.append(path)
            return
        try:
            fd = _enter_by_force(parent, name) if self.force else os.open(name, _DIRECTORY, dir_fd=parent)
        except (FileNotFoundError, NotADirectoryError):
            return  # gone, or another thing now
        except OSError:
            self.unreadable.append(path)
            return
        try:
            names = sorted(os.listdir(fd))
        except OSError:  # in /proc, of a process that has ended
            os.close(fd)
            self.unreadable.append(path)
            return
        stack.append((fd, f"{path}/", iter(names)))
