# SPDX-License-Identifier: BSD-3-Clause
"""What we put into a container's config.json, and read of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIBRARY = "usr/lib/migroce/libmigroce.so"
RUN_DIR = "/run/migroce"
"""Where the agent's directory for the container is mounted in it."""


def network_namespace(raw: Mapping[str, Any]) -> tuple[bool, Path | None]:
    """(has one of its own, its path if it was given by path)."""
    for namespace in raw.get("linux", {}).get("namespaces", []):
        if namespace["type"] == "network":
            return True, Path(namespace["path"]) if namespace.get("path") else None
    return False, None


def agent_directory(raw: Mapping[str, Any]) -> Path | None:
    """The host's directory that is the container's /run/migroce, if it has the device."""
    for mount in raw.get("mounts", []):
        if mount["destination"] == RUN_DIR:
            return Path(mount["source"])
    return None
