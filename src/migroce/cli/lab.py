# SPDX-License-Identifier: BSD-3-Clause
"""`migroce lab up|down|status|exec|run`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from migroce.cli.common import complete_container, complete_node
from migroce.cli.text import flow

Name = Annotated[str, typer.Option("--lab", "-l", help="The lab's name, if there are several.")]
PROGRAM = {"allow_interspersed_args": False}


def register(app: typer.Typer) -> None:
    """Add `lab` to the application."""
    lab = typer.Typer(
        name="lab",
        help="Several nodes on one machine: network namespaces, an underlay, an overlay network (VXLAN) for "
        "containers, an agent and a runtime root each. Needs root.",
        no_args_is_help=True,
        epilog=flow("""
[bold]A move by hand[/bold]

  migroce lab up

  migroce lab run node-a cont-moving --ip 10.0.1.7 -- ib_send_bw -d rxe0 -n 100000 -b

  migroce lab run node-b cont-static --ip 10.0.1.3 -- ib_send_bw -d rxe0 -n 100000 -b 10.0.1.7

  migroce migrate cont-moving --to node-b

  migroce wait cont-static; migroce logs cont-static

  migroce lab down
"""),
    )
    app.add_typer(lab, rich_help_panel="Use")

    @lab.command()
    def up(
        name: Name = "lab",
        nodes: Annotated[int, typer.Option("--nodes", "-n", min=1, max=26, help="How many.")] = 2,
        subnet: Annotated[str, typer.Option(help="The containers' network.")] = "10.0.1.0/24",
        engine: Annotated[
            str, typer.Option(help="What makes the containers: oci (plain bundles by runc) or docker.")
        ] = "oci",
        release: Annotated[
            str | None,
            typer.Option(
                "--docker", metavar="20.10|26.1|system|DIR", show_default=False,
                help="Which Docker: the system's, or a release that scripts/docker gets.",
            ),
        ] = None,
        json_output: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    ) -> None:  # fmt: skip
        """Bring up a lab: node-a, node-b, ... One that is up already stays as it is.

        With --engine docker each node has a dockerd, joined to a swarm with the overlay network rdma-net.
        """
        from migroce.lab.api import Lab

        made = Lab.up(
            name, nodes=nodes, subnet=subnet, engine="docker" if release else engine, release=release,
            tell=lambda text: typer.echo(text, err=True),
        )  # fmt: skip
        _status([made], json_output)

    @lab.command()
    def down(
        name: Name = "lab",
        everything: Annotated[bool, typer.Option("--all", help="All labs.")] = False,
    ) -> None:
        """Take a lab down with all its containers, also after a crash. Nothing stays behind.

        One that is not there is said to be so; that is no error.
        """
        from migroce.lab import api

        there = api.labs()
        for each in there if everything else [name]:
            api.remove(each)
            if each not in there:
                typer.echo(f"there is no lab {each}", err=True)

    @lab.command()
    def status(json_output: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
        """Show the labs that are up: nodes, addresses, agents, containers."""
        from migroce.lab import api

        _status([api.Lab.load(name) for name in api.labs()], json_output)

    @lab.command(epilog=flow("  migroce lab run node-a cont-moving --ip 10.0.1.7 -- ib_send_bw -d rxe0 -b"))
    def run(
        node: Annotated[str, typer.Argument(autocompletion=complete_node, show_default=False)],
        container: Annotated[str, typer.Argument(help="A name for it.", show_default=False)],
        program: Annotated[list[str], typer.Argument(metavar="-- COMMAND", show_default=False)],
        ip: Annotated[
            list[str] | None,
            typer.Option(
                "--ip",
                help="Its address in the containers' network. May be repeated; the first is the main one.",
                show_default=False,
            ),
        ] = None,
        ip6: Annotated[
            str | None,
            typer.Option("--ip6", help="An IPv6 address besides, with a prefix of 64.", show_default=False),
        ] = None,
        device: Annotated[bool, typer.Option("--device/--no-device", help="Give it rxe0.")] = True,
        env: Annotated[
            list[str] | None, typer.Option("--env", "-e", help="NAME=VALUE, may be repeated.")
        ] = None,
        name: Name = "lab",
    ) -> None:
        """Start a container on a node. Its root is the machine's own, with a writable layer of its own.

        `migroce logs` shows what it writes, `migroce wait` waits for its end, `migroce rm` removes it.
        """
        from migroce.errors import MigroceError
        from migroce.lab.api import Lab

        pairs = [each.partition("=") for each in env or []]
        if wrong := [name for name, equals, _ in pairs if not equals]:
            raise MigroceError(f"--env {wrong[0]} has no value; write {wrong[0]}=VALUE", status=2)
        if wrong := [value for name, _, value in pairs if not name]:
            raise MigroceError(f"--env ={wrong[0]} has no name; write NAME=VALUE", status=2)
        extra = {name: value for name, _, value in pairs}
        found = Lab.load(name)
        try:
            more: dict[str, Any] = {"ip6": ip6} if ip6 else {}
            if ip:
                more |= {"ip": ip[0], "further": ip[1:]}
            info = found.create(container, node, program, device=device, env=extra, **more)
        finally:
            found.close()
        typer.echo(f"{container} runs on {found.node(node).name}, pid {info['pid']}")

    @lab.command("exec", context_settings=PROGRAM, options_metavar="[OPTIONS]")
    def execute(
        target: Annotated[
            str,
            typer.Argument(
                help="A node or a container.", autocompletion=complete_container, show_default=False
            ),
        ],
        program: Annotated[list[str], typer.Argument(metavar="COMMAND", show_default=False)],
        name: Name = "lab",
    ) -> None:
        """Run a program in a node or in a running container; its exit status is this command's.

        For instance a capture: migroce lab exec node-a tshark -i any -f 'udp port 4791'
        """
        import os
        import sys

        from migroce.lab.api import Lab

        argv = Lab.load(name).command(target, program)
        sys.stdout.flush()
        os.execvp(argv[0], argv)


def _status(labs: list[object], json_output: bool) -> None:
    import dataclasses

    from migroce.cli.common import print_json
    from migroce.lab.api import Lab
    from migroce.report.console import console
    from migroce.report.rdma import table

    found = {}
    for lab in labs:
        assert isinstance(lab, Lab)
        try:
            found[lab.name] = lab.status()
        finally:
            lab.close()
    if json_output:
        print_json(
            {"labs": {name: [dataclasses.asdict(node) for node in nodes] for name, nodes in found.items()}}
        )
        return
    if not found:
        console().print("no lab is up")
        return
    shown = table("lab|node|underlay|network namespace|agent (pid)|containers")
    for name, nodes in found.items():
        for node in nodes:
            containers = ", ".join(f"{c['id']} ({c['status']})" for c in node.containers) or "-"
            agent = str(node.agent) if node.agent is not None else "[red]none[/]"
            shown.add_row(name, node.name, node.underlay or "-", node.netns, agent, containers)
    console().print(shown)
