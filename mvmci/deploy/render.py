"""A cluster file as a folder for somebody else to start, with keys of the folder's own; or as the services
that systemd has on its hosts, to look at.

DIR/                 `mvmci.runtimes.compose.render`
DIR/state/<cluster>  what `up` would keep of the cluster: keys, and where its broker is. With `--state`,
                     every verb finds the cluster there
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from mvmci.cluster.deployment import LOCAL_HOST
from mvmci.cluster.topology import HostSection
from mvmci.deploy.access import deployment_of
from mvmci.deploy.plan import configs_of, external_of, placed, read_file, settings_of
from mvmci.deploy.state import ClusterState
from mvmci.deploy.up import make_keys
from mvmci.runtimes.compose import render
from mvmci.runtimes.local.service import SYSTEM_UNITS, USER_UNITS, Service, service_name, service_text
from mvmci.runtimes.ssh.target import own_name
from mvmci.system.processes import program_digest, program_file, this_program

RUNTIME = "compose"
PYTHON = "/usr/bin/python3"  # where `up` finds none that fits better


async def render_compose(file: Path, output: Path | None) -> Path:
    """Render the cluster of `file` into `output`, or a folder with its name; which that is.

    Raises BadTopology, Usage, LockHeld.
    """
    _, found = read_file(file)
    folder = (output or Path(found.cluster)).resolve()
    program_file()  # that goes into images
    external = external_of(found, file)
    state = ClusterState(folder / "state", found.cluster)
    runtime = state.runtime(RUNTIME)
    deployment = await placed(deployment_of(found, file), runtime, tls=external is None)
    state.check_version()
    state.check_keys()
    with state.lock():
        authority, facts = make_keys(state, found, deployment, external, runtime, RUNTIME)
        state.keep_facts(facts)
        who = external or authority
        wanted = render.Wanted(
            cluster=found.cluster,
            units=tuple(configs_of(deployment, found, runtime, (), who, facts.broker)),
            queues=found.queues,
            compose=found.compose,
            settings=settings_of(found, deployment.engine),
        )
        render.render(folder, authority, wanted)
    return folder


def render_systemd(file: Path, state: Path) -> dict[str, tuple[Path, str]]:
    """What systemd is given on each host of the cluster of `file`: which file, and its text.

    Where that depends on the host it is what is usual: its Python, and whether there is a systemd at all.
    Raises BadTopology, Usage.
    """
    _, found = read_file(file)
    hosts = {name: host for name, host in found.hosts.items() if host.state == "present"}
    if found.runtime != "ssh" or not hosts:
        kind: Literal["system", "user"] = "user" if os.geteuid() else "system"
        here = Service(kind, state.absolute(), found.cluster)
        return {LOCAL_HOST: (here.file, service_text(this_program(), here.root, found.cluster, kind))}
    return {name: _service(host, found.cluster) for name, host in hosts.items() if host.service != "none"}


def _service(host: HostSection, cluster: str) -> tuple[Path, str]:
    user = host.user or own_name()
    is_root, home = user == "root", Path("/root" if user == "root" else f"/home/{user}")
    kind: Literal["system", "user"] = "system" if is_root and host.service != "user" else "user"
    usual = Path("/var/lib/mvmci") if is_root else home / ".local/state/mvmci"
    root = Path(host.directory) if host.directory else usual
    program = [host.python or PYTHON, "-I", str(root / "bin" / f"{program_digest()}.pyz")]
    folder = SYSTEM_UNITS if kind == "system" else home / USER_UNITS
    return folder / service_name(cluster), service_text(program, root, cluster, kind)
