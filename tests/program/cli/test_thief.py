"""A guest that wants what is not its own: every attempt is refused, and its output shows it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from tests.harness.program import Mvmci, fresh, steps

Guest = Callable[[str], Path]


def test_every_attempt_of_the_thief_is_refused(mvmci: Mvmci, guest: Guest) -> None:
    done = mvmci("run", guest("thief"))
    *attempts, verdict = done.text.splitlines()
    assert (done.code, verdict) == (0, "nothing stolen")
    assert len(attempts) > 50
    assert [line for line in attempts if not line.startswith("refused ")] == []


def test_another_jobs_workspace_and_the_state_are_out_of_reach(
    mvmci: Mvmci, guest: Guest, tmp_path: Path
) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    owner = mvmci.start("run", guest("sleeper"), "--dir", tmp_path, "--", "50")
    owner.hears("tick 0\n")
    secrets = list((mvmci.state / "_host" / "slots").glob("*/work/secret.txt"))
    assert len(secrets) == 1
    wanted = [secrets[0], mvmci.state / "_host" / "code.key", mvmci.state / "_local" / "version"]
    around = ["../secret.txt", "../../0/work/secret.txt", f"/proc/{owner.pid}/environ", "/tmp/../../lock"]
    done = mvmci("run", guest("thief"), "--", *wanted, *around)
    owner.signal(signal.SIGINT)
    owner.end()
    assert (done.code, done.text.splitlines()[-1]) == (0, "nothing stolen")
    for path in (*wanted, *around):
        assert f"refused read {path}: " in done.text


def test_a_link_in_its_workspace_does_not_help_the_thief(mvmci: Mvmci, guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "inside.txt").write_text("x")
    (tmp_path / "fine").symlink_to("inside.txt")
    done = mvmci("run", guest("thief"), "--dir", tmp_path)
    assert (done.code, done.text.splitlines()[-1]) == (0, "nothing stolen")
    # Its own link, that stays inside, is followed.
    done = mvmci("run", guest("thief"), "--dir", tmp_path, "--", "fine")
    assert (done.code, "STOLEN read fine" in done.text) == (1, True)


def test_a_program_has_neither_our_environment_nor_our_files(mvmci: Mvmci, script: Path) -> None:
    shell = "env; id -u; cat $0 2>&1; touch /etc/stolen 2>&1; true"
    assert mvmci("run", script, "--input", steps()).code == 0
    key = mvmci.state / "_host" / "code.key"
    step = {"exec": {"argv": ["sh", "-c", shell, str(key)]}}
    options = ["--id", fresh("program"), "--allow-exec", "sh"]
    done = mvmci("run", script, *options, "--input", steps(step), SECRET_OF_OURS="secret")
    assert done.code == 0
    (answer,) = done.json
    assert "SECRET_OF_OURS" not in answer["stdout"]
    assert f"HOME={mvmci.home}\n" not in answer["stdout"]
    assert answer["stdout"].count("denied") + answer["stdout"].count("No such file") == 2, answer
