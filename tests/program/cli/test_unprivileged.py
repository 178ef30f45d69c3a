"""Everything works for a user who is not root, with the isolation that is left, and says which."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.places import GUESTS, need
from tests.harness.program import Mvmci, assert_sentence, fresh, steps

Guest = Callable[[str], Path]
NOBODY = 65534
NAMELESS = 54321  # has no line in /etc/passwd


def as_user(uid: int) -> tuple[str, ...]:
    return ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all")


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A directory that every user can enter."""
    directory = Path(tempfile.mkdtemp(prefix="mvmci-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def program_of(uid: int, zipapp: Path, public: Path) -> Mvmci:
    need(os.geteuid() == 0, "only root can become somebody else")
    need(shutil.which("setpriv"), "setpriv is not there")
    python = python_of(uid)
    need(python, "no Python that is new enough is within reach of another user")
    file = public / f"mvmci-{uid}.pyz"
    shutil.copy(zipapp, file)
    file.chmod(0o755)
    home = public / f"home-{uid}"
    home.mkdir(mode=0o700)
    os.chown(home, uid, uid)
    return Mvmci(file, home / "state", home, prefix=as_user(uid), python=python)


def python_of(uid: int) -> str:
    """A Python that this user can start, also from within: ours may lie in a home directory."""
    again = "os.execv(sys.executable, [sys.executable, '-c', 'print(1)'])"
    script = f"import os, sys; sys.version_info >= (3, 11) and {again}"
    for python in (sys.executable, "/usr/local/bin/python3", "/usr/bin/python3"):
        command = [*as_user(uid), python, "-c", script]
        if subprocess.run(command, capture_output=True, check=False).stdout == b"1\n":
            return python
    return ""


@pytest.fixture(scope="module")
def nobody(zipapp: Path, public: Path) -> Iterator[Mvmci]:
    """The program as another user, with a home of its own."""
    nobody = program_of(NOBODY, zipapp, public)
    for guest in GUESTS.glob("*.wasm"):
        shutil.copy(guest, public / guest.name)
        (public / guest.name).chmod(0o644)
    yield nobody
    nobody.assert_nothing_runs()
    nobody.assert_slots_are_clean()


def test_the_doctor_tells_the_level(nobody: Mvmci) -> None:
    done = nobody("doctor", "--json")
    (isolation,) = [check for check in done.json if check["name"] == "isolation"]
    assert "uid" not in isolation["found"].partition("(")[2]
    assert "rlimits" in isolation["found"]


def test_a_command_runs_with_everything(nobody: Mvmci, public: Path) -> None:
    job = fresh("nobody")
    done = nobody("run", public / "hello.wasm", "--id", job, "--stdin", "-", "--", "one", stdin=b"in\n")
    assert (done.code, done.text) == (0, "arg hello.wasm\narg one\nin\n")
    job = fresh("nobody")
    done = nobody("run", public / "files.wasm", "--id", job, "--artifact", "a")
    assert done.code == 0
    assert nobody("artifacts", job, "--local").text.split() == ["a/b/c.txt", "a/d.txt"]
    assert nobody.status(job)["status"] == "succeeded"


def test_keys_are_out_of_reach_of_programs_that_have_our_own_user(nobody: Mvmci, public: Path) -> None:
    granted = ("unshare", "--user", "--pid", "--mount", "--fork", "--mount-proc", "true")
    unshared = subprocess.run([*nobody.prefix, *granted], capture_output=True, check=False)
    need(unshared.returncode == 0, "this host grants a user no namespaces")
    key = nobody.state / "demo" / "keys" / "secret"
    key.parent.mkdir(parents=True)
    key.write_text("hidden-from-programs")
    for path in (key, key.parent, key.parents[1], nobody.state):
        os.chown(path, NOBODY, NOBODY)
    script = f"""
        cat {key} ../../../../demo/keys/secret
        for pid in /proc/[0-9]*; do
            cat $pid/root{key} $pid/environ | tr '\\0' '\\n' | grep -e MVMCI_STATE -e hidden
        done
        umount {nobody.state}; unshare --user --map-root-user --mount umount {nobody.state}; cat {key}
        echo kept >here; cat here
    """
    several = [{"exec": {"argv": ["sh", "-c", script]}}]
    done = nobody("run", public / "script.wasm", "--allow-exec", "sh", "--input", steps(*several))
    assert done.code == 0, done
    assert done.json[0]["stdout"] == "kept\n"
    told = nobody("doctor", "--json").json
    assert any("keys are out of reach of native programs" in check["found"] for check in told)


def test_the_thief_is_refused(nobody: Mvmci, public: Path) -> None:
    done = nobody("run", public / "thief.wasm", "--", nobody.state / "_host" / "code.key")
    assert (done.code, done.text.splitlines()[-1]) == (0, "nothing stolen")


@pytest.mark.parametrize(
    ("name", "options", "limit"),
    [
        ("loop", ["--timeout", "2s"], "timeout"),
        ("memory", ["--memory", "64MiB"], "memory"),
        ("output", ["--output-limit", "1MiB"], "output"),
        ("disk", ["--disk", "32MiB"], "workspace"),
        ("stack", [], "stack"),
    ],
)
def test_limits_hold(nobody: Mvmci, public: Path, name: str, options: list[str], limit: str) -> None:
    job = fresh("nobody")
    done = nobody("run", public / f"{name}.wasm", "--id", job, *options)
    assert done.code == (124 if limit == "timeout" else 1)
    assert nobody.status(job)["reason"].startswith(f"{limit}: ")


def test_a_workflow_survives_a_kill(nobody: Mvmci, public: Path) -> None:
    job = fresh("nobody")
    several = [
        {"exec": {"argv": ["sh", "-c", "echo made >file; echo one"]}},
        {"log": "asleep"},
        {"sleep": 500},
        {"exec": {"argv": ["sh", "-c", "cat file; sleep 61.75 &"]}},
    ]
    order = ["run", public / "script.wasm", "--id", job, "--allow-exec", "sh", "--input", steps(*several)]
    running = nobody.start(*order)
    running.hears("asleep\n", "err")
    running.kill()
    nobody.assert_nothing_runs()
    done = nobody(*order)
    assert done.code == 0
    assert [one["stdout"] for one in done.json if one] == ["one\n", "made\n"]
    assert nobody("replay", job, "--local").text == "identical\n"
    nobody.assert_nothing_runs()


def test_a_fork_bomb_ends_itself_alone(nobody: Mvmci, public: Path) -> None:
    neighbour = nobody.start("run", public / "sleeper.wasm", "--", "20")
    neighbour.hears("tick 1\n")
    job = fresh("nobody")
    bomb = "bomb() { [ $1 -gt 0 ] && { bomb $(($1 - 1)) & bomb $(($1 - 1)) & }; sleep 30.5; }; bomb 9"
    step = {"exec": {"argv": ["sh", "-c", bomb], "timeout_ms": 60_000}}
    script = public / "script.wasm"
    done = nobody("run", script, "--id", job, "--allow-exec", "sh", "--input", steps(step))
    assert done.code == 1
    assert nobody.status(job)["reason"].startswith("processes: ")
    neighbour.hears("tick ", after=len(neighbour.said()))
    neighbour.signal(signal.SIGINT)
    assert neighbour.end().code == 130


def test_what_cannot_be_read_is_refused(nobody: Mvmci, public: Path) -> None:
    place = public / "unreadable"
    place.mkdir()
    (place / "secret.txt").write_text("")
    (place / "secret.txt").chmod(0o600)
    done = nobody("run", public / "exit.wasm", "--dir", place)
    assert_sentence(done, 2, "secret.txt", "cannot be read")
    (place / "secret.txt").unlink()
    (place / "secrets").mkdir(mode=0o700)
    done = nobody("run", public / "exit.wasm", "--dir", place)
    assert_sentence(done, 2, "secrets", "a directory that cannot be read")
    (place / "tool.wasm").write_bytes(b"")
    (place / "tool.wasm").chmod(0o600)
    assert_sentence(nobody("run", place / "tool.wasm"), 2, "tool.wasm cannot be read: Permission denied")


def test_a_state_directory_that_cannot_be_written_to_is_one_sentence(nobody: Mvmci, public: Path) -> None:
    place = public / "readonly"
    place.mkdir(mode=0o755)
    for state in (place, place / "deep"):
        done = nobody("run", public / "exit.wasm", MVMCI_STATE=str(state))
        assert_sentence(done, 2, str(state), "Permission denied", "MVMCI_STATE")
        assert nobody("doctor", MVMCI_STATE=str(state)).code == 1
    assert not list(place.iterdir())


def test_a_store_that_cannot_be_written_to_is_one_sentence(nobody: Mvmci, public: Path) -> None:
    state = nobody.home / "other"
    assert nobody("run", public / "exit.wasm", "--id", "a", MVMCI_STATE=str(state)).code == 0
    (state / "_local" / "blobs").chmod(0o500)
    done = nobody("run", public / "hello.wasm", "--id", "b", MVMCI_STATE=str(state))
    assert_sentence(done, 6, "cannot be written: Permission denied")
    assert nobody("status", "a", "--local", MVMCI_STATE=str(state)).code == 0
    assert_sentence(nobody("status", "b", "--local", MVMCI_STATE=str(state)), 2, "there is no job b")


def test_a_user_without_a_name_can_run_jobs(zipapp: Path, public: Path, nobody: Mvmci) -> None:
    nameless = program_of(NAMELESS, zipapp, public)
    done = nameless("run", public / "hello.wasm", "--id", "a")
    assert (done.code, done.text) == (0, "arg hello.wasm\n")
    (spec, *_) = nameless("history", "a", "--local", "--json").json
    assert spec["by"].startswith(f"{NAMELESS}@")
