"""Accesses: ours as anybody's, and those of a file; and what is said of one that is no good."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mvmci.cluster import topology
from mvmci.deploy import access
from mvmci.deploy.access import Access, accesses, deployment_of, find_access
from mvmci.deploy.plan import make_plan
from mvmci.errors import Usage
from tests.harness.places import ROOT

GOOD = """
    from mvmci.cluster.deployment import BROKER, Deployment, central, executors, workers

    def plan(topology):
        return Deployment(units=(*central(topology), *executors(topology), *workers(topology)), engine=BROKER)
"""


class Plugin:
    """A cluster file, and a plugin beside it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "topology.yaml"
        self.path = folder / "mine.py"
        self.file.write_text("cluster: demo\nworkers: {}\nplugin: ./mine.py\n")

    def write(self, source: str) -> None:
        self.path.write_text(textwrap.dedent(source).removeprefix("\n"))

    def refused(self, source: str) -> str:
        """What is said of it; before anything is changed."""
        self.write(source)
        root = self.file.parent / "state"
        with pytest.raises(Usage) as caught:
            asyncio.run(make_plan(root, self.file))
        assert not root.exists()
        assert "\n" not in caught.value.message
        return caught.value.message.removeprefix(str(self.path))


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    return Plugin(tmp_path)


def entry(value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint("theirs", value, access.GROUP)


# ---- Installed ones


def test_four_accesses_are_installed_and_each_says_what_it_is_for() -> None:
    assert list(accesses()) == ["peer", "per-worker", "pool", "shared"]
    first = {name: found.about.partition(" ")[0] for name, found in accesses().items()}
    assert first == {"peer": "One", "per-worker": "Every", "pool": "Several", "shared": "One"}


@pytest.mark.parametrize("name", ["peer", "per-worker", "pool", "shared"])
def test_the_file_beside_an_access_is_good_and_of_that_access(name: str) -> None:
    text = accesses()[name].example
    assert text is not None
    found = topology.read_topology(text, name=f"{name}.yaml", accesses=accesses())
    assert (found.access, found.runtime) == (name, "local")
    assert deployment_of(found, Path(f"{name}.yaml")).units


def test_an_access_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(Usage) as caught:
        find_access("ring")
    assert (caught.value.message, caught.value.hint) == (
        "access ring is not installed",
        "there is peer, per-worker, pool, shared",
    )


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("no_such_module:plan", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
        (
            "mvmci.cluster.deployment:no_such",
            "cannot be loaded: AttributeError: module 'mvmci.cluster.deployment' has no attribute",
        ),
        ("mvmci.cluster.deployment:LOCAL_HOST", "has no function `plan`"),
    ],
)
def test_a_strangers_access_that_is_broken_says_so_and_hurts_nobody_else(value: str, sentence: str) -> None:
    broken = Access("theirs", entry(value))
    with pytest.raises(Usage) as caught:
        broken.load()
    assert caught.value.message.startswith(f"access theirs ({value}) {sentence}")
    assert broken.about == caught.value.message


def test_a_strangers_access_is_used_like_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    theirs = {"theirs": Access("theirs", entry("mvmci_topologies.peer:plan"))}
    monkeypatch.setattr(access, "accesses", lambda: theirs)
    found = topology.read_topology("cluster: d\naccess: theirs\nworkers: {}\n", name="a", accesses=theirs)
    assert deployment_of(found, tmp_path / "a").engine == "broker"


THEIRS = """
'''A ring of executors. Nobody knows what for.'''

from mvmci.cluster.deployment import Deployment, central, workers

def plan(topology):
    return Deployment(units=(*central(topology), *workers(topology)))
"""


def install(folder: Path, **entries: str) -> None:
    """As pip would, a package that offers accesses."""
    (folder / "theirs.py").write_text(THEIRS)
    info = folder / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
    (info / "entry_points.txt").write_text(f"[{access.GROUP}]\n{lines}")


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder), "MVMCI_STATE": str(folder / "state")}
    command = [sys.executable, "-m", "mvmci", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_a_package_of_somebody_elses_is_found_by_its_entry_point(tmp_path: Path) -> None:
    install(tmp_path, ring="theirs:plan")
    listed = run(tmp_path, "topologies").stdout.splitlines()
    assert "ring        A ring of executors. Nobody knows what for." in listed
    file = tmp_path / "topology.yaml"
    file.write_text("cluster: demo\naccess: ring\nworkers: {}\n")
    done = run(tmp_path, "plan", str(file))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "+ start worker-1 on local")


def test_an_access_that_two_packages_offer_is_used_of_neither(tmp_path: Path) -> None:
    install(tmp_path, peer="theirs:plan")
    file = tmp_path / "topology.yaml"
    file.write_text("cluster: demo\naccess: peer\nworkers: {}\n")
    done = run(tmp_path, "plan", str(file))
    assert done.returncode == 2
    assert done.stderr.startswith("Error: access peer is there twice: ")
    assert run(tmp_path, "plan", str(ROOT / "topologies" / "pool.yaml")).returncode == 0


CLUSTERS = sorted((ROOT / "examples" / "clusters").glob("*.yaml"))


@pytest.mark.parametrize("file", CLUSTERS, ids=[file.stem for file in CLUSTERS])
def test_the_clusters_that_are_there_to_be_copied_make_plans(file: Path) -> None:
    found = topology.read_topology(file.read_bytes(), name=file.name, accesses=accesses())
    plan = deployment_of(found, file)
    assert (
        plan.engine
        == {
            "pool-behind-url": "http://127.0.0.1:8080",
            "shared-compose": "http://{address:executor-1}",
            "executor-per-host": "broker",
            "per-worker-ssh": "embedded",
        }[file.stem]
    )
    count = found.executors.count if found.executors is not None else len(found.hosts)
    count = 0 if found.access == "per-worker" else count
    assert sum(unit.role == "executor" for unit in plan.units) == count


def test_a_plan_that_is_there_to_be_copied_keeps_the_isolation_that_the_file_asks_for() -> None:
    file = ROOT / "examples" / "clusters" / "executor-per-host.yaml"
    text = file.read_text() + "\nmin_isolation: confined\n"
    found = topology.read_topology(text, name=file.name, accesses=accesses())
    for unit in deployment_of(found, file).units:
        has_engine = unit.role in ("executor", "worker")
        assert ("--min-isolation=confined" in unit.options) == has_engine, unit


# ---- Plugins


def test_a_plugin_makes_the_plan(plugin: Plugin) -> None:
    plugin.write(GOOD)
    found = asyncio.run(make_plan(plugin.file.parent / "state", plugin.file))
    assert (found.topology.access, found.deployment.engine) == ("plugin", "broker")
    assert [unit.name for unit in found.deployment.units][2:] == ["executor-1", "worker-1"]


def test_what_a_plugin_prints_does_not_get_into_what_a_verb_says(
    plugin: Plugin, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin.write("print('loaded')\n" + textwrap.dedent(GOOD).replace("return", "print('planned'); return"))
    asyncio.run(make_plan(plugin.file.parent / "state", plugin.file))
    assert capsys.readouterr() == ("", "loaded\nplanned\n")


def test_a_plugin_is_looked_for_beside_the_file(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    with pytest.raises(Usage, match=r"mine\.py, which `plugin` names, cannot be read: No such file"):
        asyncio.run(make_plan(plugin.file.parent / "state", plugin.file))


def test_a_plugin_may_have_classes_of_its_own(plugin: Plugin) -> None:
    plugin.write(
        """
    from dataclasses import dataclass
    import msgspec

    @dataclass
    class Mine:
        count: "int" = 1

    class Other(msgspec.Struct):
        count: "int" = 1
"""
        + GOOD
    )
    assert asyncio.run(make_plan(plugin.file.parent / "state", plugin.file)).deployment.units


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("x = 1", " has no function `plan`"),
        ("plan = 1", " has no function `plan`"),
        ("\ndef plan(topology:\n", ":1: the plugin cannot be loaded: SyntaxError: '(' was never closed"),
        ("import nothing_of_that_name", ":1: the plugin cannot be loaded: ModuleNotFoundError: No module"),
        ("x = 1\n1 / 0", ":2: the plugin cannot be loaded: ZeroDivisionError: division by zero"),
        ("\0", ": the plugin cannot be loaded: SyntaxError: source code string cannot contain null"),
        ("raise SystemExit", ":1: the plugin cannot be loaded: SystemExit"),
        ("def plan(t):\n    t.no\n", ":2: the plan function raised AttributeError: 'Topology' object has"),
        (
            "import json\ndef plan(t):\n    return json.loads('')\n",
            ":3: the plan function raised JSONDecodeError: Expecting value",
        ),
        ("def plan(t):\n    raise SystemExit(3)\n", ":2: the plan function raised SystemExit: 3"),
        ("def plan(t):\n    raise ValueError('a\\nb')\n", ":2: the plan function raised ValueError: a b"),
        ("def plan(t):\n    return plan(t)\n", ":2: the plan function raised RecursionError: "),
        ("def plan():\n    pass\n", ": the plan function raised TypeError: plan() takes 0 positional"),
        ("def plan(t):\n    pass\n", ": the plan function returned NoneType, not a Deployment"),
        (
            "from mvmci.cluster.deployment import Deployment\ndef plan(t):\n return Deployment(units=())\n",
            ": the plan has no control-plane",
        ),
        (GOOD.replace("BROKER)", "'http://{address:w}')"), ": the workers would dial w, which is no unit"),
        (GOOD.replace("*executors(topology), ", ""), ": workers would look for an engine at the broker, and"),
        (
            GOOD.replace("executors(topology)", "executors(topology, hosts=['mars'])"),
            ": executor-1 is to be on mars, which is no host of the file",
        ),
        (
            GOOD.replace(
                "(topology),", "(topology, '--listen={listen}', '--to={address:executor-1}'),", 2
            ).replace(
                "central(topology, '--listen={listen}', '--to={address:executor-1}')", "central(topology)"
            ),
            ": the addresses of the plan go in a circle: executor-1 → executor-1",
        ),
    ],
)
def test_a_plugin_that_is_no_good_is_refused_in_a_sentence_that_says_where(
    plugin: Plugin, source: str, sentence: str
) -> None:
    assert plugin.refused(source).startswith(sentence)
