"""The command line. Each verb is a module's function, imported when it is called.

An expected failure is printed as one sentence and a hint, and ends with its exit code; anything else
is a bug of ours, and ends with 125 and a sentence that says where the traceback lies.
"""

from __future__ import annotations

import errno
import gc
import importlib
import sys
from typing import Any

import click

from mvmci import __version__
from mvmci.cli.options import Interrupted
from mvmci.cli.streams import OutputLost, ReaderGone, hold_streams, let_go
from mvmci.errors import EXIT_INTERNAL, MvmciError
from mvmci.system.text import one_line, printable

VERBS = {
    "init": "init",
    "up": "cluster",
    "down": "cluster",
    "ps": "cluster",
    "metrics": "metrics",
    "plan": "cluster",
    "render": "render",
    "topologies": "cluster",
    "ticket": "ticket",
    "login": "ticket",
    "upgrade": "upgrade",
    "worker": "units",
    "executor": "units",
    "drain": "cluster",
    "recover": "backup",
    "backup": "backup",
    "restore": "backup",
    "revoke": "ticket",
    "run": "run",
    "submit": "submit",
    "status": "read",
    "list": "read",
    "logs": "read",
    "history": "read",
    "wait": "submit",
    "cancel": "submit",
    "artifacts": "read",
    "replay": "run",
    "validate": "check",
    "schema": "check",
    "wit": "check",
    "doctor": "check",
    "bench": "bench",
    "completion": "check",
    "version": "check",
    "control-plane": "units",
    "broker": "units",
    "balancer": "units",
    "supervise": "host",
    "host": "host",
}
EXIT_INTERRUPTED = 130
HELP_WIDTH_MAX = 200  # and no more than the terminal has
EXAMPLES = """
\b
Examples:
  mvmci up topology.yaml                     start a cluster, or change it
  mvmci submit tool.wasm --dir . --wait      run a WASI program on it, with a copy of this directory
  mvmci submit flow.wasm --id nightly-1      let a workflow run on it
  mvmci logs nightly-1 -f                    follow it, from any machine that logged in
  mvmci replay nightly-1                     was it deterministic?
  mvmci run tool.wasm --dir . -- --flag      the same on this machine alone, with no cluster
"""


class Verbs(click.Group):
    """A group that imports a verb only when it is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"mvmci.cli.{VERBS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_") + "_verb")
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            verb = self.get_command(ctx, ctx.invoked_subcommand or "")
            if error.ctx is None and verb is not None:  # as for an option without its value
                error.ctx = click.Context(verb, ctx, ctx.invoked_subcommand)
            raise

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], VERBS, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(error.message + hint, ctx) from None


@click.version_option(__version__, "-V", "--version", prog_name="mvmci", message="%(prog)s %(version)s")
@click.group(
    cls=Verbs,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": HELP_WIDTH_MAX},
)
def cli() -> None:
    """Durable WebAssembly CI on hosts you own, in one file."""


def main() -> None:
    """Run the command line and exit."""
    hold_streams()
    code = _run()
    try:
        let_go()
    except ReaderGone as gone:
        code = code or gone.exit_code
    except OutputLost as lost:
        code = code or _tell(lost)
    gc.freeze()  # all of it goes with the process: there is nothing to look through once more
    sys.exit(code)


def _run() -> int:
    """The exit code of the verb that was named, all said that there is to say."""
    try:
        code: Any = cli.main(prog_name="mvmci", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except click.ClickException as error:
        click.echo(f"Error: {error.format_message()}", err=True)
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "mvmci"
        own = isinstance(error, click.NoSuchOption) and where.endswith((" run", " submit"))
        hint = "a job's own arguments come after `--`; " if own else ""
        click.echo(f"hint: {hint}`{where} --help` says what there is", err=True)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    except (Interrupted, ReaderGone) as ended:
        code = ended.exit_code
    except MvmciError as error:
        code = _tell(error)
    except OSError as error:
        code = _tell(_no_room(error)) if error.errno in (errno.ENOSPC, errno.EDQUOT) else _bug(error)
    except Exception as error:
        code = _bug(error)
    return code if isinstance(code, int) else 0


def _no_room(error: OSError) -> MvmciError:
    """What a disk of this machine that is full means, whatever was to be written."""
    where = f", at {error.filename}" if error.filename else ""
    return MvmciError(f"this machine has no room: {error.strerror}{where}", hint="make room, and try again")


def _tell(error: MvmciError) -> int:
    click.echo(f"Error: {printable(error.message)}", err=True)
    if error.hint:
        click.echo(f"hint: {printable(error.hint)}", err=True)
    return error.exit_code


def _bug(error: Exception) -> int:
    import tempfile
    import traceback

    click.echo(one_line(f"Error: a bug in mvmci: {type(error).__name__}: {error}"[:500]), err=True)
    try:
        with tempfile.NamedTemporaryFile("w", prefix="mvmci-bug-", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        traceback.print_exception(error)  # no room, or no such folder
    else:
        click.echo(f"hint: please report it with {file.name}", err=True)
    return EXIT_INTERNAL
