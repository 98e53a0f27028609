# SPDX-License-Identifier: BSD-3-Clause
"""`migroce ps`, `inspect`, `logs`, `wait`, `rm`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from migroce.cli.common import NODE_HELP, complete_container, complete_node
from migroce.cli.text import flow

if TYPE_CHECKING:
    from migroce.nodes import Node

PANEL = "Look"
Container = Annotated[
    str, typer.Argument(help="The container's name.", autocompletion=complete_container, show_default=False)
]
On = Annotated[
    str | None,
    typer.Option("--on", help="Its node, if not to be looked for.", autocompletion=complete_node),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="As JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""

    @app.command(
        rich_help_panel=PANEL,
        epilog=flow("""
[bold]States of a queue pair[/bold]: those of verbs; besides, stopped (its own side is being moved),
paused (its peer is being moved), resuming (moved, its peer has not answered yet). Programs see none of these.

  migroce ps --json | jq -r '.containers[] | select(.status == "running") | .id'
"""),
    )
    def ps(
        container: Annotated[
            str | None,
            typer.Argument(help="Only this one.", autocompletion=complete_container, show_default=False),
        ] = None,
        on: Annotated[
            str | None,
            typer.Option(
                "--on", help="Only this node (default: all of this machine). " + NODE_HELP,
                autocompletion=complete_node,
            ),
        ] = None,
        json_output: JsonFlag = False,
    ) -> None:  # fmt: skip
        """List containers with their processes and queue pairs: states, peers, counters."""
        from migroce.cli.common import local_nodes, opened, print_json
        from migroce.errors import MigroceError

        with opened([on] if on else local_nodes()) as nodes:
            rows = [row for node in nodes for row in collect(node)]
        rows = [row for row in rows if container in (None, row["id"])]
        if container is not None and not rows:
            raise MigroceError(f"there is no container {container}; `migroce ps` shows those there are")
        if json_output:
            print_json({"containers": rows})
        else:
            _show(rows)

    @app.command(
        rich_help_panel=PANEL,
        epilog=flow("  migroce inspect /var/tmp/saved --json | jq '.contexts[].qps[].next_psn'"),
    )
    def inspect(
        path: Annotated[
            Path,
            typer.Argument(
                help="A checkpoint's directory, or a single .dump file.", show_default=False, exists=True
            ),
        ],
        json_output: JsonFlag = False,
    ) -> None:
        """Show a checkpoint's RDMA state: queue pairs, PSNs, keys, queue fill."""
        _inspect(path, json_output)

    @app.command(rich_help_panel=PANEL)
    def logs(container: Container, on: On = None) -> None:
        """Print what a container has written so far (those made by migroce)."""
        from migroce.cli.common import locate

        with locate(container, on) as (node, _):
            typer.echo(node.call("logs", container=container), nl=False)

    @app.command(rich_help_panel=PANEL)
    def wait(
        container: Container,
        on: On = None,
        timeout: Annotated[float | None, typer.Option(help="Give up after so many seconds.")] = None,
    ) -> None:
        """Wait until a container has ended, wherever it is moved; exit with its exit status."""
        import time

        from migroce.cli.common import locate
        from migroce.errors import EngineError, MigroceError

        end = time.monotonic() + timeout if timeout is not None else None
        while True:
            with locate(container, on) as (node, _):
                left = 600.0 if end is None else min(600.0, max(0.0, end - time.monotonic()))
                try:
                    status = node.call("wait", container=container, timeout=left)
                    break
                except EngineError as exc:
                    moved = on is None and "not on" in exc.reason
                    patient = "still runs" in exc.reason and (end is None or time.monotonic() < end)
                    if not moved and not patient:
                        raise
            time.sleep(0.1)  # it was moved away meanwhile: go after it
        if status is None:
            raise MigroceError(f"{container} has ended, but nobody saw its exit status")
        raise typer.Exit(int(status))

    @app.command(rich_help_panel=PANEL)
    def rm(container: Container, on: On = None) -> None:
        """End a container and remove all that belongs to it."""
        from migroce.cli.common import locate

        with locate(container, on) as (node, _):
            node.call("delete", container=container)


def collect(node: Node) -> list[dict[str, Any]]:
    """The containers of a node, each with its RDMA contexts; the node's own programs (`migroce run`) too."""
    from migroce.cli.common import containers_of
    from migroce.errors import MigroceError

    containers = containers_of(node)
    for row in containers:
        row["node"] = node.spec
        row["contexts"] = []
    try:
        known = _agent_ps(node)
    except MigroceError:
        return containers  # no agent: no RDMA
    by_id = {row.get("key") or row["id"]: row for row in containers}
    for entry in known:
        row = by_id.get(entry["id"], {})
        if not row:
            if not entry["contexts"]:
                continue
            row = {"id": "(no container)" if entry.get("implicit") else entry["id"], "node": node.spec,
                   "status": entry["state"], "ip": entry.get("gid"), "device": True}  # fmt: skip
            containers.append(row)
        row["rdma_state"] = entry["state"]
        row["contexts"] = entry["contexts"]
    return containers


def _agent_ps(node: Node) -> list[dict[str, Any]]:
    import os

    if node.spec == "local" and os.geteuid() != 0:  # an agent of one's own
        from migroce import paths
        from migroce.agent.client import AgentClient, AgentError
        from migroce.errors import MigroceError

        try:
            with AgentClient(paths.admin_socket()) as client:
                return client.ps()
        except AgentError as exc:
            raise MigroceError(str(exc)) from exc
    return list(node.call("agent", method="ps"))


def _show(rows: list[dict[str, Any]]) -> None:
    from migroce.report.console import console
    from migroce.report.rdma import counters_text, live_table, table

    out = console()
    if not rows:
        out.print("no containers")
        return
    shown = table("container|node|engine|state|address|pid>|device|program")
    for row in rows:
        state = row["status"] if row.get("exit_status") is None else f"exited ({row['exit_status']})"
        shown.add_row(
            row["id"], row["node"], row.get("engine") or "-", state, row.get("ip") or "-",
            str(row.get("pid") or "-"), "rxe0" if row.get("device") else "-", " ".join(row.get("args") or ()),
        )  # fmt: skip
    out.print(shown)
    for row in rows:
        for context in row["contexts"]:
            head = f"[bold]{row['id']}[/]: {context['comm']} (pid {context['pid']}), {context['state']}"
            dump = context.get("dump")
            if dump is None:
                out.print(f"{head}: {context.get('error', 'no snapshot')}")
                continue
            out.print(f"{head}, {len(dump['qps'])} QPs, {len(dump['mrs'])} memory regions")
            if dump["qps"]:
                out.print(live_table(dump["qps"]))
            out.print(f"  {counters_text(dump['counters'])}\n")


def _inspect(path: Path, json_output: bool) -> None:
    from migroce import dump as dumps
    from migroce.cli.common import print_json
    from migroce.errors import MigroceError

    files = [path]
    if path.is_dir():
        files = sorted([*path.glob("rdma-*.dump"), *path.glob("*/rdma-*.dump")])
    manifest: dict[str, Any] | None = None
    if path.is_dir() and (path / "manifest.json").is_file():
        from migroce.migration.api import read_manifest

        read = read_manifest(path)
        manifest = {
            name: getattr(read, name)
            for name in ("container", "node", "created", "contexts", "qps", "running")
        }
    if not files and manifest is None:
        raise MigroceError(f"{path} is no checkpoint: it has neither manifest.json nor rdma-*.dump files")
    contexts = {str(file): dumps.read(file).to_json() for file in files}
    if json_output:
        print_json({"checkpoint": manifest, "contexts": [{"file": f, **c} for f, c in contexts.items()]})
        return
    from migroce.report.console import console
    from migroce.report.rdma import dump_tables

    if manifest is not None:
        import datetime

        when = datetime.datetime.fromtimestamp(manifest["created"]).astimezone()
        console().print(
            f"[bold]{manifest['container']}[/] of {manifest['node']}, saved {when:%Y-%m-%d %H:%M:%S %z}, "
            f"{manifest['contexts']} RDMA contexts, {manifest['qps']} QPs"
        )
    for name, data in contexts.items():
        for part in dump_tables(name, data):
            console().print(part)
