"""The agent as a process: whoever asked it may be gone at any moment."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from mvmci.runtimes.local.agent import Answer, Observe, Request
from tests.harness.places import ROOT
from tests.harness.waiting import LONG_S

QUICK = """
from mvmci.cli import main
from mvmci.runtimes.local import agent

agent.SILENT_S = 0.2
main()
"""
ASK = msgspec.json.encode(Request(id=1, ask=Observe())) + b"\n"


@pytest.mark.parametrize("unanswered", [0, 200])
def test_who_goes_without_hearing_its_answers_ends_it_quietly(tmp_path: Path, unanswered: int) -> None:
    """One socket is both of its streams, as with sshd."""
    ours, its = socket.socketpair()
    command = [sys.executable, "-m", "mvmci", "host", "--cluster", "demo", "--state", str(tmp_path / "state")]
    with subprocess.Popen(command, cwd=ROOT, stdin=its, stdout=its, stderr=subprocess.PIPE) as agent:
        its.close()
        with ours:
            ours.sendall(ASK)
            with ours.makefile("rb") as answers:
                assert msgspec.json.decode(answers.readline(), type=Answer).last
            ours.sendall(ASK * unanswered)
        said = agent.communicate(timeout=LONG_S)[1]
        assert (agent.returncode, said) == (0, b"")


def test_one_whose_answers_nobody_takes_ends_when_nothing_is_asked_any_more(tmp_path: Path) -> None:
    """Who asked hangs, or its network does: sshd keeps the streams open for long."""
    ours, its = socket.socketpair()
    its.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ours.sendall(ASK * 2000)  # it has all of them as it begins, however slow we are
    words = ["host", "--cluster", "demo", "--state", str(tmp_path / "state")]
    command = [sys.executable, "-c", QUICK, *words]
    with subprocess.Popen(command, cwd=ROOT, stdin=its, stdout=its, stderr=subprocess.PIPE) as agent:
        its.close()
        with ours:
            said = agent.communicate(timeout=LONG_S)[1]
        assert (agent.returncode, said) == (0, b"")
