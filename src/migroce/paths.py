# SPDX-License-Identifier: BSD-3-Clause
"""Where things are: the device library and the directories used at run time.

An installed package carries its library (``migroce/lib/libmigroce.so``). A work tree has it in
``build/native``. The environment wins over both, so that tests can run a sanitized build.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


class LibraryNotFoundError(FileNotFoundError):
    """A native library of ours is not built or not installed; the text says how to mend it."""


def source_tree() -> Path | None:
    """The work tree this package is run from, or None for an installed one."""
    root = _PACKAGE.parent.parent
    return root if (root / "native" / "meson.build").is_file() else None


def _find(name: str, variable: str) -> Path:
    chosen = os.environ.get(variable)
    if chosen:
        path = Path(chosen)
        if path.is_file():
            return path.resolve()
        raise LibraryNotFoundError(f"{variable}={chosen} names no file; unset it or correct it")
    candidates = [_PACKAGE / "lib" / name]
    root = source_tree()
    if root is not None:
        candidates.append(root / "build" / "native" / name)
    for path in candidates:
        if path.is_file():
            return path
    mend = "run `make build` in the work tree" if root is not None else "reinstall the package"
    raise LibraryNotFoundError(f"{name} is not there (looked for {candidates[-1]}): {mend}")


def library() -> Path:
    """libmigroce.so, the library that applications preload (``MIGROCE_LIBRARY`` overrides)."""
    return _find("libmigroce.so", "MIGROCE_LIBRARY")


def sim_library() -> Path:
    """libmgsim.so, the transport and simulator for tests (``MIGROCE_SIM_LIBRARY`` overrides)."""
    return _find("libmgsim.so", "MIGROCE_SIM_LIBRARY")


def run_dir() -> Path:
    """State that does not outlive a boot: ``/run/migroce``, or the user's own without root.

    ``MIGROCE_RUN_DIR`` overrides. The directory is not created here.
    """
    chosen = os.environ.get("MIGROCE_RUN_DIR")
    if chosen:
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/run/migroce")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "migroce"
    return Path(f"/tmp/migroce-{os.geteuid()}")


def agent_socket() -> Path:
    """The socket at which the library finds this node's agent (``MIGROCE_AGENT`` overrides)."""
    return Path(os.environ.get("MIGROCE_AGENT") or run_dir() / "agent.sock")


def admin_socket() -> Path:
    """The agent's admin socket (``MIGROCE_ADMIN`` overrides)."""
    return Path(os.environ.get("MIGROCE_ADMIN") or run_dir() / "admin.sock")
