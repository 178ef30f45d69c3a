"""The WASI tests of Node.js, 25 programs in C that check themselves, under wasmtime alone and under mvmci.

They are run as the suite has them, compiled by another toolchain than ours. What the suite says a
program prints and how it ends is checked as well: without that, two sides that cannot even start a
program would agree. The suite was made for another runtime, and with its `/sandbox` as the root;
`OTHERWISE` names the programs that therefore find what they do not want, on both sides alike. Its links
lead where that runtime's own rules let them; here they are laid out by those of POSIX.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.foreign.conftest import Fetched
from tests.foreign.sides import Case, Outcome, Sides

ABORTED = "trap: wasm `unreachable` instruction executed"
HELLO = b"hello from input.txt"

# name: what the suite expects on stdout
PLAIN = {
    "cant_dotdot": b"",
    "clock_getres": b"",
    "exitcode": b"",
    "fd_prestat_get_refresh": b"",
    "freopen": b"hello from input2.txt\n",
    "ftruncate": b"",
    "getentropy": b"",
    "getrusage": b"",
    "gettimeofday": b"",
    "main_args": b"",
    "notdir": b"",
    "poll": b"",
    "preopen_populates": b"",
    "read_file": HELLO + b"\n",
    "read_file_twice": (HELLO + b"\n") * 2,
    "readdir": b"",
    "sock": b"",
    "stat": b"",
    "stdin": b"hello world",
    "write_file": b"",
}
LINKS = {
    "create_symlink": HELLO,
    "follow_symlink": HELLO,
    "link": b"",
    "symlink_escape": b"",
    "symlink_loop": b"",
}
WANTED = PLAIN | LINKS
EXITS = {"exitcode": "exit: 120"}
# Programs that end in a failed assertion under wasmtime, and so must under mvmci.
OTHERWISE = {
    "cant_dotdot": "/sandbox/.. is still inside of what the program may see",
    "clock_getres": "wasmtime has no clocks of processor time",
    "create_symlink": "it wants the length of a link to be one more than it is, as Node.js had it",
    "getrusage": "wasmtime has no clocks of processor time",
    "poll": "wasmtime does not tell of the end of standard input as a hang-up",
    "readdir": "wasmtime lists `.` and `..` too",
    "symlink_escape": "the link's target is still inside of what the program may see",
}


def case(name: str, folder: Path, module: Path) -> Case:
    """What the suite's own scripts give to the program `name`."""
    links: dict[str, str] = {}
    files: dict[str, bytes | Path] = {"sandbox/subdir/.keep": b""}
    if name in PLAIN:
        files |= {f"sandbox/{path.name}": path for path in (folder / "fixtures" / "wasi").iterdir()}
    else:
        files |= {"sandbox/input.txt": HELLO, "outside.txt": b"this should be inaccessible"}
        links = {"input_link.txt": "../input.txt", "outside.txt": "../../outside.txt"}
        links |= {"loop1": "loop2", "loop2": "loop1"}
    return Case(
        module=module,
        args=("-bar", "--baz=value"),
        env=(("NODE_PLATFORM", "linux"),),
        stdin=b"hello world" if name == "stdin" else None,
        files=files,
        links={f"sandbox/subdir/{link}": to for link, to in links.items()},
        leaves=name in LINKS,
    )


@pytest.fixture(scope="module")
def outcomes(fetched: Fetched, sides: Sides) -> dict[str, tuple[Outcome, Outcome]]:
    """What each program did on both sides. They run side by side, each with a state of its own."""
    folder = fetched("node-wasi")

    def run(name: str) -> tuple[Outcome, Outcome]:
        module = sides.folder / name / "foo"  # what one of them expects to be called
        module.parent.mkdir()
        shutil.copy(folder / "wasi" / "wasm" / f"{name}.wasm", module)
        return sides.both(case(name, folder, module), state=f"state-{name}")

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(WANTED, pool.map(run, WANTED), strict=True))


@pytest.mark.parametrize("name", WANTED)
def test_a_program_of_the_suite_behaves_as_under_wasmtime_alone(
    name: str, outcomes: dict[str, tuple[Outcome, Outcome]]
) -> None:
    alone, under_mvmci = outcomes[name]
    assert under_mvmci == alone


@pytest.mark.parametrize("name", WANTED)
def test_a_program_of_the_suite_does_what_the_suite_wants(
    name: str, outcomes: dict[str, tuple[Outcome, Outcome]]
) -> None:
    _, outcome = outcomes[name]
    if name in OTHERWISE:
        assert outcome.ended == ABORTED
        assert b"Assertion failed" in outcome.stderr
    else:
        assert (outcome.ended, outcome.stdout) == (EXITS.get(name, "exit: 0"), WANTED[name])
