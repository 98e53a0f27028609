# SPDX-License-Identifier: BSD-3-Clause
"""`migroce version`."""

from __future__ import annotations

import json
import platform
import subprocess

from migroce import __version__, criu, criucheck, paths
from migroce.report.console import console


def collect() -> dict[str, str | None]:
    """Versions by component; None for what is not there."""
    found = criu.find()
    try:
        criu_version = ".".join(map(str, criucheck.version(found))) if found else None
    except criucheck.CriuError:
        criu_version = None
    try:
        library: str | None = str(paths.library())
    except paths.LibraryNotFoundError:
        library = None
    return {
        "migroce": __version__,
        "library": library,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "criu": criu_version,
        "criu_path": str(found) if found else None,
        "runc": _runc(),
    }


def _runc() -> str | None:
    try:
        out = subprocess.run(
            ["runc", "--version"],
            capture_output=True,
            text=True,
            timeout=10,
            env=criu.environment(),
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.splitlines()[0].removeprefix("runc version ") if out.stdout else None


def show(*, json_output: bool) -> None:
    """Print them."""
    versions = collect()
    if json_output:
        print(json.dumps(versions, indent=2))
        return
    for name, value in versions.items():
        console().print(f"{name.replace('_', ' '):10} {value or 'not there'}", markup=False)
