# SPDX-License-Identifier: BSD-3-Clause
"""Keep a container's network quiet while it is being restored.

An engine gives the container its interface, with its address, before CRIU has restored the first socket.
What peers send over TCP meanwhile would be answered by the kernel with a reset, and their connection be lost.
So the namespace is locked before the interface comes into it, by a hook before the engine's own, or at once
if it was made beforehand; it is unlocked when all sockets are there. RoCE passes.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from migroce.engines import ocispec
from migroce.engines.files import read_json
from migroce.errors import MigroceError
from migroce.netrules import LOCK, UNLOCK
from migroce.runtime.commandline import CommandLine

_HOOK = (
    r"read -r state; pid=${state#*\"pid\":}; pid=${pid# }; "
    'printf %s "$1" | exec nsenter --net="/proc/${pid%%[!0-9]*}/ns/net" nft -f -'
)
"""A hook is told of the container by JSON on its standard input."""
_LIMIT = 20.0
"""Seconds that nft may take."""


def lock(config: dict[str, Any]) -> Path | None:
    """Lock the namespace that a container is about to be restored into, if it was made beforehand; its path.

    One that is yet to be made is locked by a hook, for which `config`, the bundle's, is changed: None.
    Raises MigroceError.
    """
    own, netns = ocispec.network_namespace(config)
    if netns is not None:
        _nft(netns, LOCK)
    elif own:
        path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin:/sbin:/bin"
        ours = {"path": "/bin/sh", "args": ["sh", "-c", _HOOK, "sh", LOCK], "env": [f"PATH={path}"]}
        hooks = config.setdefault("hooks", {})
        hooks["prestart"] = [ours, *(hooks.get("prestart") or [])]
    return netns


def unlock(line: CommandLine, netns: Path | None) -> None:
    """The container has been restored by `line`, or not: let its network go on. Raises MigroceError.

    `netns` is what `lock` gave. Not locked, or the namespace is gone, is fine.
    """
    if netns is None:
        state = read_json(Path(line.option("--root") or "/run/runc") / line.container / "state.json")
        netns = Path(str((state.get("namespace_paths") or {}).get("NEWNET") or "/nonexistent"))
    if netns.exists():
        _nft(netns, UNLOCK)


def _nft(netns: Path, rules: str) -> None:
    try:
        subprocess.run(
            ["nsenter", f"--net={netns}", "nft", "-f", "-"], input=rules.encode(), capture_output=True,
            timeout=_LIMIT, check=True,
        )  # fmt: skip
    except subprocess.CalledProcessError as exc:
        raise MigroceError("nft: " + exc.stderr.decode(errors="replace").strip()) from exc
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise MigroceError(f"nft: {exc}") from exc
