# SPDX-License-Identifier: BSD-3-Clause
"""The source's side of a checkpoint or migration; runs in a worker on the source node.

The container is frozen before CRIU looks at it and stays frozen after the dump, so that undoing is
unfreezing. It is killed at `commit`, when it runs elsewhere or its images are safe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from migroce import criu, dump
from migroce.agent.client import AgentClient
from migroce.agent.errors import AgentError
from migroce.engines import bundle as bundles
from migroce.engines import mounts, network, ocispec, runc
from migroce.engines.cgroup import Freezer
from migroce.engines.context import NodeContext, read_json, write_json
from migroce.engines.oci import OciEngine
from migroce.errors import EngineError, MigroceError
from migroce.migration import connections, faults, journal, oneaddress, processes, streams, tree
from migroce.migration.netlock import NetLock, unlock

_CRIU_CONFIG = "network-lock skip\n"
_GROWTH_PERIOD = 0.005
"""Seconds after which growing images are looked at again."""
_GROWTH = 1 << 20
"""Bytes from which on it is worth while to send what they have got."""


class SourceSide:
    """One container's way out of this node."""

    def __init__(self, ctx: NodeContext, migration: str, container: str) -> None:
        self.ctx = ctx
        self.engine = OciEngine(ctx)
        self.container = container
        self.id = migration
        self.where = journal.directory(ctx, migration)
        self.images = self.where / "mem" / "images"
        self.dumps = self.where / "mem" / "rdma"
        self.journal: journal.Journal | None = None
        self.recovery: subprocess.Popen[bytes] | None = None
        """What `give_up` has begun."""
        self._before: tree.Scan | None = None
        self._netns: Path | None = None
        self._interfaces: list[network.Interface] = []
        self._lock: NetLock | None = None
        self._owner: AgentClient | None = None
        self._pool = ThreadPoolExecutor(1)
        self._listening: socket.socket | None = None
        self._frozen: Future[None] = Future()
        self._written: Future[None] = Future()
        """Done when CRIU has written all images, or failed."""
        self._early = 0

    # -- before anything stops -----------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Check that the container can be moved; what a destination needs to know. Raises MigroceError."""
        journal.check_free(self.ctx, self.container)
        info = self.engine.require(self.container)
        if info.status == "incoming" or info.pid is None:
            raise EngineError(
                "check", f"{self.container} is {info.status}, not running", "only running containers move"
            )
        if info.status == "paused":
            raise EngineError(
                "check", f"{self.container} is paused", "resume it first, or see `migroce recover`"
            )
        if shutil.which("nft", path=self.engine.runc.env["PATH"]) is None:
            raise EngineError("check", "nft is not there", "install nftables")
        if criu.find() is None:
            raise EngineError("check", f"{self.ctx.name} has no criu", "see `migroce doctor`")
        known = []
        if info.device:
            with self.engine.agent() as agent:  # it will be needed when the container cannot run without
                known = agent.ps(self.container)
        processes.check(self.container, info.pid, connections.users(known))
        config = read_json(Path(info.bundle) / "config.json")
        own, _ = ocispec.network_namespace(config)
        if not own:
            mend = "give it a network namespace of its own"
            raise EngineError(
                "check", f"{self.container} uses the network of the node, which stays here", mend
            )
        state = self.engine.runc.state(self.container) or {}
        Freezer.of(state.get("cgroup_paths") or {})
        return {
            "container": self.container,
            "metadata": read_json(Path(info.bundle) / "container.json"),
            "config": config,
            "device": info.device,
            "plain": self._layer()[1],
            "interfaces": [dataclasses.asdict(each) for each in self.interfaces()],
            "path_mtu": connections.path_mtu(known),
            "memory": self._memory(state),
            "criu": str(criu.find()),
            "engine": "oci",
            "before": ["layer"],
            "after": ["layer-rest", "shm", "images"],
        }

    def can_change(self, old: str) -> None:
        """Check that nothing but the device holds on to the address `old`. Raises EngineError."""
        pid = self.engine.require(self.container).pid
        if pid is not None:
            connections.check_sockets(self.container, old, pid)

    def qps(self) -> list[dict[str, Any]]:
        """The container's QPs: live, or as they were stopped. Raises AgentError, EngineError."""
        with self.engine.agent() as agent:
            return connections.of_container(agent.ps(self.container))

    def stopped_counters(self) -> list[dict[str, Any]]:
        """Of each stopped QP what was sent and received again until then. Raises DumpError."""
        dumps = [dump.read(path) for path in sorted(self.dumps.glob("*.dump"))]
        return connections.counters(qp.to_json() for each in dumps for qp in each.qps)

    def netns(self) -> Path | None:
        """The container's namespace if it was given by path."""
        if self._netns is None:
            info = self.engine.info(self.container)
            self._netns = ocispec.network_namespace(read_json(Path(info.bundle) / "config.json"))[1]
        return self._netns

    def interfaces(self) -> list[network.Interface]:
        """The container's interfaces, as they were first seen."""
        netns = self.netns()
        if not self._interfaces and netns is not None and netns.exists():
            self._interfaces = network.inspect(netns)
        return self._interfaces

    def _memory(self, state: dict[str, Any]) -> int:
        """Resident bytes of the container's processes, roughly what the images will be."""
        total = 0
        for directory in list((state.get("cgroup_paths") or {}).values())[:1]:
            with contextlib.suppress(OSError):
                for pid in (Path(directory) / "cgroup.procs").read_text().split():
                    with contextlib.suppress(OSError, ValueError):
                        total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf(
                            "SC_PAGESIZE"
                        )
        return total

    def _layer(self) -> tuple[Path, bool]:
        """(what is to be copied of the container's files, whether that is a root file system of its own)."""
        info = self.engine.info(self.container)
        bundle = Path(info.bundle)
        if (bundle / "upper").is_dir() and info.managed:
            return bundle / "upper", False
        root = Path(str(read_json(bundle / "config.json").get("root", {}).get("path", "rootfs")))
        return (root if root.is_absolute() else bundle / root), True

    def open(self, record: journal.Record) -> None:
        """Begin: the journal, directories in memory, nft waiting. Raises MigroceError, OSError."""
        with self._opening(record):
            mem = self.where / "mem"
            mem.mkdir()
            mounts.tmpfs(mem)
            self.images.mkdir()
            self.dumps.mkdir()
            (self.where / "criu.conf").write_text(_CRIU_CONFIG)
            netns = self.netns()
            if netns is not None:
                self._lock = NetLock(netns)
                self._lock.arm()

    @contextlib.contextmanager
    def _opening(self, record: journal.Record) -> Iterator[None]:
        """Begin the journal; it ends if what is done inside fails: nothing has happened to the container."""
        self.journal = journal.Journal.create(self.ctx, record)
        try:
            self._own()
            journal.prune(self.ctx)
            yield
        except BaseException:
            with contextlib.suppress(MigroceError, OSError):
                self._finish("undone")
            raise

    def _own(self) -> None:
        """Let the agent watch over us: when this process dies, it starts a recovery."""
        with contextlib.suppress(AgentError):
            self._owner = self.engine.agent()
            self._owner.migration_begin(self.where / "journal.json")

    def _disown(self) -> None:
        if self._owner is not None:
            with contextlib.suppress(AgentError):
                self._owner.migration_end(self.where / "journal.json")
            self._owner.close()
            self._owner = None

    def adopt(self, *, wait: bool = True) -> bool:
        """Have the journal, an orphan's too; False: there is none, it has ended, or not `wait`: is in use."""
        if self.journal is not None:
            return True
        self.journal = journal.Journal.adopt(self.where / "journal.json", wait=wait)
        if self.journal is not None and self.journal.record.ended:
            self.journal.close()
            self.journal = None
        if self.journal is not None:
            self._own()
        return self.journal is not None

    def give_up(self) -> None:
        """Begin a recovery: the command sees to this no more, though it may live on. Raises OSError."""
        if not self.adopt(wait=False):
            return
        assert self.journal is not None
        path = self.journal.path
        self.journal.update(owner=0)  # a recovery would wait for it
        self.journal.close()
        self.journal = None
        if self._owner is not None:
            self._owner.close()  # the agent then tries, too, and again if it fails
            self._owner = None
        env = {name: value for name, value in os.environ.items() if name != faults.VARIABLE}
        with (self.where / "recover.log").open("ab") as log:
            self.recovery = subprocess.Popen(
                [sys.executable, "-m", "migroce.migration.recover", str(path)], stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True, cwd="/", env=env,
            )  # fmt: skip

    def standing(self) -> dict[str, Any]:
        """What the journal says of how far the migration has come: {ended, past_the_point}."""
        try:
            record = journal.read(self.where / "journal.json")
        except FileNotFoundError:  # `commit` removes it
            return {"ended": "done", "past_the_point": True}
        return {"ended": record.ended, "past_the_point": record.past_the_point()}

    def note(self, phase: str) -> None:
        """Write into the journal that `phase` begins. Raises OSError."""
        if self.journal is not None:
            self.journal.update(phase=phase)

    # -- data ----------------------------------------------------------------------------------------------

    def serve(self) -> str:
        """Listen for somebody who fetches data and passes it on; the socket's path. Raises OSError."""
        path = str(self.where / "out.sock")
        self._listening = streams.listen_unix(path)
        return path

    def push(self, whats: list[str], to: str | None) -> dict[str, int]:
        """Send each of `whats` to the socket `to`, or to the next that connects; bytes of each, and
        of the images `early`: how many of them went before the dump's end.

        rdma, images: files in memory, the images while CRIU writes them. layer, layer-rest: the container's
        own files, all and then what has changed. shm: its /dev/shm. Raises OSError, what the dump raised.
        """
        sent = {}
        for what in whats:
            if to is not None:
                sock = streams.connect_unix(to)
            else:
                assert self._listening is not None
                sock = self._listening.accept()[0]
            with sock:
                sent[what] = self._produce(what, sock)
                if what == "images":
                    sent["early"] = self._early
                sock.shutdown(socket.SHUT_WR)
        return sent

    def _produce(self, what: str, sock: socket.socket) -> int:
        producers: dict[str, Callable[[socket.socket], int]] = {
            "images": self._send_images,
            "rdma": self._send_rdma,
            "layer": lambda sock: self._send_layer("layer", sock),
            "layer-rest": lambda sock: self._send_layer("layer-rest", sock),
            "shm": self._send_shm,
        }
        return producers[what](sock)

    def _send_rdma(self, sock: socket.socket) -> int:
        streams.send_record(sock, {"what": "rdma"})
        return streams.send_files(sock, sorted(self.dumps.iterdir()))

    def _send_images(self, sock: socket.socket) -> int:
        """Send the memory's images as they grow; CRIU only appends to them."""
        streams.send_record(sock, {"what": "images"})
        sender = streams.FileSender(sock)
        while not wait([self._written], _GROWTH_PERIOD).done:
            for path in self.images.glob("pages-*.img"):
                sender.send(path, least=_GROWTH)
        self._written.result()
        self._early = sender.total
        sender.finish(sorted(self.images.iterdir()))
        return sender.total

    def _send_layer(self, what: str, sock: socket.socket) -> int:
        root, _ = self._layer()
        now = tree.scan(root, self.engine.info(self.container).pid)
        send, gone = tree.changes(self._before, now)
        missed: set[str] = set()
        streams.send_record(sock, {"what": what, "remove": gone})
        with streams.writer(sock) as target:
            total = tree.pack(root, send, target, missed)
        self._before = now.without(missed)
        return total

    def _send_shm(self, sock: socket.socket) -> int:
        streams.send_record(sock, {"what": "shm", "remove": []})
        info = self.engine.info(self.container)
        root = Path(info.bundle) / bundles.SHM
        if not (info.managed and root.is_dir()):
            root = self.images  # that is there; nothing is taken from it
        names = [] if root == self.images else sorted(tree.scan(root).entries)
        with streams.writer(sock) as target:
            return tree.pack(root, names, target)

    # -- stop and dump -------------------------------------------------------------------------------------

    def stop(self, timeout_ms: int) -> dict[str, Any]:
        """Stop the container's RDMA contexts; {contexts, qps, ms}. Raises AgentError; then none is."""
        with self.engine.agent() as agent:
            return dict(agent.container_stop(self.container, dump_dir=str(self.dumps), timeout_ms=timeout_ms))

    def freezer(self) -> Freezer:
        """The container's freezer. Raises EngineError."""
        state = self.engine.runc.state(self.container)
        if state is None:
            raise EngineError("freeze", f"{self.container} is not known to {self.ctx.runtime} any more")
        return Freezer.of(state.get("cgroup_paths") or {})

    def dump(self) -> dict[str, Any]:
        """Freeze, lock the network, dump; the container stays frozen. {freeze_ms, dump_ms, neighbours}.

        Raises EngineError; the container may then be frozen, `undo` thaws it.
        """
        try:
            return self._dump()
        except BaseException as exc:
            for each in (self._frozen, self._written):
                if not each.done():
                    each.set_exception(exc)
            raise

    def frozen(self) -> None:
        """Wait until the dump has frozen the container. Raises what the dump raised."""
        self._frozen.result()

    def _dump(self) -> dict[str, Any]:
        started = time.monotonic()
        self.freezer().freeze()
        frozen = _ms(started)
        if self._lock is not None:
            self._lock.lock()
        self._frozen.set_result(None)
        known: Future[list[network.Neighbour]] = self._pool.submit(self._neighbours)
        env = dict(self.engine.runc.env)
        env["CRIU_CONFIG_FILE"] = str(self.where / "criu.conf")
        env[runc.DUMP_MARK] = self.id
        try:
            self.engine.runc.run(
                "checkpoint", "--image-path", str(self.images), "--work-path", str(self.where),
                "--tcp-established", "--file-locks", "--leave-running", self.container, step="dump", env=env,
            )  # fmt: skip
        except EngineError as exc:
            log = self.where / "dump.log"
            reason = runc.criu_reason(log) or exc.reason
            raise EngineError("dump", reason, f"the whole log is {log}") from exc
        self._written.set_result(None)
        entries = [dataclasses.asdict(each) for each in known.result()]
        return {"freeze_ms": frozen, "dump_ms": _ms(started) - frozen, "neighbours": entries}

    def _neighbours(self) -> list[network.Neighbour]:
        netns = self.netns()
        with contextlib.suppress(OSError):
            return network.neighbours(netns) if netns is not None else []
        return []

    def unplug(self) -> None:
        """Take the container's interfaces off the network: the stand-in here falls silent."""
        for each in self.interfaces():
            network.unplug(self.ctx, each.outside)

    def leave(self, ip: str) -> None:
        """The destination is the container's place: fall silent, or point peers to its new address `ip`."""
        if not ip:
            self.unplug()
            return
        oneaddress.keep(self.netns(), self.engine.info(self.container).ip, self.interfaces(), self.where)
        with self.engine.agent() as agent:
            agent.container_moved(self.container, ip)

    # -- the end -------------------------------------------------------------------------------------------

    def undo(self, *, stopped: bool, timeout_ms: int, how: str = "undone") -> dict[str, Any]:
        """Let the container run on here as before; {contexts, qps} resumed. Can be repeated. Raises.

        `stopped`: its RDMA contexts may have been stopped. {lost} if its processes are gone, {exit_status} if
        it has ended by itself.
        """
        if self._lock is not None:
            self._lock.disarm()
        self._end_dump()
        netns = self.netns()
        if netns is not None and netns.exists():
            unlock(netns)
            self._interfaces = oneaddress.take_back(netns, self.where) or self._interfaces
            for each in self.interfaces():
                if each.outside:
                    with contextlib.suppress(OSError):
                        network.plug(self.ctx, each.outside)
            self._announce(netns)
        self.engine.thaw(self.container)
        done: dict[str, Any] = {"contexts": 0, "qps": 0}
        if stopped and self.engine.info(self.container).device:
            with self.engine.agent() as agent:
                done = dict(agent.container_resume(self.container, timeout_ms=timeout_ms))
        info = self.engine.info(self.container)
        if info.pid is None and info.exit_status is None:
            self._finish("lost")
            return {**done, "lost": True}
        self._finish(how)
        return done if info.pid is not None else {**done, "exit_status": info.exit_status}

    def _announce(self, netns: Path) -> None:
        with contextlib.suppress(OSError):
            announcer = network.Announcer(netns, self.interfaces())
            announcer.send()
            announcer.close()

    def _end_dump(self) -> None:
        """Wait for what is left of a dump whose caller was killed; kill it if it hangs.

        CRIU takes its code out of the container's processes when it ends by itself; killed, it may not.
        """
        end = time.monotonic() + 20
        while pids := runc.marked(runc.DUMP_MARK, self.id):
            if time.monotonic() > end:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def commit(self) -> None:
        """The container lives elsewhere: remove what is left here. Can be repeated. Raises EngineError."""
        if self.engine.info(self.container).bundle:
            self.unplug()  # of a namespace that is not ours this is all that we may do
        self.engine.delete(self.container)
        self._finish("done")

    def retire(self, directory: str) -> None:
        """The container's checkpoint is in `directory`: end its processes, keep its address and the stand-in.

        Of a container that is not ours nothing is kept. Raises EngineError.
        """
        info = self.engine.info(self.container)
        bundle = Path(info.bundle)
        if not info.managed:
            self.commit()
            return
        (bundle / "exit.not").touch()
        write_json(
            bundle / "container.json", {**read_json(bundle / "container.json"), "checkpointed": directory}
        )
        self.engine.thaw(self.container)  # of version 1's freezer nothing is killed; the network stays locked
        self.engine.runc.delete(self.container)
        mounts.unmount_below(bundle)
        self._finish("done")

    def _finish(self, how: str) -> None:
        if self._lock is not None:
            self._lock.disarm()
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        mounts.unmount_below(self.where)
        (self.where / "out.sock").unlink(missing_ok=True)
        if self.journal is not None:
            self.journal.update(ended=how)
            self.journal.close()
            self.journal = None
        self._disown()
        if how == "done":
            shutil.rmtree(self.where, ignore_errors=True)


def _ms(started: float) -> float:
    return (time.monotonic() - started) * 1000
