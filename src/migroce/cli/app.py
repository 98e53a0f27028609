# SPDX-License-Identifier: BSD-3-Clause
"""The command tree. Only typer is imported here; everything else when a command runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated

import typer

from migroce.cli import agent, bench, demo, doctor, inject, lab, migration, run, setup, show, top
from migroce.cli.text import flow

EPILOG = """
The shortest tour, as root on one machine: [bold]migroce demo[/bold]; by hand: [bold]migroce lab -h[/bold].
Any verbs program without root: [bold]migroce run -- ib_send_bw -d rxe0[/bold].

[dim]Environment: MIGROCE_DEBUG=1 (as --debug), MIGROCE_RUN_DIR (sockets and state; default for root:
/run/migroce), MIGROCE_LIBRARY (another libmigroce.so), MIGROCE_CRIU (another criu).
Exit status: 0 done; 1 failed, one sentence on stderr says what, why and the mend; 2 wrong usage;
70 a bug.[/dim]
"""

app = typer.Typer(
    name="migroce",
    help="Live migration of containers that use RDMA.\n\n"
    "A RoCEv2 device in a library, an agent per node that stops and resumes it, and migration by stock CRIU "
    "and a stock OCI runtime: programs, engine and kernel are unmodified.",
    epilog=flow(EPILOG),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from migroce import __version__

        typer.echo(f"migroce {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MIGROCE_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    del debug, version  # looked at by debugging() and _version()


run.register(app)
demo.register(app)
lab.register(app)
inject.register(app)
migration.register(app)
show.register(app)
top.register(app)
doctor.register(app)
bench.register(app)
agent.register(app)
setup.register(app)


@app.command("version", rich_help_panel="This machine")
def version_command(
    json_output: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show the versions of migroce, its library, CRIU and the runtime."""
    from migroce.cli import versions

    versions.show(json_output=json_output)


def debugging(args: Sequence[str]) -> bool:
    """Whether tracebacks are wanted: `--debug` before the command, or MIGROCE_DEBUG."""
    for arg in args:
        if arg == "--debug":
            return True
        if not arg.startswith("-"):
            break
    return os.environ.get("MIGROCE_DEBUG", "") not in ("", "0")


def application(args: Sequence[str]) -> int:
    """Run the application; its exit status. Exceptions of commands come through."""
    command = typer.main.get_command(app)
    try:
        result = command.main(args=list(args), prog_name="migroce", standalone_mode=False)
    except Exception as exc:
        # click's usage errors, whether click is vendored by typer or not: they know how to show themselves.
        show = getattr(exc, "show", None)
        code = getattr(exc, "exit_code", None)
        if code is None:
            raise
        if type(exc).__name__ == "Abort":
            return 130
        if callable(show):
            show()
        return int(code)
    return result if isinstance(result, int) else 0
