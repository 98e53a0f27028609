# SPDX-License-Identifier: BSD-3-Clause
"""A migration, step by step, seen from the command: it tells workers on both nodes what to do.

Until the phase `resume` begins, the source's container stands frozen and the destination's has no network:
any failure is undone by thawing the one and removing the other. From then on peers may have heard
of the new place: any failure is mended by going on. `recover` decides in the same way for a dead command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from migroce import urgency
from migroce.engines.oci import stat_fields
from migroce.errors import MigrationError, MigroceError, NodeError
from migroce.migration import connections, faults, streams
from migroce.migration.journal import PHASES, Record
from migroce.migration.link import CALL_LIMIT, WorkerLostError
from migroce.migration.report import Event, Progress, Report, event
from migroce.nodes import Node, SshNode

T = TypeVar("T")
STOP_TIMEOUT_MS = 5000
RESUME_TIMEOUT_MS = 15000
SETTLE = 5.0
"""Seconds that peers get to acknowledge a new address before the stand-in at the old one ends."""
PATIENCE = 30.0
"""Seconds that undoing or finishing is tried again, for instance while an agent starts again."""
_HUNG_UP = re.compile("Broken pipe|Connection reset")
_LAST_WORDS = 5.0
"""Seconds in which the end that has hung up says why."""


def silent(_: Event) -> None:
    """Progress that nobody looks at."""


class ContainerLostError(MigrationError):
    """The container's processes were ended by something else while it stood still; it runs nowhere."""


class Side:
    """One node's part of a migration: calls of its `SourceSide` or `DestinationSide`."""

    def __init__(self, node: Node, kind: str, migration: str, container: str, engine: str = "oci") -> None:
        self.node = node
        self.container = container
        self._fixed = {"migration": migration, "container": container, "engine": engine}
        self._kind = kind

    def __call__(self, method: str, **args: Any) -> Any:
        return self.node.call(self._kind, method=method, args=args, **self._fixed)

    def submit(self, method: str, **args: Any) -> Future[Any]:
        """The same, not waiting for the answer."""
        return self.node.worker().submit(self._kind, method=method, args=args, **self._fixed)

    def give_up(self) -> None:
        """Of a source: leave the migration to `recover`, which else waits for the end of this process."""
        with contextlib.suppress(MigroceError):
            self("give_up")


class Transfer:
    """Data on their way from node to node; `pump` passes it on if it does not go directly."""

    def __init__(self, receiving: Future[Any], pushing: Future[Any], pump: Callable[[], None] | None) -> None:
        self._receiving = receiving
        self._pushing = pushing
        self._pumped: Future[None] = Future()
        if pump is None:
            self._pumped.set_result(None)
        else:
            threading.Thread(target=self._pump, args=(pump,), name="pump", daemon=True).start()

    def _pump(self, pump: Callable[[], None]) -> None:
        urgency.join()
        try:
            pump()
        except BaseException as exc:  # noqa: BLE001 - handed to whoever waits for it
            self._pumped.set_exception(exc)
        else:
            self._pumped.set_result(None)

    def result(self) -> dict[str, int]:
        """Wait for the end; bytes of each. Raises MigroceError, OSError, the one that came first."""
        try:
            self._pumped.result()
            sent = dict(self._pushing.result(CALL_LIMIT))  # if it fails, the other would wait for ever
        except (MigroceError, OSError) as exc:
            if _HUNG_UP.search(str(exc)):  # then the other end knows why
                with contextlib.suppress(FutureTimeout):
                    self._receiving.result(_LAST_WORDS)
            raise
        self._receiving.result(CALL_LIMIT)
        return sent


class Phases:
    """Progress, timing and faults of phases."""

    def __init__(self, report: Report, progress: Progress) -> None:
        self.report = report
        self.current = "check"
        self._progress = progress

    @contextlib.contextmanager
    def __call__(
        self, name: str, detail: str = "", note: Callable[[str], Any] | None = None
    ) -> Iterator[None]:
        """A phase: `note` writes it into the journal before it begins."""
        self.current = name
        self._progress(event(name, "start", detail))
        started = time.monotonic()
        try:
            if note is not None:
                note(name)
            faults.hit(name)
            yield
            faults.hit(f"{name}.end")
        except BaseException as exc:
            self._progress(event(name, "failed", str(exc)))
            raise
        self.report.phases[name] = (time.monotonic() - started) * 1000
        self._progress(event(name, "done"))


def retry(work: Callable[[], T], seconds: float = PATIENCE) -> T:
    """Do `work` again until it succeeds or `seconds` are over. Raises its last MigroceError."""
    end = time.monotonic() + seconds
    while True:
        try:
            return work()
        except MigroceError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


class Migration:
    """One container from one node to another."""

    def __init__(
        self, container: str, source: Node, destination: Node, progress: Progress = silent, *,
        engine: str = "oci", ip: str = "", force: bool = False,
    ) -> None:  # fmt: skip
        self.id = secrets.token_hex(5)
        self._ip = ip
        self._force = force
        self.container = container
        self.engine = engine
        self.report = Report("migrate", container, source.name, destination.name)
        self._phase = Phases(self.report, progress)
        self._progress = progress
        self._source = Side(source, "source", self.id, container, engine)
        self._destination = Side(destination, "destination", self.id, container, engine)
        self._direct = source.shares_files_with(destination)
        self._out = ""
        self._in = ""
        self._opened = False
        self._device = False
        self._stopping = False
        self._urgent = False
        self._peers: connections.Peers = {}
        self._send_image = False
        self._resuming: Future[Any] | None = None
        self._ended: int | None = None
        """The status with which the container's program ended by itself before it could move."""

    def run(self) -> Report:
        """Move the container. Raises MigrationError with `running_on`; then it runs on exactly that node."""
        started = time.monotonic()
        try:
            self._move()
        except BaseException as exc:
            if not self._opened:
                lost = isinstance(exc, WorkerLostError)
                if isinstance(exc, MigroceError) and (lost or not isinstance(exc, NodeError)):
                    raise self._error(exc, self._source.node.name) from exc
                raise
            if self._can_be_undone(exc):
                self._undo(exc)
                if not isinstance(exc, Exception):
                    raise
                raise self._error(exc, self._source.node.name) from exc
            self._finish(exc)
            if not isinstance(exc, Exception):
                raise
        finally:
            self._calm()
        self.report.total = (time.monotonic() - started) * 1000
        return self.report

    def _move(self) -> None:
        source, destination, report = self._source, self._destination, self.report
        with self._phase("check"):
            about = self._check()
        with self._phase("prepare", f"{about['memory'] >> 20} MiB in memory"):
            self._prepare(about)
        note = self._note
        self._peers = self._known_peers() if self._device else {}
        urgency.begin()
        self._urgent = True
        stopped = time.monotonic()
        with self._phase("stop", note=note):
            if self._device:
                self._stopping = True
                done = source("stop", timeout_ms=STOP_TIMEOUT_MS)
                report.contexts, report.qps = done["contexts"], done["qps"]
                if self._ip and not self._force:  # some may have been connected just now
                    connections.check_peers(self.container, source("qps"))
        with self._phase("dump", f"{report.qps} QPs", note=note):
            dumping = source.submit("dump")
            if report.contexts:
                report.rdma_bytes = self._send("rdma")["rdma"]
            images = self._start("images")  # as CRIU writes them
            if report.contexts:
                destination("prepare_rdma")
            if self.engine != "oci":
                # A daemon attaches networks before it restores: while the images are on their way.
                source("frozen")
                destination("begin")
            dumped = dumping.result(CALL_LIMIT)
            report.parts.update(freeze=dumped["freeze_ms"], criu_dump=dumped["dump_ms"])
        with self._phase("transfer", note=note):
            sent = self._send(*(what for what in about["after"] if what != "images"))
            moved = images.result()
            report.images_bytes, report.images_early_bytes = moved["images"], moved["early"]
            report.layer_rest_bytes = sum(sent.values())
            report.layer_bytes += report.layer_rest_bytes
        with self._phase("restore", f"{report.images_bytes >> 10} KiB of images", note=note):
            restoring = destination.submit("restore", neighbours=dumped["neighbours"])
            if self._device and self.engine == "oci":
                # Its sockets are then there when the first process runs, before runc has ended.
                self._resuming = destination.submit("resume", timeout_ms=RESUME_TIMEOUT_MS)
            report.parts["criu_restore"] = restoring.result(CALL_LIMIT)["ms"]
        with self._phase("resume", note=note):
            self._resume()
        report.blackout = (time.monotonic() - stopped) * 1000
        self._calm()
        with self._phase("commit", note=note):
            destination("commit")
            self._settle()
            source("commit")

    def _known_peers(self) -> connections.Peers:
        """The QPs of both nodes, among which there may be peers."""
        found: dict[tuple[str, int], int] = {}
        for side in (self._source, self._destination):
            with contextlib.suppress(MigroceError):
                found.update(connections.peers(side.node.call("agent", method="ps")))
        return found

    def _settle(self) -> None:
        """What was sent again. At a new address: the old one's stand-in is needed until peers know of it."""
        if not self._device:
            return
        report = self.report
        with contextlib.suppress(MigroceError):  # processes may have ended meanwhile
            before = self._source("stopped_counters")
            after = self._destination("settle", seconds=SETTLE if self._ip else 0, before=before)
            again = connections.compare(before, after, self._peers, self._known_peers())
            report.retransmissions = sum(each.sent_again for each in again)
            report.qps_again = [dataclasses.asdict(each) for each in again]

    def _calm(self) -> None:
        if self._urgent:
            self._urgent = False
            urgency.end()

    def _note(self, phase: str) -> None:
        self._source("note", phase=phase)

    def _check(self) -> dict[str, Any]:
        source, destination = self._source, self._destination
        if source.node.spec == destination.node.spec:
            raise MigrationError("check", f"{self.container} is on {source.node.name} already")
        # Both interpreters start at once; then the source tells, the destination judges.
        waking = threading.Thread(target=lambda: _quietly(destination.node.worker))
        waking.start()
        about = source("describe")
        if self._ip:
            old = connections.own_address(about)
            about = connections.at_another_address(about, self._ip)
            source("can_change", old=old)
            if about["device"] and not self._force:
                connections.check_peers(self.container, source("qps"))
            self.report.ip = self._ip
        waking.join()
        self._send_image = bool(destination("check", about=about).get("image"))
        self._device = bool(about["device"])
        return dict(about)

    def _prepare(self, about: dict[str, Any]) -> None:
        source, destination = self._source, self._destination
        record = Record(
            id=self.id, kind="migrate", container=self.container, device=self._device,
            destination=self._destination_spec(), engine=self.engine, ip=self._ip, **owner(source.node),
        )  # fmt: skip
        source("open", **dataclasses.asdict(record))
        self._opened = True
        self._in = destination("prepare", about=about)
        if not self._direct:
            self._out = source("serve")
        if self._send_image:
            size, name = about["image"]["size"] >> 20, about["image"]["reference"]
            self._progress(event("prepare", "start", f"image {name}, {size} MiB"))
            self.report.image_bytes = self._send("image")["image"]
        if self.engine != "oci":  # made by a daemon, from what has come
            destination("make", about=about)
        self.report.layer_bytes = sum(self._send(*about["before"]).values())

    def _destination_spec(self) -> str:
        """The destination as the source would name it, '' if it cannot."""
        remote = isinstance(self._source.node, SshNode)
        return (
            "" if remote and not isinstance(self._destination.node, SshNode) else self._destination.node.spec
        )

    def _send(self, *whats: str) -> dict[str, int]:
        """Move data from node to node; bytes of each."""
        return self._start(*whats).result()

    def _start(self, *whats: str) -> Transfer:
        """Begin to move data from node to node."""
        receiving = self._destination.submit("received", whats=list(whats), timeout=CALL_LIMIT)
        pushing = self._source.submit("push", whats=list(whats), to=self._in if self._direct else None)
        return Transfer(receiving, pushing, None if self._direct else lambda: self._pump(len(whats)))

    def _pump(self, count: int) -> None:
        """Pass on `count` streams that the source has. Raises OSError, NodeError."""
        for _ in range(count):
            with (
                self._source.node.connect(self._out) as out,
                self._destination.node.connect(self._in) as into,
            ):
                streams.pump(out, into)

    def _resume(self) -> None:
        """From here on the destination is the container's place."""
        self._source("leave", ip=self._ip)
        self._destination("plug")
        if self._resuming is not None:
            self._resuming.result(CALL_LIMIT)

    # -- when it goes wrong --------------------------------------------------------------------------------

    def _error(self, exc: BaseException, where: str) -> MigrationError:
        step = step_of(exc, self._phase.current)
        reason = str(getattr(exc, "reason", "") or exc or type(exc).__name__)
        mend = str(getattr(exc, "mend", ""))
        if self._ended is not None:
            reason = f"{self.container} has ended by itself on {where}, with status {self._ended} ({reason})"
            return MigrationError(step, reason)
        where_now = f"{self.container} runs on {where} as before"
        return MigrationError(step, reason, f"{mend}; {where_now}" if mend else where_now, running_on=where)

    def _can_be_undone(self, cause: BaseException) -> bool:
        """Whether no peer can have heard of the destination. Raises MigrationError if nobody knows."""
        point = "resume" if self.engine == "oci" else "restore"
        if self._phase.current in (point, "resume"):
            # What counts is the journal, by which others act who have lost us, and what has become of
            # the destination.
            with contextlib.suppress(MigroceError):
                record = retry(lambda: self._source("standing"))
                if record["ended"] == "undone" or not (record["ended"] or record["past_the_point"]):
                    return True
            return not self._arrived(cause)
        return PHASES.index(self._phase.current) < PHASES.index(point)

    def _arrived(self, cause: BaseException) -> bool:
        """Whether the container has come to the destination. Raises MigrationError if nobody knows."""
        where = self._destination.node.name

        def look() -> dict[str, Any]:
            self._destination("adopt")  # after a worker that was given up has undone what it had made
            return dict(self._destination("status"))

        try:
            status = retry(look)
        except MigroceError as exc:
            self._source.give_up()
            reason = f"whether {self.container} runs on {where} is not known: {exc}"
            mend = f"make {where} reachable and run `migroce recover`; what failed first: {cause}"
            raise MigrationError(self._phase.current, reason, mend) from exc
        return bool(status["here"] and (status["alive"] or status["exit_status"] is not None))

    def _undo(self, cause: BaseException) -> None:
        self._progress_quietly(event("undo", "start"))
        with contextlib.suppress(MigroceError):
            undo_destination(self._destination)
        try:
            self._ended = undo_source(self._source, stopped=self._stopping)
        except ContainerLostError as exc:
            self._progress_quietly(event("undo", "failed", str(exc)))
            raise ContainerLostError("undo", exc.reason, f"{exc.mend}; what failed first: {cause}") from exc
        except MigroceError as exc:
            self._progress_quietly(event("undo", "failed", str(exc)))
            self._source.give_up()
            then = "until that is mended it stands still; then run `migroce recover`"
            mend = f"{then}; what failed first: {cause}"
            raise MigrationError("undo", f"{self.container} could not be brought back: {exc}", mend) from exc
        now = "has ended by itself" if self._ended is not None else "runs as before"
        self._progress_quietly(event("undo", "done", f"{self.container} {now} on {self._source.node.name}"))

    def _finish(self, cause: BaseException) -> None:
        self.report.warnings.append(f"finished after a failure in {self._phase.current}: {cause}")
        try:
            finish(self._source, self._destination, resume=self._device, ip=self._ip)
        except MigroceError as exc:
            self._source.give_up()
            where = self._destination.node.name
            mend = f"see `migroce ps`, then run `migroce recover`; what failed first: {cause}"
            raise MigrationError("finish", f"on {where}: {exc}", mend, running_on=where) from exc

    def _progress_quietly(self, what: Event) -> None:
        with contextlib.suppress(Exception):
            self._progress(what)


def step_of(exc: BaseException, phase: str) -> str:
    """The step that an error names, the phase if it names none."""
    step = str(getattr(exc, "step", ""))
    return phase if step in ("", "source", "destination", "worker") else step


def owner(source: Node) -> dict[str, Any]:
    """What a journal says of the command and of the source, as seen from the source itself."""
    if isinstance(source, SshNode):
        return {"source": f"state:{source.worker().hello['state']}"}
    fields = stat_fields(os.getpid())
    return {"source": source.spec, "owner": os.getpid(), "owner_start": fields[1] if fields else 0}


def undo_destination(destination: Side) -> None:
    """Remove what a migration made at the destination. Raises MigroceError."""

    def once() -> None:
        destination("adopt")
        destination("undo")

    retry(once, 5)


def undo_source(source: Side, *, stopped: bool) -> int | None:
    """Let the container run on at the source; its exit status if it has ended by itself meanwhile.

    Raises MigroceError, ContainerLostError if it is gone.
    """

    def once() -> dict[str, Any]:
        if not source("adopt"):
            return {}
        return dict(source("undo", stopped=stopped, timeout_ms=RESUME_TIMEOUT_MS) or {})

    done = retry(once)
    if done.get("lost"):
        what, where = source.container, source.node.name
        raise ContainerLostError(
            "undo", f"the processes of {what} on {where} are gone", "start it again there"
        )
    status = done.get("exit_status")
    return None if status is None else int(status)


def finish(source: Side, destination: Side, *, resume: bool, ip: str = "") -> None:
    """Go on from the phase `resume`: the container runs at the destination. Raises MigroceError."""

    def arrive() -> None:
        source("adopt")
        source("leave", ip=ip)
        destination("adopt")
        destination("plug")
        if resume:
            destination("resume", timeout_ms=RESUME_TIMEOUT_MS)
            if ip:
                destination("settle", seconds=SETTLE, before=[])

    retry(arrive)
    retry(lambda: destination("commit"))
    retry(lambda: source("commit") if source("adopt") else None)


def _quietly(work: Callable[[], Any]) -> None:
    with contextlib.suppress(MigroceError):
        work()
