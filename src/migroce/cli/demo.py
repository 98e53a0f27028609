# SPDX-License-Identifier: BSD-3-Clause
"""`migroce demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from migroce.cli.text import flow


def register(app: typer.Typer) -> None:
    """Add `demo` to the application."""

    @app.command(
        rich_help_panel="Use",
        epilog=flow("""
It makes two nodes on this machine (network namespaces), runs
`ib_send_bw -d rxe0 -n 100000 -b` as server in container cont-moving (10.0.1.7) on node-a and as client in
cont-static (10.0.1.3) on node-b, and moves the server to node-b in the middle. Everything is real: RoCEv2
packets, CRIU, runc, Debian's own perftest. Nothing is left behind, whichever way it ends.

[bold]Exit status[/bold]: 0 if the move succeeded and both programs ended with 0.
"""),
    )
    def demo(
        output: Annotated[
            Path, typer.Option("--output", "-o", help="Directory for the pictures (PNG and SVG).")
        ] = Path("out"),
        messages: Annotated[
            int, typer.Option("--messages", "-n", min=1000, help="Messages of 64 KiB in each direction.")
        ] = 100_000,
        at: Annotated[
            float, typer.Option("--at", min=0.0, max=0.9, help="Move when this share of them has arrived.")
        ] = 0.15,
        docker: Annotated[
            bool, typer.Option("--docker", help="With a dockerd on each node and its overlay network.")
        ] = False,
        picture: Annotated[bool, typer.Option("--picture/--no-picture", help="Draw the timeline.")] = True,
        json_output: Annotated[bool, typer.Option("--json", help="Print only the result, as JSON.")] = False,
    ) -> None:
        """Watch ib_send_bw being moved between two nodes while it runs (root)."""
        import os
        import threading

        from migroce.errors import MigroceError

        if os.geteuid() != 0:
            raise MigroceError("the demo makes network namespaces and containers: run it as root")
        from migroce.demo import view
        from migroce.demo.runner import Options, run
        from migroce.demo.state import DemoState

        def quiet(_: DemoState, over: threading.Event) -> None:
            over.wait()

        options = Options(messages=messages, output=output if picture else None, at=at, docker=docker)
        result = run(options, quiet if json_output else view.watch)
        if json_output:
            from migroce.cli.common import print_json

            print_json(view.as_json(result))
        else:
            view.summary(result)
        raise typer.Exit(0 if result.ok else 1)
