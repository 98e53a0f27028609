# SPDX-License-Identifier: BSD-3-Clause
"""A small container that keeps a swarm's networks on a node while a migration needs them.

An overlay network comes to a node with the first container on it, which takes half a second, and goes with
the last. A node that leaves one and comes back at once may be forgotten by the others for good: they take the
entries of its new endpoints for those that left (moby issue 47728). So the destination has it before anything
is stopped, and the source does not lose it while an undo may want to connect its container again.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from migroce.engines import hold
from migroce.engines.docker import DockerEngine
from migroce.errors import EngineError


class Holder:
    """The container that one migration has on one node for that."""

    def __init__(self, docker: DockerEngine, where: Path, migration: str) -> None:
        self._docker = docker
        self._program = where / "hold"
        self._name = f"migroce-hold-{migration}"

    def start(self, networks: Mapping[str, Mapping[str, Any]], image: str, container: str) -> None:
        """Hold those of the swarm's among `networks` that no container but `container` (its id) is on.

        Best effort: without it a move is slower.
        """
        with contextlib.suppress(EngineError, OSError):
            swarms = [name for name, network in networks.items() if network["Scope"] == "swarm"]
            names = [name for name in swarms if not self._others(name, container)]
            if not names or not hold.write(self._program):
                return
            body = {
                "Image": image, "Entrypoint": ["/.migroce-hold"], "Cmd": [],
                "Healthcheck": {"Test": ["NONE"]},
                "HostConfig": {
                    "Binds": [f"{self._program}:/.migroce-hold:ro"], "CapDrop": ["ALL"],
                    "NetworkMode": names[0], "LogConfig": {"Type": "none"}, "Runtime": "runc",
                },
            }  # fmt: skip
            key = self._docker.create(self._name, body)
            for name in names[1:]:
                self._docker.connect(name, key, {})
            self._docker.start(key)

    def _others(self, network: str, container: str) -> set[str]:
        """Ids of other containers here that are on the network; its own load balancer is no container."""
        found = (self._docker.network(network) or {}).get("Containers") or {}
        return {key for key in found if re.fullmatch("[0-9a-f]{64}", key) and key != container}

    def remove(self) -> None:
        """Not there is fine. Raises EngineError."""
        if self._program.exists():
            self._docker.remove(self._name, volumes=True)
            self._program.unlink(missing_ok=True)
