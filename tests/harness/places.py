"""Where things are that tests need, and what is to be done where one is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUESTS = ROOT / "dist" / "guests"
EXAMPLES = ROOT / "dist" / "examples"
ZIPAPP = Path(os.environ.get("MVMCI_ZIPAPP", ROOT / "dist" / "mvmci.pyz")).resolve()
IN_CI = os.environ.get("CI") == "true"


def need(condition: object, reason: str) -> None:
    """Skips at home; fails where everything is to be there."""
    if not condition:
        pytest.fail(reason) if IN_CI else pytest.skip(reason)


def guest_path(name: str) -> Path:
    """The guest `name` of `tests/guests`."""
    path = GUESTS / f"{name}.wasm"
    need(path.exists(), "no guests: build them with ./just examples")
    return path
