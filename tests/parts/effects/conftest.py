"""What the tests of effects share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def root() -> None:
    """Skips without root, and fails in CI."""
    if os.geteuid() != 0:
        if os.environ.get("CI") == "true":
            pytest.fail("this test needs root")
        pytest.skip("needs root")
