"""What README.md and docs/ name is there: tests, paths, subjects, verbs, and cluster files that load."""

from __future__ import annotations

import importlib.resources
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from mvmci.cli import cli
from mvmci.cluster.topology import Topology, read_topology
from mvmci.deploy.access import accesses, deployment_of
from mvmci.stores.nats.layout import Layout
from mvmci.trust.permissions import describe
from tests.harness.places import ROOT
from tests.model.rules import Rules
from tests.unit.test_architecture import ORDER

GUIDE = ROOT / "docs" / "deployment.md"
EXAMPLE = re.compile(r"^    (?:\$ )?(?:.* && )?mvmci (.+?)(?: #.*| -- .*)?$", re.MULTILINE)
PATH = re.compile(r"`((?:mvmci|tests|docs|benchmarks|examples|topologies|packaging|requirements)/[^`\s]*)`")
SUBJECT = re.compile(r"`(<cluster>\.[^`]+|\$KV\.[^`]+)`")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README = ROOT / "README.md"


@pytest.fixture(scope="module")
def tests() -> set[str]:
    """The names of all tests that there are, and of their files."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    names = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    return names | {file.stem for file in files}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_test_that_a_page_names_exists(page: Path, tests: set[str]) -> None:
    named = set(re.findall(r"\btest_\w+", page.read_text()))
    assert len(named) > 5 or page != GUIDE
    assert named - tests == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_file_and_each_heading_that_a_page_points_at_exists(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        there = page.parent / path if path else page
        assert "://" in target or there.exists(), target
        assert not heading or heading in _anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_path_that_a_page_names_exists(page: Path) -> None:
    """`<name>` in a path stands for any one."""
    for path in PATH.findall(page.read_text()):
        assert list(ROOT.glob(re.sub(r"<[^>]*>", "*", path))), path


def test_the_subjects_of_the_protocol_are_those_of_the_layout() -> None:
    layout = Layout("cluster")
    parts = {"job": "<id>", "queue": "<queue>", "kind": "<kind>", "unit": "<unit>", "worker": "<worker>"}
    parts |= {"request": "<request>", "ticket": "<ticket>", "incarnation": "<incarnation>"}
    named = set(SUBJECT.findall((ROOT / "docs" / "protocol.md").read_text())) - {"<cluster>.job.<id>.>"}
    of_streams = ("message", "ready", "timer", "log", "member")
    others = ("engine", "ping", "reply", "capacity", "enrol", "renew", "measure", "measured")
    subjects = {layout.setting(">"), layout.stored("job", "<id>"), layout.stored("log", "<id>")}
    for name in of_streams + others:
        subject = getattr(layout, name)
        wanted = list(inspect.signature(subject).parameters)
        subjects.add(subject(*(parts[one] for one in wanted)))
    assert named == {re.sub(r"\bcluster\b", "<cluster>", subject) for subject in subjects}


def test_the_permissions_of_the_security_page_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    assert text.partition("<!-- permissions -->\n")[2].partition("\n<!-- /permissions -->")[0] == describe()


def test_the_order_of_the_architecture_page_is_the_one_that_is_tested() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("## Folders, in their order")[2].partition("Beside the package")[0]
    rows = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in rows] == list(ORDER)


def test_each_module_in_the_drawings_of_the_architecture_page_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawings = "\n".join(re.findall(r"^    .*$", text, re.MULTILINE))
    names = re.findall(
        rf"(?<![\w/])((?:{'|'.join(name for line in ORDER for name in line)})/[\w/]+)", drawings
    )
    assert len(names) > 5
    for name in names:
        assert list((ROOT / "mvmci").glob(f"{name}*")), name


def test_the_rules_of_the_protocol_page_are_those_of_the_model() -> None:
    last = (ROOT / "docs" / "protocol.md").read_text().partition("## 8.")[2]
    rules = re.findall(r"`([a-z_]+)`", last.partition("| without this rule |")[2].partition("\n\n")[0])
    assert sorted(rules) == sorted(field.name for field in fields(Rules))


def test_each_section_that_the_code_refers_to_exists() -> None:
    headings = re.findall(r"^## (\d+)\.", (ROOT / "docs" / "protocol.md").read_text(), re.MULTILINE)
    for file in [*(ROOT / "mvmci").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for section in re.findall(r"docs/protocol\.md\s+§(\d+)", file.read_text()):
            assert section in headings, file


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_verb_and_option_in_an_example_exists(page: Path) -> None:
    examples = EXAMPLE.findall(page.read_text())
    assert len(examples) > 5 or page not in (README, GUIDE)
    for example in examples:
        words = example.split()
        verb = cli.get_command(None, words[0])  # type: ignore[arg-type]
        assert verb is not None, example
        if words[0] == "ticket":
            verb = verb.commands[words[1]]  # type: ignore[attr-defined]
        known = {option for parameter in verb.params for option in parameter.opts + parameter.secondary_opts}
        assert {word for word in words if word.startswith("--")} - known - {"--help"} == set(), example


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) < 200


def test_the_cluster_files_of_the_guide_are_those_that_ship() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    found: dict[str, Topology] = {}
    for block in blocks:
        topology = read_topology(block, name="block", accesses=accesses())
        deployment_of(topology, GUIDE)
        found.setdefault(topology.access, topology)
    shipped = importlib.resources.files("mvmci_topologies")
    for access in accesses():
        text = shipped.joinpath(f"{access}.yaml").read_text()
        assert found[access] == read_topology(text, name=access, accesses=accesses())
