# SPDX-License-Identifier: BSD-3-Clause
"""What code that runs on a node knows of it: names, directories, network. Saved as `node.json`."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from migroce import paths
from migroce.engines.files import check_id, read_json, write_json
from migroce.errors import EngineError

__all__ = ["NodeContext", "check_id", "host", "machine", "read_json", "write_json"]


@dataclasses.dataclass(frozen=True, slots=True)
class NodeContext:
    """One node as seen from itself."""

    name: str
    state: Path
    """Everything this package keeps for the node is below it."""
    runc_root: Path
    cgroup: str
    """Parent of the containers' cgroups, without a leading slash."""
    netns: str | None = None
    """Path of the node's network namespace; None: the one that code on the node runs in anyhow."""
    netns_prefix: str = "migroce-"
    """Containers' namespaces are `/run/netns/<prefix><container>`."""
    bridge: str | None = None
    """Where containers' interfaces are plugged in; None: the node gives containers no network."""
    mtu: int = 1500
    prefixlen: int = 24
    subnet: str | None = None
    """The network that containers' addresses are in."""
    runtime: str = "runc"
    agent: Path = Path("/run/migroce/admin.sock")
    lab: str | None = None
    engine: str = "oci"
    """What makes the containers: "oci" (we, by `runtime`) or "docker"."""
    docker_host: str | None = None
    """Where the node's dockerd listens, as DOCKER_HOST; None: the docker command's own default."""
    docker_bin: str | None = None
    """Directory of the docker command; None: it is on PATH."""

    @property
    def bundles(self) -> Path:
        return self.state / "bundles"

    @property
    def checkpoints(self) -> Path:
        return self.state / "checkpoints"

    @property
    def migrations(self) -> Path:
        return self.state / "migrations"

    def bundle(self, container: str) -> Path:
        return self.bundles / check_id(container)

    def container_netns(self, container: str) -> Path:
        return Path("/run/netns") / f"{self.netns_prefix}{container}"

    def save(self) -> None:
        """Write `node.json`. Raises OSError."""
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(self.state / "node.json", dataclasses.asdict(self))

    @classmethod
    def load(cls, state: Path) -> NodeContext:
        """The node that keeps its things in `state`. Raises EngineError."""
        try:
            raw = json.loads((state / "node.json").read_text())
        except (OSError, ValueError) as exc:
            raise EngineError("node", f"{state} is no node's state: {exc}", "is the lab up?") from exc
        known = {field.name for field in dataclasses.fields(cls)}
        raw = {key: value for key, value in raw.items() if key in known}
        for key in ("state", "runc_root", "agent"):
            raw[key] = Path(raw[key])
        return cls(**raw)


def host() -> NodeContext:
    """The machine itself as a node: its own network, runc's default root, so that `runc run` is seen."""
    context = machine()
    if (context.state / "node.json").is_file():
        return NodeContext.load(context.state)
    context.save()
    return context


def machine() -> NodeContext:
    """The machine as it would be a node, for those who only look: nothing is written."""
    return NodeContext(
        name=os.uname().nodename,
        state=paths.run_dir() / "node",
        runc_root=Path("/run/runc"),
        cgroup="migroce/host",
        agent=paths.admin_socket(),
    )
