# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints in a directory, and containers from them.

A container that is not left running stays on its node as `checkpointed`: its processes are gone, but
its address and the stand-in are kept, so that peers wait until it is restored, there or elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from migroce import dump
from migroce.errors import MigrationError, MigroceError
from migroce.migration import connections, manifest, streams
from migroce.migration.journal import Record
from migroce.migration.link import CALL_LIMIT
from migroce.migration.orchestrate import (
    RESUME_TIMEOUT_MS,
    SETTLE,
    STOP_TIMEOUT_MS,
    Phases,
    Side,
    owner,
    retry,
    silent,
    step_of,
    undo_destination,
    undo_source,
)
from migroce.migration.report import Progress, Report
from migroce.nodes import Node, resolve


class Checkpoint:
    """Takes one container's checkpoint into a directory of this machine."""

    def __init__(
        self, node: Node, container: str, directory: Path, *,
        leave_running: bool, engine: str = "oci", progress: Progress = silent,
    ) -> None:  # fmt: skip
        self.report = Report("checkpoint", container, node.name, str(directory))
        self._node = node
        self._directory = directory
        self._leave_running = leave_running
        self._phase = Phases(self.report, progress)
        self._id = secrets.token_hex(5)
        self._engine = engine
        self._source = Side(node, "source", self._id, container, engine)
        self._stopping = False

    def run(self) -> Report:
        """Take it. Raises MigrationError; then the container runs on as before and the directory is gone."""
        started = time.monotonic()
        opened = False
        container = self.report.container
        with self._phase("check"):
            about = self._source("describe")
            self._make_directory()
        try:
            with self._phase("prepare"):
                record = Record(
                    id=self._id, kind="checkpoint", container=container, device=about["device"],
                    destination=str(self._directory), engine=self._engine, **owner(self._node),
                )  # fmt: skip
                self._source("open", **dataclasses.asdict(record))
                opened = True
            self._take(about)
        except BaseException as exc:
            shutil.rmtree(self._directory, ignore_errors=True)
            if opened:
                self._undo()
            if not isinstance(exc, (MigroceError, OSError)):
                raise
            step, reason = step_of(exc, self._phase.current), getattr(exc, "reason", str(exc))
            if isinstance(exc, OSError):  # the node's own come as EngineError
                reason = f"{self._directory} cannot be written: {exc.strerror or exc}"
            where = self._node.name
            raise MigrationError(
                step, reason, f"{container} runs on {where} as before", running_on=where
            ) from exc
        self.report.directory = str(self._directory)
        self.report.total = (time.monotonic() - started) * 1000
        return self.report

    def _undo(self) -> None:
        try:
            undo_source(self._source, stopped=self._stopping)
        except MigroceError:
            self._source.give_up()
            raise

    def _make_directory(self) -> None:
        try:
            self._directory.mkdir(mode=0o700, parents=True)
        except FileExistsError as exc:
            if any(self._directory.iterdir()):
                raise MigrationError(
                    "check", f"{self._directory} is not empty", "name a new directory"
                ) from exc
        except OSError as exc:
            raise MigrationError("check", f"{self._directory} cannot be made: {exc.strerror}") from exc

    def _take(self, about: dict[str, Any]) -> None:
        report, note = self.report, self._note
        stopped = time.monotonic()
        with self._phase("stop", note=note):
            if about["device"]:
                self._stopping = True
                done = self._source("stop", timeout_ms=STOP_TIMEOUT_MS)
                report.contexts, report.qps = done["contexts"], done["qps"]
        with self._phase("dump", note=note):
            dumped = self._source("dump")
            report.parts.update(freeze=dumped["freeze_ms"], criu_dump=dumped["dump_ms"])
        with self._phase("transfer", note=note):
            self._fetch([*about["before"], *(each for each in about["after"] if not each.endswith("-rest"))])
            manifest.write(
                self._directory,
                manifest.Manifest(
                    container=report.container, node=self._node.spec, created=time.time(), about=about,
                    neighbours=dumped["neighbours"], contexts=report.contexts, qps=report.qps,
                    running=self._leave_running, files={},
                ),
            )  # fmt: skip
        with self._phase("commit"):
            if self._leave_running:
                self._source("undo", stopped=self._stopping, timeout_ms=RESUME_TIMEOUT_MS, how="done")
                report.blackout = (time.monotonic() - stopped) * 1000
            else:
                self._source("retire", directory=str(self._directory))

    def _note(self, phase: str) -> None:
        self._source("note", phase=phase)

    def _fetch(self, whats: list[str]) -> None:
        report = self.report
        images, rdma = self._directory / "images", self._directory / "rdma"
        images.mkdir()
        rdma.mkdir()
        path = self._source("serve")
        for what in ("rdma", *whats):
            pushing = self._source.submit("push", whats=[what], to=None)
            with self._node.connect(path) as sock:
                streams.receive_record(sock)
                if what in ("rdma", "images"):
                    count, _ = streams.receive_files(sock, images if what == "images" else rdma)
                    setattr(report, f"{what}_bytes", count)
                else:
                    tar = self._directory / f"{what}.tar"
                    with streams.reader(sock) as stream, tar.open("wb") as target:
                        shutil.copyfileobj(stream, target, 1 << 20)
            done = pushing.result(CALL_LIMIT)
            if what not in ("rdma", "images"):
                report.layer_bytes += done[what]


class Restore:
    """Makes a container from a checkpoint's directory."""

    def __init__(
        self, node: Node, directory: Path, *,
        ip: str = "", force: bool = False, progress: Progress = silent,
    ) -> None:  # fmt: skip
        self._directory = directory
        self._ip = ip
        self._force = force
        self._manifest = manifest.read(directory)
        self.report = Report("restore", self._manifest.container, str(directory), node.name)
        self._phase = Phases(self.report, progress)
        self._node = node
        self._engine = str(self._manifest.about.get("engine", "oci"))
        self._destination = Side(
            node, "destination", secrets.token_hex(5), self._manifest.container, self._engine
        )
        self._prepared = False
        self._plugged = False

    def run(self) -> Report:
        """Restore it. Raises MigrationError; then nothing of it is left on the node."""
        started = time.monotonic()
        try:
            self._restore()
        except BaseException as exc:
            if self._prepared and not self._plugged:
                undo_destination(self._destination)
            if not isinstance(exc, MigroceError):
                raise
            step, reason = step_of(exc, self._phase.current), getattr(exc, "reason", str(exc))
            raise MigrationError(step, reason, str(getattr(exc, "mend", ""))) from exc
        self.report.total = (time.monotonic() - started) * 1000
        return self.report

    def _restore(self) -> None:
        what, report, destination = self._manifest, self.report, self._destination
        report.contexts, report.qps, report.directory = what.contexts, what.qps, str(self._directory)
        with self._phase("check"):
            manifest.verify(self._directory, what)
            about = self._about()
            with self._origin() as origin:
                same = origin is not None and origin.spec == self._node.spec
                if same and origin is not None:
                    # Its remains would be in the way; peers are paused, the restore takes a moment.
                    origin.call("delete", container=what.container)
                destination("check", about=about)
                with self._phase("prepare"):
                    self._prepared = True
                    into = destination("prepare", about=about)
                    if self._engine != "oci":
                        destination("make", about=about)
                with self._phase("transfer"):
                    self._send(into)
                    if what.contexts:
                        destination("prepare_rdma")
                with self._phase("restore"):
                    done = destination("restore", neighbours=what.neighbours)
                    report.parts["criu_restore"] = done["ms"]
                with self._phase("resume"):
                    away = origin if not same else None
                    if away is not None and self._ip:
                        away.call("agent", method="container_moved", container=what.container, gid=self._ip)
                    elif away is not None:
                        away.call("delete", container=what.container)
                    self._plugged = True
                    destination("plug")
                    if what.about["device"]:
                        retry(lambda: destination("resume", timeout_ms=RESUME_TIMEOUT_MS))
                    if self._ip and what.about["device"]:
                        with contextlib.suppress(MigroceError):  # its processes may have ended
                            destination("settle", seconds=SETTLE, before=[])
                    if away is not None and self._ip:
                        away.call("delete", container=what.container)
        with self._phase("commit"):
            destination("commit")

    def _about(self) -> dict[str, Any]:
        """What the source said of the container, with the address that it is to have."""
        about = self._manifest.about
        if not self._ip:
            return about
        changed = connections.at_another_address(about, self._ip)
        if not self._force:
            dumps = [dump.read(path) for path in sorted((self._directory / "rdma").glob("*.dump"))]
            qps = [qp.to_json() for each in dumps for qp in each.qps]
            connections.check_peers(self._manifest.container, qps)
        self.report.ip = self._ip
        return changed

    @contextlib.contextmanager
    def _origin(self) -> Iterator[Node | None]:
        """The node that holds the container as `checkpointed`, if that is so and it can be asked."""
        node: Node | None = None
        with contextlib.suppress(MigroceError):
            node = resolve(self._manifest.node)
            if node.call("info", container=self._manifest.container)["status"] != "checkpointed":
                node.close()
                node = None
        try:
            yield node
        finally:
            if node is not None:
                node.close()

    def _send(self, into: str) -> None:
        for what in ("rdma", "images"):
            with self._node.connect(into) as sock:
                streams.send_record(sock, {"what": what})
                files = sorted((self._directory / what).iterdir())
                setattr(self.report, f"{what}_bytes", streams.send_files(sock, files))
                sock.shutdown(socket.SHUT_WR)
        tars = sorted(path.name.removesuffix(".tar") for path in self._directory.glob("*.tar"))
        for what in tars:
            with self._node.connect(into) as sock, (self._directory / f"{what}.tar").open("rb") as layer:
                streams.send_record(sock, {"what": what, "remove": []})
                self.report.layer_bytes += sock.sendfile(layer)
                sock.shutdown(socket.SHUT_WR)
        self._destination("received", whats=["rdma", "images", *tars], timeout=CALL_LIMIT)
