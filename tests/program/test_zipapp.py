"""The zipapp as a file: where it runs, and that its cache is whole and ours alone."""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import mvmci
from tests.harness.places import ROOT, guest_path, need
from tests.harness.pythons import find_python
from tests.harness.waiting import LONG_S, until

SIZE_BYTES_MAX = 40_000_000
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
    zipapp: Path,
    root: Path | None,
    *args: str | Path,
    start: Sequence[str] = (sys.executable,),
    cwd: Path | None = None,
    user: int | None = None,
    **more: str,
) -> subprocess.CompletedProcess[str]:
    """A verb, `version` if none is named, with nothing of our environment but what is named."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nowhere", **more}
    if root is not None:
        environment["SHIV_ROOT"] = str(root)
    return subprocess.run(
        [*start, zipapp, *(args or ["version"])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
        cwd=cwd,
        user=user,
        group=user,
    )


def site_packages(root: Path) -> Path:
    (found,) = root.glob("mvmci_*/site-packages")
    return found


def assert_one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    error, hint, *rest = done.stderr.splitlines()
    assert error.startswith("Error: ")
    assert hint.startswith("hint: ")
    assert not rest
    assert not done.stdout
    for word in words:
        assert word in error


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that others can reach: pytest's own are ours alone."""
    with tempfile.TemporaryDirectory(prefix="mvmci-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder to be PATH, with what a prologue for the shell may need and no Python."""
    folder = tmp_path / "path"
    folder.mkdir()
    for name in ("sh", "env"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


def link(path: Path, **pythons: str) -> None:
    """Let `path` have the Pythons of these versions under these names."""
    for name, version in pythons.items():
        (python,) = find_python(version)
        real = subprocess.run(
            [python, "-Ic", "import sys; print(sys.executable)"], capture_output=True, check=True
        )
        (path / name).symlink_to(os.path.realpath(real.stdout.decode().strip()))


@pytest.mark.parametrize("version", PYTHONS)
def test_it_runs_jobs_on_every_supported_python(zipapp: Path, tmp_path: Path, version: str) -> None:
    start, state = find_python(version), tmp_path / "state"
    done = run(zipapp, tmp_path / "root", start=start)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"mvmci {mvmci.__version__} (Python {version}.")
    done = run(zipapp, tmp_path / "root", "run", guest_path("hello"), start=start, MVMCI_STATE=str(state))
    assert (done.returncode, done.stdout) == (0, "arg hello.wasm\n"), done.stderr


@pytest.mark.parametrize("version", PYTHONS)
def test_its_compiled_modules_load_on_every_supported_python_which_gets_those_of_no_other(
    zipapp: Path, tmp_path: Path, version: str
) -> None:
    assert run(zipapp, tmp_path / "root", start=find_python(version)).returncode == 0
    inside = site_packages(tmp_path / "root")
    tags = {path.name.split("-")[1] for path in inside.rglob("*.cpython-*.so")}
    assert tags == {version.replace(".", "")}
    modules = "aiohttp._http_parser, msgspec._core, multidict._multidict, wasmtime, yaml._yaml"
    code = f"import sys; sys.path.insert(0, sys.argv[1]); import {modules}"
    command = [*find_python(version), "-I", "-c", code, str(inside)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("version", ["3.6", "3.8", "3.10"])
def test_where_no_python_fits_a_sentence_says_what_was_looked_for(
    zipapp: Path, unpacked: Path, path: Path, version: str
) -> None:
    done = run(zipapp, unpacked, start=find_python(version), PATH=str(path))
    assert done.returncode == 8
    assert_one_sentence(done, "CPython 3.11 to 3.14", f"({version})", "python3.14, python3.13, python3.12")


def test_where_there_is_no_python_a_sentence_says_what_was_looked_for(
    zipapp: Path, unpacked: Path, path: Path
) -> None:
    done = run(zipapp, unpacked, start=(), PATH=str(path))
    assert done.returncode == 8
    assert_one_sentence(done, "CPython 3.11 to 3.14", "none of python3 python3.14 python3.13")


@pytest.mark.parametrize("how", ["by itself", "by an old one"])
def test_an_old_python_gives_way_to_the_newest_that_fits(
    zipapp: Path, unpacked: Path, path: Path, tmp_path: Path, how: str
) -> None:
    link(path, python3="3.8")
    link(path, **{"python3.11": "3.11", "python3.12": "3.12", "python3.13": "3.10"})
    shim = path / "python3.14"
    shim.write_text("#!/bin/sh\nexit 127\n")  # as pyenv's of a version that is not chosen
    shim.chmod(0o755)
    start = () if how == "by itself" else (str(path / "python3"), "-u")
    done = run(zipapp, unpacked, start=start, PATH=f"{path}:relative")
    assert (done.returncode, done.stderr) == (0, "")
    assert "(Python 3.12." in done.stdout


def test_a_python_2_gives_way_to_one_that_fits_or_says_that_there_is_none(
    zipapp: Path, unpacked: Path, path: Path
) -> None:
    start = find_python("2.7")
    done = run(zipapp, unpacked, start=start, PATH=str(path))
    assert done.returncode == 8
    assert_one_sentence(done, "CPython 3.11 to 3.14", "none of python3 python3.14 python3.13")
    link(path, python3="3.11")
    done = run(zipapp, unpacked, "version", "--json", start=start, PATH=str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["python"].startswith("3.11.")


def test_the_python_that_fits_is_kept(zipapp: Path, unpacked: Path, path: Path) -> None:
    link(path, python3="3.11", **{"python3.12": "3.12"})
    assert "(Python 3.11." in run(zipapp, unpacked, start=(), PATH=str(path)).stdout


@pytest.mark.parametrize("how", ["by itself", "by a Python", "by an isolated Python", "without site"])
def test_nothing_around_it_counts(zipapp: Path, unpacked: Path, path: Path, tmp_path: Path, how: str) -> None:
    """The current directory, and what the environment tells Python."""
    link(path, python3="3.11")
    planted = tmp_path / "planted"
    planted.mkdir()
    for name in ("click", "fcntl", "json", "launch", "msgspec", "mvmci", "stat", "time"):
        (planted / f"{name}.py").write_text("raise SystemExit('planted code ran')")
    python = str(path / "python3")
    start = {
        "by itself": (),
        "by a Python": (python,),
        "by an isolated Python": (python, "-I"),
        "without site": (python, "-I", "-S"),
    }[how]
    told = {"PYTHONINSPECT": "1", "PYTHONVERBOSE": "1"} if how != "by a Python" else {}
    for place in (str(planted), ".", ""):
        done = run(zipapp, unpacked, start=start, cwd=planted, PATH=str(path), PYTHONPATH=f"{place}:", **told)
        assert (done.returncode, done.stderr) == (0, "")


def test_options_of_python_are_kept(zipapp: Path, unpacked: Path) -> None:
    done = run(zipapp, unpacked, start=(sys.executable, "-X", "importtime"))
    assert done.returncode == 0
    assert "import time:" in done.stderr


def test_it_is_small_and_starts_by_itself(zipapp: Path) -> None:
    assert zipapp.stat().st_size <= SIZE_BYTES_MAX
    assert zipapp.read_bytes().startswith(b"#!/bin/sh\n")
    assert os.access(zipapp, os.X_OK)


def test_a_file_that_nobody_can_write_to_runs(zipapp: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(zipapp, tmp_path / "other-name"))
    copy.chmod(0o444)
    done = run(copy, tmp_path / "root")
    assert (done.returncode, done.stderr) == (0, "")


# ---- Hosts that it is not for

PRETENDS = """
import os, runpy, sys
{pretence}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("pretence", "words"),
    [
        ("os.confstr = lambda name: None", ("GNU C library 2.28",)),  # musl
        ("os.confstr = lambda name: 'glibc 2.17'", ("GNU C library 2.28",)),
        ("sys.maxsize = (1 << 31) - 1", ("with a Python of 32 bits",)),
        ("sys.modules['logging'] = None", (sys.executable, "lacks the module logging")),  # python3-minimal
    ],
)
def test_a_host_that_it_is_not_for_gets_a_sentence(
    zipapp: Path, unpacked: Path, pretence: str, words: Sequence[str]
) -> None:
    done = run(zipapp, unpacked, start=(sys.executable, "-I", "-c", PRETENDS.format(pretence=pretence)))
    assert done.returncode == 8
    assert_one_sentence(done, *words)


def test_another_architecture_gets_a_sentence(zipapp: Path, unpacked: Path) -> None:
    need(platform.machine() == "x86_64" and shutil.which("setarch"), "no other architecture to pretend")
    done = run(zipapp, unpacked, start=("setarch", "i686", sys.executable))
    assert done.returncode == 8
    assert_one_sentence(done, "this file is for x86_64 and this machine is i686")


def test_the_broker_inside_is_the_one_that_was_meant(unpacked: Path) -> None:
    done = subprocess.run(
        [site_packages(unpacked) / "bin" / "nats-server", "--version"], capture_output=True, check=True
    )
    assert done.stdout.split() == [b"nats-server:", b"v2.15.1"]


# ---- What it says of itself


def test_it_says_what_it_is_made_of(zipapp: Path, unpacked: Path) -> None:
    done = run(zipapp, unpacked, "version", "--verbose", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["file"] == str(zipapp)
    assert told["sha256"] == hashlib.sha256(zipapp.read_bytes()).hexdigest()
    assert told["commit"] is None or len(told["commit"]) == 40
    assert told["unpacked"] == str(site_packages(unpacked))
    parts = {one["name"]: one for one in told["parts"]}
    broker = site_packages(unpacked) / "bin" / "nats-server"
    assert parts["nats-server"]["sha256"] == {"nats-server": hashlib.sha256(broker.read_bytes()).hexdigest()}
    lock = (ROOT / "requirements" / "run.txt").read_text()
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE):
        part = parts[next(one for one in parts if one.lower().replace("_", "-") == name)]
        assert part["version"] == version
        assert part["sha256"]
        for digest in part["sha256"].values():
            assert f"sha256:{digest}" in lock
    shown = run(zipapp, unpacked, "version", "--verbose").stdout
    assert told["sha256"] in shown
    assert all(digest in shown for one in told["parts"] for digest in one["sha256"].values())


def test_its_bill_of_materials_is_one_of_cyclonedx(zipapp: Path, unpacked: Path) -> None:
    done = run(zipapp, unpacked, "version", "--sbom")
    assert (done.returncode, done.stderr) == (0, "")
    made = json.loads(done.stdout)
    assert (made["bomFormat"], made["specVersion"], made["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", made["serialNumber"])
    top = [made["metadata"]["component"], *made["components"]]
    refs = [one["bom-ref"] for one in top]
    assert len(set(refs)) == len(refs)
    assert {one["ref"] for one in made["dependencies"]} == set(refs)
    assert all(set(one["dependsOn"]) <= set(refs) for one in made["dependencies"])
    names = set()
    pending = list(top)
    while pending:
        one = pending.pop()
        assert one["type"] in ("application", "library")
        assert one["name"]
        assert all(set(licence) in ({"expression"}, {"license"}) for licence in one.get("licenses", []))
        names.add(one["name"])
        pending += one.get("components", [])
    assert {"mvmci", "wasmtime", "nats-server", "github.com/nats-io/jwt/v2", "go", "openssl"} <= names
    assert all(one["licenses"] for one in top)


def test_the_licences_of_all_that_is_inside_are(zipapp: Path, unpacked: Path) -> None:
    done = run(zipapp, unpacked, "version", "--licenses")
    assert (done.returncode, done.stderr) == (0, "")
    told = set(re.findall(r"^==== (\S+?)-[\d.]+/", done.stdout, re.MULTILINE))
    inside = {info.name.partition("-")[0] for info in site_packages(unpacked).glob("*.dist-info")}
    assert told == inside
    assert "golang.org/x/crypto" in done.stdout
    assert "LLVM Exceptions to the Apache 2.0 License" in done.stdout


def test_the_doctor_reads_whether_what_runs_is_what_was_built(
    zipapp: Path, root: Path, tmp_path: Path
) -> None:
    def program() -> dict[str, object]:
        done = run(zipapp, root, "doctor", "--json", MVMCI_STATE=str(tmp_path / "state"))
        return next(one for one in json.loads(done.stdout) if one["name"] == "program")

    found = program()
    assert found["ok"]
    assert hashlib.sha256(zipapp.read_bytes()).hexdigest() in str(found["found"])
    path = site_packages(root) / "rich" / "table.py"
    status = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"#")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the start sees no difference
    found = program()
    assert not found["ok"]
    assert "rich/table.py" in str(found["found"])


# ---- The cache


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


def test_a_cache_that_another_one_leads_to_is_refused(zipapp: Path, root: Path, tmp_path: Path) -> None:
    cache = site_packages(root).parent
    cache.rename(tmp_path / "elsewhere")
    cache.symlink_to(tmp_path / "elsewhere")
    assert_one_sentence(run(zipapp, root), str(cache), "may lead to one of others")


def on_disk(options: str, root: Path) -> list[str]:
    """Starts a Python that sees an empty disk at `root`."""
    need(os.geteuid() == 0, "only root can mount")
    script = f'mount -t tmpfs -o mode=0700,{options} none "{root}" && exec "{sys.executable}" "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


def test_a_cache_on_a_noexec_disk_is_refused(zipapp: Path, tmp_path: Path) -> None:
    done = run(zipapp, tmp_path, start=on_disk("noexec", tmp_path))
    assert_one_sentence(done, f"{tmp_path}, where mvmci unpacks itself, is on a disk mounted noexec")


def test_a_disk_that_is_full_is_one_sentence(zipapp: Path, tmp_path: Path) -> None:
    done = run(zipapp, tmp_path, start=on_disk("size=20m", tmp_path))
    assert done.returncode == 125
    assert_one_sentence(done, "cannot unpack mvmci", "No space left on device")
    assert "make room on that disk" in done.stderr


NOBODY = 64321


def of_others() -> str:
    """A Python that every user can start."""
    found = [one for one in ("/usr/local/bin/python3", "/usr/bin/python3") if os.path.exists(one)]
    need(os.geteuid() == 0 and found, "only root can be another user, who needs a Python")
    return found[0]


@pytest.mark.parametrize(
    ("home", "words"),
    [
        ({}, ("this user has no home directory",)),
        ({"HOME": "relative", "XDG_CACHE_HOME": "relative"}, ("this user has no home directory",)),
        ({"HOME": "/nowhere"}, ("cannot make /nowhere/.cache/mvmci", "Permission denied")),
        ({"HOME": "/root"}, ("cannot make /root/.cache/mvmci", "Permission denied")),
    ],
)
def test_a_user_without_a_home_gets_a_sentence(
    zipapp: Path, public: Path, home: dict[str, str], words: Sequence[str]
) -> None:
    shutil.copy(zipapp, public / "mvmci.pyz")
    command = [of_others(), public / "mvmci.pyz", "version"]
    done = subprocess.run(
        command, env=home, user=NOBODY, group=NOBODY, capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 125
    assert_one_sentence(done, *words)


def test_root_leaves_nothing_of_its_own_in_the_home_of_another(zipapp: Path, tmp_path: Path) -> None:
    need(os.geteuid() == 0, "only root can be another user")
    os.chown(tmp_path, NOBODY, NOBODY)
    done = run(zipapp, None, HOME=str(tmp_path))
    assert_one_sentence(done, f"{tmp_path} belongs to others")
    assert not list(tmp_path.iterdir())


def test_compiled_modules_are_kept_whatever_the_environment_says(zipapp: Path, tmp_path: Path) -> None:
    """Many an image sets that, and each command would compile all that it imports anew."""
    root = tmp_path / "root"
    assert run(zipapp, root, PYTHONDONTWRITEBYTECODE="1").returncode == 0
    assert list((site_packages(root) / "mvmci").rglob("*.pyc"))


def test_a_compiled_module_that_was_cut_short_by_a_power_cut_is_made_anew(zipapp: Path, root: Path) -> None:
    for path in site_packages(root).rglob("*.pyc"):
        path.unlink()
    assert run(zipapp, root).returncode == 0
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


@pytest.mark.parametrize("harm", ["edit", "link", "unlink"])
def test_a_file_that_is_harmed_is_replaced_and_whoever_has_it_open_keeps_it(
    zipapp: Path, root: Path, tmp_path: Path, harm: str
) -> None:
    path = site_packages(root) / "click" / "core.py"
    text = path.read_bytes()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        if harm == "edit":
            mapped[:4] = b"harm"
            mapped.flush()
        elif harm == "link":
            path.unlink()
            (tmp_path / "planted.py").write_bytes(text)
            path.symlink_to(tmp_path / "planted.py")
        else:
            path.unlink()
        before = bytes(mapped)
        assert run(zipapp, root).returncode == 0
        assert bytes(mapped) == before
    assert not path.is_symlink()
    assert path.read_bytes() == text


def older(root: Path, count: int) -> list[Path]:
    """Caches of older builds, the one used last first."""
    found = []
    for age in range(1, count + 1):
        cache = root / f"mvmci_{age:064}"
        (cache / "site-packages").mkdir(parents=True)
        (cache / ".used").touch()
        os.utime(cache / ".used", (time.time() - age, time.time() - age))
        found.append(cache)
    return found


def test_older_builds_go_while_nobody_runs_from_them(zipapp: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    caches = older(root, 6)
    (caches[5] / ".used").unlink()  # it was never unpacked to its end
    (root / "of-others").mkdir()
    with (caches[3] / ".used").open() as used:
        fcntl.flock(used, fcntl.LOCK_SH)
        assert run(zipapp, root).returncode == 0
    (ours,) = set(root.glob("mvmci_*")) - set(caches)
    left = {*caches[:2], caches[3], ours, root / "of-others", root / ".mvmci_lock"}
    assert set(root.iterdir()) == left


def is_used(mark: Path) -> bool:
    with mark.open() as other:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_build_that_somebody_runs_from_is_marked_as_used(zipapp: Path, root: Path, tmp_path: Path) -> None:
    mark = site_packages(root).parent / ".used"
    os.utime(mark, (0, 0))
    assert not is_used(mark)
    environment = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(root), "MVMCI_STATE": str(tmp_path / "state")}
    command = [sys.executable, zipapp, "run", guest_path("hello"), "--stdin", "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as running:
        until(lambda: is_used(mark))
        running.communicate()
    assert not is_used(mark)
    assert mark.stat().st_mtime > 0


def test_several_first_starts_at_once_all_run(zipapp: Path, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(tmp_path / "root")}
    command = [sys.executable, zipapp, "version"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    starts = [subprocess.Popen(command, env=environment, **pipes) for _ in range(4)]
    for start in starts:
        out, err = start.communicate(timeout=LONG_S)
        assert (start.returncode, out.count(b"mvmci")) == (0, 1), err


@pytest.mark.parametrize("holds", ["other bytes", "no bytes"])
def test_a_damaged_file_is_one_sentence(zipapp: Path, tmp_path: Path, holds: str) -> None:
    """Its directory is read at every start, the rest when it is unpacked."""
    data = bytearray(zipapp.read_bytes())
    with zipfile.ZipFile(zipapp) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/mvmci/errors.py"))
        entry = archive.getinfo(name)
    begin, size = entry.header_offset + 30 + len(name), entry.compress_size
    others = zlib.compress(bytes(size - 5), 0, -15)  # the same size, as it is not compressed
    data[begin : begin + size] = others if holds == "other bytes" else b"\xff" * size
    assert len(data) == zipapp.stat().st_size
    (tmp_path / "damaged.pyz").write_bytes(data)
    done = run(tmp_path / "damaged.pyz", tmp_path / "root")
    assert done.returncode == 125
    assert_one_sentence(done, "cannot unpack mvmci", "damaged.pyz is damaged")


def test_a_kill_while_unpacking_does_no_harm(zipapp: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    environment = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(root)}
    with subprocess.Popen(
        [sys.executable, str(zipapp), "version"], env=environment, stdout=subprocess.PIPE
    ) as first:
        while first.poll() is None and not list(root.glob("mvmci_*/site-packages/*")):
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
        assert not list(root.glob("mvmci_*"))
    out, _ = start.communicate(timeout=LONG_S)
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
