# SPDX-License-Identifier: BSD-3-Clause
"""Give the device to an OCI bundle that somebody else has made, before its runtime runs it.

Four things make a container one with the device: the library in its root file system, LD_PRELOAD
and MIGROCE_AGENT in its environment, the node's agent told of it, and the agent's directory for it
mounted at /run/migroce. Any OCI runtime can then run the bundle.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from migroce import paths
from migroce.agent.client import AgentClient
from migroce.engines.files import check_id, write_json
from migroce.engines.ocispec import LIBRARY, RUN_DIR, network_namespace
from migroce.errors import MigroceError

_AGENT = f"{RUN_DIR}/agent.sock"


def add(bundle: Path, container: str, agent: Path, ip: str | None = None) -> Path:
    """Give the device to the container `container` to be run from `bundle`; the agent's directory for it.

    `agent` is the admin socket of the node's agent; `ip` the address to use, for containers with
    several. Can be repeated. Raises MigroceError, AgentError.
    """
    check_id(container)
    config = read(bundle)
    _root(bundle, config)  # refused before the agent hears of it
    _, netns = network_namespace(config)
    with AgentClient(agent) as client:
        directory = client.container_add(container, netns=str(netns) if netns else None, gid=ip)
    edit(bundle, config, directory)
    return directory


def edit(bundle: Path, config: dict[str, Any], directory: Path, *, restored: bool = False) -> None:
    """Put the library, its environment and the agent's `directory` into a bundle. Raises MigroceError.

    `config` is what `read` gave; it is changed and written. `restored`: the container was started with the
    library that is in its root file system, of whichever version, and needs that one.
    """
    root = _root(bundle, config)
    if not (restored and (root / LIBRARY).is_file()):
        _install(root)
    _strip(config)
    environment(config["process"])
    config.setdefault("mounts", []).append(
        {
            "destination": RUN_DIR,
            "type": "bind",
            "source": str(directory),
            "options": ["bind", "ro", "nosuid", "nodev"],
        }
    )
    write_json(bundle / "config.json", config)


def environment(process: dict[str, Any]) -> None:
    """Preload the library in an OCI process, before whatever it preloads itself."""
    env = process.setdefault("env", [])
    old = next((each for each in env if each.startswith("LD_PRELOAD=")), "")
    if old:
        env.remove(old)
    others = [each for each in old.partition("=")[2].replace(":", " ").split() if each != f"/{LIBRARY}"]
    env.append("LD_PRELOAD=" + ":".join([f"/{LIBRARY}", *others]))
    if f"MIGROCE_AGENT={_AGENT}" not in env:
        env.append(f"MIGROCE_AGENT={_AGENT}")


@contextlib.contextmanager
def _directory(root: Path, *, make: bool) -> Iterator[int]:
    """The library's directory in a root file system, none of whose links is followed. Raises OSError."""
    where = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in Path(LIBRARY).parent.parts:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=where)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=where)
            os.close(where)
            where = inner
        yield where
    finally:
        os.close(where)


def _install(root: Path) -> None:
    """Copy the library into a root file system. Raises MigroceError."""
    name = Path(LIBRARY).name
    part = f".{name}"
    try:
        with _directory(root, make=True) as where:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part, dir_fd=where)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(part, flags, 0o755, dir_fd=where), "wb") as target:
                os.fchmod(target.fileno(), 0o755)
                target.write(paths.library().read_bytes())
            os.rename(part, name, src_dir_fd=where, dst_dir_fd=where)
    except OSError as exc:
        text = f"{root / LIBRARY} cannot be written: {exc.strerror}"
        mend = "the root file system must be writable for this step, and usr/lib in it a plain directory"
        raise MigroceError(f"{text}; {mend}") from exc


def remove(bundle: Path, container: str, agent: Path) -> None:
    """Undo `add`; the library's file stays if it cannot be removed. Raises MigroceError, AgentError."""
    config = read(bundle)
    with AgentClient(agent) as client:
        client.container_remove(container)
    with contextlib.suppress(OSError), _directory(_root(bundle, config), make=False) as where:
        os.unlink(Path(LIBRARY).name, dir_fd=where)
    _strip(config)
    write_json(bundle / "config.json", config)


def read(bundle: Path) -> dict[str, Any]:
    """A bundle's config.json. Raises MigroceError."""
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
