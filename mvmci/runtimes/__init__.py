"""The places where units run: `local`, processes of this machine; `compose`, containers of Docker's; and
`ssh`, processes of other machines.

Their contract is `mvmci.runtime`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mvmci.errors import Usage

if TYPE_CHECKING:
    from mvmci.cluster.topology import HostSection
    from mvmci.runtime import Runtime

RUNTIMES = ("local", "compose", "ssh")  # those of this version


def open_runtime(
    name: str,
    root: Path,
    cluster: str,
    hosts: Mapping[str, HostSection] = {},
    *,
    accept_new_host_keys: bool = False,
) -> Runtime:
    """The runtime `name` of `cluster`, whose state lies in `root`. Raises Usage. Nothing is started.

    `hosts` are those of its file; without them, an `ssh` runtime knows those on which it started something.
    """
    if name == "local":
        from mvmci.runtimes.local.runtime import Local

        return Local(root, cluster)
    if name == "compose":
        from mvmci.runtimes.compose.runtime import Containers

        return Containers(root, cluster)
    if name == "ssh":
        from mvmci.runtimes.ssh.runtime import Ssh

        return Ssh(root, cluster, hosts, accept_new=accept_new_host_keys)
    raise Usage(
        f"runtime {name} is not in this version", hint=f"there is {', '.join(RUNTIMES)}: `runtime: local`"
    )
