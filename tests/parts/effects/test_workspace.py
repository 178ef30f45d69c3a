"""Directories to trees and back, with users' directories that cannot be one and guests' that bite."""

from __future__ import annotations

import asyncio
import codecs
import ctypes
import hashlib
import os
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import pytest

from mvmci.engines.embedded import workspace
from mvmci.engines.embedded.limits import LimitReached
from mvmci.errors import BadWorkspace, HostFull, NotFound, Usage
from mvmci.jobs import tree
from mvmci.jobs.tree import TreeEntry
from mvmci.store import Source
from tests.harness.waiting import LONG_S

UID = 64124


class Kept:
    """Blobs in a dictionary, which remembers what it was given."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.puts = 0
        self.asked = 0

    async def put(self, data: bytes) -> str:
        self.puts += 1
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        return digest

    async def put_file(self, path: Path) -> str:
        return await self.put(path.read_bytes())

    async def put_all(self, sources: Mapping[str, Source]) -> set[str]:
        changed = set()
        for digest in await self.missing(sources):
            with sources[digest].open() as file:
                if await self.put(file.read()) != digest:
                    changed.add(digest)
        return changed

    async def has(self, digest: str) -> bool:
        return digest in self.blobs

    async def missing(self, digests: Collection[str]) -> set[str]:
        self.asked += 1
        return set(digests) - set(self.blobs)

    async def get(self, digest: str) -> bytes:
        if digest not in self.blobs:
            raise NotFound(digest)
        return self.blobs[digest]

    async def fetch(self, digest: str, to: Path) -> None:
        to.write_bytes(await self.get(digest))


@pytest.fixture
def blobs() -> Kept:
    return Kept()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    made.mkdir()
    return made


@pytest.fixture
def target(tmp_path: Path) -> Path:
    made = tmp_path / "target"
    made.mkdir()
    return made


def deepen(directory: Path, levels: int) -> None:
    """Directories within directories, further than any path reaches."""
    fd = os.open(directory, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d" * 20, dir_fd=fd)
        inner = os.open("d" * 20, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


def fill(source: Path) -> None:
    (source / "a/b").mkdir(parents=True)
    (source / "empty/inner").mkdir(parents=True)
    (source / "a/b/text").write_text("text")
    (source / "a/same").write_text("text")
    (source / "a-b").write_bytes(b"")
    (source / "tool").write_text("#!/bin/sh\n")
    (source / "tool").chmod(0o700)
    (source / "large").write_bytes(bytes(1 << 20))
    (source / "link").symlink_to("a/b/text")
    (source / "naïve name\n").write_text("x")


async def test_a_directory_becomes_a_tree_and_a_directory_again(
    source: Path, target: Path, blobs: Kept
) -> None:
    fill(source)
    snapshot = await workspace.scan(source, blobs)
    assert [entry.path for entry in snapshot.tree.entries if entry.kind == "dir"] == ["empty/inner"]
    assert set(blobs.blobs) == {entry.digest for entry in snapshot.tree.entries if entry.kind == "file"}
    await workspace.materialise(tree.decode_tree(tree.encode_tree(snapshot.tree)), target, blobs)
    assert (target / "a/b/text").read_text() == "text"
    assert stat.S_IMODE((target / "tool").stat().st_mode) == 0o755
    assert stat.S_IMODE((target / "large").stat().st_mode) == 0o644
    assert stat.S_IMODE((target / "a").stat().st_mode) == 0o755
    assert (target / "link").readlink() == Path("a/b/text")
    assert (await workspace.scan(target, blobs)).tree == snapshot.tree


@pytest.mark.skipif(os.geteuid() != 0 and os.environ.get("CI") != "true", reason="needs root")
async def test_everything_that_is_laid_out_belongs_to_its_owner(
    source: Path, target: Path, blobs: Kept
) -> None:
    fill(source)
    snapshot = await workspace.scan(source, blobs)
    await workspace.materialise(snapshot.tree, target, blobs, owner=UID)
    owners = {path.lstat().st_uid for path in target.rglob("*")}
    assert owners == {UID}


async def test_a_tree_is_stored_once(source: Path, blobs: Kept) -> None:
    fill(source)
    await workspace.scan(source, blobs)
    before = blobs.puts
    blobs.asked = 0
    await workspace.scan(source, blobs)
    assert blobs.puts == before == len(blobs.blobs)
    assert blobs.asked <= 1  # one question for all files


async def test_files_that_did_not_change_are_not_read_again(
    source: Path, blobs: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(source)
    monkeypatch.setattr(workspace, "RACY_NS", -(10**18))
    first = await workspace.scan(source, blobs)
    read: list[str] = []
    digest = workspace._digest
    monkeypatch.setattr(
        workspace, "_digest", lambda root, path, **how: read.append(path) or digest(root, path, **how)
    )
    (source / "a/same").write_text("tex2")
    (source / "new").write_text("new")
    second = await workspace.scan(source, blobs, previous=first)
    assert sorted(read) == ["a/same", "new"]
    assert second == await workspace.scan(source, blobs)


async def test_a_file_that_changed_just_now_is_read_again(
    source: Path, blobs: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "RACY_NS", 10**18)  # whatever the machine is busy with meanwhile
    (source / "file").write_text("one")
    first = await workspace.scan(source, blobs)
    assert "file" not in first.stats
    (source / "file").write_text("two")  # perhaps within the same tick of the clock
    second = await workspace.scan(source, blobs, previous=first)
    assert first.tree != second.tree


async def test_what_was_laid_out_and_has_settled_is_not_read_again(
    source: Path, target: Path, blobs: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(source)
    monkeypatch.setattr(workspace, "RACY_NS", -(10**18))
    laid = await workspace.materialise((await workspace.scan(source, blobs)).tree, target, blobs)
    monkeypatch.setattr(workspace, "_digest", None)
    assert (await workspace.scan(target, blobs, previous=laid)).tree == laid.tree


async def test_what_the_user_ignores_stays_behind(source: Path, blobs: Kept) -> None:
    for name in ("build/out/x", "src/build/y", "src/a.o", "src/keep.o", "src/a.c", "logs/today"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    os.mkfifo(source / "build/pipe")
    (source / ".mvmciignore").write_text("# no\nbuild/\n*.o\n!keep.o\nlogs/*\n")
    found = await workspace.scan(source, blobs)
    paths = [(entry.path, entry.kind) for entry in found.tree.entries]
    expected = [(".mvmciignore", "file"), ("logs", "dir"), ("src/a.c", "file"), ("src/keep.o", "file")]
    assert paths == expected


def device(path: Path) -> None:
    if os.geteuid() != 0 and os.environ.get("CI") != "true":
        pytest.skip("needs root")
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: p.symlink_to("/etc/passwd"), "leaves the directory"),
        (lambda p: p.symlink_to("../../x"), "leaves the directory"),
        (lambda p: os.symlink(b"\xff", p), "not UTF-8"),
        (device, "a device file"),
        (os.mkfifo, "a named pipe"),
        (bound, "a socket"),
        (lambda p: Path(os.fsdecode(bytes(p) + b"\xff")).write_text("x"), "not UTF-8"),
    ],
)
async def test_what_cannot_be_in_a_workspace_is_named(
    source: Path, blobs: Kept, make: Callable[[Path], object], why: str
) -> None:
    (source / "a").mkdir()
    (source / "fine").write_text("fine")
    make(source / "a" / "bad")
    make(source / "z")
    if "leaves" in why:
        (source / "z").unlink()
        (source / "z").symlink_to("/")
    with pytest.raises(BadWorkspace) as caught:
        await workspace.scan(source, blobs)
    assert "a/bad" in caught.value.message
    assert why in caught.value.message
    assert "and 1 more" in caught.value.message
    assert ".mvmciignore" in (caught.value.hint or "")
    assert blobs.puts == 0


async def test_too_many_files_are_counted_and_not_read(
    source: Path, blobs: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 100_000
    fd = os.open(source, os.O_RDONLY)
    os.close(os.open("0", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    for number in range(1, count):
        if number % 30_000 == 0:  # a file has no more names than a filesystem gives it
            os.close(os.open(str(number), os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        else:
            os.link(str(number - number % 30_000), str(number), src_dir_fd=fd, dst_dir_fd=fd)
    os.close(fd)
    monkeypatch.setattr(workspace, "_digest", None)
    with pytest.raises(BadWorkspace, match="100000 entries, and a workspace has at most 50000"):
        await workspace.scan(source, blobs)
    workspace.clear(source)
    assert os.listdir(source) == []


async def test_a_directory_that_is_too_large_or_too_deep_is_refused(source: Path, blobs: Kept) -> None:
    with (source / "sparse").open("wb") as file:
        file.truncate(5 << 30)
    with pytest.raises(BadWorkspace, match="bytes"):
        await workspace.scan(source, blobs)
    (source / "sparse").unlink()
    deepen(source, 200)
    for strict in (True, False):
        with pytest.raises(BadWorkspace, match="too deep"):
            await workspace.scan(source, blobs, strict=strict)


@pytest.mark.parametrize("name", ["none", "file"])
async def test_what_is_no_directory_is_refused(source: Path, blobs: Kept, name: str) -> None:
    (source / "file").write_text("x")
    with pytest.raises(BadWorkspace, match=name):
        await workspace.scan(source / name, blobs)


async def test_what_a_program_left_loses_its_special_files_and_keeps_its_links(
    source: Path, blobs: Kept
) -> None:
    os.mkfifo(source / "pipe")
    bound(source / "socket")
    (source / "out").symlink_to("/etc/passwd")
    (source / "locked").mkdir()
    (source / "locked/file").write_text("x")
    (source / "locked/file").chmod(0)
    (source / "locked").chmod(0)
    found = await workspace.scan(source, blobs, strict=False)
    assert [(e.path, e.kind, e.target) for e in found.tree.entries] == [
        ("locked", "dir", ""),
        ("locked/file", "file", ""),
        ("out", "link", "/etc/passwd"),
    ]


async def test_nothing_is_written_through_a_link_of_a_tree(target: Path, tmp_path: Path, blobs: Kept) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    digest = await blobs.put(b"x")
    hostile = tree.Tree(
        entries=(
            TreeEntry(path="a", kind="link", target=str(outside)),
            TreeEntry(path="a/b", digest=digest, size=1),
        )
    )
    with pytest.raises(BadWorkspace):
        await workspace.materialise(hostile, target, blobs)
    fine = tree.tree(
        [TreeEntry(path="a", kind="link", target=str(outside)), TreeEntry(path="b", digest=digest, size=1)]
    )
    await workspace.materialise(fine, target, blobs)
    assert list(outside.iterdir()) == []


async def test_a_blob_of_another_size_is_refused(target: Path, blobs: Kept) -> None:
    digest = await blobs.put(b"four")
    with pytest.raises(BadWorkspace, match="has 4 bytes instead of 3"):
        await workspace.materialise(tree.tree([TreeEntry(path="a", digest=digest, size=3)]), target, blobs)


async def test_a_walk_that_is_cancelled_is_over_before_its_descriptor_is_closed(
    target: Path, blobs: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = tree.tree([TreeEntry(path=name, kind="link", target="x") for name in ("a", "b")])
    entered, go = threading.Event(), threading.Event()
    seen: list[int] = []

    def finish(root: int, value: tree.Tree, owner: int | None) -> object:
        entered.set()
        go.wait(LONG_S)
        seen.append(os.fstat(root).st_ino)
        return original(root, value, owner)

    original = workspace._finish
    monkeypatch.setattr(workspace, "_finish", finish)
    laying = asyncio.create_task(workspace.materialise(links, target, blobs))
    await asyncio.to_thread(entered.wait, LONG_S)
    for _ in range(2):
        laying.cancel()
        await asyncio.wait([laying], timeout=0.05)
    assert not laying.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await laying
    assert seen == [target.stat().st_ino]
    assert not list(target.iterdir()), "nobody wants the rest of it"


@pytest.fixture
def small(tmp_path: Path, root: None) -> Iterator[Path]:
    """A disk of 128 KiB."""
    made = tmp_path / "small"
    made.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", made], check=True)
    yield made
    subprocess.run(["umount", made], check=True)


async def test_a_disk_that_is_full_is_no_fault_of_the_workspace(small: Path, blobs: Kept) -> None:
    digest = await blobs.put(bytes(100_000))  # the disk takes the beginning of the second
    files = [TreeEntry(path=name, digest=digest, size=100_000) for name in ("a", "b")]
    with pytest.raises(HostFull, match="No space left on device"):
        await workspace.materialise(tree.tree(files), small, blobs)


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("report/*.json", ["report/a.json"]),
        ("./report/*.json", ["report/a.json"]),
        ("**/*.xml", ["deep/er/c.xml", "top.xml"]),
        ("*.xml", ["top.xml"]),
        ("deep", ["deep/er/c.xml", "deep/x"]),
        ("deep/", ["deep/er/c.xml", "deep/x"]),
        ("deep/**", ["deep/er/c.xml", "deep/x"]),
        ("d*p/*/*.x?l", ["deep/er/c.xml"]),
        ("**/er/**", ["deep/er/c.xml"]),
        ("report/[ab].json", ["report/a.json"]),
        ("report/[!b].*", ["report/a.json"]),
        ("*e*o*t", ["report/a.json", "report/sub/b.json"]),
        ("top.xml/**", []),
        ("nothing", []),
        ("link", []),
        ("link/*", []),
    ],
)
async def test_artifacts_are_the_regular_files_that_match(
    source: Path, blobs: Kept, pattern: str, paths: list[str]
) -> None:
    for name in ("report/a.json", "report/sub/b.json", "deep/er/c.xml", "deep/x", "top.xml"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "link").symlink_to("/etc")
    (source / "report/link.json").symlink_to("/etc/passwd")
    os.mkfifo(source / "report/pipe.json")
    found = await workspace.collect(source, [pattern], blobs)
    assert [artifact.path for artifact in found] == paths
    assert all(blobs.blobs[artifact.digest] == artifact.path.encode() for artifact in found)


@pytest.mark.parametrize("pattern", ["/etc/passwd", "../x", "a/../b", "", "a//b", "[z-a]", "x" * 2000])
async def test_a_pattern_that_cannot_be_one_is_refused(source: Path, blobs: Kept, pattern: str) -> None:
    with pytest.raises(Usage):
        await workspace.collect(source, [pattern], blobs)


async def test_too_many_artifacts_are_refused(
    source: Path, blobs: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "ARTIFACTS_MAX", 2)
    for name in "ab":
        (source / name).write_text(name)
    assert len(await workspace.collect(source, ["*"], blobs)) == 2
    (source / "c").write_text("c")
    with pytest.raises(BadWorkspace, match="more than 2 files"):
        await workspace.collect(source, ["*"], blobs)


def test_what_a_directory_takes_counts_a_file_once_and_a_hole_as_bytes(source: Path) -> None:
    (source / "one").write_bytes(b"x" * 100_000)
    os.link(source / "one", source / "two")
    (source / "out").symlink_to("/")
    full = workspace.measure(source).bytes
    assert 100_000 <= full < 150_000
    with (source / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    assert workspace.measure(source).bytes >= 1 << 30
    assert workspace.measure(source).entries == 4


@pytest.mark.parametrize(
    "outgrow",
    [
        lambda d: (d / "big").write_bytes(bytes(2 << 20)),
        lambda d: [(d / str(n)).touch() for n in range(101)],
        lambda d: deepen(d, 300),
    ],
)
async def test_a_workspace_that_outgrows_its_limit_is_noticed(
    source: Path, outgrow: Callable[[Path], object]
) -> None:
    watching = asyncio.ensure_future(workspace.watch(source, 1 << 20, entries_max=100))
    await asyncio.sleep(0)
    assert not watching.done()
    outgrow(source)
    with pytest.raises(LimitReached) as caught:
        await asyncio.wait_for(watching, 30)
    assert caught.value.reason.startswith("workspace: ")


def test_a_directory_made_by_a_hostile_guest_is_emptied(source: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    deepen(source, 10_000)
    (source / "out").symlink_to(outside)
    (source / "closed/within").mkdir(parents=True)
    (source / "closed/within/file").write_text("x")
    (source / "closed/out").symlink_to(outside)
    os.mkfifo(source / "pipe")
    Path(os.fsdecode(bytes(source) + b"/\xff\n-rf *")).mkdir()
    Path(os.fsdecode(bytes(source) + b"/\xff\n-rf */" + b"y" * 255)).write_text("x")
    (source / "closed/within").chmod(0)
    (source / "closed").chmod(0)
    workspace.clear(source)
    assert os.listdir(source) == []
    assert (outside / "kept").read_text() == "kept"


def test_what_is_emptied_is_never_the_other_end_of_a_link(source: Path, tmp_path: Path) -> None:
    (source / "kept").write_text("kept")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(BadWorkspace):
        workspace.clear(tmp_path / "link")
    assert (source / "kept").exists()


@pytest.mark.skipif(os.geteuid() != 0 and os.environ.get("CI") != "true", reason="needs root")
def test_what_was_locked_by_its_owner_is_read_and_removed_without_root(tmp_path: Path) -> None:
    """Runs in a process of another user, whom modes keep out."""
    directory = tmp_path / "locked"
    (directory / "a/b").mkdir(parents=True)
    (directory / "a/b/file").write_text("x")
    for path in (directory, directory / "a", directory / "a/b", directory / "a/b/file"):
        os.chown(path, UID, UID)
    (directory / "a/b/file").chmod(0)
    (directory / "a/b").chmod(0)
    (directory / "a").chmod(0)
    fd = os.open(directory, os.O_RDONLY)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setresgid(UID, UID, UID)
            os.setresuid(UID, UID, UID)
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # the change of user took its own /proc away
            os.fchdir(fd)  # no path leads here any more
            walk = workspace._Walk(fd, force=True)
            seen = [found.path for found in walk]
            assert seen == ["a", "a/b", "a/b/file"], seen
            os.close(workspace._open_file(fd, "a/b/file", force=True))
            os.chmod("a/b", 0, dir_fd=fd)
            os.chmod("a", 0, dir_fd=fd)
            workspace.clear(Path("."))
            code = 0
        finally:
            os._exit(code)
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert os.listdir(directory) == []


@pytest.fixture
def nobody(root: None, source: Path) -> Iterator[None]:
    """Files are read as an ordinary user, whose own `source` is."""
    for path in (source.parent, *source.parent.parents):
        if path.stat().st_mode & 0o011 != 0o011:
            path.chmod(path.stat().st_mode | 0o011)
    os.chown(source, UID, UID)
    os.seteuid(UID)
    yield
    os.seteuid(0)


async def test_a_file_that_cannot_be_read_is_named_and_left_as_it_is(
    nobody: None, source: Path, blobs: Kept
) -> None:
    secret = source / "secret"
    secret.write_text("s")
    secret.chmod(0)
    with pytest.raises(
        BadWorkspace, match=r"secret cannot be in a workspace: it cannot be read \(Permission"
    ):
        await workspace.scan(source, blobs)
    assert secret.stat().st_mode & 0o777 == 0
    assert not blobs.blobs


async def test_what_is_left_out_by_its_place_is_neither_read_nor_entered(source: Path, blobs: Kept) -> None:
    (source / "a/.state/keys").mkdir(parents=True)
    (source / "a/.state/keys/operator").write_text("key")
    (source / "a/other").write_text("fine")
    snapshot = await workspace.scan(source, blobs, without="a/.state")
    assert [entry.path for entry in snapshot.tree.entries] == ["a/other"]


@pytest.mark.parametrize("mark", [codecs.BOM_UTF8, codecs.BOM_UTF16_LE])
async def test_an_ignore_file_counts_from_its_first_line(source: Path, blobs: Kept, mark: bytes) -> None:
    encoding = "utf-8" if mark == codecs.BOM_UTF8 else "utf-16-le"
    (source / ".mvmciignore").write_bytes(mark + ".mvmciignore\nsecret\n".encode(encoding))
    for name in ("secret", "file"):
        (source / name).write_text(name)
    snapshot = await workspace.scan(source, blobs)
    assert [entry.path for entry in snapshot.tree.entries] == ["file"]


async def test_proc_is_refused_in_one_sentence(blobs: Kept) -> None:
    with pytest.raises(BadWorkspace, match="/proc"):
        await workspace.scan(Path("/proc"), blobs)


async def test_artifacts_are_executable_as_they_were_left(target: Path, blobs: Kept) -> None:
    for name, mode in (("tool", 0o755), ("text", 0o600)):
        (target / name).write_text(name)
        (target / name).chmod(mode)
    found = await workspace.collect(target, ["*"], blobs)
    assert [(one.path, one.executable) for one in found] == [("text", False), ("tool", True)]


async def test_what_a_program_left_is_found_again_with_modes_times_and_names(
    source: Path, target: Path, blobs: Kept
) -> None:
    """A workflow that sleeps finds its workspace elsewhere: `make` and `ssh` look at all of these."""
    (source / "k").mkdir()
    (source / "k/key").write_text("s")
    (source / "k/key").chmod(0o600)
    (source / "k").chmod(0o700)
    (source / "empty").mkdir()
    (source / "tool").write_text("t")
    (source / "tool").chmod(0o751)
    os.link(source / "k/key", source / "hard")
    for number, name in enumerate(("out", "in"), 1):
        (source / name).write_text(name)
        os.utime(source / name, ns=(number, 10**18 + number))
    os.utime(source / "k", ns=(0, 10**18))

    def look(directory: Path) -> dict[str, tuple[int, int, int]]:
        found = {str(path.relative_to(directory)): path.stat() for path in directory.rglob("*")}
        return {name: (at.st_mode, at.st_nlink, at.st_mtime_ns) for name, at in found.items()}

    left = look(source)
    snapshot = await workspace.scan(source, blobs, strict=False)
    await workspace.materialise(tree.decode_tree(tree.encode_tree(snapshot.tree)), target, blobs)
    assert look(target) == left
    assert (await workspace.scan(target, blobs, strict=False)).tree == snapshot.tree


async def test_a_users_directory_is_the_same_tree_whenever_it_was_checked_out(
    source: Path, target: Path, blobs: Kept
) -> None:
    for directory, mode in ((source, 0o640), (target, 0o600)):
        (directory / "file").write_text("same")
        (directory / "file").chmod(mode)
    os.utime(target / "file", (1, 1))
    assert (await workspace.scan(source, blobs)).tree == (await workspace.scan(target, blobs)).tree
