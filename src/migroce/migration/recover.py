# SPDX-License-Identifier: BSD-3-Clause
"""`python -m migroce.migration.recover JOURNAL`: finish or undo a migration whose command has died.

Before the phase `resume` the source's container is the true one: it is thawed and the other removed. From
then on the destination's is, if it is there; if the destination cannot be asked, nothing is done.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

from migroce.engines.context import NodeContext
from migroce.engines.docker import DockerEngine
from migroce.engines.oci import OciEngine, stat_fields
from migroce.errors import MigrationError, MigroceError
from migroce.migration import journal
from migroce.migration.orchestrate import Side, finish, undo_destination, undo_source
from migroce.nodes import Node, resolve

OWNER_LIMIT = 120.0
"""Seconds that a living command gets to bring its migration to an end itself."""


def recover(path: Path) -> str:
    """Bring the migration of the journal at `path` to an end; a sentence that says how. Raises."""
    try:
        record = journal.read(path)
    except FileNotFoundError:
        return "nothing to recover: the migration has ended"
    if record.ended:
        return f"nothing to recover: {record.container}'s move is {record.ended}"
    _let_the_owner_try(path, record)
    with resolve(record.source) as source:
        here = Side(source, "source", record.id, record.container, record.engine)
        if not here("adopt"):
            return f"nothing to recover: {record.container}'s move has ended meanwhile"
        record = journal.read(path)  # as it was left, now that nobody else works on it
        if record.kind != "migrate":
            undo_source(here, stopped=True)
            return f"{record.container} runs on {source.name} as before"
        try:
            destination = resolve(record.destination)
        except MigroceError as exc:
            return _without_destination(here, record, exc)
        with destination:
            return _with_both(here, destination, record)


def _let_the_owner_try(path: Path, record: journal.Record) -> None:
    """While the command lives it sees to its failures itself (a helper of its has died, say)."""
    end = time.monotonic() + OWNER_LIMIT
    while record.owner and time.monotonic() < end:
        fields = stat_fields(record.owner)
        if fields is None or fields[0] in "ZX" or fields[1] != record.owner_start:
            return
        with contextlib.suppress(MigroceError, FileNotFoundError):
            if journal.read(path).ended:
                return
        if not path.exists():
            return
        time.sleep(0.02)


def _without_destination(here: Side, record: journal.Record, why: MigroceError) -> str:
    if record.past_the_point():
        mend = "make it reachable and try again; the container here stays frozen"
        raise MigrationError("recover", f"whether {record.container} runs there is not known: {why}", mend)
    undo_source(here, stopped=True)
    return f"{record.container} runs on {here.node.name} as before"


def _with_both(here: Side, destination: Node, record: journal.Record) -> str:
    there = Side(destination, "destination", record.id, record.container, record.engine)
    try:
        there("adopt")
        status = there("status")
    except MigroceError as exc:
        return _without_destination(here, record, exc)
    arrived = status["here"] and (status["alive"] or status["exit_status"] is not None)
    if record.past_the_point() and arrived:
        finish(here, there, resume=record.device and status["alive"], ip=record.ip)
        return f"{record.container} runs on {destination.name}"
    undo_destination(there)
    undo_source(here, stopped=True)
    return f"{record.container} runs on {here.node.name} as before"


def recover_all(ctx: NodeContext) -> list[str]:
    """Recover every orphan on the node of `ctx`; a sentence for each, errors too."""
    said = []
    for path in journal.orphans(ctx):
        try:
            said.append(recover(path))
        except MigroceError as exc:
            said.append(str(exc))
    return said + _lost(ctx)


def _lost(ctx: NodeContext) -> list[str]:
    """A sentence for each container that its last move has lost, until somebody has started it again."""
    last = {record.container: record for _, record in journal.journals(ctx)}
    said = []
    for record in last.values():
        if record.ended != "lost":
            continue
        engine = DockerEngine(ctx) if record.engine == "docker" else OciEngine(ctx)
        with contextlib.suppress(MigroceError):
            info = engine.info(record.container)
            if info is not None and info.status != "running":
                what = f"{record.container} was ended by something else during its move"
                said.append(f"{what}; start it again on {ctx.name}")
    return said


def main(argv: list[str]) -> int:
    """Recover the journal named on the command line."""
    if len(argv) != 1:
        print("usage: python -m migroce.migration.recover JOURNAL", file=sys.stderr)
        return 2
    try:
        print(recover(Path(argv[0])), flush=True)
    except MigroceError as exc:
        print(f"recover: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
