"""The verb that writes a cluster as files for somebody else to start, or to look at."""

from __future__ import annotations

from pathlib import Path

import click

from mvmci.cli.options import examples, option, run_async, state_option


@click.command(
    "render",
    epilog=examples(
        "mvmci render topology.yaml --format compose --output demo",
        "cd demo && docker compose up -d --scale worker=5",
        "mvmci submit hello.wasm --wait --state demo/state",
        "mvmci render topology.yaml --format systemd      what `up` gives to the systemd of hosts",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@option("--format", type=click.Choice(["compose", "systemd"]), default="compose", show_default=True)
@option(
    "--output",
    metavar="DIR",
    envvar="MVMCI_RENDER_OUTPUT",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where. For compose a folder with the cluster's name, if absent; services are printed.",
)
@state_option
def render_verb(file: Path, format: str, output: Path | None, state: Path) -> int:
    """Write FILE's cluster as a folder that works on its own. Again brings the folder up to date.

    Its `secrets` and `state` are the cluster's keys: who has them is the cluster. With `--format systemd`,
    show the service that `up` makes on each host.
    """
    if format == "systemd":
        return _systemd(file, output, state)
    from mvmci.deploy.render import render_compose

    folder = run_async(render_compose(file, output))
    click.echo(f"{folder} is ready: `docker compose up -d`, or `docker-compose up -d`, starts it there")
    return 0


def _systemd(file: Path, output: Path | None, state: Path) -> int:
    from mvmci.deploy.render import render_systemd

    services = render_systemd(file, state)
    for host, (path, text) in services.items():
        if output is None:
            click.echo(f"# {host}: {path}\n{text}")
            continue
        (folder := output / host).mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_text(text)
        click.echo(f"{folder / path.name} is {path} of {host}")
    if not services:
        click.echo("no host of it has systemd start its units: `service: none`", err=True)
    return 0
