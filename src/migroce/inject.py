# SPDX-License-Identifier: BSD-3-Clause
"""Give the device to an OCI bundle that somebody else has made, before its runtime runs it.

Four things make a container one with the device: the library in its root file system, LD_PRELOAD
and MIGROCE_AGENT in its environment, the node's agent told of it, and the agent's directory for it
mounted at /run/migroce. Any OCI runtime can then run the bundle.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from migroce import paths
from migroce.agent.client import AgentClient
from migroce.engines.bundle import LIBRARY, RUN_DIR, network_namespace
from migroce.engines.context import check_id, write_json
from migroce.errors import MigroceError

_AGENT = f"{RUN_DIR}/agent.sock"


def add(bundle: Path, container: str, agent: Path, ip: str | None = None) -> Path:
    """Give the device to the container `container` to be run from `bundle`; the agent's directory for it.

    `agent` is the admin socket of the node's agent; `ip` the address to use, for containers with
    several. Can be repeated. Raises MigroceError, AgentError.
    """
    check_id(container)
    config = _read(bundle)
    root = _root(bundle, config)
    _, netns = network_namespace(config)
    with AgentClient(agent) as client:
        directory = client.container_add(container, netns=str(netns) if netns else None, gid=ip)
    target = root / LIBRARY
    try:
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        shutil.copyfile(paths.library(), target)
        target.chmod(0o755)
    except OSError as exc:
        text = (
            f"{target} cannot be written: {exc.strerror}; the root file system must be writable for this step"
        )
        raise MigroceError(text) from exc
    _strip(config)
    env = config["process"].setdefault("env", [])
    old = next((each for each in env if each.startswith("LD_PRELOAD=")), "")
    if old:
        env.remove(old)
    others = old.partition("=")[2].replace(":", " ").split()
    env.append("LD_PRELOAD=" + ":".join([f"/{LIBRARY}", *others]))
    env.append(f"MIGROCE_AGENT={_AGENT}")
    config.setdefault("mounts", []).append(
        {
            "destination": RUN_DIR,
            "type": "bind",
            "source": str(directory),
            "options": ["bind", "rw", "nosuid", "nodev"],
        }
    )
    write_json(bundle / "config.json", config)
    return directory


def remove(bundle: Path, container: str, agent: Path) -> None:
    """Undo `add`; the library's file stays if it cannot be removed. Raises MigroceError, AgentError."""
    config = _read(bundle)
    with AgentClient(agent) as client:
        client.container_remove(container)
    (_root(bundle, config) / LIBRARY).unlink(missing_ok=True)
    _strip(config)
    write_json(bundle / "config.json", config)


def _read(bundle: Path) -> dict[str, Any]:
    path = bundle / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as exc:
        raise MigroceError(f"{bundle} is no OCI bundle: it has no config.json (see `runc spec`)") from exc
    except (OSError, ValueError) as exc:
        raise MigroceError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(config, dict) or not isinstance(config.get("process"), dict):
        raise MigroceError(f"{path} describes no process")
    return config


def _root(bundle: Path, config: dict[str, Any]) -> Path:
    root = bundle / str(config.get("root", {}).get("path", "rootfs"))
    if not root.is_dir():
        raise MigroceError(f"{root}, the bundle's root file system, is not there")
    return root


def _strip(config: dict[str, Any]) -> None:
    """Take out what `add` puts in."""
    ours = f"/{LIBRARY}"
    env = []
    for each in config["process"].get("env", []):
        name, _, value = each.partition("=")
        if name == "LD_PRELOAD":
            value = ":".join(part for part in value.replace(":", " ").split() if part != ours)
            if not value:
                continue
            each = f"LD_PRELOAD={value}"
        if name != "MIGROCE_AGENT":
            env.append(each)
    config["process"]["env"] = env
    config["mounts"] = [mount for mount in config.get("mounts", []) if mount.get("destination") != RUN_DIR]
