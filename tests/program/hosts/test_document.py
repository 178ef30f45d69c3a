"""What docs/hosts.md tells a reader to type, typed on machines as it asks for, in its order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.hosts import hosts
from tests.harness.places import ROOT, ZIPAPP, need

PAGE = ROOT / "docs" / "hosts.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WITHIN = "10m"  # the machine may be busy


@pytest.mark.soak
def test_what_the_page_says_is_done_by_what_it_says(tmp_path: Path) -> None:
    need(ZIPAPP.exists(), "no zipapp: build it with ./just zipapp")
    blocks = BLOCK.findall(PAGE.read_text())
    assert len(blocks) >= 6
    with hosts(tmp_path / "hosts") as made:
        made.add(*"abcde", systemd=True)
        home = tmp_path / "home"
        (home / ".ssh").mkdir(0o700, parents=True)
        (home / ".ssh" / "id_ed25519").write_bytes(made.key.read_bytes())
        (home / ".ssh" / "id_ed25519").chmod(0o600)
        (home / "bin").mkdir()
        program = home / "bin" / "mvmci"
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(ZIPAPP))} "$@"\n')
        program.chmod(0o755)
        env = {"PATH": f"{program.parent}:{os.environ['PATH']}", "MVMCI_WITHIN": WITHIN, "HOME": str(home)}
        addresses = {f"10.0.0.{number}": made.hosts[name].address for number, name in enumerate("abcde", 1)}
        said = ""
        for block in blocks:
            for written, real in addresses.items():
                block = re.sub(rf"{re.escape(written)}\b", real, block)
            done = subprocess.run(
                ["bash", "-euc", block],
                cwd=home,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            assert done.returncode == 0, (block, done.stdout)
            said += done.stdout
        for sentence in (
            "farm is ready: a job has run",
            "hello",
            "nothing to change: 7 units of farm are ready",
            "+ start worker-6 on a",
            "* host e is absent",
            "farm is down",
        ):
            assert sentence in said
        for host in made.hosts.values():
            left = [path for path in host.files() if "mvmci" in path]
            assert left == [], (host.name, left)
            assert not [command for command in host.processes().values() if "mvmci" in command]
