"""The clusters that this machine knows, and where it keeps who it is to each of them.

<state>/<cluster>/client.json                  who its user is: an `Identity` of role client
<state>/<cluster>/units/<name>/identity.json   who a unit is that runs here
<state>/<cluster>/keys                         what makes it the machine that `up` was called on
<state>/_local                                 the jobs of `mvmci run`, which are of no cluster
"""

from __future__ import annotations

from pathlib import Path

from mvmci.errors import StoreUnavailable, Usage

CLIENT = "client.json"
LOCAL_FOLDER = "_local"
KEYS = "keys"
_KNOWN_BY = (CLIENT, KEYS, "units")


def find_cluster(state: Path, name: str | None) -> str:
    """The cluster that is meant: `name`, or the only one that this machine knows.

    Raises StoreUnavailable where there is none, Usage where there are several.
    """
    from mvmci.jobs.job import check_id  # `--help` needs no records

    if name is not None:
        check_id(name, "cluster name")
    known = known_clusters(state)
    if name in known or (name is None and len(known) == 1):
        return name or known[0]
    if known and name is None:
        raise Usage(f"several clusters are known here: {', '.join(known)}", hint="name one with --cluster")
    others = f"; known are {', '.join(known)}" if known else ""
    raise StoreUnavailable(
        f"the cluster {name} is not known here{others}" if name else "no cluster is known here",
        hint="`mvmci up` starts one, `mvmci login @ticket` makes this machine a client of one; "
        "--local is for jobs of `mvmci run` on this machine",
    )


def known_clusters(state: Path) -> list[str]:
    """The names of all clusters that this machine knows."""
    return sorted(
        path.name
        for path in (state.iterdir() if state.is_dir() else ())
        if not path.name.startswith("_") and any((path / part).exists() for part in _KNOWN_BY)
    )


def identity_path(state: Path, cluster: str, name: str) -> Path:
    """Where a unit of this machine keeps who it is. `name` is the one that it was started under."""
    return state / cluster / "units" / name / "identity.json"


def find_config(state: Path, cluster: str | None, name: str) -> Path:
    """What `up` gave a unit of this machine. Raises StoreUnavailable, Usage."""
    cluster = find_cluster(state, cluster)
    file = state / cluster / "units" / name / "config.json"
    if not file.exists():
        raise StoreUnavailable(
            f"cluster {cluster} has no {name} on this machine", hint="`mvmci up` starts one"
        )
    return file
