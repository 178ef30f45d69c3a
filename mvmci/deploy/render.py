"""A cluster file as a folder for somebody else to start: the plan, with keys of the folder's own.

DIR/                 `mvmci.runtimes.compose.render`
DIR/state/<cluster>  what `up` would keep of the cluster: keys, and where its broker is. With `--state`,
                     every verb finds the cluster there
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from mvmci.cluster.broker import ANY_PORT
from mvmci.cluster.deployment import resolve
from mvmci.cluster.identity import Login
from mvmci.deploy.access import deployment_of
from mvmci.deploy.changes import broker_of, external_of, read_file, settings_of, url_of
from mvmci.deploy.state import VERSION, ClusterState, Facts
from mvmci.runtimes import open_runtime
from mvmci.runtimes.compose import render
from mvmci.system.files import write_private
from mvmci.system.ports import choose_port
from mvmci.trust.authority import Authority

RUNTIME = "compose"


def render_compose(file: Path, output: Path | None) -> Path:
    """Render the cluster of `file` into `output`, or a folder with its name; which that is.

    Raises BadTopology, Usage, LockHeld.
    """
    _, found = read_file(file)
    folder = (output or Path(found.cluster)).resolve()
    render.check_program()
    external = external_of(found, file)
    home = ClusterState(folder / "state", found.cluster)
    plan = resolve(deployment_of(found, file), open_runtime(RUNTIME, home.root, home.cluster).place)
    home.check_version()
    with home.lock():
        write_private(home.folder / "version", VERSION.encode())
        if external is not None:
            authority, settings, login = (
                Authority.of_external(home.folder, external),
                None,
                Login(urls=external.urls),
            )
        else:
            authority, settings = Authority.create(home.folder), broker_of(found, home.facts())
            if settings.port == ANY_PORT:
                port = choose_port(str(home.folder), settings.listen)
                settings = msgspec.structs.replace(settings, port=port)
            login = authority.login([url_of(settings, tls=True)], tls=True)
        home.keep_facts(Facts(login=login, broker=settings, runtime=RUNTIME))
        render.render(
            folder,
            authority,
            render.Wanted(
                cluster=found.cluster,
                units=plan.units,
                queues=found.workers.queues,
                login=render.inside(authority) if external is None else login,
                broker=settings,
                compose=found.compose,
                settings=settings_of(found, plan.engine),
            ),
        )
    return folder
