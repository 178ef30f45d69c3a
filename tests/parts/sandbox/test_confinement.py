"""What native code in a slot can reach, layer by layer; and that nothing outlives its parent."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mvmci.errors import MvmciError
from mvmci.sandbox import confinement, frames
from mvmci.sandbox.confinement import LAYERS, LEVELS, Profile, level
from mvmci.sandbox.forkserver import ForkServer, ForkServerDied, SlotDied

THIEF = "tests.parts.sandbox.thief:run"
DATA_BYTES = 512 << 20
ALWAYS = LAYERS | {"rlimits"}

# Each attempt, and the layers any one of which refuses it. `rlimits` and `no-new-privs` are always there.
REFUSED_BY: dict[str, set[str]] = {
    "read a file of the world's": {"landlock"},
    "list the root": {"landlock"},
    "read the parent's environment": {"landlock", "uid"},
    "read another slot's file": {"landlock", "uid"},
    "leave its directory by ..": {"landlock", "uid"},
    "write into another slot's directory": {"landlock", "uid"},
    "write beside its directory": {"landlock", "uid"},
    "signal the parent": {"landlock 6", "seccomp", "uid"},
    "signal another slot": {"landlock 6", "seccomp", "uid"},
    "signal a thread of another slot": {"landlock 6", "seccomp", "uid"},
    "have the kernel signal the parent": {"seccomp"},
    "trace another slot": {"seccomp", "uid", "landlock"},
    "trace the parent": {"seccomp", "uid", "landlock"},
    "make a socket": {"seccomp"},
    "make a local socket": {"seccomp"},
    "connect to the host": {"seccomp", "namespace", "landlock 4"},
    "fork": {"seccomp", "uid"},
    "clone": {"seccomp", "uid"},
    "mount": {"no-new-privs"},
    "set up io_uring": {"seccomp"},
    "take a pidfd": {"seccomp"},
    "raise its limits": {"no-new-privs"},
    "become root": {"uid"},
    "use more memory": {"rlimits"},
    "use memory that no limit counts": {"seccomp"},
    "make a file in memory": {"seccomp"},
    "make a large file": {"rlimits"},
    "leave a namespace": {"seccomp"},  # late: whoever did has other rights
    "run another program": {"landlock", "seccomp"},
}
# What a thief who is not held back does: it shows that the attempts are real.
CONTROLS = {
    "read a file of the world's",
    "make a socket",
    "fork",
    "have the kernel signal the parent",
    "take a pidfd",
    "leave a namespace",
    "signal the parent",
    "read another slot's file",
    "connect to the host",
}
WITHOUT = [
    frozenset[str](),
    frozenset({"landlock"}),
    frozenset({"seccomp"}),
    frozenset({"uid"}),
    frozenset({"landlock", "seccomp"}),
    *[LAYERS - {layer} for layer in sorted(LAYERS)],
    LAYERS,
]


def landlock_abi() -> int:
    libc = ctypes.CDLL(None)
    return int(libc.syscall(confinement.LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


async def steal(forkserver: ForkServer, root: Path, attempts: list[str], port: int = 0) -> dict[str, str]:
    """The thief's outcomes; an attempt that ends its process is `done`."""
    for index, name in enumerate(("mine", "other")):
        (root / name).mkdir(mode=0o700, exist_ok=True)
        uid = forkserver.slot_uid(index)
        if uid is not None:
            os.chown(root / name, uid, uid)
    (root / "other" / "secret").write_text("secret")
    other = await forkserver.fork(Profile(name="workflow", uid=forkserver.slot_uid(1)))
    victims = {"attempts": attempts, "parent": os.getpid(), "slot": other.pid, "port": port}
    (root / "thief.json").write_text(json.dumps(victims))
    profile = Profile(
        name="probe",
        uid=forkserver.slot_uid(0),
        readable=("thief.json",),
        writable=("mine",),
        data_bytes=DATA_BYTES,
    )
    child = await forkserver.fork(profile)
    try:
        ended = await child.receive()
        assert isinstance(ended, frames.Ended)
        return json.loads(ended.text)
    except SlotDied as died:
        return dict.fromkeys(attempts, f"done: {died}")
    finally:
        await child.close()
        await other.close()


@pytest.mark.parametrize("without", WITHOUT, ids=lambda layers: "without " + "+".join(sorted(layers)))
async def test_a_thief_is_refused_whatever_a_layer_that_is_there_denies(start, root, without):
    forkserver = await start(without=without, probe=THIEF)
    present = ALWAYS - without | {"no-new-privs"} | ({"namespace"} & forkserver.features)
    if "uid" not in forkserver.features:
        present -= {"uid"}
    if "network" not in forkserver.features:
        present -= {"namespace"}
    if "landlock" in present:
        present |= {f"landlock {n}" for n in range(landlock_abi() + 1)}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcomes = await steal(forkserver, root, [n for n in REFUSED_BY if n != "run another program"], port)
    outcomes |= await steal(forkserver, root, ["run another program"])
    held = {name for name, layers in REFUSED_BY.items() if layers & present}
    assert {name: outcomes[name] for name in held if not outcomes[name].startswith("refused")} == {}
    if without == LAYERS:
        # The limit on processes does not bind root, and does bind others.
        controls = CONTROLS if os.geteuid() == 0 else CONTROLS - {"fork"}
        assert {name: outcomes[name] for name in controls if not outcomes[name].startswith("done")} == {}


async def test_a_slot_has_its_directory_no_environment_and_no_descriptor_beyond_its_own(start, root):
    forkserver = await start(probe=THIEF)
    names = ["use its own directory", "dump its environment", "list its descriptors"]
    outcomes = await steal(forkserver, root, names)
    assert outcomes["use its own directory"] == "done: wrote 1 bytes"
    assert set(json.loads(outcomes["dump its environment"].removeprefix("done: "))) <= {
        "TOKIO_WORKER_THREADS",
        "LC_CTYPE",
    }
    assert json.loads(outcomes["list its descriptors"].removeprefix("done: ")) == [0, 1, 2, 3, 4]


async def test_a_program_with_threads_may_start_them_and_no_process(start, root):
    forkserver = await start(probe="tests.parts.sandbox.threads:run")
    child = await forkserver.fork(Profile(name="probe", uid=forkserver.slot_uid(0), threads=True))
    ended = await child.receive()
    await child.close()
    assert json.loads(ended.text) == {"thread": "ran", "fork": "PermissionError", "vfork": "PermissionError"}


@pytest.mark.usefixtures("needs_root")
async def test_root_on_a_host_with_everything_is_isolated(forkserver):
    assert forkserver.isolation == "isolated"
    assert forkserver.features == {"uid", "no-new-privs", "rlimits", "landlock", "seccomp", "network"}


async def test_a_layer_that_is_left_out_is_not_reported(start):
    for layer, feature in (("landlock", "landlock"), ("seccomp", "seccomp"), ("namespace", "network")):
        forkserver = await start(without=frozenset({layer}))
        assert feature not in forkserver.features


def test_levels_are_ordered_by_what_they_deny():
    base = frozenset({"no-new-privs", "rlimits"})
    assert level(base | {"uid", "network"}) == "process"
    assert level(base | {"landlock"}) == level(base | {"seccomp", "uid"}) == "filtered"
    assert level(base | {"landlock", "seccomp"}) == level(base | {"landlock", "seccomp", "uid"}) == "confined"
    assert level(base | {"landlock", "seccomp", "uid", "network"}) == "isolated"
    assert LEVELS == ("process", "filtered", "confined", "isolated")


HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("column", [0, 1], ids=list(HEADERS))
def test_the_numbers_of_system_calls_are_those_of_the_kernel_headers(column):
    header = list(HEADERS.values())[column]
    if not header.exists():
        pytest.skip(f"{header} is not installed")
    words = [line.split() for line in header.read_text().splitlines() if line.startswith("#define __NR")]
    numeric = [word for word in words if len(word) > 2 and word[2].isdigit()]
    numbers = {word[1].removeprefix("__NR_").removeprefix("__NR3264_"): word[2] for word in numeric}
    numbers.setdefault("newfstatat", numbers.get("fstatat", ""))
    calls = confinement._CALLS | confinement._GUARDED
    wrong = {n: v[column] for n, v in calls.items() if v[column] >= 0 and numbers.get(n) != str(v[column])}
    assert wrong == {}


# ---- nothing outlives its parent


async def ended(*pidfds: int) -> None:
    """Until every one of the processes is gone."""
    loop = asyncio.get_running_loop()
    for pidfd in pidfds:
        gone = asyncio.Event()
        loop.add_reader(pidfd, gone.set)
        async with asyncio.timeout(30):
            await gone.wait()
        loop.remove_reader(pidfd)
        os.close(pidfd)


async def test_no_slot_outlives_its_fork_server(start):
    forkserver = await start()
    children = [await forkserver.fork(Profile(name="workflow", uid=forkserver.slot_uid(i))) for i in range(3)]
    pidfds = [os.pidfd_open(child.pid) for child in children]
    os.kill(forkserver._process.pid, signal.SIGKILL)
    await ended(*pidfds)
    for child in children:
        with pytest.raises(SlotDied, match="SIGKILL"):
            await child.receive()
    with pytest.raises(ForkServerDied, match="zygote ended"):
        await forkserver.fork(Profile(name="workflow"))


async def test_a_slot_that_is_just_being_forked_does_not_outlive_its_fork_server_either(start):
    for _ in range(8):
        forkserver = await start()
        children = [
            await forkserver.fork(Profile(name="workflow", uid=forkserver.slot_uid(i))) for i in range(4)
        ]
        forkserver._process.kill()
        async with asyncio.timeout(30):
            for child in children:
                await child.wait()


PARENT = """
import asyncio, sys
from pathlib import Path
from mvmci.sandbox.forkserver import ForkServer
from mvmci.sandbox.confinement import Profile
async def main():
    forkserver = await ForkServer.start(Path(sys.argv[1]))
    children = [await forkserver.fork(Profile(name="workflow", uid=forkserver.slot_uid(i))) for i in range(3)]
    print(forkserver._process.pid, *[child.pid for child in children], flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_neither_fork_server_nor_slots_outlive_their_parent(root):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(root), stdout=subprocess.PIPE, env=environment
    )
    line = await process.stdout.readline()
    pidfds = [os.pidfd_open(int(pid)) for pid in line.split()]
    assert len(pidfds) == 4
    process.kill()
    await process.wait()
    await ended(*pidfds)


async def test_a_child_ends_when_its_parent_lets_go_of_the_socket(forkserver):
    child = await forkserver.fork(Profile(name="workflow", uid=forkserver.slot_uid(0)))
    child.disconnect()
    assert await child.wait() == 0


async def test_closing_a_fork_server_leaves_nothing(start):
    forkserver = await start()
    children = [await forkserver.fork(Profile(name="workflow", uid=forkserver.slot_uid(i))) for i in range(3)]
    pidfds = [os.pidfd_open(pid) for pid in (forkserver._process.pid, *[child.pid for child in children])]
    await forkserver.close()
    assert all(select.select([pidfd], [], [], 0)[0] for pidfd in pidfds)
    for pidfd in pidfds:
        os.close(pidfd)


async def test_nurseries_leave_no_descriptor_behind(root):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        forkserver = await ForkServer.start(root)
        await forkserver.fork(Profile(name="workflow", uid=forkserver.slot_uid(0)))
        await forkserver.close()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_fork_server_that_cannot_start_says_why_in_one_sentence(tmp_path):
    with pytest.raises(MvmciError) as failed:
        await ForkServer.start(tmp_path, probe="tests.parts.sandbox.absent:run")
    assert "tests.parts.sandbox.absent" in failed.value.message
    assert "\n" not in failed.value.message


async def test_a_slot_that_cannot_be_confined_never_runs(forkserver):
    child = await forkserver.fork(Profile(name="workflow", uid=forkserver.slot_uid(0), readable=("absent",)))
    with pytest.raises(SlotDied, match="could not be confined"):
        await child.receive()
    await child.close()
