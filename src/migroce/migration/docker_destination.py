# SPDX-License-Identifier: BSD-3-Clause
"""The destination's side of moving or restoring a Docker container.

The container is made by Docker beforehand, like the source's to the letter, and its files are copied into it;
`restore` is then `docker start --checkpoint`. Docker gives it its network just before CRIU restores it, so
peers may hear of this place from then on: the phase `restore`, not `resume`, is the point of no return.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from migroce import criu
from migroce.agent.errors import AgentError
from migroce.engines import docker, dockerspec, runc
from migroce.engines.context import NodeContext, read_json, write_json
from migroce.engines.docker import DockerEngine
from migroce.errors import EngineError
from migroce.migration import connections, dockerkit, journal, streams
from migroce.migration.destination import DestinationSide, available_memory
from migroce.migration.dockerhold import Holder
from migroce.migration.dockerkit import agent_name
from migroce.runtime import known
from migroce.runtime.gate import Gate

_SPARE = 64 << 20
_NEEDED = 8 << 20
"""Bytes of disk that `docker start` and CRIU's log may take."""
_FORGETTING = 3.0
"""Seconds that a swarm may take to hear that a container has given its address back."""
_CHECKPOINT = "migroce"


class DockerDestination(DestinationSide):
    """One Docker container's way into this node."""

    def __init__(self, ctx: NodeContext, migration: str, container: str) -> None:
        super().__init__(ctx, migration, container)
        self.docker = DockerEngine(ctx)
        self._roots: dict[str, Path] = {}
        self._device = False
        self._waits = False
        """Whether the runtime that restores it is ours, which waits for the images."""
        self._gate: Gate | None = None
        self._starting: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1)
        self._holder = Holder(self.docker, self.where, migration)

    @property
    def made(self) -> dict[str, Any]:
        """What this migration has made here so far: {id, volumes}; after `commit` still the id."""
        return read_json(self.where / "made.json") or dockerkit.arrival(self.ctx, self.id)

    def found(self) -> dict[str, Any] | None:
        """The container as Docker sees it now, None if it is not there."""
        key = self.made.get("id")
        return self.docker.inspect(key) if key else None

    # -- before anything stops -----------------------------------------------------------------------------

    def check(self, about: dict[str, Any]) -> dict[str, Any]:
        """Refuse what cannot work here; {image: whether it must be sent}. Raises EngineError, AgentError."""
        self._sweep()
        node, found = self.ctx.name, about["inspect"]
        info = self.docker.about
        if about["architecture"] != platform.machine():
            reason = (
                f"{node} is a {platform.machine()}, the container's programs are for {about['architecture']}"
            )
            raise EngineError("check", reason)
        dockerspec.check_release(node, info, about["networks"])
        if info.get("Driver") != "overlay2":
            raise EngineError(
                "check", f"Docker on {node} has storage driver {info.get('Driver')}, not overlay2"
            )
        runtime = str(found["HostConfig"].get("Runtime") or "runc")
        if runtime not in (info.get("Runtimes") or {}):
            mend = (
                "run `migroce setup docker` there"
                if "migroce" in runtime
                else "register it in its daemon.json"
            )
            raise EngineError("check", f"Docker on {node} has no runtime {runtime}", mend)
        if criu.find() is None:
            raise EngineError("check", f"{node} has no criu", "see `migroce doctor` there")
        if about["device"]:
            with self.engine.agent() as agent:
                agent.status()
        if (other := self.docker.info(self.container)) is not None:
            mend = f"`docker rm {self.container}` there, or give the container another name"
            raise EngineError(
                "check", f"{node} has a container {self.container} already ({other.status})", mend
            )
        self._check_networks(about)
        self._check_files(found)
        image = self._image(about) is None
        self._check_room(about, about["image"]["size"] if image else 0)
        return {"image": image}

    def _check_networks(self, about: dict[str, Any]) -> None:
        node = self.ctx.name
        for name, ip in docker.addresses(about["inspect"]).items():
            there = about["networks"].get(name) or {}
            if there.get("Scope") == "swarm":
                self._check_swarm(name, about)
                continue
            here = self.docker.network(name)
            if here is None:
                mend = f"make it there (docker network create {name} ...)"
                raise EngineError("check", f"{node} has no network {name}", mend)
            if mtu := (here.get("Options") or {}).get("com.docker.network.driver.mtu"):
                connections.check_mtu(about, int(mtu), f"network {name} on {node}")
            for each in (here.get("Containers") or {}).values():
                if ip and str(each.get("IPv4Address", "")).split("/")[0] == ip and name != "bridge":
                    reason = f"address {ip} is in use on {node} by {each.get('Name')}"
                    raise EngineError("check", reason, "stop that one first")

    def _check_swarm(self, name: str, about: dict[str, Any]) -> None:
        node, swarm = self.ctx.name, self.docker.about.get("Swarm") or {}
        if swarm.get("LocalNodeState") != "active":
            mend = "docker swarm join there"
            raise EngineError("check", f"{node} is in no swarm, and network {name} is a swarm's", mend)
        managers = {each["NodeID"] for each in swarm.get("RemoteManagers") or []}
        if about["swarm"] and managers and not managers & set(about["swarm"]):
            raise EngineError(
                "check", f"{node} is in another swarm than network {name}", "docker swarm join there"
            )
        here = self.docker.network(name)  # a worker knows it only while it has containers on it
        if here is not None and here["Id"] != about["networks"][name]["Id"]:
            raise EngineError("check", f"network {name} on {node} is another one", "rename one of them")

    def _check_files(self, found: dict[str, Any]) -> None:
        node = self.ctx.name
        for path, _ in dockerspec.binds(found):
            if not Path(path).exists():
                reason = f"{node} has no {path}, which the container mounts"
                raise EngineError("check", reason, "copy it there, or use a volume, which is copied")
        for each in found["HostConfig"].get("Devices") or []:
            if not Path(each["PathOnHost"]).exists():
                raise EngineError(
                    "check", f"{node} has no device {each['PathOnHost']}, which the container uses"
                )
        ours = dockerkit.left_volumes(self.ctx)
        for volume in dockerspec.volumes(found):
            here = None if volume.anonymous else self.docker.volume(volume.name)
            if here is None:
                continue
            users = self.docker.users_of(volume.name)
            if users:
                reason = f"volume {volume.name} is in use on {node} by {', '.join(users)}"
                raise EngineError("check", reason, "remove those, or rename the volume")
            with contextlib.suppress(FileNotFoundError):
                if volume.name not in ours and any(Path(here["Mountpoint"]).iterdir()):
                    reason = f"{node} has a volume {volume.name} already, with files in it"
                    mend = f"`docker volume rm {volume.name}` there if nobody needs it"
                    raise EngineError("check", reason, mend)

    def _check_room(self, about: dict[str, Any], image: int) -> None:
        node = self.ctx.name
        room = available_memory()
        if about["memory"] + _SPARE > room:
            have, need = room >> 20, about["memory"] >> 20
            raise EngineError("check", f"{node} has {have} MiB of memory free, the container needs {need}")
        stat = os.statvfs(self.docker.root)
        free = stat.f_bavail * stat.f_frsize
        wanted = about["files"] + about["memory"] + 2 * image + _SPARE
        if wanted > free:
            reason = (
                f"{node} has {free >> 20} MiB free in {self.docker.root}, the container needs {wanted >> 20}"
            )
            raise EngineError("check", reason, docker.NO_SPACE)

    def _check_left_room(self) -> None:
        """Refuse if the disk has become full. Raises EngineError.

        A `docker start` that fails so, between the swarm's attachment and the network namespace, never
        gives the address back: no container of the swarm could have it until dockerd starts again.
        """
        root = self.docker.root
        stat = os.statvfs(root)
        if stat.f_bavail * stat.f_frsize < _NEEDED:
            reason = f"no space is left in {root} on {self.ctx.name}"
            raise EngineError("restore", reason, docker.NO_SPACE)

    def _check_holders(self, step: str, patience: float = 0) -> None:
        """Refuse if another container has an address as well, for `patience` seconds. Raises EngineError.

        Docker would find that out in 20 s, while the container is frozen. A swarm gives an address to two if
        it has lost sight of a node for a while.
        """
        for network, endpoint in dockerspec.endpoints(self.found() or {}).items():
            ip = str(endpoint["IPAMConfig"].get("IPv4Address") or "") if endpoint else ""
            end = time.monotonic() + patience
            # The source's own may be remembered still.
            while ip and (holder := self.docker.holder(network, ip, but=self.container)) is not None:
                if time.monotonic() < end:
                    time.sleep(0.1)
                    continue
                taken = "was taken meanwhile" if step == "restore" else "is in use"
                reason = f"address {ip} of {network} {taken} by {holder[0]} on {holder[1]}"
                raise EngineError(step, reason, f"remove {holder[0]}, or give it another address")

    def _image(self, about: dict[str, Any]) -> str | None:
        """How to name the container's image here, None if it is not there."""
        for reference in (about["image"]["reference"], about["image"]["id"]):
            here = self.docker.image(reference)
            if here is not None and here["Id"] == about["image"]["id"]:
                return str(reference)
        return None

    def prepare(self, about: dict[str, Any]) -> str:
        """A place for what comes; its data socket. Raises MigroceError, OSError."""
        self.where.mkdir(mode=0o700, parents=True)
        if self._image(about) is None:
            write_json(self.where / "image.json", {"id": about["image"]["id"]})
        self.adopt()
        path = self._listen()
        self._received = defaultdict(Future)
        return path

    def make(self, about: dict[str, Any]) -> None:
        """Make the container, now that its image is there. Raises EngineError."""
        found = about["inspect"]
        image = self._image(about)
        if image is None:
            reason = f"image {about['image']['reference']} is not on {self.ctx.name} any more"
            raise EngineError("prepare", reason, "start again: it is then brought there")
        named = [each.name for each in dockerspec.volumes(found) if not each.anonymous]
        new = [name for name in named if self.docker.volume(name) is None]
        write_json(self.where / "made.json", {"volumes": new})
        key = self.docker.create(self.container, dockerspec.creation(found, image))
        write_json(self.where / "made.json", {"id": key, "volumes": new})
        for network, endpoint in list(dockerspec.endpoints(found).items())[1:]:
            self.docker.connect(network, key, endpoint)
        self._holder.start(about["networks"], image, key)
        # The networks are here now, and nothing has been stopped.
        self._check_holders("prepare", _FORGETTING)
        here = self.found()
        assert here is not None
        self._roots["layer"] = Path(here["GraphDriver"]["Data"]["UpperDir"])
        places = {each.destination: each.source for each in dockerspec.volumes(here)}
        for number, volume in enumerate(dockerspec.volumes(found)):
            root = self._roots[f"volume{number}"] = Path(places[volume.destination])
            for entry in list(root.iterdir()):  # what the image had there
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        self._checkpoint(key).mkdir(mode=0o700, parents=True)
        self.images = self._checkpoint(key)
        self._waits = self._ours(about["runtime"])
        if self._waits:
            # Docker would pass the images through containerd's store, 40 ms a MB: our runtime is told where
            # they are.
            self.images = dockerkit.place(self.where, about["memory"], self.id, None) / "images"
            self.images.mkdir()
            link = dockerkit.runtime_file(self.ctx, key, known.IMAGES)
            link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(self.images)
        self.dumps = self.images / dockerkit.BESIDE
        self._device = bool(about["device"])
        if self._device:
            self.dumps.mkdir()

    def _ours(self, runtime: str) -> bool:
        """Whether a runtime of the node's Docker is migroce-runtime."""
        path = (self.docker.about["Runtimes"].get(runtime) or {}).get("path", "")
        return os.path.basename(str(path)) == dockerkit.RUNTIME

    def _checkpoint(self, key: str) -> Path:
        """Where `docker start` looks for the checkpoint."""
        return self.docker.root / "containers" / key / "checkpoints" / _CHECKPOINT

    # -- data ----------------------------------------------------------------------------------------------

    def _consume(self, header: dict[str, Any], sock: socket.socket) -> int:
        what = str(header["what"])
        if what in ("images", "rdma"):
            return super()._consume(header, sock)
        if what in ("image", "log"):
            with streams.reader(sock) as stream:
                return self._load(stream) if what == "image" else self._write_log(stream)
        return self._unpack(self._roots[what.removesuffix("-rest")], header, sock)

    def _write_log(self, stream: BinaryIO) -> int:
        key = str(self.made["id"])
        data = stream.read()
        if data:
            path = self.docker.root / "containers" / key / f"{key}-json.log"
            path.write_bytes(data)
            path.chmod(0o640)
        return len(data)

    def _load(self, stream: BinaryIO) -> int:
        total = 0

        def chunks() -> Iterator[bytes]:
            nonlocal total
            while data := stream.read(1 << 20):
                total += len(data)
                yield data

        self.docker.load(chunks())
        return total

    # -- restore -------------------------------------------------------------------------------------------

    def prepare_rdma(self) -> dict[str, Any]:
        """Let the agent check the dumps and reserve their ids. Raises AgentError."""
        found = self.found()
        if found is None:
            raise EngineError("dump", f"{self.container} is not on {self.ctx.name} any more")
        with self.engine.agent() as agent:
            dumps = [str(path) for path in sorted(self.dumps.iterdir())]
            return dict(agent.container_prepare(agent_name(found), netns=None, gid=None, dumps=dumps))

    def begin(self) -> None:
        """Let Docker start the container as far as it can without the images. Raises EngineError, OSError.

        A swarm takes a quarter of a second to attach a network. Only our runtime waits for the images.
        """
        self._check_before_start()
        if self._waits:
            self._gate = Gate(dockerkit.runtime_file(self.ctx, str(self.made["id"]), known.GATE))
            self._starting = self._pool.submit(self._start)

    def _check_before_start(self) -> None:
        self._check_left_room()
        self._check_holders("restore")

    def _start(self) -> None:
        self.docker.start(str(self.made["id"]), _CHECKPOINT)

    def restore(self, neighbours: list[dict[str, Any]]) -> dict[str, Any]:  # noqa: ARG002
        """Restore the container; it runs, with its network. {pid, ms}. Raises EngineError."""
        try:
            return self._restore()
        finally:
            if self._gate is not None:  # if it is still shut: dockerd answers nothing about what it starts
                self._gate.give_up()

    def _restore(self) -> dict[str, Any]:
        started = time.monotonic()
        if self._starting is None:
            self._check_before_start()
        else:  # Docker shows a container as not running if it could not write down that it is
            self._check_left_room()
        self.plugged = True
        if self._device:
            count = len(list(self.dumps.glob("*.dump")))
            write_json(self.dumps / "checkpoint.json", {"version": 1, "contexts": count})
        try:
            if self._starting is None or self._gate is None:
                self._start()
            else:
                self._gate.open()
                self._starting.result()
        except EngineError as exc:
            log = re.search(r"log file: (\S+?\.log)", exc.reason)
            reason = runc.criu_reason(Path(log[1])) if log else None
            raise EngineError("restore", reason or exc.reason, exc.mend) from exc
        found = self.found()
        if found is None or never_started(found):
            raise EngineError("restore", f"Docker on {self.ctx.name} did not start {self.container}")
        write_json(self.where / "made.json", {**self.made, "started": True})
        return {"pid": found["State"]["Pid"], "ms": (time.monotonic() - started) * 1000}

    def plug(self) -> None:
        """Docker has done it. Raises EngineError if the container is gone."""
        self._still_here("resume")

    def resume(self, timeout_ms: int) -> dict[str, Any]:
        """Let the agent resume the RDMA contexts; {contexts, qps, ms}. Raises AgentError."""
        found = self.found()
        if found is None or not found["State"]["Running"]:
            return {"contexts": 0, "qps": 0, "ms": 0.0}
        with self.engine.agent() as agent:
            return dict(agent.container_resume(agent_name(found), timeout_ms=timeout_ms))

    def here(self) -> bool:
        """Whether this migration's container is here, or has ended here."""
        return bool(self.status()["here"])

    def status(self) -> dict[str, Any]:
        """How far the container has come here: {here, alive, exit_status}; for `recover`.

        A Docker that does not answer has not started it if there is no shim for it. Raises EngineError.
        """
        if self._gate is not None:  # who asks before it was opened has given up
            self._gate.give_up()
        try:
            found = self.found()
        except EngineError:
            if docker.has_shim(str(self.made.get("id"))):
                raise
            return {"here": True, "alive": False, "exit_status": None}
        if found is None and self.made.get("started"):  # it has ended, and was made with --rm
            return {"here": True, "alive": False, "exit_status": 0}
        if found is None or never_started(found):
            return {"here": found is not None, "alive": False, "exit_status": None}
        alive = bool(found["State"]["Running"])
        return {"here": True, "alive": alive, "exit_status": None if alive else found["State"]["ExitCode"]}

    # -- the end -------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """The container belongs here now. Can be repeated. Raises EngineError, OSError."""
        self._still_here("commit")
        found = self.found()
        if found is not None:
            shutil.rmtree(self._checkpoint(found["Id"]), ignore_errors=True)
            self._holder.remove()
            for kind in known.FOR_A_RESTORE:
                dockerkit.runtime_file(self.ctx, found["Id"], kind).unlink(missing_ok=True)
            dockerkit.leave_volumes(self.ctx, [each.name for each in dockerspec.volumes(found)], left=False)
            dockerkit.note_arrival(self.ctx, self.id, found["Id"])
        self._close()
        dockerkit.release(self.where)
        shutil.rmtree(self.where, ignore_errors=True)

    def undo(self) -> None:
        """Remove everything this migration made here. Can be repeated. Raises EngineError."""
        self._refuse()
        if self._gate is not None:
            self._gate.give_up()
        dockerkit.release(self.where)  # first: Docker may not answer any more
        made = read_json(self.where / "made.json")
        if made:
            self._holder.remove()
        if key := made.get("id") or self._unfinished():
            self.docker.remove(key, volumes=True)
            for kind in known.FOR_A_RESTORE:
                link = dockerkit.runtime_file(self.ctx, key, kind)
                link.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others have files in it
                link.parent.rmdir()
            with contextlib.suppress(AgentError), self.engine.agent() as agent:
                agent.container_remove(key)
        for name in made.get("volumes", []):
            with contextlib.suppress(EngineError):
                self.docker.remove_volume(name)
        if brought := read_json(self.where / "image.json").get("id"):
            # With a name it spares the next try the time; without one nobody would find it.
            self.docker.remove_unnamed(brought)
        for rest in ("in.sock", "image.json", "made.json"):
            (self.where / rest).unlink(missing_ok=True)
        self._close()

    def _sweep(self) -> None:
        """Undo what earlier migrations had to leave because Docker did not answer any more."""
        for path in self.ctx.migrations.glob("*/made.json"):
            if path.parent == self.where:
                continue
            lock = journal.take_lock(path.parent, wait=False)
            if lock is None:
                continue
            other = DockerDestination(self.ctx, path.parent.name, self.container)
            other._lock = lock  # undo lets it go
            status = other.status()
            if status["alive"] or status["exit_status"] is not None:  # whose it is, `recover` must find out
                other._close()
            else:
                other.undo()

    def _unfinished(self) -> str | None:
        """The container's id if we died between making it and noting that."""
        if "volumes" not in read_json(self.where / "made.json"):
            return None
        found = self.docker.inspect(self.container)
        return str(found["Id"]) if found is not None and never_started(found) else None


def never_started(found: dict[str, Any]) -> bool:
    """Whether the container has not run yet."""
    return not found["State"]["Running"] and docker.never(found["State"]["StartedAt"])
