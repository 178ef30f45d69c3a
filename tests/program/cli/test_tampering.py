"""What was changed on disk is noticed: said in a sentence, compiled anew, never believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.program import Mvmci, assert_sentence, fresh, steps

Guest = Callable[[str], Path]


def flip(path: Path, at: int) -> None:
    """Change one byte of a file, in place, as a bad disk or a person would."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.write(data)


# ---- Journals


@pytest.mark.parametrize("part", [0.1, 0.99])
def test_a_changed_journal_is_errored_and_nothing_goes_on_from_it(
    mvmci: Mvmci, script: Path, part: float
) -> None:
    job = fresh("changed")
    order = ["run", script, "--id", job, "--input", steps({"sleep": 1}, {"random": None})]
    assert mvmci(*order).code == 0
    journal = mvmci.journal(job)
    size = journal.stat().st_size
    flip(journal, int(size * part))
    before = journal.read_bytes()
    status = mvmci.status(job)
    assert status["status"] == "errored"
    assert status["reason"].startswith("journal corrupt: message ")
    assert status["id"] == job
    done = mvmci(*order)
    assert done.code == 125
    assert f"{job} errored: journal corrupt: message " in done.err
    assert "Traceback" not in done.err
    assert journal.read_bytes() == before
    history = mvmci("history", job, "--local")
    assert (history.code, "the rest of the journal is corrupt" in history.err) == (0, True)
    assert job in mvmci.jobs()
    assert mvmci("logs", job, "--local").code == 0
    assert_sentence(mvmci("replay", job, "--local"), 2, f"{job} cannot be replayed")


def test_a_line_that_was_taken_out_is_noticed(mvmci: Mvmci, script: Path) -> None:
    job = fresh("short")
    assert mvmci("run", script, "--id", job, "--input", steps({"sleep": 50}, {"sleep": 50})).code == 0
    lines = mvmci.journal(job).read_bytes().splitlines(keepends=True)
    assert len(lines) > 3
    mvmci.journal(job).write_bytes(b"".join([lines[0], *lines[2:]]))
    assert mvmci.status(job)["reason"].startswith("journal corrupt: message 2 ")


def test_a_journal_of_another_job_is_noticed(mvmci: Mvmci, guest: Guest) -> None:
    one, other = fresh("one"), fresh("other")
    for job in (one, other):
        assert mvmci("run", guest("exit"), "--id", job).code == 0
    mvmci.journal(one).write_bytes(mvmci.journal(other).read_bytes())
    assert mvmci.status(one)["reason"].startswith("journal corrupt: message 1 ")


def test_a_last_line_that_was_never_finished_is_not_there(mvmci: Mvmci, guest: Guest) -> None:
    job = fresh("torn")
    assert mvmci("run", guest("exit"), "--id", job).code == 0
    journal = mvmci.journal(job)
    first, *_ = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first + b'{"prev":"')
    assert mvmci.status(job)["status"] == "queued"
    assert mvmci("run", guest("exit"), "--id", job).code == 0
    assert mvmci.status(job)["status"] == "succeeded"


# ---- Compiled code


@pytest.mark.parametrize("suffix", ["cwasm", "mac"])
def test_changed_code_is_compiled_anew_and_never_run(alone: Mvmci, guest: Guest, suffix: str) -> None:
    order = ["run", guest("hello")]
    assert alone(*order).code == 0
    assert "compiling" not in alone(*order).err
    for path in (alone.state / "_host" / "code").glob(f"*.{suffix}"):
        flip(path, path.stat().st_size // 2)
    changed = alone(*order)
    assert (changed.code, changed.text) == (0, "arg hello.wasm\n")
    assert "compiling hello.wasm" in changed.err
    assert "compiling" not in alone(*order).err


def test_code_without_its_key_is_compiled_anew(alone: Mvmci, guest: Guest) -> None:
    order = ["run", guest("exit")]
    assert alone(*order).code == 0
    (alone.state / "_host" / "code.key").unlink()
    assert "compiling" in alone(*order).err


def test_a_key_that_others_can_read_is_refused(mvmci: Mvmci, alone: Mvmci, guest: Guest) -> None:
    order = ["run", guest("exit")]
    assert alone(*order).code == 0
    (alone.state / "_host" / "code.key").chmod(0o644)
    done = alone(*order)
    assert done.code == 125
    assert "is not a key of ours alone" in done.err
    assert "hint: " in done.err


# ---- Blobs


def test_a_changed_workspace_is_errored(mvmci: Mvmci, alone: Mvmci, guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "file").write_text("these are the bytes of the file")
    order = ["run", guest("exit"), "--id", "first", "--dir", tmp_path / "dir"]
    assert alone(*order).code == 0
    for path in (alone.state / "_local" / "blobs").glob("*/*"):
        if path.read_bytes() == b"these are the bytes of the file":
            flip(path, 3)
    done = alone("run", guest("exit"), "--id", "second", "--dir", tmp_path / "dir")
    if done.code:  # noticed when it was laid out; it is made good by the next one
        assert (done.code, "was damaged on disk" in done.err) == (125, True)
        assert alone.status("second")["status"] == "errored"
        done = alone("run", guest("exit"), "--id", "third", "--dir", tmp_path / "dir")
    assert done.code == 0


def test_a_changed_artifact_is_not_handed_out(mvmci: Mvmci, guest: Guest, tmp_path: Path) -> None:
    job = fresh("artifact")
    assert mvmci("run", guest("files"), "--id", job, "--artifact", "top.txt", "--", "top.txt").code == 0
    (artifact,) = mvmci("artifacts", job, "--local", "--json").json
    flip(mvmci.blob(artifact["digest"]), 1)
    done = mvmci("artifacts", job, "--local", "--output", tmp_path / "out")
    assert_sentence(done, 2, "top.txt: blob sha256:", "was damaged on disk")
    assert not list((tmp_path / "out").iterdir())


def test_a_damaged_result_does_not_hide_the_other_jobs(alone: Mvmci, guest: Guest) -> None:
    big = steps(*[{"now": None}] * 8_000)
    (alone.home / "big.json").write_text(big)
    order = ["run", guest("script"), "--id", "big", "--input", f"@{alone.home}/big.json"]
    assert alone(*order).code == 0
    assert alone("run", guest("exit"), "--id", "other").code == 0
    done = json.loads(alone.journal("big").read_bytes().splitlines()[-1])
    flip(alone.blob(done["records"][-1]["result"]["blob"]), 5)
    assert_sentence(alone("status", "big", "--local"), 2, "was damaged on disk")
    assert alone.jobs() == ["other", "big"]


# ---- The state directory


def test_a_state_directory_of_another_version_is_refused(alone: Mvmci, guest: Guest) -> None:
    assert alone("run", guest("exit"), "--id", "a").code == 0
    version = alone.state / "_local" / "version"
    version.write_text("2\n")
    for args in (["list", "--local"], ["status", "a", "--local"], ["run", guest("exit")]):
        assert_sentence(alone(*args), 2, "is of version '2', not 1", "MVMCI_STATE")
    assert version.read_text() == "2\n"


def test_a_state_directory_that_is_a_file_is_refused(alone: Mvmci, guest: Guest) -> None:
    alone.state.write_text("")
    assert_sentence(alone("run", guest("exit")), 2, str(alone.state))
    assert_sentence(alone("list", "--local"), 2, str(alone.state))


def test_a_state_directory_beneath_a_file_is_refused(alone: Mvmci, guest: Guest) -> None:
    alone.state.write_text("")
    deep = str(alone.state / "deep")
    assert_sentence(alone("run", guest("exit"), MVMCI_STATE=deep), 2, "Not a directory")


def test_a_state_directory_is_ours_alone(alone: Mvmci, guest: Guest) -> None:
    assert alone("run", guest("exit"), "--id", "a").code == 0
    private = [path for path in (alone.state / "_local").rglob("*") if path.parent.name != "_local"]
    assert private
    for path in (alone.state, alone.state / "_local"):
        assert path.stat().st_mode & 0o077 == 0
    assert (alone.state / "_host" / "code.key").stat().st_mode & 0o077 == 0


def test_two_state_directories_know_nothing_of_each_other(alone: Mvmci, mvmci: Mvmci, guest: Guest) -> None:
    job = fresh("elsewhere")
    assert mvmci("run", guest("exit"), "--id", job).code == 0
    assert_sentence(alone("status", job, "--local"), 2, f"there is no job {job}")
    assert alone("status", job, "--local", "--state", str(mvmci.state)).code == 0
    assert not alone.state.exists(), "looking makes nothing"
