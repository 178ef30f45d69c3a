"""A cluster file as a folder for somebody else to start, with keys of the folder's own.

DIR/                 `mvmci.runtimes.compose.render`
DIR/state/<cluster>  what `up` would keep of the cluster: keys, and where its broker is. With `--state`,
                     every verb finds the cluster there
"""

from __future__ import annotations

from pathlib import Path

from mvmci.deploy.access import deployment_of
from mvmci.deploy.plan import configs_of, external_of, placed, read_file, settings_of
from mvmci.deploy.state import ClusterState
from mvmci.deploy.up import make_keys
from mvmci.runtimes.compose import render

RUNTIME = "compose"


async def render_compose(file: Path, output: Path | None) -> Path:
    """Render the cluster of `file` into `output`, or a folder with its name; which that is.

    Raises BadTopology, Usage, LockHeld.
    """
    _, found = read_file(file)
    folder = (output or Path(found.cluster)).resolve()
    render.check_program()
    external = external_of(found, file)
    state = ClusterState(folder / "state", found.cluster)
    runtime = state.runtime(RUNTIME)
    deployment = await placed(deployment_of(found, file), runtime)
    state.check_version()
    state.check_keys()
    with state.lock():
        authority, facts = make_keys(state, found, deployment, external, runtime, RUNTIME)
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
