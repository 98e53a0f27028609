# SPDX-License-Identifier: BSD-3-Clause
"""Lock a container's network for the time of a dump, but for RoCE, which the agent's stand-in answers.

One nftables table in the container's own namespace. While it is there, TCP of the frozen container neither
sends nor acknowledges anything, so that what CRIU saw of its connections stays true.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from migroce.engines.network import in_netns
from migroce.errors import EngineError
from migroce.netrules import LOCK, UNLOCK


def _start(netns: Path, *args: str) -> subprocess.Popen[bytes]:
    try:
        return in_netns(
            netns,
            lambda: subprocess.Popen(
                ["nft", *args], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            ),
        )
    except OSError as exc:
        raise EngineError("lock", f"nft cannot be run: {exc.strerror}", "install nftables") from exc


class NetLock:
    """The lock of one namespace. `arm` starts nft beforehand; `lock` then takes 2 ms instead of 12."""

    def __init__(self, netns: Path) -> None:
        self._netns = netns
        self._armed: subprocess.Popen[bytes] | None = None

    def arm(self) -> None:
        """Get ready. Raises EngineError."""
        self._armed = _start(self._netns, "-f", "-")

    def lock(self) -> None:
        """Drop everything but RoCE from now on. Raises EngineError."""
        process = self._armed or _start(self._netns, "-f", "-")
        self._armed = None
        try:
            _, err = process.communicate(LOCK.encode(), 20)
        except subprocess.TimeoutExpired as exc:
            process.kill()
            process.communicate()
            raise EngineError("lock", "nft did not end within 20 s") from exc
        if process.returncode != 0:
            raise EngineError("lock", "nft: " + err.decode(errors="replace").strip())

    def disarm(self) -> None:
        """Let go of the process that `arm` started."""
        if self._armed is not None:
            self._armed.kill()
            self._armed.communicate()
            self._armed = None


def unlock(netns: Path) -> None:
    """Remove the lock; not locked, or the namespace is gone, is fine. Raises EngineError."""
    if not netns.exists():
        return
    process = _start(netns, "-f", "-")
    _, err = process.communicate(UNLOCK.encode(), 20)
    if process.returncode != 0:
        raise EngineError("unlock", "nft: " + err.decode(errors="replace").strip())
