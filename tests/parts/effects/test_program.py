"""A native program and all that it starts end together, in each way that a tree is held."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.parts.effects.processes import UID, Supervised, alive, wait_until_dead

Start = Callable[..., Supervised]

WAYS = {
    "root": {},
    "root, own uid": {"uid": UID},
    "root, no namespace": {"namespaces": False},
    "root, own uid, no namespace": {"uid": UID, "namespaces": False},
    "user namespace": {"user": UID},
    "user, no namespace": {"user": UID, "namespaces": False},
}


@pytest.fixture
def marker() -> str:
    return f"marker-{uuid.uuid4()}"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a program in a directory of its own; kills it at the end."""
    started: list[Supervised] = []
    directory = tmp_path / "workspace"
    directory.mkdir()

    def one(*argv: str, **how: Any) -> Supervised:
        owner = how.get("uid") or how.get("user")
        if owner:
            os.chown(directory, owner, owner)
        if how.get("user"):
            # An unprivileged supervisor must be able to enter by itself.
            for path in [tmp_path, *tmp_path.parents]:
                if path.stat().st_uid == os.geteuid() and path.stat().st_mode & 0o005 != 0o005:
                    path.chmod(0o755)
        started.append(Supervised(directory, *argv, **how))
        return started[-1]

    yield one
    for each in started:
        each.close()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> dict[str, Any]:
    if os.geteuid() == 0:
        return dict(WAYS[request.param])
    if os.environ.get("CI") == "true":
        pytest.fail("this test needs root")
    if "root" in request.param:
        pytest.skip("needs root")
    return {name: value for name, value in WAYS[request.param].items() if name != "user"}


def test_a_program_gets_its_arguments_environment_streams_and_directory(
    start: Start, way: dict[str, Any], tmp_path: Path
) -> None:
    script = 'read line; echo "$line $1 $A $LANG $PWD $HOME $(id -u)"; echo bad >&2; touch here; exit 7'
    program = start("sh", "-c", script, "sh", "two words", env=(("A", "b c"),), **way)
    ended, out, err = program.end(b"hello\n")
    assert (ended.outcome, ended.code) == ("exit", 7)
    here = tmp_path / "workspace"
    uid = way.get("uid") or way.get("user") or os.geteuid()
    assert out.decode() == f"hello two words b c C.UTF-8 {here} {here} {uid}\n"
    assert err == b"bad\n"
    assert (here / "here").stat().st_uid == uid


def test_a_program_has_no_other_descriptor_and_no_other_environment(
    start: Start, way: dict[str, Any]
) -> None:
    ended, out, err = start("sh", "-c", "ls /proc/self/fd; env", env=(("A", ""),), **way).end()
    lines = out.decode().split()
    assert lines[:4] == ["0", "1", "2", "3"], (ended, err)  # 3 is the directory that `ls` reads
    names = {line.partition("=")[0] for line in lines[4:]}
    assert names - {"PWD", "OLDPWD", "SHLVL", "_"} == {"A", "HOME", "LANG", "PATH", "TMPDIR"}


def test_a_program_that_dies_of_a_signal_says_which(start: Start, way: dict[str, Any]) -> None:
    ended, _, _ = start("sh", "-c", "kill -SEGV $$", **way).end()
    assert (ended.outcome, ended.code) == ("signal", signal.SIGSEGV)


@pytest.mark.parametrize(
    "argv", [("no-such-program",), ("/etc",), ("/etc/passwd",), ("sh\0",), ("./nothing",)]
)
def test_what_cannot_be_started_is_invalid_and_says_why(start: Start, argv: tuple[str, ...]) -> None:
    ended, _, _ = start(*argv).end()
    assert ended.outcome == "invalid"
    assert argv[0].strip("\0") in ended.text


def test_a_daemon_is_dead_before_the_end_is_reported(start: Start, way: dict[str, Any], marker: str) -> None:
    daemon = f"trap '' TERM HUP; echo up; exec >/dev/null 2>&1; sleep 1000; : {marker}"
    script = '(setsid sh -c "$1" </dev/null &); read go; exit 3'
    program = start("sh", "-c", script, "sh", daemon, **way)
    assert program.process.stdout is not None
    assert program.process.stdin is not None
    assert program.process.stdout.readline() == b"up\n"
    assert alive(marker)
    program.process.stdin.write(b"go\n")
    program.process.stdin.flush()
    assert program.answer().code == 3
    assert alive(marker) == []


def test_everything_dies_with_a_supervisor_that_is_killed(
    start: Start, way: dict[str, Any], marker: str
) -> None:
    daemon = f"trap '' TERM HUP; echo up; sleep 1000; : {marker}"
    script = f"trap '' TERM HUP; setsid sh -c \"{daemon}\" & wait; : {marker}"
    program = start("sh", "-c", script, **way)
    assert program.process.stdout is not None
    assert program.process.stdout.readline() == b"up\n"
    assert len(alive(marker)) >= 2
    program.process.kill()
    assert wait_until_dead(marker) == []


def test_everything_dies_when_nobody_reads_its_output_any_more(
    start: Start, way: dict[str, Any], marker: str
) -> None:
    script = f"trap '' TERM HUP PIPE; exec >/dev/null 2>&1; sleep 1000 & wait; : {marker}"
    program = start("sh", "-c", script, **way)
    assert program.process.stdout is not None
    program.process.stdout.close()
    ended = program.answer()
    assert (ended.outcome, ended.code) == ("signal", signal.SIGKILL)
    assert alive(marker) == []


def test_a_tree_that_is_told_to_end_may_put_down_what_it_has_in_hand(
    start: Start, way: dict[str, Any], marker: str
) -> None:
    """All of it is told: a shell dies of the signal and passes nothing on to what it started."""
    inner = f"trap 'sleep 0.3; echo unlocked; exit 0' TERM; echo up; while :; do sleep 0.1; done; : {marker}"
    program = start("sh", "-c", 'sh -c "$1"; true', "sh", inner, **way)
    assert program.process.stdout is not None
    assert program.process.stdout.readline() == b"up\n"
    program.process.terminate()
    ended, out, _ = program.end()
    assert out == b"unlocked\n"
    assert (ended.outcome, ended.code) == ("signal", signal.SIGTERM)
    assert alive(marker) == []


def test_a_fork_bomb_ends_at_the_limit(start: Start, way: dict[str, Any], marker: str) -> None:
    # What met the kernel's limit gives up by itself, and may have done so before we look: sleepers stay.
    bomb = f"bomb() {{ sleep 1000 & bomb & bomb; }}; bomb & exec sleep 1000; : {marker}"
    if not way.get("uid") and not way.get("user"):
        # Root without a uid of its own has no backstop in the kernel: there it must be a slow one.
        bomb = f"while :; do sleep 1000 & sleep 0.01; done; : {marker}"
    ended, _, _ = start("sh", "-c", bomb, **way).end()
    assert (ended.outcome, ended.limit) == ("limit", "processes"), ended
    assert alive(marker) == []


def test_a_program_may_have_as_many_processes_as_the_limit(start: Start, way: dict[str, Any]) -> None:
    script = "for n in 1 2 3 4 5 6; do sleep 0.3 & done; wait"
    ended, _, _ = start("sh", "-c", script, processes_max=8, **way).end()
    assert (ended.outcome, ended.code) == ("exit", 0), ended


def test_a_file_over_its_limit_ends_the_program(start: Start, way: dict[str, Any]) -> None:
    ended, _, _ = start("sh", "-c", "exec head -c 2000000 /dev/zero > big", file_bytes=1 << 20, **way).end()
    assert (ended.outcome, ended.code) == ("signal", signal.SIGXFSZ)


@pytest.mark.usefixtures("root")
def test_a_program_with_its_own_uid_reaches_its_workspace_below_a_closed_directory(
    start: Start, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    tmp_path.chmod(0o700)
    script = 'cd "$HOME" && touch there && ls "$HOME/.." && cat "$HOME/../secret"'
    ended, out, err = start("sh", "-c", script, uid=UID).end()
    assert (out, ended.code) == (b"workspace\n", 1), err
    assert (tmp_path / "workspace" / "there").exists()
    assert secret.read_text() == "secret"


@pytest.mark.usefixtures("root")
def test_a_program_in_a_namespace_sees_and_signals_nobody_else(start: Start) -> None:
    script = "kill -9 -1; ls -d /proc/[0-9]* | wc -l; kill -9 1; kill -0 $(( $$ + 1000 )) || echo alone"
    ended, out, _ = start("bash", "-c", script, uid=UID).end()
    assert ended.outcome == "exit"
    assert int(out.split()[0]) <= 5
    assert out.split()[1] == b"alone"
