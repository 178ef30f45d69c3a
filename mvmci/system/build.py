"""What this program was built from, as the zipapp says of itself. A source tree says nothing."""

from __future__ import annotations

import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import msgspec

import mvmci
from mvmci.errors import Usage

BUILD, BILL, LICENCES = "build.json", "sbom.cdx.json", "licenses/"


class Part(msgspec.Struct, frozen=True):
    """A package or program inside, and the SHA-256 of each file that it came as."""

    name: str
    version: str
    sha256: dict[str, str]


class Build(msgspec.Struct, frozen=True):
    """One build."""

    id: str  # of what is unpacked
    commit: str | None  # None: what it was built from was not committed, or not in git
    machine: str
    pythons: list[str]
    files: dict[str, int]  # what is unpacked, with sizes in bytes
    compiled: dict[str, dict[str, int]]  # and what for one Python alone, by its `cache_tag`

    @classmethod
    def ours(cls) -> Build:
        """Raises Usage in a source tree."""
        return msgspec.json.decode(_read(BUILD), type=cls)


def bill() -> bytes:
    """The bill of materials, as CycloneDX JSON. Raises Usage in a source tree."""
    return _read(BILL)


def licences() -> str:
    """The licences of all that is inside, each under its name. Raises Usage in a source tree."""
    with _archive() as archive:
        names = [name for name in archive.namelist() if name.startswith(LICENCES)]
        texts = (archive.read(name).decode(errors="replace").strip("\n") for name in names)
        return "\n".join(
            f"==== {name.removeprefix(LICENCES)}\n\n{text}\n" for name, text in zip(names, texts, strict=True)
        )


def parts() -> list[Part]:
    """What the bill names by digest. Raises Usage in a source tree."""
    return list(_parts(msgspec.json.decode(bill())["components"]))


def _parts(components: list[dict[str, Any]]) -> list[Part]:
    found = []
    for one in components:
        digests = {
            ref["url"].rpartition("=")[2]: ref["hashes"][0]["content"]
            for ref in one.get("externalReferences", [])
        }
        if "hashes" in one:
            digests[one["name"]] = one["hashes"][0]["content"]
        if digests:
            found.append(Part(one["name"], one["version"], digests))
        found += _parts(one.get("components", []))
    return found


def unpacked() -> Path:
    """Where it runs from."""
    return Path(mvmci.__file__).parents[1]


def differing() -> list[str]:
    """The unpacked files whose content is not the archive's. Reads all. Raises Usage in a source tree."""
    root, ours = unpacked().parent, Build.ours()
    with _archive() as archive:
        names = [*ours.files, *ours.compiled[sys.implementation.cache_tag]]
        return [name for name in names if not _is(archive.getinfo(name), root / name)]


def _is(wanted: zipfile.ZipInfo, path: Path) -> bool:
    try:
        return zlib.crc32(path.read_bytes()) == wanted.CRC
    except OSError:
        return False


def _read(name: str) -> bytes:
    with _archive() as archive:
        return archive.read(name)


def _archive() -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(sys.argv[0])
    except (OSError, zipfile.BadZipFile):
        raise Usage(
            "this is a source tree, and only the zipapp knows what it was built from",
            hint="use mvmci.pyz, which `./just zipapp` builds",
        ) from None
