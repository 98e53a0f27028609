# SPDX-License-Identifier: BSD-3-Clause
"""`migroce inject`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from migroce.cli.common import complete_node
from migroce.cli.text import flow

EPILOG = """
It puts the library into the bundle's root file system, sets LD_PRELOAD and MIGROCE_AGENT, mounts the agent's
directory for the container at /run/migroce, and tells the node's agent of it. Nothing else changes.

[bold]Example[/bold]: a bundle in /srv/box, to be run by plain runc as container box

  migroce inject /srv/box box

  runc run --detach --bundle /srv/box box

  migroce ps box
"""


def register(app: typer.Typer) -> None:
    """Add `inject` to the application."""

    @app.command(epilog=flow(EPILOG), rich_help_panel="Use")
    def inject(
        bundle: Annotated[
            Path, typer.Argument(help="The directory with config.json.", show_default=False, exists=True)
        ],
        container: Annotated[str, typer.Argument(help="The name it will be run under.", show_default=False)],
        on: Annotated[
            str, typer.Option("--on", help="The node that will run it.", autocompletion=complete_node)
        ] = "local",
        ip: Annotated[
            str | None, typer.Option("--ip", help="Which address to use, if it will have several.")
        ] = None,
        remove: Annotated[bool, typer.Option("--remove", help="Take the device out again.")] = False,
    ) -> None:
        """Give the device to an OCI bundle of yours, for any OCI runtime to run (root)."""
        from migroce import inject as injecting
        from migroce import launch, nodes, paths
        from migroce.errors import MigroceError

        with nodes.resolve(on) as node:
            if not isinstance(node, nodes.LocalNode):
                raise MigroceError(f"the bundle must be on this machine: run this command on {node.name}")
            agent = node.context.agent
            if agent == paths.admin_socket():
                launch.ensure_agent(paths.run_dir())
            if remove:
                injecting.remove(bundle.absolute(), container, agent)
                return
            directory = injecting.add(bundle.absolute(), container, agent, ip)
        typer.echo(f"{container} will have rxe0; its agent's directory is {directory}")
