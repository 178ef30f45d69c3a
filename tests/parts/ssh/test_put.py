"""A program that is copied is there whole, or not at all, and what is in use stays."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mvmci.cluster.topology import HostSection
from mvmci.errors import HostAway, MvmciError
from mvmci.runtimes.ssh import receive
from mvmci.runtimes.ssh.connection import Connection
from mvmci.runtimes.ssh.put import put_program
from mvmci.runtimes.ssh.receive import KEPT
from tests.harness.proxy import Proxy
from tests.harness.sshd import Sshd, user
from tests.harness.waiting import until_true
from tests.parts.ssh.conftest import Connect

SIZE = 8 << 20


@pytest.fixture
async def h1(sshd: Sshd, connect: Connect) -> Connection:
    return await connect(h1=sshd.section()).connect("h1")


def make_program(folder: Path, text: bytes = b"") -> tuple[Path, str]:
    """A file that is none, and its digest."""
    data = text + os.urandom(SIZE)
    path = folder / "local.pyz"
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest()


async def put(connection: Connection, path: Path, digest: str, there: Path) -> Path:
    return Path(await put_program(connection, path, digest, str(there), python=sys.executable))


async def test_a_program_is_there_under_its_digest_for_its_user_alone(h1: Connection, tmp_path: Path) -> None:
    path, digest = make_program(tmp_path)
    there = tmp_path / "a place" / "mvmci"
    found = await put(h1, path, digest, there)
    assert found == there / "bin" / f"{digest}.pyz"
    assert found.read_bytes() == path.read_bytes()
    assert [oct(one.stat().st_mode & 0o777) for one in (found, there / "bin", there)] == ["0o700"] * 3
    assert sorted(os.listdir(there / "bin")) == [".lock", f"{digest}.pyz"]


async def test_one_that_is_there_is_not_sent_again_and_counts_as_used(h1: Connection, tmp_path: Path) -> None:
    path, digest = make_program(tmp_path)
    found = await put(h1, path, digest, tmp_path / "mvmci")
    os.utime(found, (1, 1))
    inode = found.stat().st_ino
    path.write_bytes(b"is not read")
    assert await put(h1, path, digest, tmp_path / "mvmci") == found
    assert found.stat().st_ino == inode
    assert found.stat().st_mtime > 1


async def test_one_that_was_damaged_is_sent_again(h1: Connection, tmp_path: Path) -> None:
    path, digest = make_program(tmp_path)
    found = await put(h1, path, digest, tmp_path / "mvmci")
    found.write_bytes(path.read_bytes()[:-1] + b"!")
    assert (await put(h1, path, digest, tmp_path / "mvmci")).read_bytes() == path.read_bytes()


async def test_one_that_arrives_changed_does_not_appear(h1: Connection, tmp_path: Path) -> None:
    path, _ = make_program(tmp_path)
    with pytest.raises(MvmciError, match="h1: it did not arrive whole"):
        await put(h1, path, "0" * 64, tmp_path / "mvmci")
    assert os.listdir(tmp_path / "mvmci" / "bin") == [".lock"]


async def test_a_copy_that_is_cut_off_leaves_a_file_that_the_next_one_removes(
    sshd: Sshd, h1: Connection, connect: Connect, tmp_path: Path
) -> None:
    path, digest = make_program(tmp_path)
    folder = tmp_path / "mvmci" / "bin"
    async with Proxy(f"ssh://127.0.0.1:{sshd.port}").serve() as proxy:
        proxy.rate = 2 << 20
        port = int(proxy.url.rpartition(":")[2])
        section = HostSection(address="127.0.0.1", port=port, host_key=sshd.host_keys[0])
        slow = await connect(h1=section).connect("h1")
        copying = asyncio.ensure_future(put(slow, path, digest, tmp_path / "mvmci"))
        await until_true(lambda: any(part.stat().st_size for part in folder.glob(".part-*")))
        (part,) = folder.glob(".part-*")
        assert not list(folder.glob("*.pyz"))
        # Another one meanwhile leaves it alone, and is not kept waiting.
        other = tmp_path / "other.pyz"
        other.write_bytes(b"another")
        await put(h1, other, hashlib.sha256(b"another").hexdigest(), tmp_path / "mvmci")
        assert part.exists()
        proxy.cut()
        with pytest.raises(HostAway):
            await copying
    # Who wrote it may have seen the end, and removed it; whoever is killed leaves it.
    await until_true(lambda: not part.exists() or _can_lock(part))
    part.write_bytes(b"of one that was killed")
    found = await put(h1, path, digest, tmp_path / "mvmci")
    assert found.read_bytes() == path.read_bytes()
    assert not list(folder.glob(".part-*"))


def _can_lock(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def test_nothing_is_left_of_what_nobody_waits_for(tmp_path: Path) -> None:
    """Ctrl-C, before it could say that it wants the program."""
    nobody, said = os.pipe()
    os.close(nobody)
    script = Path(receive.__file__)
    command = [sys.executable, "-I", "-S", "-B", script, "0" * 64, tmp_path, "1"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.PIPE, check=False)
    os.close(said)
    assert done.returncode != 0
    assert [one.name for one in (tmp_path / "bin").iterdir()] == [".lock"]


async def test_the_last_three_are_kept_and_those_that_run_or_are_to_run(
    h1: Connection, tmp_path: Path
) -> None:
    folder = tmp_path / "mvmci" / "bin"
    folder.mkdir(parents=True)
    names = [f"{number}" * 64 for number in range(6)]
    for age, name in enumerate(names):
        (folder / f"{name}.pyz").touch()
        os.utime(folder / f"{name}.pyz", (1000 - age, 1000 - age))
    runs, wanted = names[-1], names[-2]
    (tmp_path / "mvmci" / "ci").mkdir()
    (tmp_path / "mvmci" / "ci" / "desired.json").write_text(f'{{"program": ["python3", "/x/{wanted}.pyz"]}}')
    sleeper = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import time; time.sleep(1000)", folder / f"{runs}.pyz"
    )
    try:
        path, digest = make_program(tmp_path)
        await put(h1, path, digest, tmp_path / "mvmci")
        left = {one.stem for one in folder.glob("*.pyz")}
        assert left == {digest, *names[: KEPT - 1], runs, wanted}
    finally:
        sleeper.kill()
        await sleeper.wait()
    (tmp_path / "mvmci" / "ci" / "desired.json").unlink()
    await put(h1, path, digest, tmp_path / "mvmci")
    assert {one.stem for one in folder.glob("*.pyz")} == {digest, *names[: KEPT - 1]}


async def test_a_full_disk_is_said_to_be(h1: Connection, tmp_path: Path, small_disk: Path) -> None:
    path, digest = make_program(tmp_path)
    with pytest.raises(MvmciError, match=f"h1 has no room for the program in {small_disk}/mvmci"):
        await put(h1, path, digest, small_disk / "mvmci")
    assert os.listdir(small_disk / "mvmci" / "bin") == [".lock"]


async def test_a_directory_that_cannot_be_used_is_said_to_be(h1: Connection, tmp_path: Path) -> None:
    path, digest = make_program(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(
        MvmciError, match=f"{user()} cannot keep the program in .*/file on h1: Not a directory"
    ):
        await put(h1, path, digest, tmp_path / "file")


async def test_a_python_that_is_not_there_is_said_to_be(h1: Connection, tmp_path: Path) -> None:
    path, digest = make_program(tmp_path)
    with pytest.raises(MvmciError, match=r"h1 did not take the program: .*/no/python"):
        await put_program(h1, path, digest, str(tmp_path), python="/no/python")


async def test_an_old_python_takes_it_too(h1: Connection, tmp_path: Path) -> None:
    path, digest = make_program(tmp_path)
    for python in sorted(Path("~/.pyenv/versions").expanduser().glob("3.6.*/bin/python")):
        found = await put_program(h1, path, digest, str(tmp_path / "mvmci"), python=str(python))
        assert Path(found).read_bytes() == path.read_bytes()


def test_whoever_is_killed_at_any_line_leaves_a_temporary_file_at_most(tmp_path: Path) -> None:
    """The program is there whole or not at all, and once more puts everything right."""
    data, folder = b"program", tmp_path / "mvmci" / "bin"
    digest = hashlib.sha256(data).hexdigest()
    folder.mkdir(parents=True)
    names = [letter * 64 for letter in "abc"]
    for age, name in enumerate(names):  # the last of them has to go
        (folder / f"{name}.pyz").touch()
        os.utime(folder / f"{name}.pyz", (1000 - age, 1000 - age))
    killed = Path(__file__).with_name("killed.py")
    command = [sys.executable, "-I", killed, receive.__file__, digest, tmp_path / "mvmci", str(len(data))]
    ran = subprocess.run(command, input=data, check=True, capture_output=True)
    runs = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(runs) > 50
    assert [one["code"] for one in runs] == [-signal.SIGKILL] * (len(runs) - 1) + [0]
    assert {one["there"] for one in runs} == {None, data.decode()}
    assert max(sum(name.startswith(".part-") for name in one["names"]) for one in runs) == 1
    assert sorted(os.listdir(folder)) == sorted([".lock", *(f"{name}.pyz" for name in (digest, *names[:-1]))])
