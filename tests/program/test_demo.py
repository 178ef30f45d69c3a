"""What the README promises to a newcomer: the demo, and every command that it shows."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from mvmci.cli import cli
from tests.harness.places import ROOT

DEMO_S_MAX = 900  # for one that hangs: it takes a minute


def test_the_demo_kills_a_worker_and_every_effect_happens_once() -> None:
    demo = subprocess.run(
        ["sh", "examples/demo.sh"], cwd=ROOT, capture_output=True, text=True, timeout=DEMO_S_MAX
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    for line in ("GET /build: 1 time", "POST /reports: 1 time", "PUT /builds/42: 1 time", "identical"):
        assert f"{line}\n" in demo.stdout
    killed, others = (
        re.findall(rf"{words}(worker-[0-9])", demo.stdout)
        for words in ("-- kill -9 of ", "epoch 2, recovered, ")
    )
    assert len(killed) == len(others) == 1
    assert killed != others
    assert "demo is down" in demo.stdout


def commands(document: Path) -> list[str]:
    """The `mvmci …` commands of a document, lines that end in a backslash joined."""
    text = document.read_text().replace("\\\n", " ")
    found = re.findall(r"^\s*(?:\$ )?(?:dist/)?mvmci(?:\.pyz)? (.+)$", text, re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in found]


DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "jobs.md", *sorted((ROOT / "examples").glob("*/README.md"))]
SHOWN = [(path, line) for path in DOCUMENTS for line in commands(path)]


def test_the_documents_show_commands() -> None:
    assert {path for path, _ in SHOWN} == set(DOCUMENTS)


@pytest.mark.parametrize(("document", "line"), SHOWN, ids=[line[:40] for _, line in SHOWN])
def test_every_command_that_a_document_shows_is_understood(document: Path, line: str) -> None:
    arguments = [word for word in shlex.split(line) if word != "…"]
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    shown = CliRunner().invoke(cli, [*options, "--help"])
    assert shown.exit_code == 0, f"{document.name}: {line}: {shown.output}"
    for option in options:
        if option.startswith("--"):
            assert option in shown.output, f"{document.name}: {line}"
