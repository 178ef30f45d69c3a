"""The zipapp as a file: where it runs, and that its cache is whole and ours alone."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import mvmci
from tests.harness.places import need

SIZE_BYTES_MAX = 40_000_000
RUN_S_MAX = 60
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


@pytest.fixture(scope="module")
def unpacked(zipapp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root in which the zipapp has run once. Copy it, do not change it."""
    root = tmp_path_factory.mktemp("unpacked") / "root"
    assert run(zipapp, root).returncode == 0
    return root


@pytest.fixture
def root(unpacked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unpacked, tmp_path / "root"))


def run(
    zipapp: Path, root: Path | None, *, python: str = sys.executable, **more: str
) -> subprocess.CompletedProcess[str]:
    """`version`, with nothing of our environment but what is named."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nowhere", **more}
    if root is not None:
        environment["SHIV_ROOT"] = str(root)
    command = [python, str(zipapp), "version"]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=RUN_S_MAX, check=False
    )


def site_packages(root: Path) -> Path:
    (found,) = root.glob("mvmci.pyz_*/site-packages")
    return found


def assert_one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    error, hint, *rest = done.stderr.splitlines()
    assert error.startswith("Error: ")
    assert hint.startswith("hint: ")
    assert not rest
    assert not done.stdout
    for word in words:
        assert word in error


def interpreters(version: str) -> Iterator[str]:
    """Where a Python of `version` may be: on PATH, or among those of pyenv."""
    yield f"python{version}"
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    yield from (str(path) for path in versions.glob(f"{version}.*/bin/python3"))


def find_python(version: str) -> str:
    for python in interpreters(version):
        try:
            question = "import sys; print('.'.join(map(str, sys.version_info[:2])))"
            done = subprocess.run([python, "-c", question], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        if done.stdout.strip() == version:
            return python
    pytest.skip(f"no Python {version} on this machine")


@pytest.mark.parametrize("version", PYTHONS)
def test_it_runs_on_every_supported_python(zipapp: Path, tmp_path: Path, version: str) -> None:
    done = run(zipapp, tmp_path / "root", python=find_python(version))
    assert (done.returncode, done.stderr) == (0, "")
    assert mvmci.__version__ in done.stdout


@pytest.mark.parametrize("version", PYTHONS)
def test_its_compiled_modules_load_on_every_supported_python(zipapp: Path, root: Path, version: str) -> None:
    modules = "aiohttp._http_parser, msgspec._core, multidict._multidict, wasmtime, yaml._yaml"
    code = f"import sys; sys.path.insert(0, sys.argv[1]); import {modules}"
    command = [find_python(version), "-I", "-c", code, str(site_packages(root))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S_MAX, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("version", ["3.8", "3.10"])
def test_another_python_gets_a_sentence(zipapp: Path, root: Path, version: str) -> None:
    done = run(zipapp, root, python=find_python(version))
    assert done.returncode == 8
    assert_one_sentence(done, "CPython 3.11 to 3.14", version)


def test_it_runs_isolated(zipapp: Path, root: Path) -> None:
    command = [sys.executable, "-I", "-S", str(zipapp), "version"]
    environment = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(root)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=RUN_S_MAX, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_small_and_starts_by_itself(zipapp: Path, root: Path) -> None:
    assert zipapp.stat().st_size <= SIZE_BYTES_MAX
    assert zipapp.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert os.access(zipapp, os.X_OK)


def test_the_broker_inside_is_the_one_that_was_meant(root: Path) -> None:
    done = subprocess.run(
        [site_packages(root) / "bin" / "nats-server", "--version"], capture_output=True, check=True
    )
    assert done.stdout.split() == [b"nats-server:", b"v2.15.1"]


def test_pythonpath_does_not_shadow_what_is_inside(zipapp: Path, root: Path, tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    planted.mkdir()
    for name in ("click", "msgspec", "mvmci"):
        (planted / f"{name}.py").write_text("raise SystemExit('planted code ran')")
    for path in (str(planted), os.path.relpath(planted)):
        done = run(zipapp, root, PYTHONPATH=path)
        assert (done.returncode, done.stderr) == (0, "")


def test_its_cache_is_ours_alone_by_default(zipapp: Path, tmp_path: Path) -> None:
    done = run(zipapp, None, HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    cache = tmp_path / ".cache" / "mvmci"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert site_packages(cache).is_dir()


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o720])
def test_a_cache_that_others_can_write_to_is_refused(zipapp: Path, root: Path, mode: int) -> None:
    root.chmod(mode)
    assert_one_sentence(run(zipapp, root), str(root), "can be written to by others")


def test_a_cache_that_others_can_replace_is_refused(zipapp: Path, root: Path) -> None:
    root.parent.chmod(0o777)
    assert_one_sentence(run(zipapp, root), str(root.parent), "could replace")


def test_a_cache_of_another_user_is_refused(zipapp: Path, root: Path) -> None:
    need(os.geteuid() == 0, "only root can give a directory away")
    os.chown(root, 65533, 65533)
    assert_one_sentence(run(zipapp, root), str(root), "belongs to another user")


def test_a_cache_on_a_noexec_disk_is_refused(zipapp: Path, tmp_path: Path) -> None:
    need(os.geteuid() == 0, "only root can mount")
    script = (
        f'mount -t tmpfs -o noexec,mode=0700 none "{tmp_path}" && exec "{sys.executable}" "{zipapp}" version'
    )
    environment = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(tmp_path)}
    command = ["unshare", "--mount", "sh", "-c", script]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=RUN_S_MAX, check=False
    )
    assert_one_sentence(done, f"{tmp_path}, where mvmci unpacks itself, is on a disk mounted noexec")


def test_compiled_modules_are_kept_whatever_the_environment_says(zipapp: Path, tmp_path: Path) -> None:
    """Many an image sets that, and each command would compile all that it imports anew."""
    root = tmp_path / "root"
    assert run(zipapp, root, PYTHONDONTWRITEBYTECODE="1").returncode == 0
    assert list((site_packages(root) / "mvmci").rglob("*.pyc"))


def test_a_compiled_module_that_was_cut_short_by_a_power_cut_is_made_anew(zipapp: Path, root: Path) -> None:
    compiled = list((site_packages(root) / "mvmci").rglob("*.pyc"))
    assert compiled
    for path in compiled:
        path.write_bytes(b"")
    done = run(zipapp, root)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(path.stat().st_size for path in compiled)


def test_a_cache_that_cannot_be_made_is_one_sentence(zipapp: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run(zipapp, tmp_path / "file" / "root")
    assert done.returncode == 125
    assert_one_sentence(done, str(tmp_path / "file" / "root"))


def test_a_half_deleted_cache_is_mended(zipapp: Path, root: Path) -> None:
    inside = site_packages(root)
    before = {path for path in inside.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    shutil.rmtree(inside / "click")
    (inside / "msgspec" / "__init__.py").write_text("")
    (inside / "bin" / "nats-server").unlink()
    done = run(zipapp, root)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path for path in inside.rglob("*") if path.is_file() and path.suffix != ".pyc"} == before
    assert os.access(inside / "bin" / "nats-server", os.X_OK)


def test_a_kill_while_unpacking_does_no_harm(zipapp: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    environment = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(root)}
    with subprocess.Popen(
        [sys.executable, str(zipapp), "version"], env=environment, stdout=subprocess.PIPE
    ) as first:
        while first.poll() is None and not list(root.glob("*.tmp/site-packages/*")):
            time.sleep(0.001)
        first.kill()
    done = run(zipapp, root)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_first_start_waits_for_another_and_says_so(zipapp: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    environment = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(root)}
    command = [sys.executable, str(zipapp), "version"]
    with (root / ".mvmci_lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        start = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert start.stderr is not None
        assert start.stderr.readline() == b"mvmci: waiting for another process that is unpacking it\n"
        assert not list(root.glob("mvmci.pyz_*"))
    out, _ = start.communicate(timeout=RUN_S_MAX)
    assert start.returncode == 0
    assert mvmci.__version__.encode() in out


def test_ctrl_c_before_the_command_line_is_there_ends_it_without_a_traceback(
    zipapp: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    with open(root / ".mvmci_lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ["env", "--default-signal=INT", sys.executable, str(zipapp), "version"]
        environment = {"PATH": os.environ["PATH"], "HOME": "/nowhere", "SHIV_ROOT": str(root)}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as waiting:
            assert waiting.stderr is not None
            assert "waiting for another process" in waiting.stderr.readline()
            waiting.send_signal(signal.SIGINT)
            assert waiting.stderr.read() == ""
        assert waiting.returncode == 130
