"""The verb that writes a cluster as files for somebody else to start: a folder for Docker Compose."""

from __future__ import annotations

from pathlib import Path

import click

from mvmci.cli.options import examples, option, run_async


@click.command(
    "render",
    epilog=examples(
        "mvmci render topology.yaml --format compose --output demo",
        "cd demo && docker compose up -d --scale worker=5",
        "mvmci submit hello.wasm --wait --state demo/state",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@option("--format", type=click.Choice(["compose"]), default="compose", show_default=True)
@option(
    "--output",
    metavar="DIR",
    envvar="MVMCI_RENDER_OUTPUT",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where. A folder with the cluster's name, if absent.",
)
def render_verb(file: Path, format: str, output: Path | None) -> int:
    """Write FILE's cluster as a folder that works on its own. Again brings the folder up to date.

    Its `secrets` and `state` are the cluster's keys: who has them is the cluster.
    """
    del format  # there is one
    from mvmci.deploy.render import render_compose

    folder = run_async(render_compose(file, output))
    click.echo(f"{folder} is ready: `docker compose up -d`, or `docker-compose up -d`, starts it there")
    return 0
