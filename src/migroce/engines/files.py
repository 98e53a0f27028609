# SPDX-License-Identifier: BSD-3-Clause
"""Files that say what is known of a container, and names that may be theirs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from migroce.errors import EngineError

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def check_id(container: str) -> str:
    """`container` if it is usable as a name of files and cgroups. Raises EngineError."""
    if not _ID.fullmatch(container):
        raise EngineError(
            "container",
            f"{container!r} is no container name",
            "use letters, digits, '-', '_' and '.', at most 63",
        )
    return container


def write_json(path: Path, value: Any) -> None:
    """Replace `path` in one step, so that a reader or a crash sees the old or the new."""
    part = path.with_name(path.name + "~")
    part.write_text(json.dumps(value, indent=1, default=str) + "\n")
    part.rename(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty if there is none. Raises ValueError for damage."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no object")
    return value
