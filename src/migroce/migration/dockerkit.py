# SPDX-License-Identifier: BSD-3-Clause
"""What both sides of moving a Docker container use: room for images, the agent's name of it, volumes left."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from migroce.engines import mounts
from migroce.engines.context import NodeContext, read_json, write_json
from migroce.runtime import known

_SHARED_MEMORY = Path("/dev/shm")
_SPARE = 64 << 20
RUNTIME = "migroce-runtime"
"""Our OCI runtime's program."""
BESIDE = "migroce"
"""Where it has the RDMA dumps, among the images (see migroce.runtime.wrap)."""


def place(where: Path, need: int, migration: str, process: int | None) -> Path:
    """A new directory for `need` bytes of images that `process` sees too, in memory if there is room.

    A file system mounted now is not seen in the mount namespace that a dockerd may have of its own.
    """
    fallback = where / "mem"
    with contextlib.suppress(OSError):
        stat = os.statvfs(_SHARED_MEMORY)
        room = stat.f_bavail * stat.f_frsize
        seen = (
            process is None
            or os.stat(f"/proc/{process}/root{_SHARED_MEMORY}").st_dev == os.stat(_SHARED_MEMORY).st_dev
        )
        if mounts.filesystem(_SHARED_MEMORY) == "tmpfs" and seen and room > need * 5 // 4 + _SPARE:
            made = _SHARED_MEMORY / f"migroce-{migration}"
            write_json(where / "mem.json", {"path": str(made)})  # first: whoever is killed leaves word of it
            made.mkdir(mode=0o700)
            return made
    (where / "mem.json").unlink(missing_ok=True)
    fallback.mkdir(mode=0o700)
    return fallback


def placed(where: Path) -> Path:
    """What `place` made."""
    return Path(read_json(where / "mem.json").get("path") or where / "mem")


def release(where: Path) -> None:
    """Remove what `place` made; can be repeated."""
    if where.is_dir():
        shutil.rmtree(placed(where), ignore_errors=True)
        (where / "mem.json").unlink(missing_ok=True)


def runtime_file(ctx: NodeContext, key: str, kind: str) -> Path:
    """A file by which migroce-runtime knows, or is told, of a container: a kind of migroce.runtime.known."""
    return known.path(key, kind, ctx.agent)


def agent_name(found: Mapping[str, Any]) -> str:
    """What the agent calls a Docker container: as the OCI runtime does."""
    return str(found["Id"])


# Named volumes stay where they were, for other containers and as a copy; when the container comes back, what
# is in a copy is older than what comes, and may be replaced.


def left_volumes(ctx: NodeContext) -> set[str]:
    """Names of volumes here whose container was moved away."""
    return set(read_json(ctx.state / "volumes.json").get("left", []))


def leave_volumes(ctx: NodeContext, names: list[str], *, left: bool) -> None:
    """Note that the volumes' container was moved away (or has come back)."""
    known = left_volumes(ctx)
    now = known | set(names) if left else known - set(names)
    if now != known:
        write_json(ctx.state / "volumes.json", {"left": sorted(now)})


# A plain container's bundle says by which migration it came; Docker's containers have no place for that.

_ARRIVALS = 64


def note_arrival(ctx: NodeContext, migration: str, key: str) -> None:
    """Remember that the container `key` has come here for good by `migration`."""
    known = dict(read_json(ctx.state / "arrivals.json"))
    known[migration] = key
    write_json(ctx.state / "arrivals.json", dict(list(known.items())[-_ARRIVALS:]))


def arrival(ctx: NodeContext, migration: str) -> dict[str, Any]:
    """{id, started} of the container that came here by `migration`; empty if none has."""
    key = read_json(ctx.state / "arrivals.json").get(migration)
    return {"id": key, "started": True} if key else {}
