"""What the engine is asked, by its command line."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from mvmci.runtimes.compose.docker import last_exit
from tests.harness.docker import Docker
from tests.harness.waiting import until_true

STATE = "{{.State.Status}} {{.RestartCount}}"
ENDS_ONCE = "test -e /ended || { touch /ended; exit 7; }; exec sleep 600"


@pytest.fixture
def ended_once(docker: Docker) -> Iterator[str]:
    """A container that ends once, with exit code 7, and is started again."""
    name = f"mvmci-test-{uuid.uuid4().hex[:8]}"
    docker("run", "-d", "--name", name, "--restart", "unless-stopped", docker.base, "sh", "-c", ENDS_ONCE)
    yield name
    docker("rm", "-f", name)


@pytest.mark.parametrize("_", range(3))  # one of them may be at the very end of its second
async def test_how_one_ended_that_runs_again_is_told_at_once(docker: Docker, ended_once: str, _: int) -> None:
    await until_true(lambda: docker("inspect", "-f", STATE, ended_once) == "running 1\n")
    assert await last_exit(ended_once) == 7
