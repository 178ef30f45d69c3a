"""The accesses that are installed, and the plans that they make of a cluster file.

Ours are found by entry point like anybody's. A file can also name a plan function of its own, in
`plugin`; that is code, and runs with the rights of whoever calls `up` or `plan`. Neither is believed:
what it returns is checked, and what goes wrong in it is said in a sentence.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.resources
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvmci.cluster.deployment import Deployment, check_deployment, hosts_of
from mvmci.cluster.topology import Topology
from mvmci.errors import Usage

GROUP = "mvmci.topologies"  # the entry points that give plan functions
PLUGIN = "mvmci_plugin"  # the module's name that a plugin runs under
_REASON_CHARS_MAX = 300

PlanFunction = Callable[[Topology], Deployment]


@dataclass(frozen=True)
class Access:
    """A way for workers to reach an engine, as some package offers it."""

    name: str
    entry: importlib.metadata.EntryPoint
    rival: importlib.metadata.EntryPoint | None = None  # of the same name, from another package

    def load(self) -> PlanFunction:
        """Its plan function. Raises Usage."""
        if self.rival is not None:
            raise Usage(
                f"access {self.name} is there twice: {self.entry.value} and {self.rival.value}",
                hint="remove one of the two packages, or name a plan function with `plugin`",
            )
        try:
            return _callable(self.entry.load(), f"access {self.name} ({self.entry.value})")
        except Exception as error:
            if isinstance(error, Usage):
                raise
            raise Usage(
                f"access {self.name} ({self.entry.value}) cannot be loaded: {_said(error)}",
                hint="the package that offers it is broken, or of another version",
            ) from error

    @property
    def about(self) -> str:
        """What it is for: the first line of its module."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self.load()
        except Usage as error:
            return error.message
        return (sys.modules[self.entry.module].__doc__ or "").strip().partition("\n")[0]

    @property
    def example(self) -> str | None:
        """The cluster file that lies beside its module; None where there is none."""
        package = self.entry.module.rpartition(".")[0] or self.entry.module
        try:
            return importlib.resources.files(package).joinpath(f"{self.name}.yaml").read_text()
        except (OSError, ImportError):
            return None


@functools.cache
def accesses() -> dict[str, Access]:
    """All that are installed, by name."""
    found: dict[str, Access] = {}
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        first = found.setdefault(entry.name, Access(entry.name, entry))
        if first.entry.value != entry.value:
            found[entry.name] = Access(entry.name, first.entry, entry)
    return found


def find_access(name: str) -> Access:
    """The one of that name. Raises Usage."""
    if name not in accesses():
        raise Usage(f"access {name} is not installed", hint=f"there is {', '.join(accesses())}")
    return accesses()[name]


def deployment_of(found: Topology, file: Path) -> Deployment:
    """The plan of the cluster that `file` says, not yet resolved. Raises Usage."""
    # What a plan function prints is talk: stdout is for what the verb says.
    with contextlib.redirect_stdout(sys.stderr):
        if found.plugin is not None:
            path = file.parent / Path(found.plugin).expanduser()
            return _checked(_plugin(path), found, str(path), path)
        return _checked(find_access(found.access).load(), found, f"access {found.access}", None)


def _plugin(path: Path) -> PlanFunction:
    """The function `plan` of the Python file at `path`. Raises Usage."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise Usage(f"{path}, which `plugin` names, cannot be read: {error.strerror}") from None
    module = sys.modules[PLUGIN] = types.ModuleType(PLUGIN)
    try:
        code = compile(source, str(path), "exec", dont_inherit=True)
        exec(code, module.__dict__)  # noqa: S102 (the user asked for it)
    except (Exception, SystemExit) as error:
        raise Usage(f"{_where(path, error)}: the plugin cannot be loaded: {_said(error)}") from error
    return _callable(getattr(module, "plan", None), str(path))


def _callable(plan: Any, where: str) -> PlanFunction:
    if not callable(plan):
        raise Usage(f"{where} has no function `plan`", hint="def plan(topology): return Deployment(units=…)")
    function: PlanFunction = plan
    return function


def _checked(function: PlanFunction, found: Topology, where: str, path: Path | None) -> Deployment:
    """What `function` makes of `found`, where a cluster can come of it. `where` begins what is said."""
    try:
        plan: Any = function(found)
    except (Exception, SystemExit) as error:
        place = _where(path, error) if path is not None else where
        raise Usage(f"{place}: the plan function raised {_said(error)}") from error
    if not isinstance(plan, Deployment):
        raise Usage(
            f"{where}: the plan function returned {type(plan).__name__}, not a Deployment",
            hint="from mvmci.cluster.deployment import Deployment",
        )
    try:
        check_deployment(plan, hosts_of(found))
    except Usage as error:
        raise Usage(f"{where}: {error.message}", hint=error.hint) from None
    return plan


def _where(path: Path, error: BaseException) -> str:
    """The file, and the line in it at which things went wrong."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f"{path}:{lines[-1]}" if lines and lines[-1] else str(path)


def _said(error: BaseException) -> str:
    """What `error` is, in one line."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"[:_REASON_CHARS_MAX].removesuffix(": ")
