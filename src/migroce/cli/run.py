# SPDX-License-Identifier: BSD-3-Clause
"""`migroce run`."""

from __future__ import annotations

from typing import Annotated

import typer

from migroce.cli.text import flow

HELP = """
Run a program with the device rxe0: no container, no root, no kernel module.

COMMAND is any program that uses libibverbs, with its arguments. It is run in place of this
command, so its exit status, signals and terminal are its own.

An agent of yours is started in the background unless one runs (it ends a minute after the last program):
with it several programs share the address, and `migroce ps` shows their queue pairs.
"""

EPILOG = """
[bold]Examples[/bold]

A bandwidth test between two machines, or two terminals of one:

  migroce run -- ib_send_bw -d rxe0
  migroce run -- ib_send_bw -d rxe0 10.0.0.1

On a given interface or address: migroce run --iface eth1 -- ibv_devinfo -d rxe0
"""


def register(app: typer.Typer) -> None:
    """Add `run` to the application."""

    @app.command(
        help=flow(HELP),
        epilog=flow(EPILOG),
        rich_help_panel="Use",
        context_settings={"allow_interspersed_args": False},
        options_metavar="[OPTIONS] --",
    )
    def run(
        program: Annotated[list[str], typer.Argument(metavar="COMMAND", show_default=False)],
        iface: Annotated[
            str | None, typer.Option("--iface", help="Use the first address of this network interface.")
        ] = None,
        addr: Annotated[
            str | None, typer.Option("--addr", help="Use this address of the machine (IPv4 or IPv6).")
        ] = None,
        agent: Annotated[
            bool,
            typer.Option(
                "--agent/--no-agent",
                help="Without an agent the program has the address to itself and cannot be stopped or shown.",
            ),
        ] = True,
    ) -> None:
        import os

        from migroce import launch, paths

        overrides = {}
        if iface is not None:
            overrides["MIGROCE_IFACE"] = iface
        if addr is not None:
            overrides["MIGROCE_ADDR"] = addr
        control = None
        if agent:
            chosen = os.environ.get("MIGROCE_AGENT")
            control = paths.agent_socket() if chosen else launch.ensure_agent(paths.run_dir())
        launch.execute(program, launch.environment(os.environ, control, overrides))
