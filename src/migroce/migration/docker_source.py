# SPDX-License-Identifier: BSD-3-Clause
"""The source's side of moving a Docker container.

Docker's own checkpoint ends the container, and gives its address back, before anybody knows whether the
images can be restored. So the container is dumped beneath Docker, by the same runc, and stands frozen, for
Docker still running, until the destination's runs; undoing is thawing here as well. What Docker sees is the
network: two containers cannot have one address in a swarm, so this one is disconnected while it is being
dumped, and connected again by `undo`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
import subprocess
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from migroce import criu, urgency
from migroce.agent.errors import AgentError
from migroce.engines import dockerspec, runc
from migroce.engines.cgroup import Freezer
from migroce.engines.context import NodeContext, read_json, write_json
from migroce.engines.docker import DockerEngine, Shim
from migroce.engines.oci import stat_fields
from migroce.errors import EngineError
from migroce.migration import connections, dockerkit, journal, processes, streams, tree
from migroce.migration.dockerhold import Holder
from migroce.migration.dockerkit import agent_name
from migroce.migration.netlock import NetLock, unlock
from migroce.migration.source import SourceSide
from migroce.runtime import known

_CRIU_CONFIG = "network-lock skip\n"
_NO_RESTART = {"Name": "no"}


class DockerSource(SourceSide):
    """One Docker container's way out of this node."""

    def __init__(self, ctx: NodeContext, migration: str, container: str) -> None:
        super().__init__(ctx, migration, container)
        self.docker = DockerEngine(ctx)
        self._kept: dict[str, Any] = {}
        self._scans: dict[str, tree.Scan] = {}
        self._unplugging: Future[None] | None = None
        self._unplugged = False
        self._holder = Holder(self.docker, self.where, migration)

    @property
    def found(self) -> dict[str, Any]:
        """`docker inspect` as it was before anything was stopped, also for a later process."""
        if not self._kept:
            self._kept = read_json(self.where / "docker.json") or self.docker.inspect(self.container) or {}
        if not self._kept:
            raise EngineError(
                "container", f"{self.ctx.name} has no container {self.container}", "see `migroce ps`"
            )
        return self._kept

    @property
    def shim(self) -> Shim:
        return Shim(self.found)

    # -- before anything stops -----------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Check that the container can be moved; what a destination needs to know. Raises EngineError."""
        found = self.found
        dockerspec.check_movable(found)
        shim = self.shim
        with contextlib.suppress(OSError):
            program = os.path.basename(os.readlink(f"/proc/{shim.pid}/exe"))
            if program in ("docker-init", "tini-static") or os.path.exists(f"/proc/{shim.pid}/root/dev/init"):
                mend = 'make it with --init=false, or take "init" out of daemon.json'
                raise EngineError(
                    "check", f"{self.container} runs under docker's init, which cannot be restored", mend
                )
        if criu.find() is None:
            raise EngineError("check", f"{self.ctx.name} has no criu", "see `migroce doctor`")
        shim.runc()
        ps: list[dict[str, Any]] = []
        with_device = dockerkit.runtime_file(self.ctx, found["Id"], known.DEVICE).exists()
        if with_device:
            with self.engine.agent() as agent:
                ps = agent.ps(agent_name(found))
        processes.check(self.container, shim.pid, connections.users(ps))
        state = shim.state()
        Freezer.of(state.get("cgroup_paths") or {})
        image = self.docker.image(found["Image"])
        if image is None:
            raise EngineError(
                "check", f"{self.container}'s image is not on {self.ctx.name} any more", "load it again"
            )
        volumes = dockerspec.volumes(found)
        parts = ["layer", *(f"volume{number}" for number, _ in enumerate(volumes))]
        return {
            "engine": "docker",
            "container": self.container,
            "inspect": found,
            "device": with_device,
            "path_mtu": connections.path_mtu(ps),
            "runtime": str(found["HostConfig"].get("Runtime") or "runc"),
            "image": {"id": image["Id"], "size": image.get("Size", 0), "reference": found["Config"]["Image"]},
            "architecture": platform.machine(),
            "memory": self._memory(state),
            "files": self._size(Path(found["GraphDriver"]["Data"]["UpperDir"]))
            + sum(self._size(Path(each.source)) for each in volumes),
            "networks": self._networks(found),
            "swarm": sorted(
                each["NodeID"] for each in self.docker.about.get("Swarm", {}).get("RemoteManagers") or []
            ),
            "interfaces": [],
            "before": parts,
            "after": [*(f"{part}-rest" for part in parts), "log", "images"],
        }

    def _networks(self, found: dict[str, Any]) -> dict[str, Any]:
        made = {}
        for name in dockerspec.endpoints(found):
            network = self.docker.network(name) or {}
            made[name] = {key: network.get(key) for key in ("Id", "Driver", "Scope")}
        return made

    @staticmethod
    def _size(root: Path) -> int:
        with contextlib.suppress(OSError):
            return tree.scan(root).bytes()
        return 0

    def netns(self) -> Path:
        """The container's namespace."""
        return self.shim.netns

    def open(self, record: journal.Record) -> None:
        """Begin: the journal, a place for images, nft waiting. Raises MigroceError, OSError."""
        found = self.found
        with self._opening(record):
            write_json(self.where / "docker.json", {**found, "Started": self.shim.started})
            self._kept = {}
            mem = dockerkit.place(self.where, self._memory(self.shim.state()), self.id, self.shim.shim)
            self.images, self.dumps = mem / "images", mem / "rdma"
            self.images.mkdir()
            self.dumps.mkdir()
            (self.where / "criu.conf").write_text(_CRIU_CONFIG)
            self._lock = NetLock(self.netns())
            self._lock.arm()
            self._holder.start(self._networks(found), found["Image"], found["Id"])

    # -- data ----------------------------------------------------------------------------------------------

    def _produce(self, what: str, sock: socket.socket) -> int:
        if what == "image":
            return self._send_image(sock)
        if what == "log":
            return self._send_log(sock)
        if what.startswith("volume"):
            number = int(what.removeprefix("volume").removesuffix("-rest"))
            return self._send_tree(what, Path(dockerspec.volumes(self.found)[number].source), sock)
        if what.startswith("layer"):
            return self._send_tree(what, Path(self.found["GraphDriver"]["Data"]["UpperDir"]), sock)
        return super()._produce(what, sock)

    def _send_tree(self, what: str, root: Path, sock: socket.socket) -> int:
        now = tree.scan(root, self.found["State"]["Pid"] or None)
        name = what.removesuffix("-rest")
        send, gone = tree.changes(self._scans.get(name), now)
        missed: set[str] = set()
        streams.send_record(sock, {"what": what, "remove": gone})
        with streams.writer(sock) as target:
            total = tree.pack(root, send, target, missed)
        self._scans[name] = now.without(missed)
        return total

    def _send_log(self, sock: socket.socket) -> int:
        """What `docker logs` shows, if it is kept in a file."""
        streams.send_record(sock, {"what": "log"})
        path = Path(self.found.get("LogPath") or "/")
        if not path.is_file():
            return 0
        with path.open("rb") as log:
            return sock.sendfile(log)

    def _send_image(self, sock: socket.socket) -> int:
        total = 0
        streams.send_record(sock, {"what": "image"})
        reference = self.found["Config"]["Image"]
        same = self.docker.image(reference)
        wanted = reference if same is not None and same["Id"] == self.found["Image"] else self.found["Image"]
        for chunk in self.docker.save(wanted):
            sock.sendall(chunk)
            total += len(chunk)
        return total

    # -- stop and dump -------------------------------------------------------------------------------------

    def stop(self, timeout_ms: int) -> dict[str, Any]:
        """Stop the container's RDMA contexts; {contexts, qps, ms}. Raises AgentError; then none is."""
        with self.engine.agent() as agent:
            return dict(
                agent.container_stop(agent_name(self.found), dump_dir=str(self.dumps), timeout_ms=timeout_ms)
            )

    def freezer(self) -> Freezer:
        """The container's freezer. Raises EngineError."""
        return Freezer.of(self.shim.state().get("cgroup_paths") or {})

    def _dump(self) -> dict[str, Any]:
        """Freeze, lock the network, dump, give the address back; the container stays frozen."""
        started = time.monotonic()
        self.freezer().freeze()
        frozen = _ms(started)
        # A swarm's network takes longer than all of the dump, which does not look at it.
        self._unplugging = self._pool.submit(self.unplug)
        self._frozen.set_result(None)
        if self._lock is not None:
            self._lock.lock()
        shim = self.shim
        env = shim.environment()
        env["CRIU_CONFIG_FILE"] = str(self.where / "criu.conf")
        env[runc.DUMP_MARK] = self.id
        argv = urgency.command([
            *shim.runc(), "checkpoint", "--image-path", str(self.images), "--work-path", str(self.where),
            "--tcp-established", "--file-locks", "--ext-unix-sk", "--leave-running", shim.id,
        ], real_time=True)  # fmt: skip
        with subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            words = process.communicate()[1].decode(errors="replace").strip()
        if process.returncode != 0:
            log = self.where / "dump.log"
            reason = runc.criu_reason(log) or (words.splitlines() or ["runc failed"])[-1]
            raise EngineError("dump", reason, f"the whole log is {log}")
        self._written.set_result(None)
        dumped = _ms(started) - frozen
        self._unplugging.result()
        return {"freeze_ms": frozen, "dump_ms": dumped, "neighbours": []}

    def unplug(self) -> None:
        """Take the container off its networks: its addresses are free. Can be repeated. Raises."""
        if self._unplugged:
            return
        for network in dockerspec.endpoints(self.found):
            self.docker.disconnect(network, self.found["Id"])
        self._unplugged = True

    def _plug(self) -> None:
        """Undo `unplug`, if the container is still there. Can be repeated. Raises EngineError."""
        self._unplugged = False
        now = self.docker.inspect(self.found["Id"])
        if now is None:
            return
        have = (now.get("NetworkSettings") or {}).get("Networks") or {}
        for network, endpoint in dockerspec.endpoints(self.found).items():
            if network not in have:
                self._check_manager(network)
                self.docker.connect(network, self.found["Id"], endpoint)

    def _check_manager(self, network: str) -> None:
        """Refuse while the network is a swarm's without a manager. Raises EngineError.

        Docker would wait for one, for 20 s and more, and not notice if it came back meanwhile.
        """
        scope = (self.docker.network(network) or {}).get("Scope")
        if scope == "swarm" and not self.docker.manager_answers():
            reason = f"{self.ctx.name} reaches no manager of the swarm of network {network}"
            raise EngineError("network", reason, "see to the link between them")

    # -- the end -------------------------------------------------------------------------------------------

    def undo(self, *, stopped: bool, timeout_ms: int, how: str = "undone") -> dict[str, Any]:
        """Let the container run on here as before; {contexts, qps} resumed. Can be repeated. Raises.

        `stopped`: its RDMA contexts may have been stopped. {lost} if its processes are gone: a dockerd that
        is started again after it was killed ends all containers.
        """
        if self._lock is not None:
            self._lock.disarm()
        self._end_dump()
        if self._unplugging is not None:
            with contextlib.suppress(EngineError):
                self._unplugging.result()
            self._unplugging = None
        if not self._alive():
            with contextlib.suppress(AgentError), self.engine.agent() as agent:
                agent.container_remove(agent_name(self.found))
            self._plug()  # for whoever starts it again: Docker would do that without its networks
            self._finish("lost")
            return {"contexts": 0, "qps": 0, "lost": True}
        self._plug()
        unlock(self.netns())
        self.freezer().thaw()
        done: dict[str, Any] = {"contexts": 0, "qps": 0}
        if stopped and dockerkit.runtime_file(self.ctx, self.found["Id"], known.DEVICE).exists():
            with self.engine.agent() as agent:
                done = dict(agent.container_resume(agent_name(self.found), timeout_ms=timeout_ms))
        self._finish(how)
        return done

    def _alive(self) -> bool:
        fields = stat_fields(self.found["State"]["Pid"])
        if fields is None or fields[0] in "ZX":
            return False
        return self.found.get("Started") in (None, fields[1])

    def commit(self) -> None:
        """The container lives elsewhere: remove what is left here. Can be repeated. Raises EngineError."""
        self._end()
        found = self.found
        self.docker.remove(found["Id"], volumes=True)
        named = [each.name for each in dockerspec.volumes(found) if not each.anonymous]
        dockerkit.leave_volumes(self.ctx, named, left=True)
        with contextlib.suppress(AgentError), self.engine.agent() as agent:
            agent.container_remove(agent_name(found))
        self._finish("done")

    def _end(self) -> None:
        """End the frozen processes without letting them run, or Docker starting the container again."""
        found = self.found
        if not self._alive():
            return
        policy = (found["HostConfig"].get("RestartPolicy") or {}).get("Name")
        if policy not in ("", "no", None):
            self.docker.restart_policy(found["Id"], _NO_RESTART)
        freezer = self.freezer()
        for pid in (freezer.directory / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        freezer.thaw()

    def retire(self, directory: str) -> None:  # noqa: ARG002
        """The container's checkpoint is in `directory`: end it here, and keep it as a stopped one. Raises."""
        self._end()
        with contextlib.suppress(EngineError):  # Docker hears of it a moment later
            self.docker.wait(self.found["Id"], timeout=10)
        self._finish("done")

    def _finish(self, how: str) -> None:
        self._holder.remove()
        dockerkit.release(self.where)
        super()._finish(how)


def _ms(started: float) -> float:
    return (time.monotonic() - started) * 1000
