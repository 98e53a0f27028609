# SPDX-License-Identifier: BSD-3-Clause
"""The Python interface of checkpoint, restore and migration.

    report = migrate("cont-moving", "node-a", "node-b", progress=print)

Nodes are given as `migroce.nodes.Node` or as what the command line takes (`node-a`, `ssh://user@host`).
All raise MigrationError (step, reason, mend, running_on) and NodeError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from migroce.migration.checkpoint import Checkpoint, Restore
from migroce.migration.manifest import Manifest
from migroce.migration.manifest import read as read_manifest
from migroce.migration.manifest import verify as verify_manifest
from migroce.migration.orchestrate import Migration, silent
from migroce.migration.report import Event, Progress, Report
from migroce.nodes import Node, resolve

__all__ = [
    "Event", "Manifest", "Progress", "Report", "checkpoint", "find", "migrate", "read_manifest", "recover",
    "restore", "verify_manifest",
]  # fmt: skip


@contextlib.contextmanager
def _opened(*specs: str | Node) -> Iterator[list[Node]]:
    """Nodes by their specs; those that were made here are closed at the end."""
    with contextlib.ExitStack() as stack:
        yield [spec if isinstance(spec, Node) else stack.enter_context(resolve(spec)) for spec in specs]


def _engine(node: Node, container: str) -> str:
    """The engine of a container. Raises NodeError, EngineError if it is not there."""
    return str(node.call("require", container=container)["engine"])


def migrate(
    container: str, source: str | Node, destination: str | Node, progress: Progress = silent, *,
    ip: str | None = None, force: bool = False,
) -> Report:  # fmt: skip
    """Move a running container, its files and its connections. What fails before the destination is its
    place is undone; then the container runs on at the source.

    `ip`: the address it gets there, if another than before: refused if a peer would not follow, unless
    `force`; and if a socket of the container is bound to the old one.
    """
    with _opened(source, destination) as (src, dst):
        return Migration(
            container, src, dst, progress, engine=_engine(src, container), ip=ip or "", force=force
        ).run()


def checkpoint(
    node: str | Node, container: str, directory: Path | str, *,
    leave_running: bool = False, progress: Progress = silent,
) -> Report:  # fmt: skip
    """Save a running container into a new `directory`, to be restored on any node.

    Without `leave_running` its processes end; its address is kept and answered for until it is restored.
    """
    with _opened(node) as (where,):
        return Checkpoint(
            where, container, Path(directory).absolute(),
            leave_running=leave_running, engine=_engine(where, container), progress=progress,
        ).run()  # fmt: skip


def restore(
    node: str | Node, directory: Path | str, *,
    ip: str | None = None, force: bool = False, progress: Progress = silent,
) -> Report:  # fmt: skip
    """Run the container of a checkpoint on `node`; at the address `ip`, if given (see `migrate`)."""
    with _opened(node) as (where,):
        return Restore(where, Path(directory).absolute(), ip=ip or "", force=force, progress=progress).run()


def find(container: str, nodes: list[Node]) -> Node | None:
    """The node of `nodes` on which `container` runs, None if on none (or not reachable ones only)."""
    for node in nodes:
        if node.call("info", container=container)["pid"] is not None:
            return node
    return None


def recover(node: str | Node) -> list[str]:
    """Finish or undo every migration that was left in the middle on `node`; a sentence for each."""
    with _opened(node) as (where,):
        return [str(said) for said in where.call("recover")]
