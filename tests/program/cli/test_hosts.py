"""Hosts as they are: whatever its umask, limits, signals and streams, a verb works or says why."""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.program import Mvmci, steps

Guest = Callable[[str], Path]
PASSABLE = {"_host", "_host/slots", "_host/slots/0", "_host/code"}


def with_umask(program: Mvmci, umask: str, **changes: Path) -> Mvmci:
    prefix = ("sh", "-c", f'umask {umask}; exec "$@"', "sh")
    return dataclasses.replace(program, prefix=prefix, **changes)


@pytest.mark.parametrize("umask", ["077", "000"])
def test_jobs_run_and_nothing_is_open_whatever_the_umask(
    program: Mvmci, script: Path, tmp_path: Path, umask: str
) -> None:
    state = tmp_path / "made" / "state"
    step = {"exec": {"argv": ["sh", "-c", "umask; echo >made"]}}
    done = with_umask(program, umask, state=state)(
        "run", script, "--allow-exec", "sh", "--input", steps(step)
    )
    assert (done.code, done.json[0]["stdout"]) == (0, "0022\n"), done
    for path in (state.parent, state, *state.rglob("*")):
        mode, name = stat.S_IMODE(path.stat().st_mode), str(path.relative_to(state.parent))
        if path.is_dir():
            assert mode == (0o711 if name.partition("/")[2] in PASSABLE else 0o700), name
        else:
            assert mode == (0o444 if path.suffix == ".cwasm" else 0o600), name


def test_a_home_that_is_new_is_not_left_open_by_the_umask(program: Mvmci, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    done = with_umask(program, "000", home=home, state=home / "state")("version")
    assert done.code == 0, done
    assert stat.S_IMODE((home / ".cache").stat().st_mode) == 0o700
