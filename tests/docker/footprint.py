# SPDX-License-Identifier: BSD-3-Clause
"""All that there is of Docker and migroce on a lab's nodes, to be compared before and after something."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

from tests.docker.stage import COUNTER

from migroce.lab.api import Lab
from migroce.nodes import LocalNode

_LOGS = {"lock", "journal.json", "criu.conf", "docker.json", "stats-dump", "stats-restore"}
"""Beside *.log: what a migration that failed leaves to be looked at."""


def footprint(lab: Lab) -> set[str]:
    """A line for each thing: containers, networks' endpoints, images, volumes, checkpoints, mounts, files,
    rules, cgroups and processes. Two that are equal: nothing has been left, nothing is missing.
    """
    seen: set[str] = set()
    for node in lab.nodes.values():
        seen |= {f"{node.name}: {line}" for line in _of_docker(node) | _of_files(node) | _of_kernel(node)}
    return seen


def _of_docker(node: LocalNode) -> set[str]:
    def docker(*args: str) -> list[str]:
        return node.run(["docker", *args], timeout=120).stdout.decode().splitlines()

    seen = {f"container {line}" for line in docker("ps", "-a", "--format", "{{.ID}} {{.Names}} {{.State}}")}
    seen |= {
        f"image {line}"
        for line in docker("image", "ls", "-a", "--format", "{{.ID}} {{.Repository}}:{{.Tag}}")
    }
    seen |= {f"volume {line}" for line in docker("volume", "ls", "-q")}
    for network in json.loads("\n".join(docker("network", "inspect", *docker("network", "ls", "-q")))):
        seen.add(f"network {network['Name']}")
        seen |= {f"{network['Name']}: {key} {each['IPv4Address']}"
                 for key, each in (network.get("Containers") or {}).items()}  # fmt: skip
    (root,) = docker("info", "-f", "{{.DockerRootDir}}")
    for pattern in (
        "containers/*/checkpoints/*",
        "volumes/*",
        "tmp/*",
        "containerd-tmp/*",
        "overlay2/*",
        "image/overlay2/layerdb/sha256/*",
    ):
        seen |= {str(path.relative_to(root)) for path in Path(root).glob(pattern)}
    return seen


def _of_files(node: LocalNode) -> set[str]:
    """Below the node's state; of migrations that have failed the logs may stay."""
    state, migrations = node.context.state, node.context.migrations
    seen = {str(path) for path in Path("/dev/shm").glob("migroce-*") if (migrations / path.name[8:]).exists()}
    for where, names, files in os.walk(state):
        at = Path(where)
        names[:] = [
            name for name in names if at != state or name not in ("docker", "docker-run", "docker-config")
        ]
        for name in [*names, *files]:
            path = at / name
            if at.parent == migrations and (name in _LOGS or name.endswith(".log")):
                continue
            if at != migrations and name not in ("volumes.json", "arrivals.json", "stopped"):
                seen.add(str(path.relative_to(state)))
    run = state / "docker-run"
    seen |= {str(path.relative_to(state)) for path in run.glob("runtime-runc/moby/*")}
    seen |= {
        str(path.relative_to(state))
        for path in run.glob("containerd/daemon/io.containerd.runtime.v2.task/moby/*")
    }
    return seen


def _of_kernel(node: LocalNode) -> set[str]:
    state = str(node.context.state)
    seen = set()
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        try:
            process = Path(f"/proc/{pid}")
            argv = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            cgroups = (process / "cgroup").read_text()
            parent = re.search(r"^PPid:\t(\d+)$", (process / "status").read_text(), re.MULTILINE)
            above = Path(f"/proc/{parent[1]}/cmdline").read_bytes() if parent and parent[1] != "0" else b""
        except OSError:
            continue
        own = parent is not None and int(parent[1]) == os.getpid()
        ours = ("migroce.migration" in argv and not own) or "criu" in argv.split(" ")[0]
        if COUNTER.encode() in above:  # its children, each a new one: forked, asleep or a zombie
            continue
        if node.context.cgroup in cgroups or (ours and state in argv):
            seen.add(f"process {pid} {argv.strip()[:120]}")
    for base in Path("/sys/fs/cgroup").glob(f"*/{node.context.cgroup}"):
        seen |= {f"cgroup {path}" for path in base.rglob("*") if path.is_dir()}
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    seen |= {f"mount {line.split()[4]}" for line in mounts if state in line.split()[4]}
    argv = node.command(["nft", "list", "ruleset"])
    rules = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    seen |= {f"rule {line.strip()}" for line in rules.splitlines() if "migroce" in line or "CRIU" in line}
    links = subprocess.run(
        node.command(["ip", "-o", "link"]), capture_output=True, text=True, check=True
    ).stdout
    names = [line.split(": ")[1] for line in links.splitlines()]
    seen |= {
        f"link {name}" for name in names if not name.startswith("veth")
    }  # these get other names each time
    seen.add(f"{sum(name.startswith('veth') for name in names)} veth links")
    return seen
