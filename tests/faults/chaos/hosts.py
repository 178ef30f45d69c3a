"""A host that has a network namespace, an empty home, and Python alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.harness.network import Namespace
from tests.harness.program import Mvmci

PYTHONS = (getattr(sys, "_base_executable", sys.executable), "/usr/local/bin/python3", "/usr/bin/python3")
PATH = "/usr/local/bin:/usr/bin:/bin"
NEW_ENOUGH = "import sys; sys.exit(sys.version_info < (3, 11))"


@dataclass(frozen=True)
class Host:
    """A host: `home` is all that it has of its own."""

    namespace: Namespace
    home: Path

    def program(self, zipapp: Path) -> Mvmci:
        """The program there: a copy of `zipapp`, an empty home, and a Python that is not ours."""
        self.home.mkdir(mode=0o700)
        copy = self.home / "mvmci.pyz"
        shutil.copy(zipapp, copy)
        prefix, state = self.namespace.inside, self.home / "state"
        return Mvmci(copy, state, self.home, prefix=prefix, python=python(), env={"PATH": PATH})


def python() -> str:
    """A Python that is not that of the project's environment."""
    for path in PYTHONS:
        found = shutil.which(path)
        if found and subprocess.run([found, "-c", NEW_ENOUGH], check=False).returncode == 0:
            return found
    raise AssertionError("no Python that is new enough is there")
