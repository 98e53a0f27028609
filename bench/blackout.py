# SPDX-License-Identifier: BSD-3-Clause
"""How long the demo's container is silent when it is moved, beside one without RDMA that runc and CRIU move.

With RDMA: ib_send_bw -b between two containers of a lab, one of them moved by migroce. Without: the same
container with a program that talks TCP and has as much memory, checkpointed and restored by the runtime's
own command line, on the same node and in the same network namespace, which is the least that can be done.
Both as the peer sees it: the longest time without data.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from bench import programs
from bench.ends import BenchError
from bench.results import Section
from bench.settings import Settings
from migroce import criu
from migroce.errors import MigroceError
from migroce.lab.api import Lab
from migroce.lab.api import remove as remove_lab
from migroce.migration.api import migrate
from migroce.nodes import LocalNode

LIMIT_MS, LIMIT_RATIO = 400.0, 1.3
LAB = "bench"
MOVING, STATIC = "10.0.1.7", "10.0.1.3"
PORT = 18515
_PROGRAM = "/usr/local/bin/mgbench-stream"
_PATIENCE = 30.0  # seconds for anything to begin
_SETTLE = 0.4  # seconds of traffic before a move
_FLOWING = 1e6  # bytes that the peer has received when traffic flows
# Less than this in a millisecond is no data but control packets and retransmissions.
_TRICKLE = 20_000


class PeerEndedError(BenchError):
    """The process whose interfaces are listened to is gone."""


class Ear:
    """Listens to what arrives in a container's network namespace: the longest silence while it listens."""

    def __init__(self, pid: int, trickle: int = _TRICKLE) -> None:
        """Of the process `pid`; fewer than `trickle` bytes in a millisecond are no data."""
        self._trickle = trickle
        self._path = Path(f"/proc/{pid}/net/dev")
        self._over = threading.Event()
        self.silence = 0.0
        """Seconds."""
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def received(self) -> int:
        """Bytes received by all interfaces but `lo`. Raises PeerEndedError."""
        total = 0
        try:
            text = self._path.read_text()
        except OSError as exc:  # ENOENT, or EINVAL while it ends
            raise PeerEndedError("the program that should receive has ended") from exc
        for line in text.splitlines()[2:]:
            name, _, numbers = line.partition(":")
            if name.strip() != "lo":
                total += int(numbers.split()[0])
        return total

    def _listen(self) -> None:
        with contextlib.suppress(PeerEndedError):  # said by whoever asks for what was `received`
            self._measure()

    def _measure(self) -> None:
        heard, seen = time.monotonic(), self.received()
        while not self._over.is_set():
            time.sleep(0.001)
            now, count = time.monotonic(), self.received()
            if count - seen >= self._trickle:
                self.silence = max(self.silence, now - heard)
                heard = now
            seen = count

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _wait_for(what: str, lab: Lab, container: str) -> None:
    """Until `what` is in the output of a container. Raises BenchError."""
    until = time.monotonic() + _PATIENCE
    node = lab.find(container)
    while node is not None and what not in (words := str(node.call("logs", container=container))):
        if time.monotonic() > until:
            raise BenchError(f"{container} never said {what!r}: {words.strip()[-200:]}")
        time.sleep(0.01)


def wait_listening(pid: int) -> None:
    """Until something listens on perftest's port in the network of `pid`. Raises BenchError."""
    wanted, until = f":{PORT:04X}", time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(OSError):
                rows = [row.split() for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
                if any(row[1].endswith(wanted) and row[3] == "0A" for row in rows):
                    return
        time.sleep(0.01)
    raise BenchError(f"nothing listens on port {PORT} in a container")


@contextlib.contextmanager
def _removed(lab: Lab, *containers: str) -> Iterator[None]:
    try:
        yield
    finally:
        for container in containers:
            node = lab.find(container)
            if node is not None:
                node.call("delete", container=container)


def _with_rdma(lab: Lab) -> tuple[float, float, float]:
    """(silence in ms as the peer sees it, blackout in ms as the migration reports it, MiB of the images)."""
    command = ["ib_send_bw", "-d", "rxe0", "-n", "200000", "-b"]
    with _removed(lab, "moving", "static"):
        server = lab.create("moving", "node-a", command, ip=MOVING)
        wait_listening(int(server["pid"]))
        client = lab.create("static", "node-b", [*command, MOVING], ip=STATIC)
        with Ear(int(client["pid"])) as ear:
            until = time.monotonic() + _PATIENCE
            while ear.received() < _FLOWING:
                if time.monotonic() > until:
                    raise BenchError("ib_send_bw does not run between the containers")
                time.sleep(0.005)
            time.sleep(_SETTLE)
            ear.silence = 0.0
            report = migrate("moving", lab.node("a"), lab.node("b"))
            time.sleep(_SETTLE)
        return ear.silence * 1e3, report.blackout, report.images_bytes / 2**20


def _runc(node: LocalNode, *arguments: str) -> None:
    """The node's runtime, with a CRIU that works. Raises MigroceError."""
    ctx = node.context
    node.run([ctx.runtime, "--root", str(ctx.runc_root), *arguments], env=criu.environment(), timeout=60)


def _without_rdma(lab: Lab, mib: int, where: Path) -> tuple[float, float]:
    """(silence in ms as the peer sees it, MiB of the images)."""
    node, images, work = lab.node("a"), where / "images", where / "work"
    for directory in (images, work):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
    files = {_PROGRAM: programs.stream()}
    with _removed(lab, "plain", "peer"):
        server = lab.create(
            "plain", "node-a", [_PROGRAM, "server", str(PORT), str(mib)], ip=MOVING, device=False, files=files
        )
        wait_listening(int(server["pid"]))
        ask = [_PROGRAM, "client", MOVING, str(PORT), "20"]
        lab.create("peer", "node-b", ask, ip=STATIC, device=False, files=files)
        _wait_for("connected", lab, "peer")
        time.sleep(_SETTLE)
        bundle = node.context.bundle("plain")
        # CRIU's own lock of the network, the quicker of its two; migroce's configuration has none.
        (bundle / "criu.conf").write_text("network-lock nftables\nmanage-cgroups=ignore\n")
        common = ["--tcp-established", "--file-locks", "--image-path", str(images), "--work-path", str(work)]
        _runc(node, "checkpoint", *common, "plain")
        _runc(node, "restore", "--detach", *common, "--bundle", str(bundle), "plain")
        _wait_for("gap", lab, "peer")
        time.sleep(_SETTLE)
        words = str(lab.node("b").call("logs", container="peer"))
        gaps = [float(line.split()[1]) for line in words.splitlines() if line.startswith("gap")]
        return max(gaps), sum(f.stat().st_size for f in images.iterdir()) / 2**20


def blackout(settings: Settings) -> Section:
    """Both kinds of move in turns, fresh containers each time."""
    section = Section("blackout", "Blackout of the demo's container", "longest time without data at the peer")
    rdma: list[float] = []
    reported: list[float] = []
    plain: list[float] = []
    sizes: list[tuple[float, float]] = []
    mib = 4
    try:
        remove_lab(LAB)
        with Lab.up(LAB, nodes=2, overlay=False) as lab, settings.scratch() as where:
            for turn in range(-settings.warm_up, settings.rounds):
                settings.tell(f"blackout ({turn + 1}/{settings.rounds})")
                silence, said, with_mib = _with_rdma(lab)
                without, without_mib = _without_rdma(lab, mib, where)
                if turn < 0:  # give the plain container as much memory as the other has
                    mib = max(0, mib + round(with_mib - without_mib))
                    continue
                rdma.append(silence)
                reported.append(said)
                plain.append(without)
                sizes.append((with_mib, without_mib))
    except MigroceError as exc:
        raise BenchError(str(exc)) from exc
    ours = section.add("with RDMA, migroce", "ms", rdma)
    section.add("as migroce reports it", "ms", reported)
    theirs = section.add("without RDMA, runc and CRIU", "ms", plain)
    section.add("images, with RDMA", "MiB", [size for size, _ in sizes])
    section.add("images, without", "MiB", [size for _, size in sizes])
    section.target(f"at most {LIMIT_MS:.0f} ms", ours, LIMIT_MS)
    section.target(
        f"at most {LIMIT_RATIO} times that without RDMA", section.ratio("ratio", ours, theirs), LIMIT_RATIO
    )
    return section
