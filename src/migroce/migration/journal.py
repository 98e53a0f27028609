# SPDX-License-Identifier: BSD-3-Clause
"""The journal of a migration, on its source: what `recover` needs to finish or undo it.

`<state>/migrations/<id>/journal.json`, written before each phase; `lock` beside it is held (flock) by
whoever works on the migration, so a journal without an end that is not locked is an orphan.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, Self

from migroce.engines.context import NodeContext, write_json
from migroce.errors import MigrationError

PHASES = ("check", "prepare", "stop", "dump", "transfer", "restore", "resume", "commit")
KEEP = 4
"""Journals and logs of ended migrations that are kept per node."""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """The journal's content."""

    id: str
    kind: str
    """migrate or checkpoint."""
    container: str
    source: str
    destination: str
    """Specs of nodes, for `nodes.resolve`; or the directory of a checkpoint."""
    phase: str = "prepare"
    """The phase that was about to begin. See `past_the_point`."""
    device: bool = False
    """Whether the container has RDMA contexts to resume."""
    ended: str = ""
    """'', done, undone, or lost: something else has ended the container's processes."""
    started: float = 0.0
    engine: str = "oci"
    """oci or docker."""
    ip: str = ""
    """The address that it has at the destination, if another than before."""
    owner: int = 0
    owner_start: int = 0
    """Pid and start time of the command, if it runs on the source: while it lives it sees to failures."""

    def past_the_point(self) -> bool:
        """Whether the destination may have spoken to peers: if it has, the move can only be finished.

        Docker gives the container its network before the restore, we after it.
        """
        return PHASES.index(self.phase) >= PHASES.index("resume" if self.engine == "oci" else "restore")


def directory(ctx: NodeContext, migration: str) -> Path:
    """Where the files of a migration are on a node."""
    if not migration.isalnum():
        raise MigrationError("journal", f"{migration!r} is no migration's name")
    return ctx.migrations / migration


def check_free(ctx: NodeContext, container: str) -> None:
    """Raise MigrationError if the container is in another migration's hands."""
    for path, other in journals(ctx):
        if other.container == container and not other.ended:
            why = "is being moved already" if locked(path) else "was left in the middle of a move"
            mend = f"wait for it, or run `python -m migroce.migration.recover {path}`"
            raise MigrationError("check", f"{container} {why}", mend)


class Journal:
    """A journal that this process has locked."""

    def __init__(self, path: Path, record: Record, lock: int) -> None:
        self.path = path
        self.record = record
        self._lock = lock

    @classmethod
    def create(cls, ctx: NodeContext, record: Record) -> Self:
        """Begin a journal. Raises MigrationError if the container is in another's hands, OSError."""
        check_free(ctx, record.container)
        where = directory(ctx, record.id)
        where.mkdir(mode=0o700, parents=True)
        lock = take_lock(where, wait=False)
        assert lock is not None
        journal = cls(where / "journal.json", dataclasses.replace(record, started=time.time()), lock)
        journal.update()
        return journal

    @classmethod
    def adopt(cls, path: Path, *, wait: bool) -> Self | None:
        """Take over an existing journal; None if somebody else works on it or it is gone."""
        try:
            lock = take_lock(path.parent, wait=wait)
            if lock is None:
                return None
            return cls(path, read(path), lock)
        except FileNotFoundError:
            return None

    def update(self, **changes: Any) -> None:
        """Write the record with `changes`. Raises OSError."""
        self.record = dataclasses.replace(self.record, **changes)
        write_json(self.path, dataclasses.asdict(self.record))

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def take_lock(where: Path, *, wait: bool) -> int | None:
    """Lock the directory of a migration: a descriptor to be closed, None if somebody else has it."""
    fd = os.open(where / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def locked(path: Path) -> bool:
    """Whether somebody works on the journal at `path`."""
    try:
        fd = take_lock(path.parent, wait=False)
    except FileNotFoundError:
        return False
    if fd is None:
        return True
    os.close(fd)
    return False


def read(path: Path) -> Record:
    """The record at `path`. Raises FileNotFoundError, MigrationError."""
    try:
        raw = json.loads(path.read_text())
        known = {field.name for field in dataclasses.fields(Record)}
        record = Record(**{key: value for key, value in raw.items() if key in known})
        PHASES.index(record.phase)
    except (ValueError, TypeError, AttributeError) as exc:
        raise MigrationError(
            "journal", f"{path} is damaged: {exc}", "see where the container runs by `migroce ps`"
        ) from exc
    return record


def journals(ctx: NodeContext) -> list[tuple[Path, Record]]:
    """All readable journals of a node, oldest first."""
    found = []
    for path in ctx.migrations.glob("*/journal.json"):
        with contextlib.suppress(MigrationError, FileNotFoundError):
            found.append((path, read(path)))
    return sorted(found, key=lambda each: each[1].started)


def orphans(ctx: NodeContext) -> list[Path]:
    """Journals without an end that nobody works on."""
    return [path for path, record in journals(ctx) if not record.ended and not locked(path)]


def prune(ctx: NodeContext) -> None:
    """Remove all but the last few ended migrations' files."""
    ended = [path for path, record in journals(ctx) if record.ended and not locked(path)]
    logs = [
        path
        for path in ctx.migrations.glob("*")
        if not (path / "journal.json").exists() and not (path / "mem").exists()
    ]
    logs.sort(key=lambda path: path.stat().st_mtime)
    for path in [*(path.parent for path in ended[:-KEEP]), *logs[:-KEEP]]:
        shutil.rmtree(path, ignore_errors=True)
