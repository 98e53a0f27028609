# SPDX-License-Identifier: BSD-3-Clause
"""The destination's side of a migration or a restore; runs in a worker on the destination node.

Everything that can be made before the source stops is made in `prepare`: namespace, bundle, the first
copy of the files, the agent's directory, a place in memory for the images. Until `plug` the
restored container has no network, so that killing it undoes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Collection
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any

from migroce import criu, urgency
from migroce.engines import bundle as bundles
from migroce.engines import mounts, network, ocispec, runc
from migroce.engines.context import NodeContext, read_json, write_json
from migroce.engines.oci import OciEngine
from migroce.errors import EngineError
from migroce.migration import connections, journal, streams, tree

_SPARE = 64 << 20
_REPAIR = 0.3
"""Seconds in which connections are usually whole again, to be told in the report what that took."""
_PATIENCE = 10.0
"""Seconds for a file that is being stored when all is given up."""
_KINDS = ("rdma", "images", "layer", "layer-rest", "shm")


class DestinationSide:
    """One container's way into this node."""

    def __init__(self, ctx: NodeContext, migration: str, container: str) -> None:
        self.ctx = ctx
        self.engine = OciEngine(ctx)
        self.container = container
        self.id = migration
        self.where = journal.directory(ctx, migration)
        self.images = self.where / "mem" / "images"
        self.dumps = self.where / "mem" / "rdma"
        self._announcer: network.Announcer | None = None
        self._interfaces: list[network.Interface] = []
        self._listening: socket.socket | None = None
        self._received: dict[str, Future[int]] = {}
        self._accepting: threading.Thread | None = None
        self._receiving: dict[threading.Thread, socket.socket] = {}
        self._lock: int | None = None
        self.plugged = False

    @property
    def bundle(self) -> Path:
        return self.ctx.bundle(self.container)

    def incoming(self) -> bool:
        """Whether the container here is the one that this migration brings, not yet committed."""
        return read_json(self.bundle / "container.json").get("incoming") == self.id

    # -- before anything stops -----------------------------------------------------------------------------

    def check(self, about: dict[str, Any]) -> dict[str, Any]:
        """Refuse what cannot work here; what is wanted besides. Raises EngineError, AgentError."""
        self._check_programs(about)
        info = self.engine.info(self.container)
        if info.bundle or info.pid is not None:
            mend = "remove it there or give the container another name"
            raise EngineError(
                "check", f"{self.ctx.name} has a container {self.container} already ({info.status})", mend
            )
        interfaces = [network.Interface.decode(raw) for raw in about["interfaces"]]
        if interfaces and self.ctx.bridge is None:
            raise EngineError("check", f"{self.ctx.name} has no bridge for the container's interface")
        if interfaces:
            connections.check_mtu(about, self.ctx.mtu, f"{self.ctx.name}'s network")
        self._check_addresses(interfaces, about.get("macs_before", ()))
        for mount in about["config"].get("mounts", []):
            is_bind = mount.get("type") == "bind" or "bind" in mount.get("options", [])
            ours = mount["destination"] == ocispec.RUN_DIR or bundles.own_dev(mount, self.container)
            if is_bind and not ours and not Path(mount["source"]).exists():
                raise EngineError(
                    "check", f"{self.ctx.name} has no {mount['source']}, which the container mounts"
                )
        room = available_memory()
        if about["memory"] + _SPARE > room:
            need, have = about["memory"] >> 20, room >> 20
            raise EngineError(
                "check", f"{self.ctx.name} has {have} MiB of memory free, the container needs {need}"
            )
        return {}

    def _check_programs(self, about: dict[str, Any]) -> None:
        path = self.engine.runc.env["PATH"]
        if shutil.which(self.ctx.runtime, path=path) is None:
            raise EngineError(
                "check", f"{self.ctx.name} has no {self.ctx.runtime}", "install it there (apt install runc)"
            )
        if criu.find() is None:
            raise EngineError("check", f"{self.ctx.name} has no criu", "see `migroce doctor` there")
        if about["device"]:
            with self.engine.agent() as agent:
                agent.status()

    def _check_addresses(self, interfaces: list[network.Interface], before: Collection[str]) -> None:
        taken = {each.ip: each.id for each in self.engine.list() if each.ip}
        for interface in interfaces:
            for address in interface.addresses:
                ip = address.split("/")[0]
                if ip in taken:
                    raise EngineError(
                        "check",
                        f"address {ip} is in use on {self.ctx.name} by {taken[ip]}",
                        "stop that one first",
                    )
                self.engine.check_address_free(ip, except_macs=(interface.mac, *before))

    def prepare(self, about: dict[str, Any]) -> str:
        """Make everything but what is not yet known; its data socket. Raises MigroceError, OSError."""
        metadata = dict(about["metadata"])
        metadata.update(id=self.container, incoming=self.id, device=about["device"], plain=about["plain"])
        metadata.pop("checkpointed", None)
        self.where.mkdir(mode=0o700, parents=True)
        self.adopt()
        self.bundle.mkdir(mode=0o700, parents=True)
        write_json(self.bundle / "container.json", metadata)  # first: by it `undo` knows what is ours
        for part in ("rootfs",) if about["plain"] else ("rootfs", "upper", "work"):
            (self.bundle / part).mkdir(mode=0o755)
        self._make_room()
        if not about["plain"]:
            bundles.make_dev(self.bundle)
        interfaces = [
            dataclasses.replace(
                network.Interface.decode(raw), mtu=min(int(raw["mtu"]), self.ctx.mtu),
                outside=network.outside_name(self.container, position),
            )
            for position, raw in enumerate(about["interfaces"])
        ]  # fmt: skip
        config = about["config"]
        netns = None
        if ocispec.network_namespace(config)[1] is not None:
            netns = self.ctx.container_netns(self.container)
            network.create(self.ctx, netns, interfaces, plugged=False)
            self._announcer, self._interfaces = network.Announcer(netns, interfaces), interfaces
        agent_dir = None
        if about["device"]:  # the agent's socket is not there until the container may come back to it
            with self.engine.agent() as agent:
                ready = agent.container_prepare(
                    self.container, netns=str(netns) if netns else None, gid=metadata.get("ip"), dumps=[]
                )
            agent_dir = Path(ready["dir"])
        bundles.relocate(config, self.ctx, self.container, netns, agent_dir)
        self.engine.write_bundle(self.bundle, config, metadata)
        return self._listen()

    def adopt(self, patience: float = 30.0) -> None:
        """Have the migration's lock here, waiting for a worker that is given up. Raises EngineError."""
        end = time.monotonic() + patience
        while self._lock is None and self.where.is_dir():
            self._lock = journal.take_lock(self.where, wait=False)
            if self._lock is None and time.monotonic() > end:
                raise EngineError("recover", f"another process works on {self.where}")
            time.sleep(0 if self._lock is not None else 0.02)

    def _still_here(self, step: str) -> None:
        """Have the lock, and see that a worker that was given up has not undone all. Raises EngineError."""
        self.adopt()
        if not self.here():
            raise EngineError(step, f"{self.container} is not on {self.ctx.name} any more")

    def _make_room(self) -> None:
        mem = self.where / "mem"
        mem.mkdir(mode=0o700)
        mounts.tmpfs(mem)
        self.images.mkdir()
        self.dumps.mkdir()

    # -- data ----------------------------------------------------------------------------------------------

    def _listen(self) -> str:
        path = str(self.where / "in.sock")
        self._listening = streams.listen_unix(path)
        self._received = {kind: Future() for kind in _KINDS}
        accepting = threading.Thread(target=self._accept, args=(self._listening,), name="in", daemon=True)
        self._accepting = accepting
        accepting.start()
        return path

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = listening.accept()[0]
                thread = threading.Thread(target=self._receive, args=(sock,), name="receive", daemon=True)
                self._receiving[thread] = sock
                thread.start()

    def _receive(self, sock: socket.socket) -> None:
        future: Future[int] | None = None
        urgency.join()
        try:
            with sock:
                header = streams.receive_record(sock)
                future = self._received[header["what"]]
                future.set_result(self._consume(header, sock))
        except Exception as exc:  # noqa: BLE001 - handed to whoever waits for it
            if future is not None:
                future.set_exception(exc)
        finally:
            self._receiving.pop(threading.current_thread(), None)

    def _refuse(self) -> None:
        """Take no more data: what is still coming would be left behind. Who waits for it need not."""
        if self._listening is not None:
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
            self._listening = None
        if self._accepting is not None:
            self._accepting.join()
        for thread, sock in list(self._receiving.items()):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join(_PATIENCE)
        for future in list(self._received.values()):
            with contextlib.suppress(InvalidStateError):
                future.set_exception(EngineError("transfer", "it was given up"))

    def _consume(self, header: dict[str, Any], sock: socket.socket) -> int:
        what = header["what"]
        if what in ("images", "rdma"):
            return streams.receive_files(sock, self.images if what == "images" else self.dumps)[0]
        root = self.bundle / bundles.SHM if what == "shm" else self.layer()
        return self._unpack(root, header, sock)

    @staticmethod
    def _unpack(root: Path, header: dict[str, Any], sock: socket.socket) -> int:
        tree.remove(root, header["remove"])
        with streams.reader(sock) as stream:
            return tree.unpack(root, stream)

    def layer(self) -> Path:
        """Where the container's own files go."""
        plain = read_json(self.bundle / "container.json").get("plain")
        return self.bundle / ("rootfs" if plain else "upper")

    def received(self, whats: list[str], timeout: float) -> None:
        """Wait until all of `whats` is here whole. Raises EngineError."""
        for what in whats:
            try:
                self._received[what].result(timeout)
            except TimeoutError as exc:
                raise EngineError("transfer", f"{what} did not arrive within {timeout:.0f} s") from exc
            except Exception as exc:
                why = getattr(exc, "reason", "") or exc
                mend = str(getattr(exc, "mend", ""))
                if getattr(exc, "errno", None) == errno.ENOSPC:
                    mend = "make room there"
                reason = f"{what} could not be stored on {self.ctx.name}: {why}"
                raise EngineError("transfer", reason, mend) from exc

    # -- restore -------------------------------------------------------------------------------------------

    def prepare_rdma(self) -> dict[str, Any]:
        """Let the agent check the dumps and reserve their ids. Raises AgentError."""
        netns = ocispec.network_namespace(read_json(self.bundle / "config.json"))[1]
        metadata = read_json(self.bundle / "container.json")
        with self.engine.agent() as agent:
            return dict(
                agent.container_prepare(
                    self.container, netns=str(netns) if netns else None, gid=metadata.get("ip"),
                    dumps=[str(path) for path in sorted(self.dumps.iterdir())],
                )
            )  # fmt: skip

    def restore(self, neighbours: list[dict[str, Any]]) -> dict[str, Any]:
        """Restore the container from the images; it runs, without network. {pid, ms}. Raises EngineError."""
        started = time.monotonic()
        if not read_json(self.bundle / "container.json").get("plain"):
            mounts.overlay(self.bundle / "rootfs", Path("/"), self.bundle / "upper", self.bundle / "work")
        monitor = self.engine.runc.monitor(
            self.bundle, "restore", "--bundle", str(self.bundle), "--image-path", str(self.images),
            "--work-path", str(self.where), "--tcp-established", "--file-locks", self.container, mark=self.id,
        )  # fmt: skip
        netns = ocispec.network_namespace(read_json(self.bundle / "config.json"))[1]
        if netns is not None:  # while the restore is going on
            with contextlib.suppress(OSError):
                network.add_neighbours(netns, [network.Neighbour(**raw) for raw in neighbours])
        try:
            pid = runc.wait_started(self.bundle, monitor, "restore")
            for each in (monitor.pid, *urgency.children(monitor.pid)):
                urgency.calm(each)  # they stay as long as the container does, whose processes have their own
        except EngineError as exc:
            log = self.where / "restore.log"
            reason = runc.criu_reason(log) or exc.reason
            raise EngineError("restore", reason, f"the whole log is {log}") from exc
        return {"pid": pid, "ms": (time.monotonic() - started) * 1000}

    def plug(self) -> None:
        """Put the container on the network and say so. Can be repeated. Raises OSError, EngineError."""
        self._still_here("resume")
        config = read_json(self.bundle / "config.json")
        netns = ocispec.network_namespace(config)[1]
        if netns is None:
            return
        if self._announcer is None:
            self._interfaces = network.inspect(netns)
            self._announcer = network.Announcer(netns, self._interfaces)
        self.plugged = True
        for each in self._interfaces:
            network.plug(self.ctx, each.outside)
        self._announcer.send_on()

    def resume(self, timeout_ms: int) -> dict[str, Any]:
        """Let the agent resume the RDMA contexts; {contexts, qps, ms}. Raises AgentError."""
        with self.engine.agent() as agent:
            return dict(agent.container_resume(self.container, timeout_ms=timeout_ms))

    def settle(
        self, seconds: float, before: list[dict[str, Any]], repair: float = _REPAIR
    ) -> list[dict[str, Any]]:
        """Wait until peers know of the move, at most `seconds`; counters of the QPs. Raises AgentError.

        And until what was in flight at the stop (`before`) has been acknowledged, at most `repair` seconds.
        """
        start = time.monotonic()
        while True:
            with self.engine.agent() as agent:
                qps = connections.of_container(agent.ps(self.container))
            spent = time.monotonic() - start
            known = connections.settled(qps) or spent > seconds
            if known and (connections.repaired(before, qps) or spent > repair):
                return connections.counters(qps)
            time.sleep(0.01)

    def here(self) -> bool:
        """Whether the container here is the one that this migration brings, or has brought."""
        metadata = read_json(self.bundle / "container.json")
        return self.id in (metadata.get("incoming"), metadata.get("came"))

    def status(self) -> dict[str, Any]:
        """How far the container has come here: {here, alive, exit_status}; for `recover`."""
        info = self.engine.info(self.container)
        return {"here": self.here(), "alive": info.pid is not None, "exit_status": info.exit_status}

    # -- the end -------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """The container belongs here now. Can be repeated. Raises OSError, EngineError."""
        self._still_here("commit")
        metadata = read_json(self.bundle / "container.json")
        if metadata.pop("incoming", None) is not None:
            metadata["came"] = self.id
            write_json(self.bundle / "container.json", metadata)
        self._close()
        mounts.unmount_below(self.where)
        shutil.rmtree(self.where, ignore_errors=True)

    def undo(self) -> None:
        """Remove everything this migration made here. Can be repeated. Raises EngineError."""
        self._refuse()
        for pid in runc.marked(runc.RESTORE_MARK, self.id):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.incoming():
            self.engine.delete(self.container)
        mounts.unmount_below(self.where)
        for rest in ("in.sock", "mem"):
            path = self.where / rest
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        if self._announcer is not None:
            self._announcer.close()
            self._announcer = None
        self._refuse()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def abandoned(self) -> None:
        """The command that moved the container has died: undo what peers cannot have seen yet."""
        if self._lock is not None and not self.plugged:
            self.undo()
        self._close()


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62
