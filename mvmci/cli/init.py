"""`mvmci init`: a first cluster file and a first job, to look at, to run, and to change."""

from __future__ import annotations

import base64
import json
import shlex
from pathlib import Path

import click

from mvmci.cli.complete import complete_access
from mvmci.cli.options import examples, option
from mvmci.errors import Usage

SCHEMA = "topology.schema.json"  # for editors, beside the file that it is for
HELLO = """\
;; Prints a line. A job is any WASI program: from C, Rust, Go, … (README.md), or by hand, as here.
(module
  (import "wasi_snapshot_preview1" "fd_write"
    (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 16) "hello from mvmci\\n")
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 16))  ;; where the text begins
    (i32.store (i32.const 4) (i32.const 17))  ;; how long it is
    (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))
"""
# The text above, assembled.
HELLO_WASM = base64.b64decode(
    "AGFzbQEAAAABDAJgBH9/f38Bf2AAAAIjARZ3YXNpX3NuYXBzaG90X3ByZXZpZXcxCGZkX3dyaXRlAAADAgEBBQMBAAEHEwIG"
    "bWVtb3J5AgAGX3N0YXJ0AAEKHQEbAEEAQRA2AgBBBEERNgIAQQFBAEEBQQgQABoLCxcBAEEQCxFoZWxsbyBmcm9tIG12bWNp"
    "CgASBG5hbWUBCwEACGZkX3dyaXRl"
)
README = """\
# A first job

`hello.wasm` is `hello.wat`, assembled. Run it on a cluster, or with no cluster at all:

    mvmci submit hello/hello.wasm --wait
    mvmci run hello/hello.wasm

Build it, and others like it:

    wat2wasm hello.wat                                       text, with wabt
    zig cc --target=wasm32-wasi hello.c -o hello.wasm        C, or clang with the WASI SDK
    rustc --target wasm32-wasip1 hello.rs                    Rust
    GOOS=wasip1 GOARCH=wasm go build -o hello.wasm           Go
"""


@click.command(
    "init",
    epilog=examples("mvmci init", "mvmci init ci && mvmci up ci/topology.yaml", "mvmci init --access pool"),
)
@click.argument("directory", metavar="[DIR]", default=".", type=click.Path(path_type=Path))
@option(
    "--access",
    default="per-worker",
    show_default=True,
    shell_complete=complete_access,
    help="How workers reach an engine; `mvmci topologies` lists the accesses.",
)
def init_verb(directory: Path, access: str) -> int:
    """Write a cluster file with comments, and an example job. No file is overwritten."""
    from mvmci.cluster import topology

    files: dict[str, str | bytes] = {
        "topology.yaml": f"# yaml-language-server: $schema={SCHEMA}\n{_topology(directory, access)}",
        SCHEMA: f"{json.dumps(topology.schema(), indent=2)}\n",
        "hello/hello.wat": HELLO,
        "hello/hello.wasm": HELLO_WASM,
        "hello/README.md": README,
    }
    there = [name for name in files if (directory / name).exists()]
    if there:
        raise Usage(
            f"{directory / there[0]} already exists", hint="name another directory, or remove the file"
        )
    for name, content in files.items():
        path = directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise Usage(f"{path} cannot be written: {error.strerror}") from None
        click.echo(path)
    up, hello = (shlex.quote(str(directory / name)) for name in ("topology.yaml", "hello/hello.wasm"))
    click.echo("\nnext:", err=True)
    click.echo(f"  mvmci up {up}                    the cluster, until Ctrl-C", err=True)
    click.echo(f"  mvmci submit {hello} --wait      in another terminal", err=True)
    return 0


def _topology(directory: Path, name: str) -> str:
    """The file that lies beside the access, for a cluster of the directory's name where that can be one."""
    from mvmci.deploy.access import find_access
    from mvmci.jobs.job import is_id

    access = find_access(name)
    text = access.example
    if text is None:
        raise Usage(f"access {name} ({access.entry.value}) comes with no example of a cluster file")
    cluster = directory.resolve().name
    if is_id(cluster):
        text = text.replace("cluster: demo\n", f"cluster: {cluster}\n")
    return text
