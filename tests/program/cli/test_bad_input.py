"""What is wrong with an order is said in one sentence, before anything is written."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import wasmtime

from tests.harness.places import need
from tests.harness.program import Mvmci, Outcome, assert_sentence

Guest = Callable[[str], Path]
FILES_TOO_MANY = 100_000


@pytest.fixture(scope="module")
def empty(mvmci: Mvmci, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mvmci]:
    """A state directory in which no job is ever made."""
    mvmci = Mvmci(mvmci.zipapp, tmp_path_factory.mktemp("bad") / "state", mvmci.home)
    yield mvmci
    assert mvmci.jobs() == []


def refused(mvmci: Mvmci, *args: str | Path, words: tuple[str, ...] = (), **env: str) -> Outcome:
    done = mvmci("run", *args, **env)
    assert_sentence(done, 2, *words)
    assert not (mvmci.state / "_local" / "jobs").exists()
    return done


# ---- Modules


def component(text: str) -> bytes:
    return bytes(wasmtime.wat2wasm(f"(component {text})"))


IMPORTS_FOO = '(module (import "env" "foo" (func)) (memory (export "memory") 1) (func (export "_start")))'
WASI_HTTP = """
    (import "wasi:http/outgoing-handler@0.2.0" (instance)) (instance $run)
    (export "wasi:cli/run@0.2.0" (instance $run))"""
MODULES = {
    "a text": (b"just a text, and no program\n", ("is not WebAssembly",)),
    "empty": (b"", ("is empty",)),
    "a native program": (b"\x7fELF" + bytes(60), ("is a native program",)),
    "wat": (b"(module)", ("is WebAssembly in its text form",)),
    "of its header only a part": (b"\0asm\1", ("is cut short",)),
    "of another version": (b"\0asm\2\0\0\0", ("unknown version",)),
    "importing env.foo": (bytes(wasmtime.wat2wasm(IMPORTS_FOO)), ("imports `env.foo`",)),
    "a library": (bytes(wasmtime.wat2wasm("(module)")), ("no function `_start`",)),
    "importing wasi:http": (component(WASI_HTTP), ("imports `wasi:http/outgoing-handler@0.2.0`",)),
    "of another world": (
        component('(instance $thing) (export "example:other/thing@1.0.0" (instance $thing))'),
        ("a world that is not run here", "example:other/thing@1.0.0"),
    ),
    "of another version of ours": (
        component('(import "mvmci:workflow/host@0.2.0" (instance))'),
        ("mvmci:workflow/host@0.2.0", "mvmci:workflow/host@0.1.0"),
    ),
}


@pytest.mark.parametrize("what", MODULES)
def test_a_module_that_cannot_run_is_named_with_its_reason(empty: Mvmci, tmp_path: Path, what: str) -> None:
    data, words = MODULES[what]
    (tmp_path / "tool.wasm").write_bytes(data)
    done = refused(empty, tmp_path / "tool.wasm", words=("tool.wasm", *words))
    assert "hint: " in done.err


@pytest.mark.parametrize("kept", [9, 300, 20_000])
def test_a_module_that_was_cut_short_is_refused(
    empty: Mvmci, guest: Guest, tmp_path: Path, kept: int
) -> None:
    (tmp_path / "tool.wasm").write_bytes(guest("hello").read_bytes()[:kept])
    refused(empty, tmp_path / "tool.wasm", words=("tool.wasm", "is not valid WebAssembly"))


def test_a_module_over_the_limit_is_refused(empty: Mvmci, tmp_path: Path) -> None:
    with open(tmp_path / "tool.wasm", "wb") as file:
        file.write(b"\0asm\1\0\0\0")
        file.truncate(257 << 20)
    refused(empty, tmp_path / "tool.wasm", words=("tool.wasm", "256 MiB"))


def test_a_missing_module_is_refused(empty: Mvmci, tmp_path: Path) -> None:
    refused(empty, tmp_path / "none.wasm", words=("none.wasm cannot be read: No such file",))


def test_a_directory_is_no_module(empty: Mvmci, tmp_path: Path) -> None:
    refused(empty, tmp_path, words=(f"{tmp_path} cannot be read: Is a directory",))


# ---- Options


@pytest.mark.parametrize("bad", ["", "-a", "../a", "a" * 64, "a\n"])
def test_a_malformed_id_is_refused(empty: Mvmci, guest: Guest, bad: str) -> None:
    refused(empty, guest("hello"), f"--id={bad}", words=("cannot be a job id",))


ORDERS = {
    "no JSON": ("script", ["--input", "{"], "--input is not JSON"),
    "a file that is missing": ("script", ["--input", "@none.json"], "none.json cannot be read"),
    "arguments for a workflow": ("script", ["--", "one"], "is a workflow and takes no arguments"),
    "input for a command": ("hello", ["--input", "1"], "is a command and takes no --input"),
    "a variable without =": ("hello", ["--env", "HOME"], "is not of the form K=V"),
    "a variable without a name": ("hello", ["--env", "=1"], "is not of the form K=V"),
    "stdin that is missing": ("hello", ["--stdin", "none.txt"], "none.txt cannot be read"),
    "stdin that is a directory": ("hello", ["--stdin", "/"], "/ cannot be read: Is a directory"),
    "an artifact outside": ("hello", ["--artifact", "../*"], "cannot be an artifact pattern"),
    "an absolute artifact": ("hello", ["--artifact", "/etc/*"], "cannot be an artifact pattern"),
    "no pattern": ("hello", ["--artifact", "a//b"], "cannot be an artifact pattern"),
    "an unknown option": ("hello", ["--timout", "1s"], "Did you mean"),
    "an unknown option before": ("hello", ["--frobnicate"], "--frobnicate"),
    "no duration": ("hello", ["--timeout", "never"], "`never` is not a duration"),
    "a negative duration": ("hello", ["--timeout", "-1s"], "is not a duration"),
    "no time at all": ("hello", ["--timeout", "0"], "out of bounds"),
    "too long a duration": ("hello", ["--timeout", "99999d"], "out of bounds"),
    "no size": ("hello", ["--memory", "1GB"], "`1GB` is not a size"),
    "too large a size": ("hello", ["--output-limit", "9999999GiB"], "out of bounds"),
    "no disk": ("hello", ["--disk", "0"], "out of bounds"),
    "no attempts": ("hello", ["--attempts", "0"], "0 is not in the range"),
    "no queue": ("hello", ["--queue", "A B"], "cannot be a queue"),
    "no URL": ("script", ["--allow-http", "example.com"], "allow: http: 'example.com'"),
    "a pattern of programs": ("script", ["--allow-exec", "git*"], "allow: exec: 'git*'"),
    "a directory that is missing": ("hello", ["--dir", "none"], "none: No such file"),
    "a directory that is a file": ("hello", ["--dir", "/etc/passwd"], "/etc/passwd: Not a directory"),
}


@pytest.mark.parametrize("what", ORDERS)
def test_a_wrong_order_is_refused(empty: Mvmci, guest: Guest, what: str) -> None:
    module, options, words = ORDERS[what]
    refused(empty, guest(module), *options, words=(words,))


def test_an_input_file_that_is_not_json_is_named(empty: Mvmci, script: Path, tmp_path: Path) -> None:
    (tmp_path / "build.json").write_bytes(b'{"a": \xff}')
    refused(empty, script, "--input", f"@{tmp_path}/build.json", words=("build.json is not JSON",))


def test_an_input_that_is_nested_without_end_is_refused(empty: Mvmci, script: Path, tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    refused(empty, script, "--input", f"@{tmp_path}/deep.json", words=("deep.json is not JSON",))


def test_a_wrong_variable_is_named_with_its_option(empty: Mvmci, guest: Guest) -> None:
    refused(empty, guest("hello"), words=("--timeout", "MVMCI_TIMEOUT"), MVMCI_TIMEOUT="soon")


def test_an_unknown_verb_gets_the_one_that_was_meant(empty: Mvmci) -> None:
    assert_sentence(empty("stauts", "a"), 2, "Did you mean 'status'?")


@pytest.mark.parametrize("verb", ["run", "status", "validate"])
def test_a_verb_without_its_argument_says_which(empty: Mvmci, verb: str) -> None:
    assert_sentence(empty(verb), 2, "Missing argument")


# ---- Workspaces


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    path = tmp_path / "workspace"
    path.mkdir()
    (path / "fine.txt").write_text("fine")
    return path


@pytest.mark.parametrize("target", ["..", "/etc/passwd", "sub/../../outside"])
def test_a_link_that_leaves_the_workspace_is_refused(
    empty: Mvmci, guest: Guest, workspace: Path, target: str
) -> None:
    (workspace / "sub").mkdir()
    (workspace / "sub" / "way-out").symlink_to(target if target[0] == "/" else f"../{target}")
    words = ("sub/way-out", "a link that leaves the directory")
    refused(empty, guest("hello"), "--dir", workspace, words=words)


def test_a_device_in_the_workspace_is_refused(empty: Mvmci, guest: Guest, workspace: Path) -> None:
    need(os.geteuid() == 0, "only root can make a device file")
    os.mknod(workspace / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    refused(empty, guest("hello"), "--dir", workspace, words=("null", "a device file"))


def test_a_pipe_in_the_workspace_is_refused(empty: Mvmci, guest: Guest, workspace: Path) -> None:
    os.mkfifo(workspace / "pipe")
    refused(empty, guest("hello"), "--dir", workspace, words=("pipe", "a named pipe"))


def test_a_name_that_is_not_utf_8_is_refused_and_shown(empty: Mvmci, guest: Guest, workspace: Path) -> None:
    (Path(os.fsdecode(os.fsencode(workspace) + b"/caf\xe9"))).write_text("")
    refused(empty, guest("hello"), "--dir", workspace, words=("caf", "its name is not UTF-8"))


def test_too_many_files_are_counted_and_refused(empty: Mvmci, guest: Guest) -> None:
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None  # a disk takes a minute to make so many
    with tempfile.TemporaryDirectory(dir=place) as name:
        for number in range(FILES_TOO_MANY // 1000):
            (Path(name) / str(number)).mkdir()
            for file in range(1000):
                os.mknod(f"{name}/{number}/{file}")
        refused(empty, guest("hello"), "--dir", name, words=("100100 entries", "50000", ".mvmciignore"))


def test_too_many_bytes_are_counted_and_refused(empty: Mvmci, guest: Guest, workspace: Path) -> None:
    with open(workspace / "large", "wb") as file:
        file.truncate(5 << 30)
    refused(empty, guest("hello"), "--dir", workspace, words=("bytes, and the workspace has 4GiB",))


# ---- What is in a directory


def test_the_state_directory_is_left_out_of_a_directory_and_that_is_said(
    mvmci: Mvmci, tmp_path: Path, guest: Guest
) -> None:
    (tmp_path / "file").write_text("x")
    args = ("--state", tmp_path / ".state")
    options = ("--id", "j", "--dir", tmp_path, "--artifact", "**")
    assert mvmci("run", guest("hello"), *args, *options).code == 0
    done = mvmci("run", guest("hello"), *args, *options[:1], "again", *options[2:])
    assert "left out of" in done.err
    assert ".state (the state directory)" in done.err
    assert mvmci("artifacts", "again", "--local", *args).out.split() == [b"file"]
    assert_sentence(mvmci("run", guest("hello"), *args, "--dir", tmp_path / ".state"), 2, "state directory")


def test_artifacts_are_written_as_executable_as_they_were_and_a_tmp_of_ones_own_is_seen(
    mvmci: Mvmci, tmp_path: Path, guest: Guest
) -> None:
    source = tmp_path / "source"
    (source / "tmp").mkdir(parents=True)
    for name, mode in (("tool", 0o755), ("text", 0o644), ("tmp/own", 0o644)):
        (source / name).write_text(name)
        (source / name).chmod(mode)
    args = ("--id", "kept", "--dir", source, "--artifact", "**")
    assert mvmci("run", guest("files"), *args, "--", "tmp/new").code == 0
    assert mvmci("artifacts", "kept", "--local", "--output", tmp_path / "out").code == 0
    modes = {
        str(path.relative_to(tmp_path / "out")): path.stat().st_mode & 0o777
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert modes == {"tool": 0o755, "text": 0o644, "tmp/own": 0o644, "tmp/new": 0o644}
