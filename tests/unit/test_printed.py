"""What a job says reaches a terminal as text on one line; scripts get it as it is."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from mvmci.cli import cli
from mvmci.cli.options import LOCAL_FOLDER, LogLines
from mvmci.cli.view import View, plan_lines
from mvmci.cluster.changes import Action
from mvmci.cluster.deployment import Unit
from mvmci.deploy.status import UnitRow
from mvmci.jobs.job import Artifact, Payload
from mvmci.jobs.journal import AnyRecord, Done, Journal, Lease, Progress, Spec, kind_of
from mvmci.stores import open_folder
from mvmci.system.text import one_line

HOSTILE = "\x1b[2J\x1b[1;1Hgood\r\nforged  command  succeeded\x9b2J\u202egnp\u2066\u2028\x00"
DIGEST = "sha256:" + "0" * 64


def spec(job: str) -> Spec:
    return Spec(
        at=1,
        id=job,
        queue="q",
        kind="command",
        module=DIGEST,
        name=HOSTILE,
        component=False,
        seed=1,
        by=HOSTILE,
    )


async def fill(state: Path) -> None:
    """One job that says what it should not, one that is garbage, and one that is as it should be."""
    store = open_folder("run", state / LOCAL_FOLDER)
    lease = Lease(at=2, epoch=1, unit="run", incarnation="i", run="r", why="first", worker=HOSTILE)
    left = (Artifact(path=HOSTILE, digest=DIGEST, size=1),)
    artifacts = Payload(text=msgspec.json.encode(left).decode())
    done = Done(at=3, status="failed", reason=HOSTILE, artifacts=artifacts, result=Payload(text="not JSON"))
    says: list[list[AnyRecord]] = [
        [spec("hostile")],
        [lease, Progress(at=2, done=1, total=2, message=HOSTILE), done],
    ]
    journal = Journal("hostile")
    for number, records in enumerate(says, 1):
        data = journal.encode(records, f"m{number}")
        await store.journals.append("hostile", kind_of(records), "q", data, expect=number - 1)
        journal.absorb(await store.journals.read("hostile", number - 1))
    await store.journals.append("hostile", "cancel", "q", b"after the end", expect=2)
    await store.journals.append("garbage", "spec", "q", b"\xff garbage", expect=0)
    await store.journals.append("good", "spec", "q", Journal("good").encode([spec("good")], "m"), expect=0)
    (state / LOCAL_FOLDER / "jobs" / "hostile" / "log").write_bytes(b"no piece of output\n")
    await store.close()


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str], Result]:
    asyncio.run(fill(tmp_path))
    return lambda line: CliRunner().invoke(cli, [*line.split(), "--local", "--state", str(tmp_path)])


def assert_plain(text: str, lines: int) -> None:
    assert all(line.isprintable() for line in text.split("\n")), text
    assert len(text.splitlines()) == lines


def test_each_job_is_one_line_of_a_list_whatever_it_says(run: Callable[[str], Result]) -> None:
    found = run("list")
    assert found.exit_code == 0, found.output
    assert sum(" failed " in line for line in found.stdout.splitlines()) == 1
    assert "journal corrupt" in found.stdout
    assert all(line.isprintable() for line in found.stdout.splitlines())
    by_id = {one["id"]: one for one in json.loads(run("list --json").stdout)}
    assert by_id["hostile"]["reason"] == HOSTILE
    assert by_id["hostile"]["result"] == "not JSON"
    assert by_id["garbage"]["status"] == "errored"
    assert set(by_id) == {"hostile", "garbage", "good"}


def test_what_a_job_says_is_escaped_wherever_it_is_told(run: Callable[[str], Result]) -> None:
    assert_plain(run("history hostile").stdout, 5)
    assert_plain(run("artifacts hostile").stdout, 1)
    assert all(line.isprintable() for line in run("status hostile").stdout.splitlines())
    assert json.loads(run("artifacts hostile --json").stdout)[0]["path"] == HOSTILE
    assert run("logs hostile").exit_code == 0


def test_what_no_reader_takes_in_has_a_line_in_the_history(run: Callable[[str], Result]) -> None:
    assert run("history hostile").stdout.splitlines()[-1].endswith("ignored   a message: the job had ended")
    ignored = json.loads(run("history hostile --json").stdout)[-1]
    assert (ignored["record"], ignored["why"], ignored["seq"]) == ("ignored", "the job had ended", 3)


def test_a_line_of_a_log_is_one_line() -> None:
    record = logging.makeLogRecord({"msg": "job %s", "args": (HOSTILE,), "levelname": "INFO"})
    assert LogLines().format(record).isprintable()


@pytest.mark.parametrize("text", ["", "plain", "caf\u00e9 \u65e5\u672c"])
def test_text_stays_text(text: str) -> None:
    assert one_line(text) == text


@pytest.mark.parametrize("says", ["name", "reason"])
def test_nor_does_a_host_write_what_it_likes_while_units_change(
    says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = UnitRow(
        **{"name": "worker-1", "role": "worker", "host": "h1", "state": "down", "pid": 1} | {says: HOSTILE}
    )
    view = View(live=False, err=False)
    for rows in ([row], [msgspec.structs.replace(row, pid=2)], []):
        view.show(rows)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3
    assert all(line.isprintable() for line in shown)


def test_nor_in_a_plan() -> None:
    stop = Action(kind="stop", unit=Unit(name=HOSTILE, role="worker", host="h1"), why=HOSTILE)
    plan: Any = SimpleNamespace(changes=[stop])
    assert all(line.isprintable() for line in plan_lines(plan))
