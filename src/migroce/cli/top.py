# SPDX-License-Identifier: BSD-3-Clause
"""`migroce top`."""

from __future__ import annotations

from typing import Annotated

import typer

from migroce.cli.common import NODE_HELP, complete_node
from migroce.cli.text import flow


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command(
        rich_help_panel="Look",
        epilog=flow("""
The busiest come first. Rates are of payload. It follows containers that are moved.

  migroce top --interval 0.5

  migroce top --json --count 10 | jq '.processes[] | [.container, .rx_bits]'
"""),
    )
    def top(
        on: Annotated[
            str | None,
            typer.Option(
                "--on", help="Only this node (default: all of this machine). " + NODE_HELP,
                autocompletion=complete_node,
            ),
        ] = None,
        interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
        count: Annotated[
            int | None, typer.Option(min=1, help="End after so many (default: Ctrl-C ends it).")
        ] = None,
        json_output: Annotated[bool, typer.Option("--json", help="A line of JSON for each look.")] = False,
    ) -> None:  # fmt: skip
        """Watch processes with the device: queue pairs, bandwidth, retransmissions, again and again."""
        import contextlib
        import dataclasses
        import json
        import time

        from migroce.cli.common import local_nodes, opened
        from migroce.cli.show import collect
        from migroce.report import top as report
        from migroce.report.console import console

        with contextlib.ExitStack() as stack:
            nodes = stack.enter_context(opened([on] if on else local_nodes()))
            stack.enter_context(contextlib.suppress(KeyboardInterrupt))
            live = None
            if not json_output and console().is_terminal:
                from rich.live import Live

                live = stack.enter_context(Live(console=console(), screen=count is None, auto_refresh=False))
            before = [row for node in nodes for row in collect(node)]
            looked = time.monotonic()
            done = 0
            while count is None or done < count:
                time.sleep(max(0.0, looked + interval - time.monotonic()))
                seconds = max(0.001, time.monotonic() - looked)
                looked += seconds
                now = [row for node in nodes for row in collect(node)]
                found = report.rows(before, now, seconds)
                before = now
                done += 1
                if json_output:
                    processes = [dataclasses.asdict(row) for row in found]
                    print(json.dumps({"time": time.time(), "processes": processes}), flush=True)
                elif live is not None:
                    live.update(report.view(found), refresh=True)
                else:
                    console().print(report.view(found))
