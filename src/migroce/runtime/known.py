# SPDX-License-Identifier: BSD-3-Clause
"""What is known of a container between commands of migroce-runtime, and what an engine's driver tells it.

`<agent's directory>/runtime/<container>.<kind>`:

json     the bundle of a container that has the device
images   a link, made by whoever drives the engine: a directory for the images, which then need not pass
         through the engine's store
gate     what a restore waits for before it reads them (see migroce.runtime.gate)
paused   a directory: the dumps of RDMA contexts that `pause` has stopped
criu     CRIU's settings while a checkpoint is made
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

from migroce import paths
from migroce.agent.client import AgentClient
from migroce.agent.errors import AgentError
from migroce.engines.files import write_json
from migroce.errors import MigroceError

DEVICE, IMAGES, GATE, PAUSED, CRIU = "json", "images", "gate", "paused", "criu"
FOR_A_RESTORE = (IMAGES, GATE)
"""Of whoever drives the engine."""


def agent_socket() -> Path:
    """The admin socket of the node's agent."""
    return paths.admin_socket()


def path(container: str, kind: str, agent: Path | None = None) -> Path:
    """The file of that kind; `agent`: the admin socket of the node's agent, else of this one's.

    Raises MigroceError.
    """
    if not container or "/" in container or container.startswith("."):
        raise MigroceError(f"{container!r} is no container id")
    return (agent or agent_socket()).parent / "runtime" / f"{container}.{kind}"


def remember(container: str, bundle: Path) -> None:
    """Note that a container has the device. Raises MigroceError, OSError."""
    file = path(container, DEVICE)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_json(file, {"bundle": str(bundle)})


def bundle_of(container: str) -> Path | None:
    """The bundle of a container that has the device; None: it is not one of ours."""
    try:
        return Path(json.loads(path(container, DEVICE).read_text())["bundle"])
    except (OSError, ValueError, KeyError, MigroceError):
        return None


def chosen_images(container: str) -> str | None:
    """The directory that the engine's driver wants the images in."""
    with contextlib.suppress(OSError, MigroceError):
        return os.readlink(path(container, IMAGES))
    return None


def forget(container: str) -> None:
    """Let the agent forget a container; one that does not answer will find it gone by itself."""
    with contextlib.suppress(AgentError), AgentClient(agent_socket()) as agent:
        agent.container_remove(container)
    with contextlib.suppress(MigroceError, OSError):
        for kind in (DEVICE, CRIU, *FOR_A_RESTORE):
            path(container, kind).unlink(missing_ok=True)
        shutil.rmtree(path(container, PAUSED), ignore_errors=True)
        path(container, DEVICE).parent.rmdir()  # the last one
