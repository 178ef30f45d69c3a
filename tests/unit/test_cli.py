"""What all verbs have in common: their options and their tables."""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import os
import signal
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import click
import msgspec
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from rich.console import Console

import mvmci.cli as program
from mvmci.cli import cli
from mvmci.cli.init import HELLO_WASM
from mvmci.cli.metrics import MACHINE_TITLES, TITLES
from mvmci.cli.options import Location, LogLines, Share, make_table
from mvmci.cli.view import unit_table
from mvmci.cluster.identity import Identity, Login, Ticket, encode_ticket
from mvmci.deploy.status import UnitRow
from mvmci.errors import Usage


def commands(command: click.Command = cli) -> Iterator[click.Command]:
    if not isinstance(command, click.Group):
        yield command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from commands(found)


def test_a_variable_means_one_thing() -> None:
    meanings: dict[str, set[str | None]] = defaultdict(set)
    for command in commands():
        for option in command.params:
            if isinstance(option, click.Option) and isinstance(option.envvar, str):
                meanings[option.envvar].add(option.help)
    assert len(meanings) > 40
    assert {name: told for name, told in meanings.items() if len(told) > 1} == {}


def test_help_is_as_wide_as_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    cli.main(["up", "--help"], standalone_mode=False)
    assert 100 < max(map(len, capsys.readouterr().out.splitlines())) <= 160


# ---- Completion


def offered(state: Path, *words: str) -> list[str]:
    """What is offered for the last of `words`, for `--state state`."""
    verb, *rest, incomplete = words
    complete = ShellComplete(cli, {}, "mvmci", "_MVMCI_COMPLETE")
    at = ["--state", str(state)] if verb != "ticket" else []
    return [item.value for item in complete.get_completions([verb, *at, *rest], incomplete)]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state directory of a machine that is a client of two clusters, and has run a job of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("east", "west"):
        (tmp_path / "state" / name / "keys").mkdir(parents=True)
    (tmp_path / "state" / "_local" / "jobs" / "own-1").mkdir(parents=True)
    return tmp_path / "state"


def test_clusters_and_files_are_offered(state: Path, tmp_path: Path) -> None:
    assert offered(state, "ps", "--cluster", "") == ["east", "west"]
    assert offered(state, "ps", "--cluster", "w") == ["west"]
    (state / "west" / "ticket").write_text("")
    (tmp_path / "build.json").write_text("")
    assert offered(state, "worker", "--join", "") == [f"@{state}/west/ticket", "@build.json", "@state/"]
    assert offered(state, "login", "@state/w") == ["@state/west/"]
    assert offered(state, "ticket", "inspect", "@b") == ["@build.json"]
    assert offered(state, "submit", "--input", "@b") == ["@build.json"]
    assert offered(state, "submit", "--input", "{") == []
    complete = ShellComplete(cli, {}, "mvmci", "_MVMCI_COMPLETE")
    for words in (["run"], ["submit"], ["submit", "--stdin"], ["up"], ["validate"]):
        assert [item.type for item in complete.get_completions(words, "dist/")] == ["file"], words


@pytest.mark.parametrize("listens", [False, True])
def test_where_no_broker_answers_nothing_is_offered_and_nothing_said(
    state: Path, listens: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        login = Login(urls=(f"nats://127.0.0.1:{server.getsockname()[1]}",))
        if not listens:
            server.close()
        identity = Identity(cluster="east", unit="a", role="client", login=login)
        (state / "east" / "keys").rmdir()
        (state / "east" / "client.json").write_bytes(msgspec.json.encode(identity))
        at = ["--cluster", "east"]
        assert offered(state, "logs", *at, "") == ["own-1"]
        assert offered(state, "drain", *at, "") == offered(state, "submit", *at, "--queue", "") == []
    assert capfd.readouterr() == ("", "")


def printed(width: int, reason: str) -> list[str]:
    file = io.StringIO()
    row = ("a-job-with-a-long-name-1234567890", "succeeded", "2026-11-30T03:06:52.123Z", reason)
    table = make_table(("ID", "STATUS", "SUBMITTED", "REASON"), [row])
    Console(file=file, width=width, highlight=False).print(table, crop=False)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_in_a_narrow_terminal_only_the_last_column_of_a_table_is_folded() -> None:
    reason = "trap: all of it is there, however narrow"
    title, first, *more = printed(60, reason)
    assert title.split() == ["ID", "STATUS", "SUBMITTED", "REASON"]
    assert first.startswith("a-job-with-a-long-name-1234567890  succeeded  2026-11-30T03:06:52.123Z  trap:")
    assert " ".join([first.partition("Z  ")[2], *(line.strip() for line in more)]) == reason
    assert len(printed(200, reason)) == 2
    assert len(printed(60, "")) == 2


def test_log_lines_begin_with_a_time_as_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        record = logging.LogRecord("a", logging.INFO, "a.py", 1, "it is %s", ("so",), None)
        record.created = 1_700_000_000.25
        assert LogLines().format(record) == "2023-11-14T22:13:20.250Z INFO it is so"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_what_others_wrote_is_shown_and_moves_no_cursor_in_a_table() -> None:
    _, row = printed(200, "trap: \x1b[2J\nforged  succeeded")
    assert row.endswith(r"trap: \x1b[2J\nforged  succeeded")


def test_a_ticket_of_somebody_else_is_shown_and_moves_no_cursor() -> None:
    ticket = Ticket(id="a", cluster="b", role="client", login=Login(urls=("nats://a\x1b[2J",)))
    shown = CliRunner().invoke(cli, ["ticket", "inspect", encode_ticket(ticket)]).output
    assert r"nats://a\x1b[2J" in shown


def test_ps_shows_the_labels_of_units_where_there_are_any() -> None:
    row = UnitRow(name="gpu-1", role="worker", host="a", state="ready", queues=("gpu",))
    table = unit_table([row, msgspec.structs.replace(row, labels={"b": "2", "arch": "arm64"})])
    titles = [column.header for column in table.columns]
    assert list(table.columns[titles.index("LABELS")].cells) == ["", "arch=arm64,b=2"]
    assert "LABELS" not in [column.header for column in unit_table([row]).columns]


@pytest.mark.parametrize(
    ("while_sent", "told"),
    [(False, "interrupted; a was not submitted\n"), (True, "it is unknown whether a was accepted\n")],
)
def test_after_ctrl_c_a_submit_says_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, while_sent: bool, told: str
) -> None:
    async def interrupted(*_: object) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()
        raise AssertionError

    async def kept(_: bytes) -> str:
        return "sha256:" + "0" * 64

    @asynccontextmanager
    async def opened(_: Location) -> AsyncIterator[object]:
        yield SimpleNamespace(blobs=SimpleNamespace(put=kept if while_sent else interrupted))

    # Who runs the tests in the background may have it ignored, and then there is no Ctrl-C.
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
    monkeypatch.setattr(Location, "open", opened)
    monkeypatch.setattr("mvmci.cli.submit.submit", interrupted)
    (tmp_path / "hello.wasm").write_bytes(HELLO_WASM)
    (tmp_path / "state" / "demo").mkdir(parents=True)
    (tmp_path / "state" / "demo" / "client.json").touch()  # a cluster that is known here
    argv = ["submit", f"{tmp_path}/hello.wasm", "--id", "a", "--state", f"{tmp_path}/state"]
    done = CliRunner().invoke(cli, argv, standalone_mode=False)
    assert (done.return_value, done.stdout) == (130, "")
    assert done.stderr.endswith(told)


def test_a_full_disk_is_a_sentence_and_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/state/x")

    monkeypatch.setattr(program.cli, "main", full)
    assert program._run() == 125
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "Error: this machine has no room: No space left on device, at /state/x"
    assert said[1] == "hint: make room, and try again"


@pytest.mark.parametrize(("text", "share"), [("20%", 0.2), ("1", 0.01), (" 100% ", 1.0)])
def test_a_share_is_a_percentage(text: str, share: float) -> None:
    assert Share().convert(text, None, None) == share


@pytest.mark.parametrize("text", ["", "%", "0%", "101%", "-5%", "0.2", "20 %%", "half", "²%"])
def test_what_is_no_share_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not of the form 20%, from 1% to 100%"):
        Share().convert(text, None, None)


@pytest.mark.parametrize(
    "words", [["bench", "--module"], ["ticket", "create", "--uses"], ["submit", "--no-such"]]
)
def test_what_is_typed_wrong_leads_to_the_help_of_its_verb(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["mvmci", *words])
    assert program._run() == 2
    assert f"`mvmci {words[0]}" in capsys.readouterr().err.splitlines()[-1]


def test_each_column_of_metrics_is_explained_by_its_help() -> None:
    said = CliRunner().invoke(cli, ["metrics", "--help"], prog_name="mvmci").output
    for title in {*TITLES, *MACHINE_TITLES} - {"UNIT", "ROLE", "HOST", "MACHINE"}:
        assert f"\n    {title} " in said


def test_a_module_in_the_place_of_a_cluster_file_is_told_from_one(tmp_path: Path) -> None:
    module = tmp_path / "job.wasm"
    module.write_bytes(HELLO_WASM)
    done = CliRunner().invoke(cli, ["bench", str(module), "--state", str(tmp_path / "state")])
    assert isinstance(done.exception, Usage)
    assert "--module" in done.exception.hint
