# SPDX-License-Identifier: BSD-3-Clause
"""`migroce setup docker`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add `setup` to the application."""
    setup = typer.Typer(
        name="setup",
        help="Make engines of this machine know the device (root).",
        no_args_is_help=True,
    )
    app.add_typer(setup, rich_help_panel="This machine")

    @setup.callback()
    def engines() -> None:
        """Make engines of this machine know the device (root)."""

    @setup.command()
    def docker(
        undo: Annotated[bool, typer.Option("--undo", help="Take everything out again.")] = False,
        default: Annotated[
            bool,
            typer.Option(
                "--default",
                help="Make it the default runtime too, for containers that ask: --device migroce/rdma=rxe0 "
                "(Docker 25 and newer), -e MIGROCE=on or an annotation migroce=on.",
            ),
        ] = False,
        restart: Annotated[
            bool, typer.Option("--restart", help="Restart Docker if it must be; that ends its containers.")
        ] = False,
        config: Annotated[
            Path | None, typer.Option(help="daemon.json, if it is elsewhere.", show_default=False)
        ] = None,
        json_output: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    ) -> None:
        """Register the runtime with dockerd, enable `docker checkpoint`, start the agent; say what changed.

        Your own settings stay. Then: docker run --runtime migroce ...
        """
        import os

        from migroce import dockersetup
        from migroce.errors import MigroceError

        if os.geteuid() != 0:
            raise MigroceError("setup changes files in /etc: run it as root")
        layout = dockersetup.Layout(config=config.absolute() if config else None)
        if undo:
            outcome = dockersetup.undo(layout)
        else:
            outcome = dockersetup.apply(layout, default=default, restart=restart)
        if json_output:
            from migroce.cli.common import print_json

            print_json(outcome.to_json())
            return
        for line in outcome.changes or ["nothing had to be changed"]:
            typer.echo(line)
        for line in outcome.todo:
            typer.echo(f"left to do: {line}")
