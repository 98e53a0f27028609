# SPDX-License-Identifier: BSD-3-Clause
"""Runs the demo: lab up, two containers, the move in the middle, lab down whatever happens."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migroce.demo.sampler import Sampler
from migroce.demo.state import DemoState, End
from migroce.errors import EngineError, MigroceError
from migroce.lab import docker
from migroce.lab.api import Lab, remove
from migroce.migration import api
from migroce.nodes import Node

if TYPE_CHECKING:
    from migroce.migration.report import Event, Report

LAB = "demo"
MESSAGE = 65536  # bytes: ib_send_bw's default
_PORT = 18515  # where its server waits for the client (TCP, inside the lab)
_START_LIMIT = 30.0  # seconds until the server listens and the QPs are connected
_END_LIMIT = 300.0  # seconds for the programs to end
_END_OF_WORKER = 30.0  # seconds that an interrupted demo waits for what it is in the middle of


@dataclass(frozen=True, slots=True)
class Options:
    """What can be chosen."""

    messages: int = 100_000
    """Per direction, of 64 KiB."""
    output: Path | None = None
    """Directory of the pictures; None: none are drawn."""
    at: float = 0.15
    """The move starts when this share of the messages has arrived."""
    docker: bool = False
    """Containers of two dockerds in a swarm's overlay network instead of plain OCI ones."""


@dataclass(slots=True)
class Result:
    """How it went."""

    state: DemoState
    report: Report
    server_output: str
    client_output: str
    pictures: list[Path] = field(default_factory=list)

    @property
    def peer_silence(self) -> float:
        """The longest time in seconds for which the peer of the moved container received nothing."""
        spans = self.state.spans
        return self.state.static.received.silence(spans[0].start, spans[-1].end + 0.5) if spans else 0.0

    @property
    def retransmissions(self) -> int:
        """Packets sent again by both ends."""
        return sum(int(end.counters.get("retransmits", 0)) for end in self.state.ends)

    @property
    def ok(self) -> bool:
        """Both programs ended with status 0."""
        return all(end.exit_status == 0 for end in self.state.ends)


Watch = Callable[[DemoState, threading.Event], None]
"""Shows the state until the event is set; runs in the main thread."""


def run(options: Options, watch: Watch) -> Result:
    """The whole demo. Raises MigroceError; the lab is gone in any case."""
    state = DemoState(
        moving=End("cont-moving", "server", "10.0.1.7", "node-a"),
        static=End("cont-static", "client", "10.0.1.3", "node-b"),
        message="bringing up two nodes",
    )
    over = threading.Event()
    outcome: list[Result | BaseException] = []

    def tell(text: str) -> None:
        state.message = text

    def work() -> None:
        try:
            remove(LAB)  # what a killed demo has left
            engine = "docker" if options.docker else "oci"
            outcome.append(_play(options, state, Lab.up(LAB, nodes=2, engine=engine, tell=tell)))
        except BaseException as exc:  # noqa: BLE001 - handed to the main thread
            outcome.append(exc)
        finally:
            over.set()

    worker = threading.Thread(target=work, name="demo", daemon=True)
    with _interruptible():
        try:
            worker.start()
            watch(state, over)
        finally:
            _clean_up(worker)
    (result,) = outcome
    if isinstance(result, BaseException):
        raise result
    return result


def _clean_up(worker: threading.Thread) -> None:
    """Remove the lab, not to be interrupted; under a worker that is not done yet, once more after it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        remove(LAB)
        if worker.is_alive():
            worker.join(_END_OF_WORKER)
            remove(LAB)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _play(options: Options, state: DemoState, lab: Lab) -> Result:
    with contextlib.ExitStack() as stack:
        stack.callback(lab.close)
        source, destination = lab.node("node-a"), lab.node("node-b")
        ends = {end.container: end for end in state.ends}
        create = _docker if options.docker else _oci

        def take(now: float, node: str, entry: dict[str, Any]) -> None:
            end = ends.get(entry["id"]) or _of_docker(lab.node(node), ends, entry["id"])
            if end is not None and not end.done:
                end.take(now, node, entry)

        command = ["ib_send_bw", "-d", "rxe0", "-n", str(options.messages), "-b"]
        state.message = "starting " + " ".join(command)
        moving, static = state.ends
        pid = create(lab, moving, command)
        _until(
            lambda: _listens(pid, _PORT),
            "the server does not wait for its client",
            source,
            moving,
        )
        for node in lab.nodes.values():
            stack.callback(Sampler(node.name, node.context.agent, take).close)
        create(lab, static, [*command, moving.address])
        # The move begins by what has arrived, not by time: machines differ in speed.
        wanted = options.messages * MESSAGE * options.at
        state.message = f"running: the move starts when {options.at:.0%} of the messages have arrived"
        _until(
            lambda: moving.connected and static.received.last > 0,
            "the two programs exchange no data", destination, static,
        )  # fmt: skip
        _until(
            lambda: static.received.last >= wanted,
            "the two programs are too slow", destination, static, _END_LIMIT,
        )  # fmt: skip
        state.message = f"moving {moving.container} from {source.name} to {destination.name}"
        report = api.migrate(moving.container, source, destination, progress=_progress(state))
        state.message = f"{moving.container} runs on {destination.name}, both programs go on"
        for end in state.ends:
            end.exit_status = destination.call("wait", container=end.container, timeout=_END_LIMIT)
            end.done = True
        state.message = "both programs have ended"
        server_output, client_output = (
            str(destination.call("logs", container=end.container)) for end in state.ends
        )
        result = Result(state, report, server_output, client_output)
        if options.output is not None:
            result.pictures = _draw(options.output, result)
        return result


def _oci(lab: Lab, end: End, command: list[str]) -> int:
    """Start a container of the lab's own; its pid."""
    return int(lab.create(end.container, end.node, command, ip=end.address)["pid"])


def _docker(lab: Lab, end: End, command: list[str]) -> int:
    """`docker run`, as people type it; the container's pid."""
    node = lab.node(end.node)
    own = ["--runtime", "migroce", "--network", docker.NETWORK, "--ip", end.address, "--name", end.container]
    node.run(["docker", "run", "-d", *own, docker.IMAGE, *command])
    return int(node.run(["docker", "inspect", "-f", "{{.State.Pid}}", end.container]).stdout)


def _of_docker(node: Node, ends: dict[str, End], ident: str) -> End | None:
    """Whose container it is that the agent knows by Docker's id; remembered in `ends`."""
    if not re.fullmatch("[0-9a-f]{64}", ident):
        return None
    done = node.run(["docker", "inspect", "-f", "{{.Name}}", ident], check=False)
    end = ends.get(done.stdout.decode().strip().removeprefix("/"))
    if end is not None:
        ends[ident] = end
    return end


def _progress(state: DemoState) -> Callable[[Event], None]:
    return lambda event: state.phase(event.phase, event.state, event.monotonic)


def _until(
    reached: Callable[[], bool], complaint: str, node: Node, end: End, limit: float = _START_LIMIT
) -> None:
    """Wait for something the programs do. Raises MigroceError when they end or take more than `limit` s."""
    deadline = time.monotonic() + limit
    while not reached():
        info = node.call("info", container=end.container)
        if info["exit_status"] is not None or time.monotonic() > deadline:
            how = f"ended with {info['exit_status']}" if info["exit_status"] is not None else "runs"
            words = node.call("logs", container=end.container).strip().splitlines()[-3:]
            raise MigroceError(
                f"{complaint}: {end.container} {how} and says: {' / '.join(words) or 'nothing'}"
            )
        time.sleep(0.01)


def _listens(pid: int, port: int) -> bool:
    """Whether something in the network namespace of `pid` listens on a TCP port."""
    wanted = f":{port:04X}"
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            rows = [row.split() for row in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]]
            if any(row[1].endswith(wanted) and row[3] == "0A" for row in rows):
                return True
    return False


def _draw(directory: Path, result: Result) -> list[Path]:
    from migroce.report.timeline import draw

    state = result.state
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise EngineError(
            "picture", f"{directory} cannot be made: {exc.strerror}", "name another by --output"
        ) from exc
    stops = [span for span in state.spans if span.name == "stop"]
    starts = [span for span in state.spans if span.name == "resume"]
    blackout = (stops[0].start, starts[-1].end) if stops and starts else None
    return draw(
        directory / "demo",
        {f"{end.container} ({end.role})": end.received for end in state.ends},
        state.spans,
        title=f"ib_send_bw -b: {state.moving.container} moved from node-a to node-b while it runs",
        blackout=blackout,
    )
