"""The shape of the source: one strict order, one module for each big library, nothing heavy too early."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.places import ROOT

PACKAGE = ROOT / "mvmci"

# From low to high: whatever stands in a line imports only what stands in lines before it, and itself. A name
# stands for the module or the folder with all that is in it. docs/architecture.md draws it.
ORDER = (
    ("errors",),
    ("wire",),
    ("system",),
    ("config",),
    ("jobs",),
    ("cluster",),
    ("engine", "store"),
    ("sandbox",),
    ("stores",),
    ("journals",),
    ("trust",),
    ("engines",),
    ("runtime",),
    ("api",),
    ("roles",),
    ("runtimes",),
    ("deploy",),
    ("bench",),
    ("cli",),
)
RANKS = {name: rank for rank, names in enumerate(ORDER) for name in names}
FACES = {"", "__main__"}  # the package, which imports nothing, and what `python -m mvmci` runs
PURE = {"jobs", "cluster"}

# What `mvmci bench` makes of what it measured.
DECIDING = {
    f"mvmci.bench.{name}"
    for name in (
        "bottleneck", "capacity", "charts", "curves", "figures", "knee", "law", "markup", "page", "report",
        "style", "svg", "table", "verdict",
    )
}  # fmt: skip

# The one module that imports each big library, and what only the command line imports. aiohttp is three
# things: a client for guests, a client of executors, and a server; asyncssh is our keys, connections, and
# what runs through them.
API = {f"mvmci.api.{name}" for name in ("answers", "app", "bodies", "engine", "jobs")}
SSH = {f"mvmci.runtimes.ssh.{name}" for name in ("channel", "connection", "dial", "login")}
OWNERS = {
    "aiohttp": {"mvmci.engines.embedded.effects.http", "mvmci.engines.http", *API},
    "asyncssh": SSH,
    "cryptography": {"mvmci.system.keys"},
    "nats": {"mvmci.stores.nats.link"},
    "prometheus_client": {"mvmci.api.metrics"},
    "uvloop": {"mvmci.roles.unit"},
    "wasmtime": {"mvmci.sandbox.slot", "mvmci.stores.nats.highwayhash"},
    "yaml": {"mvmci.config.strict_yaml"},
}
CLI_ONLY = ["click", "rich"]
HEAVY = ["aiohttp", "asyncssh", "cryptography", "nats", "prometheus_client", "uvloop", "wasmtime"]

# The domain takes no clock, does no I/O and throws no dice.
IMPURE = {
    "asyncio", "fcntl", "glob", "io", "logging", "multiprocessing", "os", "random", "secrets", "select",
    "shutil", "signal", "socket", "sqlite3", "subprocess", "tempfile", "threading", "time", "urllib", "uuid",
}  # fmt: skip
IMPURE_NAMES = {("pathlib", "Path"), ("datetime", "date")}
IMPURE_CALLS = {"now", "today", "utcnow", "open", "print", "input"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    """`sandbox` of `mvmci.sandbox.slot`, empty for `mvmci` itself."""
    return [*module.split("."), ""][1]


def imports(module: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every import, also those inside functions; the name is empty for `import x`."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively; write the name out"
            yield from ((node.module or "", alias.name) for alias in node.names)


def ours(module: str) -> Iterator[str]:
    """The modules of mvmci that `module` imports."""
    for target, name in imports(module):
        if target.split(".")[0] == "mvmci":
            yield f"{target}.{name}" if f"{target}.{name}" in MODULES else target


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) not in FACES])
def test_every_module_has_its_place_and_imports_only_what_stands_before_it(module: str) -> None:
    own = room(module)
    assert own in RANKS, f"{module} has no place; add it to ORDER"
    others = {target for target in ours(module) if room(target) not in {own, ""}}
    assert not {target for target in others if RANKS[room(target)] >= RANKS[own]}


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: {target for target in ours(module) if target != module} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in PURE])
def test_the_domain_is_pure(module: str) -> None:
    found = set(imports(module))
    assert not {target for target, _ in found if target.split(".")[0] in IMPURE}
    assert not found & IMPURE_NAMES
    assert not {target for target in ours(module) if RANKS[room(target)] > RANKS["cluster"]}
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            assert name not in IMPURE_CALLS, f"{module}:{node.lineno} calls {name}()"


@pytest.mark.parametrize("module", sorted(DECIDING))
def test_what_decides_and_what_is_shown_follow_from_figures_alone(module: str) -> None:
    """No clock, no I/O; and dice only of a seed, so that the same figures give the same answer."""
    assert module in MODULES
    assert not {target for target, _ in imports(module)} & (IMPURE - {"random"})


@pytest.mark.parametrize("path", sorted((ROOT / "topologies").glob("*.py")), ids=lambda path: path.stem)
def test_the_accesses_that_ship_import_no_more_than_a_strangers_may(path: Path) -> None:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in nodes} <= {
        "__future__",
        "mvmci.cluster.deployment",
        "mvmci.cluster.topology",
    }


def importers(library: str) -> set[str]:
    return {name for name in MODULES if any(target.split(".")[0] == library for target, _ in imports(name))}


@pytest.mark.parametrize("library", OWNERS)
def test_a_big_library_is_imported_only_where_it_is_named(library: str) -> None:
    assert importers(library) <= OWNERS[library]


def test_only_the_store_speaks_jetstream_and_only_permissions_name_what_it_says() -> None:
    """Whoever wants something of a broker's streams says so to `Cluster`, and names none."""
    said = re.compile(r"\$JS\.|\blink\.api\(|\b(STREAM|CONSUMER)\.|\bmvmci\.stores\.nats\.streams\b")
    where = {name for name, path in MODULES.items() if said.search(path.read_text())}
    assert {name for name in where if not name.startswith("mvmci.stores.nats")} == {"mvmci.trust.permissions"}


@pytest.mark.parametrize("library", CLI_ONLY)
def test_what_faces_a_user_stays_in_the_command_line(library: str) -> None:
    assert {room(module) for module in importers(library)} <= {"cli"}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("mvmci.cli", HEAVY),
        ("mvmci.cli.read", [*HEAVY, "mvmci.engines", "pathspec"]),
        ("mvmci.engines.embedded.engine", ["pathspec"]),
        ("mvmci.roles.worker", ["pathspec", "yaml"]),
        ("mvmci.runtimes.local.supervisor", ["cryptography", "nats", "yaml"]),
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(module: str, heavy: list[str]) -> None:
    """`version` is to work where a library does not; it, verbs that read and units are to be quick."""
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
