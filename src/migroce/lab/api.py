# SPDX-License-Identifier: BSD-3-Clause
"""Bring a lab up, look at it, use it, take it down.

    with Lab.up(nodes=2) as lab:            # or lab.down() later, also from another process
        lab.create("cont-static", "node-a", ["ib_send_bw", "-d", "rxe0"], ip="10.0.1.3")

State is below `<run dir>/lab/<name>/<node>`, as on as many machines: agent/ (its sockets), runc/ (the
runtime's root), bundles/, checkpoints/, migrations/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import ipaddress
import json
import os
import re
import shutil
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from migroce import criu, paths
from migroce.engines import cgroup, mounts
from migroce.engines.context import NodeContext, write_json
from migroce.errors import LabError
from migroce.lab import docker, kdat, processes, topology
from migroce.nodes import LocalNode

MAX_NODES = 26
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,15}")
_LONGEST_PREFIX = 29
_NO_HOSTS = (0, *range(240, 256))
"""First bytes of addresses that no host has."""


@dataclasses.dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node as `status` shows it."""

    name: str
    underlay: str
    """Its address on the underlay, empty without overlay."""
    netns: str
    agent: int | None
    """Pid of its agent, None if that does not answer."""
    containers: list[dict[str, Any]]
    """As `ContainerInfo`."""


class Lab:
    """A lab that is up."""

    def __init__(
        self, name: str, state: Path, plan: topology.Plan, contexts: Mapping[str, NodeContext],
        made: docker.Docker | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.docker = made
        """The Docker of its nodes; None: containers are plain OCI bundles."""
        self.state = state
        self._plan = plan
        self.nodes = {node: LocalNode(ctx, f"{name}/{node}") for node, ctx in contexts.items()}

    # -- up and down ---------------------------------------------------------------------------------------

    @classmethod
    def up(
        cls, name: str = "lab", nodes: int = 2, subnet: str = "10.0.1.0/24", *, overlay: bool = True,
        engine: str = "oci", release: str | None = None, tell: Callable[[str], None] = lambda _: None,
    ) -> Self:  # fmt: skip
        """Bring up a lab; one that is up already is taken as it is, its agents started if they had died.

        `overlay` False: containers' bridges are joined directly, for benchmarks. `engine`: "oci", or "docker"
        for a dockerd per node, of the release that `docker.find` finds; `tell` hears what is fetched first.
        Raises LabError.
        """
        _check(name, nodes, subnet)
        if engine not in ("oci", "docker"):
            raise LabError("up", f"there is no engine {engine!r}", "name oci or docker")
        made = docker.find(release, tell=tell) if engine == "docker" else None
        saved = docker.image(tell=tell) if made is not None else None
        with _locked(name):
            if _state(name).is_dir():
                lab = cls._whole(name)
                if lab is not None:
                    known = (len(lab.nodes), lab._plan.overlay, lab.docker)
                    if known != (nodes, overlay, made):
                        mend = "take it down first, or give this one another name"
                        raise LabError("up", f"lab {name} is up with {known[0]} nodes and differs", mend)
                    lab._ensure_agents()
                    lab._ensure_docker(saved)
                    return lab
            _clear(name)
            try:
                return cls._build(name, nodes, subnet, overlay, made, saved)
            except BaseException as exc:
                _clear(name)
                if isinstance(exc, (LabError, KeyboardInterrupt)) or not isinstance(exc, Exception):
                    raise
                raise LabError("up", f"lab {name} cannot be built: {exc}", "see `migroce doctor`") from exc

    @classmethod
    def load(cls, name: str = "lab") -> Self:
        """The lab `name`, which must be up. Raises LabError."""
        lab = cls._whole(name)
        if lab is None:
            raise LabError("lab", f"lab {name} is not up", "bring it up by `migroce lab up`")
        return lab

    @classmethod
    def _whole(cls, name: str) -> Self | None:
        try:
            raw = json.loads((_state(name) / "lab.json").read_text())
            known = raw.get("docker")
            made = docker.Docker(known[0], Path(known[1]) if known[1] else None) if known else None
            plan = topology.Plan(name, tuple(raw["nodes"]), bool(raw["overlay"]), docker=made is not None)
        except (OSError, ValueError, KeyError):
            return None
        wanted = [plan.underlay_ns(), *(plan.node_ns(node) for node in plan.nodes)]
        if not all(os.path.ismount(topology.netns_path(each)) for each in wanted):
            return None
        contexts = {node: NodeContext.load(_state(name) / node) for node in plan.nodes}
        return cls(name, _state(name), plan, contexts, made)

    @classmethod
    def _build(
        cls, name: str, count: int, subnet: str, overlay: bool, made: docker.Docker | None, saved: Path | None
    ) -> Self:
        names = tuple(f"node-{letter}" for letter in string.ascii_lowercase[:count])
        plan = topology.Plan(name, names, overlay, docker=made is not None)
        state = _state(name)
        state.mkdir(mode=0o755, parents=True)
        if made is None and "overlay" in (mounts.filesystem(Path("/")), mounts.filesystem(state)):
            reason = "the root file system here is an overlay, and CRIU cannot dump an overlay on an overlay"
            raise LabError("up", reason, "use a machine or a virtual machine instead of a container")
        contexts = {}
        for node in names:
            where = state / node
            ctx = contexts[node] = NodeContext(
                name=node, state=where, runc_root=where / "runc", cgroup=f"migroce/{name}/{node}",
                netns=str(topology.netns_path(plan.node_ns(node))), netns_prefix=f"{plan.node_ns(node)}.",
                bridge=None if made else topology.BRIDGE, mtu=topology.MTU, subnet=subnet, lab=name,
                prefixlen=ipaddress.IPv4Network(subnet).prefixlen, agent=where / "agent" / "admin.sock",
            )  # fmt: skip
            if made is not None:
                found = str(made.bin) if made.bin else None
                ctx = contexts[node] = dataclasses.replace(
                    ctx, engine="docker", docker_host=docker.host(ctx), docker_bin=found
                )
            for directory in (ctx.runc_root, ctx.bundles, ctx.checkpoints, ctx.migrations):
                directory.mkdir(mode=0o700, parents=True)
            ctx.save()
        topology.build(plan)
        kdat.provide(criu.find())
        lab = cls(name, state, plan, contexts, made)
        lab._ensure_agents()
        lab._ensure_docker(saved)
        release = [made.version, str(made.bin) if made.bin else None] if made is not None else None
        write_json(
            state / "lab.json", {"nodes": names, "overlay": overlay, "subnet": subnet, "docker": release}
        )
        return lab

    def _ensure_agents(self) -> None:
        for node in self.nodes.values():
            if processes.agent_pid(node.context) is None and not processes.supervisors(node.context.state):
                processes.start_agent(node.context, node.command([]))
        for node in self.nodes.values():
            processes.wait_for_agent(node.context)

    def _ensure_docker(self, saved: Path | None) -> None:
        if self.docker is not None:
            docker.ensure(
                {name: node.context for name, node in self.nodes.items()}, self.docker,
                lambda node: self.nodes[node].command([]), self._subnet(), topology.MTU,
                self._plan.underlay_ip, saved,
            )  # fmt: skip

    def down(self) -> None:
        """Take the lab down. Nothing of it stays. Raises LabError."""
        for node in self.nodes.values():
            node.close()
        remove(self.name)

    # -- using it ------------------------------------------------------------------------------------------

    def node(self, name: str) -> LocalNode:
        """The node `node-a`, or `a` for short. Raises LabError."""
        found = self.nodes.get(name) or self.nodes.get(f"node-{name}")
        if found is None:
            raise LabError("lab", f"lab {self.name} has no node {name} (it has {', '.join(self.nodes)})")
        return found

    def create(self, container: str, node: str, args: Sequence[str], **options: Any) -> dict[str, Any]:
        """Start a container on a node; its info. Options as `OciEngine.create` (ip, ip6, env, ...)."""
        for ip in (options.get("ip"), *options.get("further", ())):
            if ip is not None:
                _check_address(ip, ipaddress.IPv4Network(self._subnet()))
        return dict(self.node(node).call("create", container=container, args=list(args), **options))

    def _subnet(self) -> str:
        return next(iter(self.nodes.values())).context.subnet or "10.0.1.0/24"

    def find(self, container: str) -> LocalNode | None:
        """The node that has the container, one where it runs first; None if none has."""
        having = []
        for node in self.nodes.values():
            info = node.call("info", container=container)
            if info["pid"] is not None and info["status"] != "incoming":
                return node
            if info["bundle"]:
                having.append(node)
        return having[0] if having else None

    def command(self, target: str, argv: Sequence[str]) -> list[str]:
        """The local command line that runs `argv` in a node or in a running container. Raises LabError."""
        if target in self.nodes or f"node-{target}" in self.nodes:
            return self.node(target).command(argv)
        node = self.find(target)
        if node is None:
            known = ", ".join(self.nodes)
            raise LabError("exec", f"lab {self.name} has no node or container {target} (nodes: {known})")
        ctx = node.context
        return node.command([ctx.runtime, "--root", str(ctx.runc_root), "exec", target, *argv])

    def status(self) -> list[NodeStatus]:
        """Every node with its agent and containers."""
        return [
            NodeStatus(
                name=node.name, netns=str(node.context.netns), agent=processes.agent_pid(node.context),
                underlay=self._plan.underlay_ip(node.name) if self._plan.overlay else "",
                containers=list(node.call("list")),
            )
            for node in self.nodes.values()
        ]  # fmt: skip

    def close(self) -> None:
        """Let go of connections; the lab stays up."""
        for node in self.nodes.values():
            node.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.down()


def labs() -> list[str]:
    """Names of labs that are up, or of which something is left."""
    base = paths.run_dir() / "lab"
    with contextlib.suppress(FileNotFoundError):
        return sorted(path.name for path in base.iterdir() if path.is_dir())
    return []


def remove(name: str = "lab") -> None:
    """Take a lab down, or remove what a crash left of it; not there is fine. Raises LabError."""
    _check(name, 1, "10.0.1.0/24")
    with _locked(name):
        _clear(name)
    base = paths.run_dir() / "lab"
    with contextlib.suppress(OSError):
        (base / f".{name}.lock").unlink()
        base.rmdir()
        base.parent.rmdir()


def _check(name: str, nodes: int, subnet: str) -> None:
    if os.geteuid() != 0:
        raise LabError("lab", "a lab needs root", "try again with sudo")
    if not _NAME.fullmatch(name):
        raise LabError("lab", f"{name!r} is no name for a lab", "use up to 16 small letters, digits and '-'")
    if not 1 <= nodes <= MAX_NODES:
        raise LabError("lab", f"{nodes} nodes are not possible", f"ask for 1 to {MAX_NODES}")
    try:
        network = ipaddress.IPv4Network(subnet)
    except ValueError as exc:
        raise LabError("lab", f"{subnet} is no IPv4 network: {exc}", "write 10.0.1.0/24") from exc
    why = ""
    if network.is_multicast or network.is_loopback or network.network_address.packed[0] in _NO_HOSTS:
        why = "holds addresses that no container can have"
    elif network.prefixlen > _LONGEST_PREFIX:
        why = "is too small for containers"
    elif network.overlaps(topology.UNDERLAY):
        why = f"overlaps the nodes' own network {topology.UNDERLAY}"
    if why:
        raise LabError("lab", f"{subnet} {why}", "write 10.0.1.0/24")


def _check_address(ip: str, network: ipaddress.IPv4Network) -> None:
    """Raise LabError if no container of the network can have the address."""
    try:
        address = ipaddress.IPv4Address(ip)
    except ValueError as exc:
        raise LabError("create", f"{ip!r} is no IPv4 address", f"take one of {network}") from exc
    if address not in network:
        raise LabError("create", f"{ip} is not in the lab's network {network}")
    if address in (network.network_address, network.broadcast_address):
        raise LabError("create", f"{ip} means all of {network}", "take another")


def _state(name: str) -> Path:
    return paths.run_dir() / "lab" / name


def _clear(name: str) -> None:
    state = _state(name)
    cgroup.destroy(f"migroce/{name}")  # first: what is frozen does not die by itself
    processes.end_all(topology.namespaces(name), state)
    cgroup.destroy(f"migroce/{name}")
    mounts.unmount_below(state)
    topology.destroy(name)
    docker.withdraw(name, state)
    shutil.rmtree(state, ignore_errors=True)
    if state.exists():
        raise LabError("down", f"{state} cannot be removed", "see what is mounted or open there")
    if not labs():
        kdat.withdraw()
        cgroup.remove_empty("migroce")


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    base = paths.run_dir() / "lab"
    base.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (base / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
