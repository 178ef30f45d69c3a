"""Writes the zipapp that shiv.toml describes: one file, for several Pythons, the broker inside.

The dependencies are installed once for each Python, from the locked wheels, and merged into one tree;
files that two Pythons have in common are identical, or the build stops. mvmci itself comes as a
wheel. The archive has shiv's layout, but is written here: sorted, with fixed dates and modes and without
traces of the place, so that a commit gives the same bytes wherever it is built, by whichever Python.

Nothing is done when no input has changed. The target is replaced in one step.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bill
import zip_file

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "zipapp"
INPUTS = ("LICENSE", "mvmci", "packaging", "pyproject.toml", "requirements", "shiv.toml", "topologies")
LOCK = ROOT / "requirements" / "run.txt"
CONFIG = ROOT / "shiv.toml"
MAIN = ROOT / "packaging" / "main.py"
LAUNCHER = ROOT / "packaging" / "launch.py"
PROLOGUE = ROOT / "packaging" / "prologue.sh"
NOTICES = ROOT / "packaging" / "notices"

# What nobody needs at run time. Entry points stay; licences go where the bill is.
LEFT_OUT_NAMES = {
    "__pycache__",
    "tests",
    "RECORD",
    "WHEEL",
    "INSTALLER",
    "REQUESTED",
    "direct_url.json",
    "sboms",
    ".hash",
}
LEFT_OUT_SUFFIXES = {".pyc", ".pyi", ".pyx", ".pxd", ".pxi", ".c", ".h", ".typed"}

# The ELF-64 file header and the beginning of a program header.
ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
ELF_PROGRAM_TABLE, ELF_PROGRAM_SIZE, ELF_PROGRAM_COUNT = 5, 9, 10
ELF_SECTION_FIELDS = (6, 12, 13)  # where the section headers are, how many, which has their names
ELF_SEGMENT = struct.Struct("<IIQQQQ")


def main() -> int:
    config = tomllib.loads(CONFIG.read_text())
    target = ROOT / config["target"]
    stamp = target.with_suffix(".stamp")
    inputs = digest_of_inputs()
    if target.exists() and stamp.exists() and stamp.read_text() == inputs:
        return 0
    machine = os.uname().machine
    if machine not in config["platforms"]:
        sys.exit(f"Error: shiv.toml knows no wheels for {machine}.")
    gathered = dependencies(config, machine)
    tree = BUILD / "site-packages"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(gathered / "site-packages", tree, copy_function=os.link)
    install_mvmci(tree)
    check_programs(tree, config["programs"])
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    write_archive(part, tree, json.loads((gathered / "origins.json").read_bytes()), config, machine)
    size = part.stat().st_size
    if size > config["size_bytes_max"]:
        sys.exit(
            f"Error: the zipapp has {size} bytes, over the limit of {config['size_bytes_max']} in shiv.toml."
        )
    stamp.unlink(missing_ok=True)
    part.replace(target)
    stamp.write_text(inputs)
    print(f"{target.relative_to(ROOT)}: {size / 1e6:.1f} MB")
    return 0


def digest_of_inputs() -> str:
    """A digest of all that shapes the zipapp."""
    found = [path for name in INPUTS for path in (ROOT / name, *(ROOT / name).rglob("*"))]
    sources = [path for path in found if path.is_file() and not left_out(path)]
    return digest(sorted(sources), os.uname().machine, str(commit()))


def digest(paths: Iterable[Path], *more: str) -> str:
    total = hashlib.sha256(repr(more).encode())
    for path in paths:
        total.update(f"{path.relative_to(ROOT)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def left_out(path: Path) -> bool:
    return path.suffix in LEFT_OUT_SUFFIXES or not LEFT_OUT_NAMES.isdisjoint(path.parts)


def dependencies(config: dict[str, Any], machine: str) -> Path:
    """The locked dependencies for every Python in one tree, and whence they come; made once for each lock."""
    made_by = [Path(__file__), Path(bill.__file__)]
    made = BUILD / f"dependencies-{digest([LOCK, CONFIG, *made_by], machine)[:16]}"
    if made.exists():
        return made
    for old in BUILD.glob("dependencies-*"):
        shutil.rmtree(old)
    # pip looks at the markers with the Python that it runs on, not with the one it installs for. No
    # package of the lock hurts where it is not needed, so all go in.
    lock = BUILD / "lock.txt"
    BUILD.mkdir(parents=True, exist_ok=True)
    lock.write_text(re.sub(r" ;[^\\\n]*", "", LOCK.read_text()))
    part = BUILD / "merged"
    shutil.rmtree(part, ignore_errors=True)
    reports, inside = [], {}
    for python in config["pythons"]:
        single = BUILD / f"python-{python}"
        shutil.rmtree(single, ignore_errors=True)
        reports.append(pip_install(lock, single, python, config["platforms"][machine]))
        inside |= bill.enclosed(single)
        merge(single, part / "site-packages")
        shutil.rmtree(single)
    (part / "origins.json").write_text(json.dumps({"known": bill.wheels(reports), "inside": inside}))
    part.rename(made)
    return made


def pip_install(lock: Path, target: Path, python: str, platforms: Iterable[str]) -> Any:
    """What pip reports of it."""
    report = BUILD / "report.json"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", "install"]
    command += ["--require-hashes", "--no-deps", "--no-compile", "--only-binary", ":all:"]
    command += ["--implementation", "cp", "--python-version", python, "--report", str(report)]
    for platform in platforms:
        command += ["--platform", platform]
    done = subprocess.run([*command, "--target", str(target), "-r", str(lock)], check=False)
    if done.returncode:
        sys.exit(f"Error: pip could not install the dependencies for Python {python} (its reason is above).")
    return json.loads(report.read_bytes())


def merge(source: Path, target: Path) -> None:
    """Move the files of `source` that are needed into `target`."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_dir() or left_out(name):
            continue
        there = target / name
        if path.suffix == ".so":
            strip(path)
        if there.exists() and not filecmp.cmp(path, there, shallow=False):
            sys.exit(f"Error: {name} differs between two Pythons; they cannot share a tree.")
        there.parent.mkdir(parents=True, exist_ok=True)
        path.replace(there)


def strip(library: Path) -> None:
    """Cut off what no segment of a 64-bit ELF file loads: the symbols for debuggers, most of some wheels.

    The loader reads segments only, so the section headers, which stand at the end, can go too.
    """
    data = library.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        sys.exit(f"Error: {library.name} is not a 64-bit little-endian ELF file.")
    header = list(ELF_HEADER.unpack_from(data))
    table, size, count = header[ELF_PROGRAM_TABLE], header[ELF_PROGRAM_SIZE], header[ELF_PROGRAM_COUNT]
    end = table + size * count
    for index in range(count):
        _type, _flags, offset, _address, _physical, in_file = ELF_SEGMENT.unpack_from(
            data, table + size * index
        )
        end = max(end, offset + in_file)
    for field in ELF_SECTION_FIELDS:
        header[field] = 0
    library.write_bytes(ELF_HEADER.pack(*header) + data[ELF_HEADER.size : end])


def install_mvmci(tree: Path) -> None:
    """Build mvmci's wheel and unpack it into `tree`."""
    wheels = BUILD / "wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"Error: mvmci's wheel could not be built.\n{done.stdout}{done.stderr}")
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree, [name for name in archive.namelist() if not left_out(Path(name))])


def check_programs(tree: Path, programs: dict[str, str]) -> None:
    """The programs inside are of the version that is meant, and the only ones."""
    for path in (tree / "bin").iterdir():
        if path.name not in programs:
            path.unlink()
    for name, version in programs.items():
        answer = subprocess.run(
            [tree / "bin" / name, "--version"], capture_output=True, text=True, check=True
        )
        if version not in answer.stdout.split():
            sys.exit(f"Error: the {name} inside says {answer.stdout.strip()!r}; shiv.toml wants {version}.")


def write_archive(
    target: Path, tree: Path, origins: dict[str, Any], config: dict[str, Any], machine: str
) -> None:
    """Shiv's layout: site-packages/, and our launcher, behind a prologue for the shell.

    Beside it is what is not unpacked: build.json, the bill of materials and the licences of all that is
    inside.
    """
    texts = bill.licences(tree, NOTICES)
    packed = {f"site-packages/{name}": data for name, data in files(tree).items()}
    identity = hashlib.sha256()
    for name, data in packed.items():
        identity.update(f"{name}\0{hashlib.sha256(data).hexdigest()}\n".encode())
    sizes = {name: len(data) for name, data in packed.items()}
    tags = ["cpython-" + python.replace(".", "") for python in config["pythons"]]
    build = {
        "id": identity.hexdigest(),
        "commit": commit(),
        "machine": machine,
        "pythons": config["pythons"],
        "files": {name: size for name, size in sizes.items() if ".cpython-" not in name},
        "compiled": {tag: {name: sizes[name] for name in sizes if f".{tag}-" in name} for tag in tags},
    }
    made_of = bill.bill(tree, build["id"], **origins)
    packed |= {f"licenses/{name}": text for name, text in sorted(texts.items())}
    packed["sbom.cdx.json"] = json.dumps(made_of, indent=1).encode()
    packed["build.json"] = json.dumps(build).encode()
    packed["__main__.py"] = MAIN.read_bytes()
    packed["launch.py"] = LAUNCHER.read_bytes()
    with target.open("wb") as file:
        file.write(prologue(config["pythons"]))
        zip_file.write(file, (zip_file.Entry(name, data, mode(name)) for name, data in packed.items()))
    target.chmod(0o755)


def files(tree: Path) -> dict[str, bytes]:
    """All that is in `tree`, in an order that is the same everywhere."""
    found = (path.relative_to(tree) for path in tree.rglob("*") if path.is_file())
    return {str(name): (tree / name).read_bytes() for name in sorted(found, key=lambda name: name.parts)}


def commit() -> str | None:
    """What was built, where all that shapes it is as it was committed."""
    answers = []
    for command in (["status", "--porcelain", "--", *INPUTS], ["rev-parse", "HEAD"]):
        try:
            done = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        answers.append(done.stdout.strip())
    changed, head = answers
    return None if changed else head


def mode(name: str) -> int:
    return 0o100755 if name.startswith("site-packages/bin/") else 0o100644


def prologue(pythons: list[str]) -> bytes:
    """What a shell reads of the file, up to its `exit`."""
    text = PROLOGUE.read_text().replace("@RANGE@", f"{pythons[0]} to {pythons[-1]}")
    return text.replace("@PYTHONS@", " ".join(f"python{python}" for python in reversed(pythons))).encode()


if __name__ == "__main__":
    sys.exit(main())
