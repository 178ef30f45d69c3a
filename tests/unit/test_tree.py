"""The manifest of a workspace: equal directories are equal, and a hostile manifest is refused."""

from __future__ import annotations

import msgspec
import pytest

from mvmci.errors import BadWorkspace
from mvmci.jobs import tree
from mvmci.jobs.tree import Tree, TreeEntry

DIGEST = "sha256:" + "0" * 64


def file(path: str, **more: object) -> TreeEntry:
    return msgspec.structs.replace(TreeEntry(path=path, digest=DIGEST, size=1), **more)


def link(path: str, target: str) -> TreeEntry:
    return TreeEntry(path=path, kind="link", target=target)


def test_the_order_in_which_entries_come_does_not_matter() -> None:
    entries = [file("b"), file("a/b"), file("a-b"), link("l", "b"), TreeEntry(path="e", kind="dir")]
    assert tree.encode_tree(tree.tree(entries)) == tree.encode_tree(tree.tree(entries[::-1]))
    assert tree.decode_tree(tree.encode_tree(tree.tree(entries))) == tree.tree(entries)


def test_any_difference_changes_the_bytes_and_so_the_digest() -> None:
    one = [[file("a")], [file("b")], [file("a", size=2)], [file("a", executable=True)], [link("a", "b")], []]
    assert len({tree.encode_tree(tree.tree(entries)) for entries in one}) == len(one)


@pytest.mark.parametrize(
    "entries",
    [
        [file("/etc/passwd")],
        [file("../a")],
        [file("a/../b")],
        [file("./a")],
        [file("a//b")],
        [file("a/")],
        [file("")],
        [file("a\0")],
        [file("a" * 256)],
        [file("a/" * 300 + "b")],
        [file("/".join(["a" * 200] * 30))],
        [file("a"), file("a")],
        [file("b"), file("a")],
        [file("a"), file("a/b")],
        [link("a", "/etc"), file("a/passwd")],
        [link("a", "/etc"), file("a-b"), file("a/b/c")],
        [TreeEntry(path="a", kind="dir"), file("a/b")],
        [file("a", digest="sha256:00")],
        [file("a", digest="../../etc/passwd")],
        [file("a", size=-1)],
        [file("a", mode=-1)],
        [file("a", mode=0o4755)],
        [file("a", mtime_ns=-1)],
        [file("a", mtime_ns=2**63)],
        [file("a", same_as="b"), file("b")],
        [file("a"), file("b", same_as="a", digest="sha256:" + "1" * 64)],
        [file("a"), file("b", same_as="a"), file("c", same_as="b")],
        [link("a", "x"), file("b", same_as="a")],
        [file("a"), link("b", "a"), TreeEntry(path="c", kind="dir", same_as="a")],
        [TreeEntry(path="a", kind="dir", mode=0o755), file("a")],
        [file("a", target="b")],
        [TreeEntry(path="a", kind="link")],
        [link("a", "b\0")],
        [link("a", "b" * 5000)],
        [TreeEntry(path="a", kind="dir", digest=DIGEST)],
        [file("a", size=5 << 30)],
    ],
)
def test_a_hostile_manifest_is_refused(entries: list[TreeEntry]) -> None:
    with pytest.raises(BadWorkspace):
        tree.decode_tree(tree.encode_tree(Tree(entries=tuple(entries))))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"entries":[{"path":"\\ud800"}]}', b'{"entries":[{}]}', b"\xff"]
)
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(BadWorkspace):
        tree.decode_tree(data)


def test_too_many_entries_are_refused_with_a_hint() -> None:
    entries = tuple(file(f"{n:06}") for n in range(tree.FILES_MAX + 1))
    with pytest.raises(BadWorkspace, match="over the limit of 50000") as caught:
        tree.check_tree(Tree(entries=entries))
    assert caught.value.hint
    assert ".mvmciignore" in caught.value.hint


@pytest.mark.parametrize(
    ("links", "path", "out"),
    [
        ({"a": "b"}, "a", False),
        ({"a": "/etc"}, "a", True),
        ({"a": ".."}, "a", True),
        ({"d/a": ".."}, "d/a", False),
        ({"d/a": "../.."}, "d/a", True),
        ({"d/a": "../../d"}, "d/a", True),
        ({"d": ".", "a": "d/../x"}, "a", True),
        ({"d": "s/deep", "a": "d/../../x"}, "a", False),
        ({"a": "b", "b": "a"}, "a", False),
    ],
)
def test_a_link_that_leads_out_is_found_also_through_other_links(
    links: dict[str, str], path: str, out: bool
) -> None:
    assert tree.leaves(links, path) is out


def test_a_name_is_shown_without_control_characters() -> None:
    assert tree.shown_path("a\x1b[31m\udcff\n") == "a\\x1b[31m\\udcff\\n"
