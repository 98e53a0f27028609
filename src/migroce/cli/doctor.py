# SPDX-License-Identifier: BSD-3-Clause
"""`migroce doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from migroce.cli.text import flow

if TYPE_CHECKING:
    from migroce.doctor import Check

EPILOG = """
[bold]Exit status[/bold]: 0 if containers can be migrated on this machine, 1 if something needed is missing.
Warnings don't count.

  migroce doctor --json | jq '.checks[] | select(.state == "bad")'
"""


def register(app: typer.Typer) -> None:
    """Add `doctor` to the application."""

    @app.command(epilog=flow(EPILOG), rich_help_panel="This machine")
    def doctor(
        json_output: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
        quick: Annotated[
            bool, typer.Option("--quick", help="Leave out the real dump and restore by CRIU.")
        ] = False,
    ) -> None:
        """Say what this machine has and lacks, each with the mend."""
        from migroce import doctor as examine

        checks = examine.examine(real=not quick)
        if json_output:
            import json

            typer.echo(json.dumps(examine.as_json(checks), indent=2))
        else:
            _show(checks)
        if any(check.state is examine.State.BAD for check in checks):
            raise typer.Exit(1)

    def _show(checks: list[Check]) -> None:
        from migroce.doctor import State
        from migroce.report.console import console

        signs = {State.GOOD: "[green]ok  [/]", State.WARN: "[yellow]note[/]", State.BAD: "[red]LACK[/]"}
        for check in checks:
            console().print(f"{signs[check.state]} [bold]{check.name}[/]: {check.text}", highlight=False)
            if check.mend:
                console().print(f"     [dim]->[/] {check.mend}", highlight=False)
