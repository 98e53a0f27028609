# SPDX-License-Identifier: BSD-3-Clause
"""What several commands share: finding nodes and containers, completion, JSON."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migroce.errors import MigroceError

if TYPE_CHECKING:
    from migroce.nodes import Node

NODE_HELP = (
    "A node: [bold]local[/], a lab node such as [bold]node-a[/], [bold]ssh://user@host[/], "
    "or the name of a docker context."
)


def print_json(value: Any) -> None:
    """Plain JSON on standard output."""
    print(json.dumps(value, indent=2, default=str))


def local_nodes() -> list[str]:
    """Specs of the nodes on this machine: those of labs, then the machine itself if it has anything of ours.

    (To ask a node is to make its state directory; nothing should be left where nothing was.)
    """
    from migroce import nodes, paths

    specs = [f"{path.parent.name}/{path.name}" for path in nodes.lab_states("*")]
    docker = Path("/var/run/docker.sock")
    signs = (paths.run_dir() / "node", paths.admin_socket(), docker, *Path("/run/runc").glob("*/state.json"))
    if any(sign.exists() for sign in signs):
        specs.append("local")
    return specs


@contextlib.contextmanager
def opened(specs: Sequence[str]) -> Iterator[list[Node]]:
    """The nodes, closed at the end."""
    from migroce import nodes

    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(nodes.resolve(spec)) for spec in specs]


@contextlib.contextmanager
def locate(container: str, node: str | None) -> Iterator[tuple[Node, dict[str, Any]]]:
    """The node that has `container` (looked for on all nodes of this machine unless `node` is given).

    Raises MigroceError when none or several have it.
    """
    with opened([node] if node else local_nodes()) as candidates:
        if node:
            yield candidates[0], candidates[0].call("require", container=container)
            return
        found: list[tuple[Node, dict[str, Any]]] = []
        unknown: MigroceError | None = None
        for each in candidates:
            try:
                found += [(each, info) for info in containers_of(each) if info["id"] == container]
            except MigroceError as exc:  # a node that does not answer matters only if no other has it
                unknown = unknown or exc
        running = [(each, info) for each, info in found if info["status"] in ("running", "paused")]
        if len(running) == 1:
            found = running
        if len(found) == 1:
            yield found[0]
            return
        if found:
            where = ", ".join(each.spec for each, _ in found)
            raise MigroceError(
                f"container {container} is on several nodes ({where}); name one with --from or --on"
            )
        if unknown is not None:
            raise unknown
        where = ", ".join(each.spec for each in candidates) or "this machine (no lab is up)"
        raise MigroceError(
            f"there is no container {container} on {where}; see `migroce ps`, or name its node"
        )


def containers_of(node: Node) -> list[dict[str, Any]]:
    """The containers of a node; none where the machine has no state of ours and no root."""
    if node.spec == "local" and os.geteuid() != 0:
        return []
    return list(node.call("list"))


def complete_node(incomplete: str) -> list[str]:
    """Shell completion of nodes."""
    with contextlib.suppress(Exception):
        names = [spec.rpartition("/")[2] for spec in local_nodes()]
        return sorted({name for name in names if name.startswith(incomplete)})
    return []


def complete_container(incomplete: str) -> list[str]:
    """Shell completion of containers (those that are ours: nothing is started for it)."""
    with contextlib.suppress(Exception):
        from migroce import nodes, paths

        states = [*nodes.lab_states("*"), paths.run_dir() / "node"]
        found = {bundle.parent.name for state in states for bundle in state.glob("bundles/*/container.json")}
        return sorted(name for name in found if name.startswith(incomplete))
    return []
