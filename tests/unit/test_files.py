"""Private files are whole or absent, and what a killed writer leaves is known by its number."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mvmci.system.files import passable_folder, private_folder, sweep, write_private

KILLED_IN_THE_MIDDLE = """
import os, signal, sys
from pathlib import Path
from mvmci.system.files import write_private
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
write_private(Path(sys.argv[1]), b"new")
"""


def test_a_file_is_replaced_whole_and_is_ours_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "key"
    for data in (b"old", b"new"):
        write_private(path, data)
        assert path.read_bytes() == data
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [*path.parent.iterdir()] == [path]


def test_what_a_killed_writer_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_private(path, b"old")
    done = subprocess.run([sys.executable, "-c", KILLED_IN_THE_MIDDLE, path], check=False)
    assert done.returncode == -9
    (left,) = tmp_path.glob(".*")
    ours = tmp_path / f".key.{os.getpid()}"
    ours.touch()
    sweep(tmp_path)
    assert not left.exists()
    assert ours.exists()
    assert path.read_bytes() == b"old"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_private(tmp_path / "key", b"new")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_a_folder_of_ours_has_its_mode_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        private_folder(tmp_path / "a" / "b")
        passable_folder(tmp_path / "c" / "d")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"a": 0o700, "b": 0o700, "c": 0o700, "d": 0o711}


def test_a_folder_that_was_there_keeps_its_mode_unless_others_have_to_pass(tmp_path: Path) -> None:
    for name in ("kept", "opened"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o750)
    assert stat.S_IMODE(private_folder(tmp_path / "kept").stat().st_mode) == 0o750
    assert stat.S_IMODE(passable_folder(tmp_path / "opened").stat().st_mode) == 0o711
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        private_folder(tmp_path / "file")
