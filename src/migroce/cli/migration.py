# SPDX-License-Identifier: BSD-3-Clause
"""`migroce migrate`, `checkpoint`, `restore`, `recover`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from migroce.cli.common import NODE_HELP, complete_container, complete_node
from migroce.cli.text import flow

if TYPE_CHECKING:
    from migroce.migration.report import Progress, Report

PANEL = "Migrate"
Json = Annotated[
    bool,
    typer.Option(
        "--json", help='Print JSON lines: {"event": ...} for each step, at the end {"report": ...}.'
    ),
]
Container = Annotated[
    str, typer.Argument(help="The container's name.", autocompletion=complete_container, show_default=False)
]
NewAddress = Annotated[
    str | None,
    typer.Option(
        "--ip",
        help="An address there, other than before; peers follow if they speak the extension.",
        show_default=False,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="With --ip: even if peers would not follow; their connections end.")
]
_PHASES = """
[bold]Phases[/bold]: check and prepare (it still runs), stop (its queue pairs), dump (freeze, CRIU), transfer,
restore, resume (it runs again, peers are told), commit (the old one is removed).
Whatever fails before resume is undone: the container runs on where it was, and so do its peers.
"""


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""

    @app.command(
        rich_help_panel=PANEL,
        epilog=flow(
            _PHASES
            + """
[bold]Examples[/bold]

  migroce migrate cont-moving --to node-b

  migroce migrate cont-moving --from local --to ssh://root@other-host

  migroce migrate cont-moving --to node-b --ip 10.0.1.9

  migroce migrate cont-moving --to node-a --json | jq 'select(.report).report.blackout'
"""
        ),
    )
    def migrate(
        container: Container,
        to: Annotated[
            str,
            typer.Option(
                "--to", help="Where to. " + NODE_HELP, autocompletion=complete_node, show_default=False
            ),
        ],
        from_: Annotated[
            str | None,
            typer.Option(
                "--from", help="Where it is now, if not to be looked for.", autocompletion=complete_node
            ),
        ] = None,
        ip: NewAddress = None,
        force: Force = False,
        json_output: Json = False,
    ) -> None:
        """Move a running container, its files and its RDMA connections, to another node.

        Its peers notice a pause. Programs, peers and the runtime need no change.
        """
        from migroce.cli.common import locate
        from migroce.migration import api

        with locate(container, from_) as (source, _):
            _run(
                lambda progress: api.migrate(container, source, to, progress=progress, ip=ip, force=force),
                json_output,
            )

    @app.command(
        rich_help_panel=PANEL,
        epilog=flow("""
The directory can be copied to another machine. While the container is away its address is answered
for: peers wait.

  migroce checkpoint cont-moving /var/tmp/saved
  migroce inspect /var/tmp/saved
  migroce restore /var/tmp/saved --on node-b
"""),
    )
    def checkpoint(
        container: Container,
        directory: Annotated[
            Path, typer.Argument(help="A directory to be made, on this machine.", show_default=False)
        ],
        on: Annotated[
            str | None,
            typer.Option("--on", help="Its node, if not to be looked for.", autocompletion=complete_node),
        ] = None,
        leave_running: Annotated[
            bool, typer.Option("--leave-running", help="Let it run on afterwards.")
        ] = False,
        json_output: Json = False,
    ) -> None:
        """Save a running container, with its RDMA state, into a directory."""
        from migroce.cli.common import locate
        from migroce.migration import api

        with locate(container, on) as (node, _):
            _run(
                lambda progress: api.checkpoint(
                    node, container, directory, leave_running=leave_running, progress=progress
                ),
                json_output,
            )

    @app.command(rich_help_panel=PANEL, epilog=flow("  migroce restore /var/tmp/saved --on node-b"))
    def restore(
        directory: Annotated[
            Path, typer.Argument(help="Made by migroce checkpoint.", show_default=False, exists=True)
        ],
        on: Annotated[
            str,
            typer.Option("--on", help="Where to. " + NODE_HELP, autocompletion=complete_node),
        ] = "local",
        ip: NewAddress = None,
        force: Force = False,
        json_output: Json = False,
    ) -> None:
        """Run the container of a checkpoint on a node; its connections go on."""
        from migroce.migration import api

        _run(lambda progress: api.restore(on, directory, ip=ip, force=force, progress=progress), json_output)

    @app.command(rich_help_panel=PANEL)
    def recover(
        on: Annotated[
            str | None,
            typer.Option(
                "--on", help="The node (default: all of this machine).", autocompletion=complete_node
            ),
        ] = None,
    ) -> None:
        """Finish or undo migrations that were left in the middle.

        Agents do this by themselves when a migrating command dies; this is for nodes whose agent died too.
        """
        from migroce.cli.common import local_nodes
        from migroce.migration import api

        said = [text for spec in ([on] if on else local_nodes()) for text in api.recover(spec)]
        typer.echo("\n".join(said) if said else "nothing to recover")


def _run(work: Callable[[Progress], Report], json_output: bool) -> None:
    from migroce.report import progress

    if json_output:
        progress.json_report(work(progress.json_event))
        return
    with progress.Printer() as printer:
        report = work(printer)
    progress.show(report)
