# SPDX-License-Identifier: BSD-3-Clause
"""The plain OCI engine: containers from bundles, run by runc, no daemon.

A container made here lives in `<state>/bundles/<id>`: config.json, container.json (what we know of it),
rootfs (overlay of `/`), upper and work (its writable layer), pid, exit (its exit status, decimal).
Containers that somebody else made with the same runtime are listed and can be killed and moved too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migroce.engines import bundle as bundles
from migroce.engines import cgroup, mounts, network, ocispec, runc
from migroce.engines.context import NodeContext, check_id, read_json, write_json
from migroce.errors import EngineError

if TYPE_CHECKING:
    from migroce.agent.client import AgentClient


@dataclasses.dataclass(frozen=True, slots=True)
class ContainerInfo:
    """A container as `list` shows it."""

    id: str
    status: str
    """running, paused, exited, stopped, checkpointed, incoming (a migration brings it)."""
    pid: int | None
    ip: str | None
    bundle: str
    device: bool
    managed: bool
    """Made by this package (its bundle is below the node's state)."""
    exit_status: int | None = None
    args: tuple[str, ...] = ()
    created: float | None = None
    """Unix time."""
    engine: str = "oci"
    """oci or docker."""
    image: str = ""
    """The image's reference; plain OCI containers have none."""
    key: str = ""
    """What the engine itself calls it; empty if that is `id`."""


class OciEngine:
    """The containers of one node. Runs on the node, in its network namespace."""

    def __init__(self, ctx: NodeContext) -> None:
        self.ctx = ctx
        self.runc = runc.Runc(ctx)

    def agent(self) -> AgentClient:
        """A client of the node's agent; raises AgentError when it does not answer."""
        from migroce.agent.client import AgentClient

        return AgentClient(self.ctx.agent)

    # -- making and ending ---------------------------------------------------------------------------------

    def create(
        self,
        container: str,
        args: Sequence[str],
        *,
        ip: str | None = None,
        ip6: str | None = None,
        further: Sequence[str] = (),
        device: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        files: Mapping[str, str] | None = None,
    ) -> ContainerInfo:
        """Make and start a container that runs `args` with the node's own root file system.

        `ip`: its address on the node's network (None: no network), `further`: more of them, `ip6`: one more,
        with a prefix of 64.
        `device`: give it `rxe0`. `files`: what to put into it (path in the container: file of the node).
        Raises EngineError; then nothing is left.
        """
        bundle = self.ctx.bundle(container)
        if not args:
            raise EngineError("create", "no program given")
        if bundle.exists() or self.runc.state(container) is not None:
            raise EngineError(
                "create",
                f"{self.ctx.name} has a container {container} already",
                "remove it or take another name",
            )
        ip6 = None if ip6 is None else _ipv6(ip6)
        if (ip6 is not None or further) and ip is None:
            raise EngineError("create", "a container with an IPv6 address needs an IPv4 address, too")
        for each in (ip, *further, ip6):
            if each is not None:
                self.check_address_free(each)
        try:
            interface = None if ip is None else network.interface_for(self.ctx, container, ip, ip6, further)
            self._make(bundle, container, args, ip, interface, device=device, env=env or {}, cwd=cwd)
            for target, source in (files or {}).items():
                place = bundle / "rootfs" / target.lstrip("/")
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)
            self.start(container)
        except BaseException:
            with contextlib.suppress(Exception):
                self.delete(container)
            raise
        return self.info(container)

    def check_address_free(self, ip: str, *, except_macs: Collection[str] = ()) -> None:
        """Raise EngineError if something on the network (but for `except_macs`) has `ip`."""
        try:
            owner = network.owner_of(self.ctx, ip)
        except OSError as exc:
            raise EngineError("network", f"cannot ask for {ip} on {self.ctx.bridge}: {exc.strerror}") from exc
        if owner is not None and owner not in except_macs:
            raise EngineError(
                "network", f"address {ip} is in use by {owner}", "remove that one or take another address"
            )

    def _make(
        self, bundle: Path, container: str, args: Sequence[str], ip: str | None,
        interface: network.Interface | None, *, device: bool, env: Mapping[str, str], cwd: str,
    ) -> None:  # fmt: skip
        for part in ("rootfs", "upper", "work"):
            (bundle / part).mkdir(mode=0o755, parents=True)
        bundle.chmod(0o700)
        netns = None
        if interface is not None:
            netns = self.ctx.container_netns(container)
            network.create(self.ctx, netns, [interface], plugged=True)
        agent_dir = self.register(container, netns, ip) if device else None
        bundles.fill_layer(bundle / "upper", device=device)
        bundles.make_dev(bundle)
        mounts.overlay(bundle / "rootfs", Path("/"), bundle / "upper", bundle / "work")
        config = bundles.config(self.ctx, container, args, netns=netns, agent_dir=agent_dir, env=env, cwd=cwd)
        self.write_bundle(bundle, config, {
            "id": container, "ip": ip, "args": list(args), "device": device, "created": time.time(),
        })  # fmt: skip

    def write_bundle(self, bundle: Path, config: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Write config.json, criu.conf and container.json."""
        (bundle / "criu.conf").write_text(bundles.CRIU_CONFIG)
        write_json(bundle / "config.json", config)
        write_json(bundle / "container.json", metadata)

    def register(self, container: str, netns: Path | None, ip: str | None) -> Path:
        """Tell the agent of a container; the directory to be its /run/migroce. Raises AgentError."""
        with self.agent() as agent:
            return agent.container_add(container, netns=str(netns) if netns else None, gid=ip)

    def start(self, container: str) -> int:
        """Run the container of a bundle of ours; its pid. Raises EngineError."""
        bundle = self.ctx.bundle(container)
        monitor = self.runc.monitor(bundle, "run", "--bundle", str(bundle), container)
        return runc.wait_started(bundle, monitor, "run", poll=0.002)

    def kill(self, container: str, signal: str = "TERM") -> None:
        """Send a signal to the container's first process. Raises EngineError."""
        self.require(container)
        self.runc.kill(container, signal)

    def delete(self, container: str) -> None:
        """End the container and remove everything that belongs to it; not there is fine.

        Of a container that is not ours, only the runtime's part is removed. Raises EngineError.
        """
        bundle = self.ctx.bundle(container)
        if bundle.is_dir():
            (bundle / "exit.not").touch()
        with contextlib.suppress(EngineError):
            self.thaw(container)
        self.runc.delete(container)
        if not bundle.is_dir():
            return
        cgroup.destroy(f"{self.ctx.cgroup}/{container}")
        self.forget(container)
        mounts.unmount_below(bundle)
        network.remove(self.ctx.container_netns(container))
        shutil.rmtree(bundle, ignore_errors=True)
        if bundle.exists():
            raise EngineError("delete", f"{bundle} cannot be removed", "see what is mounted or open there")

    def forget(self, container: str) -> None:
        """Take the container away from the agent; an agent that does not answer is fine."""
        metadata = read_json(self.ctx.bundle(container) / "container.json")
        if metadata.get("device"):
            with contextlib.suppress(Exception), self.agent() as agent:
                agent.container_remove(container)

    def thaw(self, container: str) -> None:
        """Let a frozen container run. Raises EngineError."""
        state = self.runc.state(container)
        if state is not None:
            cgroup.Freezer.of(state.get("cgroup_paths") or {}).thaw()

    # -- looking -------------------------------------------------------------------------------------------

    def list(self) -> list[ContainerInfo]:
        """All containers of the node, ours and those that the runtime knows besides."""
        names = set(self.runc.containers())
        with contextlib.suppress(FileNotFoundError):
            names.update(
                path.name for path in self.ctx.bundles.iterdir() if (path / "container.json").is_file()
            )
        return [self._with_address(self.info(name)) for name in sorted(names)]

    def _with_address(self, info: ContainerInfo) -> ContainerInfo:
        """Of a running container that somebody else made, the first address of its namespace."""
        if info.ip is not None or info.pid is None or not info.bundle:
            return info
        config = read_json(Path(info.bundle) / "config.json")
        own, path = ocispec.network_namespace(config)
        with contextlib.suppress(OSError):
            for interface in network.inspect(path) if own and path is not None else ():
                for address in interface.addresses:
                    return dataclasses.replace(info, ip=address.partition("/")[0])
        return info

    def require(self, container: str) -> ContainerInfo:
        """The container; raises EngineError if the node has none of that name."""
        check_id(container)
        if (
            self.runc.state(container) is None
            and not (self.ctx.bundle(container) / "container.json").is_file()
        ):
            known = ", ".join(each.id for each in self.list()) or "none at all"
            raise EngineError(
                "container",
                f"{self.ctx.name} has no container {container} (it has {known})",
                "see `migroce ps`",
            )
        return self.info(container)

    def info(self, container: str) -> ContainerInfo:
        """What is known of a container."""
        state = self.runc.state(container)
        bundle = self.bundle_of(container, state)
        metadata = read_json(bundle / "container.json") if bundle else {}
        exit_status = self.exit_status(container)
        status, pid = _status(state)
        if metadata.get("incoming"):
            status = "incoming"
        elif metadata.get("checkpointed") and pid is None:
            status = "checkpointed"
        elif pid is None and exit_status is not None:
            status = "exited"
        device, args = metadata.get("device"), metadata.get("args")
        if bundle is not None and (device is None or args is None):
            config = read_json(bundle / "config.json")
            device = ocispec.agent_directory(config) is not None if device is None else device
            args = (config.get("process") or {}).get("args") if args is None else args
        return ContainerInfo(
            id=container, status=status, pid=pid, ip=metadata.get("ip"), bundle=str(bundle or ""),
            device=bool(device), managed=bundle == self.ctx.bundle(container), exit_status=exit_status,
            args=tuple(args or ()), created=metadata.get("created"),
        )  # fmt: skip

    def bundle_of(self, container: str, state: Mapping[str, Any] | None) -> Path | None:
        """Where the container's bundle is: ours, or what the runtime was told."""
        ours = self.ctx.bundle(container)
        if ours.is_dir():
            return ours
        for label in (state or {}).get("config", {}).get("labels", []):
            if str(label).startswith("bundle="):
                return Path(str(label)[len("bundle=") :])
        return None

    def exit_status(self, container: str) -> int | None:
        """The container's exit status, None while it runs or if nobody saw it."""
        try:
            return int((self.ctx.bundle(container) / "exit").read_text())
        except (OSError, ValueError):
            return None

    def wait(self, container: str, timeout: float | None = None) -> int | None:
        """Wait until the container has ended here; its exit status, None if that is not known.

        Raises EngineError on timeout, or when it was moved away meanwhile.
        """
        end = None if timeout is None else time.monotonic() + timeout
        bundle = self.ctx.bundle(container)
        while True:
            if (status := self.exit_status(container)) is not None:
                return status
            metadata = read_json(bundle / "container.json")
            if not bundle.is_dir() or (bundle / "exit.not").exists():
                raise EngineError("wait", f"{container} is not on {self.ctx.name} any more")
            if _status(self.runc.state(container))[1] is None and not metadata.get("incoming"):
                self._wait_for_monitor(bundle)
                return self.exit_status(container)
            if end is not None and time.monotonic() > end:
                raise EngineError("wait", f"{container} still runs after {timeout:.1f} s")
            time.sleep(0.01)

    @staticmethod
    def _wait_for_monitor(bundle: Path, seconds: float = 10.0) -> None:
        """Wait until the monitor has written the exit status, or is gone without."""
        end = time.monotonic() + seconds
        while not (bundle / "exit").exists() and time.monotonic() < end:
            try:
                fields = stat_fields(int((bundle / "monitor.pid").read_text()))
            except (OSError, ValueError):
                return
            if fields is None or fields[0] in "ZX":
                return
            time.sleep(0.005)

    def log_path(self, container: str) -> Path:
        """The file with the output of a container of ours. Raises EngineError."""
        info = self.require(container)
        path = Path(info.bundle) / "upper" / bundles.LOG
        if not info.managed or not path.is_file():
            raise EngineError(
                "logs",
                f"the output of {container} is not kept by this package",
                "look where its bundle sends it",
            )
        return path

    def logs(self, container: str) -> str:
        """The output so far of a container of ours, bytes that are no UTF-8 replaced. Raises EngineError."""
        return self.log_path(container).read_text(errors="replace")


def _ipv6(text: str) -> str:
    """An address as the kernel writes it. Raises EngineError."""
    mend = "give one like fd00::7"
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError as exc:
        raise EngineError("create", f"{text} is no IPv6 address", mend) from exc
    if address.is_link_local or address.is_multicast or address.is_unspecified or address.is_loopback:
        raise EngineError("create", f"{text} is no address for an interface of a container", mend)
    return str(address)


def _status(state: Mapping[str, Any] | None) -> tuple[str, int | None]:
    """(status, pid) from the runtime's state; the pid only while that very process lives."""
    if state is None:
        return "stopped", None
    pid = int(state.get("init_process_pid") or 0)
    fields = stat_fields(pid)
    if fields is None or fields[0] in "ZX" or fields[1] != int(state.get("init_process_start") or 0):
        return "stopped", None
    frozen = False
    with contextlib.suppress(EngineError, OSError):
        frozen = cgroup.Freezer.of(state.get("cgroup_paths") or {}).frozen()
    return "paused" if frozen else "running", pid


def stat_fields(pid: int) -> tuple[str, int] | None:
    """(state letter, start time in ticks) of a process, None if it is not there."""
    if pid <= 0:
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])
