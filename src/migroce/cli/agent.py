# SPDX-License-Identifier: BSD-3-Clause
"""`migroce agent run|status|stop`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        help="Where its sockets are (default: MIGROCE_RUN_DIR or /run/migroce).",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add `agent` to the application."""
    agent = typer.Typer(
        name="agent",
        help="The node's control plane: hands out sockets and id ranges, stops, resumes and stands in. "
        "Never on the data path.\n\n`migroce run` and the lab start agents by themselves.",
        no_args_is_help=True,
    )
    app.add_typer(agent, rich_help_panel="This machine")

    @agent.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        epilog="Further options go to the agent: see `python -m migroce.agent --help`.\n\n"
        "  migroce agent run --run-dir /run/migroce --idle-exit 60",
    )
    def run(context: typer.Context, run_dir: RunDir = None) -> None:
        """Run an agent in the foreground (for a service manager)."""
        import os
        import sys

        from migroce import launch, paths

        directory = run_dir or paths.run_dir()
        launch.private_directory(directory)
        argv = [sys.executable, "-m", "migroce.agent", "--run-dir", str(directory), *context.args]
        sys.stdout.flush()
        os.execv(sys.executable, argv)

    @agent.command()
    def status(
        run_dir: RunDir = None,
        json_output: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    ) -> None:
        """Say whether an agent runs and what it has. Exit status 1 if none answers."""
        from migroce import paths
        from migroce.agent.client import AgentClient
        from migroce.cli.common import print_json

        with AgentClient((run_dir or paths.run_dir()) / "admin.sock") as client:
            answer = client.status()
        if json_output:
            print_json(answer)
            return
        typer.echo(
            f"agent {answer.get('version')} of {answer.get('node')}, pid {answer.get('pid')}, "
            f"up {float(answer.get('uptime_s', 0)):.0f} s, {len(answer.get('containers', ()))} containers"
        )

    @agent.command()
    def stop(run_dir: RunDir = None) -> None:
        """End the agent. Programs go on with their sockets and find the next agent by themselves."""
        from migroce import paths
        from migroce.agent.client import AgentClient

        with AgentClient((run_dir or paths.run_dir()) / "admin.sock") as client:
            client.shutdown()
