# SPDX-License-Identifier: BSD-3-Clause
"""OCI bundles: the configuration of containers that we make ourselves.

Their root is the node's own `/` below a private writable layer, so no image is needed. Mounts are few, and
/dev (with /dev/shm) is a bind of a tmpfs that we make and fill ourselves, because each tmpfs of its own
costs CRIU 8 ms at a dump and 10 ms at a restore.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from migroce import paths
from migroce.engines import mounts
from migroce.engines.context import NodeContext
from migroce.engines.ocispec import LIBRARY, RUN_DIR

LOG = ".migroce/log"
"""Standard output and error of a container, inside its writable layer: it moves along with the container."""
DEV = "dev"
"""The container's /dev in its bundle."""
SHM = "dev/shm"
CRIU_CONFIG = "network-lock skip\nmanage-cgroups=ignore\n"
"""The container's network is locked by us, its cgroups are made by the runtime."""

_REDIRECT = f'exec </dev/null >>/{LOG} 2>&1; exec "$@"'
_CAPABILITIES = [  # as Docker gives them
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
]
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def environment(*, device: bool, extra: Mapping[str, str]) -> list[str]:
    """The process's environment: the device preloaded if wanted, MIGROCE_* of ours, then `extra`."""
    env = {"HOME": "/root", "TERM": "dumb", "LC_ALL": "C.UTF-8"}
    if device:
        env["LD_PRELOAD"] = f"/{LIBRARY}"
        env["MIGROCE_AGENT"] = f"{RUN_DIR}/agent.sock"
        env.update(
            {name: value for name, value in os.environ.items() if name in ("MIGROCE_LOG", "MIGROCE_DEBUG")}
        )
    env.update(extra)
    return ([] if "PATH" in env else [_PATH]) + [f"{name}={value}" for name, value in env.items()]


def _mounts(dev: Path, agent_dir: Path | None) -> list[dict[str, Any]]:
    def mount(destination: str, fstype: str, *options: str, source: str = "") -> dict[str, Any]:
        return {
            "destination": destination, "type": fstype, "source": source or fstype, "options": list(options)
        }  # fmt: skip

    plain = ("nosuid", "noexec", "nodev")
    found = [
        mount("/proc", "proc"),
        mount("/dev", "bind", "bind", "rw", "nosuid", source=str(dev)),
        mount("/dev/pts", "devpts", *plain[:2], "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        mount("/sys", "sysfs", *plain, "ro"),
    ]
    if agent_dir is not None:
        found.append(mount(RUN_DIR, "bind", "bind", "ro", "nosuid", "nodev", source=str(agent_dir)))
    return found


def config(
    ctx: NodeContext,
    container: str,
    args: Sequence[str],
    *,
    netns: Path | None,
    agent_dir: Path | None,
    env: Mapping[str, str],
    cwd: str,
) -> dict[str, Any]:
    """The config.json of a container of ours. `netns` None: an empty network of its own."""
    bundle = ctx.bundle(container)
    namespaces: list[dict[str, str]] = [{"type": kind} for kind in ("pid", "mount", "uts", "ipc")]
    namespaces.append({"type": "network"} | ({"path": str(netns)} if netns else {}))
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/sh", "-c", _REDIRECT, "sh", *args],
            "env": environment(device=agent_dir is not None, extra=env),
            "cwd": cwd,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
            "noNewPrivileges": True,
        },
        "root": {"path": str(bundle / "rootfs"), "readonly": False},
        "hostname": container,
        "mounts": _mounts(bundle / DEV, agent_dir),
        "annotations": {"org.criu.config": str(bundle / "criu.conf")},
        "linux": {
            "cgroupsPath": f"/{ctx.cgroup}/{container}",
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": namespaces,
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }


def relocate(
    raw: dict[str, Any], ctx: NodeContext, container: str, netns: Path | None, agent: Path | None
) -> None:
    """Rewrite what depends on the node in a configuration that comes from another one (in place)."""
    bundle = ctx.bundle(container)
    linux = raw.setdefault("linux", {})
    linux["cgroupsPath"] = f"/{ctx.cgroup}/{container}"
    raw["root"]["path"] = str(bundle / "rootfs")
    for namespace in linux.get("namespaces", []):
        if namespace["type"] == "network" and netns is not None:
            namespace["path"] = str(netns)
    for mount in raw.get("mounts", []):
        if mount["destination"] == RUN_DIR and agent is not None:
            mount["source"] = str(agent)
        if own_dev(mount, container):
            mount["source"] = str(bundle / DEV)
        if mount.get("type") == "bind" or "bind" in mount.get("options", []):
            mount["source"] = os.path.realpath(mount["source"])  # CRIU does not follow a link (/bin)
    annotations = raw.setdefault("annotations", {})
    if "org.criu.config" in annotations:
        annotations["org.criu.config"] = str(bundle / "criu.conf")


def own_dev(mount: Mapping[str, Any], container: str) -> bool:
    """Whether a mount is the /dev that we made for the container, on whichever node."""
    return mount["destination"] == "/dev" and str(mount.get("source", "")).endswith(
        f"/bundles/{container}/{DEV}"
    )


def make_dev(bundle: Path) -> None:
    """Mount and fill what will be the container's /dev. Raises OSError."""
    dev = bundle / DEV
    dev.mkdir(mode=0o755, exist_ok=True)
    mounts.tmpfs(dev, "mode=755,size=50%", device_nodes=True)
    for name, minor in (("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)):
        os.mknod(dev / name, 0o020666, os.makedev(1, minor))
    os.mknod(dev / "tty", 0o020666, os.makedev(5, 0))
    for node in dev.iterdir():
        node.chmod(0o666)
    for name, target in (
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
        ("ptmx", "pts/ptmx"),
    ):
        (dev / name).symlink_to(target)
    (dev / "pts").mkdir(mode=0o755)
    (bundle / SHM).mkdir()
    (bundle / SHM).chmod(0o1777)


def fill_layer(upper: Path, *, device: bool) -> None:
    """Put the log and the library into a fresh writable layer. Raises OSError, LibraryNotFoundError.

    The library is a copy, so that the container keeps running the one it was started with, on any node.
    """
    log = upper / LOG
    log.parent.mkdir(parents=True)
    log.touch()
    log.chmod(0o666)
    if device:
        target = upper / LIBRARY
        target.parent.mkdir(parents=True)
        shutil.copyfile(paths.library(), target)
        target.chmod(0o755)
        # Directories of the layer hide the mode of those below them: keep those of any Debian.
        for parent in target.relative_to(upper).parents:
            (upper / parent).chmod(0o755)
