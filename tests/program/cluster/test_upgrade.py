"""A machine that joined by ticket, and the cluster's own program."""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster
from tests.harness.places import ZIPAPP
from tests.harness.program import Mvmci, assert_sentence
from tests.harness.waiting import until

FIRST_WORDS = b"mvmci: a zip archive"
OTHER_BUILD = FIRST_WORDS.upper()


@pytest.fixture
def elsewhere(program: Mvmci, tmp_path: Path) -> Iterator[Mvmci]:
    """Another machine, with another build."""
    file = tmp_path / "elsewhere" / "mvmci.pyz"
    file.parent.mkdir()
    ours = ZIPAPP.read_bytes()
    assert ours.count(FIRST_WORDS) == 1
    file.write_bytes(ours.replace(FIRST_WORDS, OTHER_BUILD))
    file.chmod(0o755)
    there = dataclasses.replace(program, zipapp=file, state=tmp_path / "elsewhere" / "state")
    yield there
    there.assert_nothing_runs()


def test_a_machine_that_joined_is_told_and_upgrades_itself(demo: Cluster, elsewhere: Mvmci) -> None:
    file, ours = elsewhere.zipapp, ZIPAPP.read_bytes()
    theirs = file.read_bytes()
    ticket = shutil.copy(demo.folder / "ticket", elsewhere.state.parent / "ticket")
    worker = elsewhere.start("worker", "--join", f"@{ticket}", "--name", "extra", "--slots", "1")
    until(lambda: "extra" in demo.units())
    assert "mvmci upgrade" in demo.units()["extra"]["reason"]
    assert_sentence(elsewhere("upgrade"), 2, "demo offers no program")
    demo.up()
    worker.signal(signal.SIGTERM)
    worker.end()
    worker = elsewhere.start("worker", "--cluster", "demo", "--name", "extra", "--slots", "1")
    until(lambda: b"runs another build" in worker.said("err"), lambda: worker.said("err"))
    done = elsewhere("upgrade", "--check")
    assert done.code == 3
    assert file.read_bytes() == theirs
    done = elsewhere("upgrade")
    assert done.code == 0, done
    assert file.read_bytes() == ours
    assert file.stat().st_mode & 0o777 == 0o755
    assert file.with_name("mvmci.pyz.old").read_bytes() == theirs
    assert {path.name for path in file.parent.iterdir()} == {"mvmci.pyz", "mvmci.pyz.old", "state", "ticket"}
    assert elsewhere("upgrade", "--check").code == 0
    taken = elsewhere.state / "demo" / "program.json"
    offer = taken.read_text()
    taken.write_text(re.sub(r'"at":(\d+)', r'"at":1\1', offer))  # a later one, once upon a time
    assert_sentence(elsewhere("upgrade"), 7, "this machine had one of")
    taken.write_text(offer)
    worker.signal(signal.SIGTERM)
    worker.end()
    worker = elsewhere.start("worker", "--cluster", "demo", "--name", "extra", "--slots", "1")
    until(lambda: demo.units().get("extra", {}).get("reason", "-") is None)
    worker.signal(signal.SIGTERM)
    worker.end()

    assert elsewhere("upgrade", "--undo").code == 0
    assert (file.read_bytes(), file.with_name("mvmci.pyz.old").read_bytes()) == (theirs, ours)


def test_a_machine_that_knows_no_cluster_gets_a_sentence(elsewhere: Mvmci) -> None:
    assert_sentence(elsewhere("upgrade"), 6, "no cluster is known here")
    assert_sentence(elsewhere("upgrade", "--undo"), 2, "mvmci.pyz.old to put back")
