# SPDX-License-Identifier: BSD-3-Clause
"""Which CRIU is used. It is on the blackout's path: no more is imported than that takes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from migroce import paths


def find() -> Path | None:
    """The CRIU to use: `MIGROCE_CRIU`, the private prefix of the work tree or of /opt, then PATH."""
    chosen = os.environ.get("MIGROCE_CRIU")
    if chosen:
        return Path(chosen)
    prefixes = [Path("/opt/migroce/criu")]
    root = paths.source_tree()
    if root is not None:
        prefixes.insert(0, root / ".criu")
    for prefix in prefixes:
        candidate = prefix / "sbin" / "criu"
        if os.access(candidate, os.X_OK):
            return candidate
    found = shutil.which("criu", path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin")
    return Path(found) if found else None


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """`base` (default: ours) with PATH such that runc and crun find the right CRIU first."""
    env = dict(os.environ if base is None else base)
    path = env.get("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    for directory in ("/usr/sbin", "/sbin"):
        if directory not in path.split(":"):
            path += ":" + directory
    criu = find()
    if criu is not None and path.split(":")[0] != str(criu.parent):
        path = f"{criu.parent}:{path}"
    env["PATH"] = path
    return env
