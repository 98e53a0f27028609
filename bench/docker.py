# SPDX-License-Identifier: BSD-3-Clause
"""How long a Docker container is silent when it is moved, beside one without RDMA that docker itself moves.

With RDMA: ib_send_bw -b between two containers on a swarm's overlay network, the server moved by migroce;
small, and with 256 MB of buffers. Without: a container with about as much memory that sends UDP, moved by
docker's own commands (checkpoint create, copy, rm, start --checkpoint), and by migroce. As the peer sees it:
the longest time without data.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.blackout import MOVING, STATIC, Ear, PeerEndedError, wait_listening
from bench.ends import BenchError
from bench.results import Section
from bench.settings import Settings
from migroce.errors import MigroceError
from migroce.lab.api import Lab
from migroce.lab.api import remove as remove_lab
from migroce.lab.docker import IMAGE, NETWORK
from migroce.migration.api import migrate
from migroce.nodes import LocalNode

LIMIT_MS, LIMIT_BIG_MS, LIMIT_RATIO = 1000.0, 1600.0, 1.15
LAB = "bench-docker"
BIG = 256 << 20
_PATIENCE = 60.0
_SETTLE = 0.5
_SENDER = (
    "use IO::Socket::INET; my $kept = join('', map { chr(rand(256)) } 1 .. 65536) x (16 * $ARGV[1]); "
    "my $s = IO::Socket::INET->new(Proto => 'udp', PeerAddr => $ARGV[0], PeerPort => 9); "
    "while (1) { send($s, substr($kept, 0, 1000), 0); select(undef, undef, undef, 0.0005); }"
)
"""Sends 1000 bytes each half millisecond, and has MiB of memory: ADDRESS MIB."""
_TRICKLE = 500


def _docker(node: LocalNode, *args: str) -> str:
    return node.run(["docker", *args], timeout=120).stdout.decode().strip()


def _inspect(node: LocalNode, container: str) -> dict[str, Any]:
    return dict(json.loads(_docker(node, "inspect", container))[0])


def _checkpoints(node: LocalNode, found: dict[str, Any]) -> Path:
    root = Path(_docker(node, "info", "-f", "{{.DockerRootDir}}"))
    return root / "containers" / str(found["Id"]) / "checkpoints"


def _options(name: str, ip: str) -> list[str]:
    return ["--name", name, "--network", NETWORK, "--ip", ip]


def _run(
    node: LocalNode, name: str, ip: str, *args: str, runtime: str = "migroce", more: Sequence[str] = ()
) -> int:
    """Start a container, `more` being options; its pid."""
    _docker(node, "run", "-d", "--runtime", runtime, *more, *_options(name, ip), IMAGE, *args)
    return int(_inspect(node, name)["State"]["Pid"])


def _keep_network(lab: Lab) -> None:
    """Have a container on each node that keeps the overlay there between the rounds.

    A node that leaves it with its last container and comes back at once with the next may be forgotten by
    the others (moby issue 47728): the client of the next round says "Couldn't connect" and ends.
    """
    for node in lab.nodes.values():
        _docker(node, "run", "-d", "--network", NETWORK, IMAGE, "sleep", "infinity")


@contextlib.contextmanager
def _removed(lab: Lab, *names: str) -> Iterator[None]:
    """Remove them in the end. Raises BenchError with what they had to say if one has ended."""
    try:
        yield
    except PeerEndedError as exc:
        words = [f"{name}: {said}" for name in names if (said := _last_words(lab, name))]
        raise BenchError("; ".join([str(exc), *words])) from exc
    finally:
        for node in lab.nodes.values():
            node.run(["docker", "rm", "-f", *names], check=False)


def _last_words(lab: Lab, name: str) -> str:
    """The last line of the container's output, wherever it is; '' if it has said nothing."""
    said = ""
    for node in lab.nodes.values():
        with contextlib.suppress(MigroceError):
            said = str(node.call("logs", container=name)).strip() or said
    return said.splitlines()[-1] if said else ""


def _hear(ear: Ear, amount: int) -> None:
    until = time.monotonic() + _PATIENCE
    start = ear.received()
    while ear.received() < start + amount:
        if time.monotonic() > until:
            raise BenchError("nothing runs between the containers")
        time.sleep(0.005)


def _with_rdma(lab: Lab, size: int) -> tuple[float, float, float]:
    """(silence in ms as the peer sees it, blackout in ms as the migration reports it, MiB of the images)."""
    command = ["ib_send_bw", "-d", "rxe0", "-D", "120", "-b", "-s", str(size)]
    with _removed(lab, "moving", "static"):
        wait_listening(_run(lab.node("a"), "moving", MOVING, *command))
        with Ear(_run(lab.node("b"), "static", STATIC, *command, MOVING)) as ear:
            _hear(ear, 4 << 20)
            time.sleep(_SETTLE)
            ear.silence = 0.0
            report = migrate("moving", lab.node("a"), lab.node("b"))
            _hear(ear, 4 << 20)
            time.sleep(_SETTLE)
        return ear.silence * 1e3, report.blackout, report.images_bytes / 2**20


def _without_rdma(lab: Lab, mib: int, *, by_docker: bool) -> float:
    """Silence in ms as the peer sees it, when docker's own commands move the container or migroce does."""
    here, there = lab.node("a"), lab.node("b")
    kind: dict[str, Any] = {"runtime": "runc"} if by_docker else {"more": ["-e", "MIGROCE=off"]}
    args = ["perl", "-e", _SENDER, STATIC, str(mib)]
    with (
        _removed(lab, "plain", "peer"),
        Ear(_run(there, "peer", STATIC, "sleep", "600", runtime="runc"), _TRICKLE) as ear,
    ):
        _run(here, "plain", MOVING, *args, **kind)
        if by_docker:
            _docker(there, "create", *_options("plain", MOVING), IMAGE, *args)
        _hear(ear, 100_000)
        time.sleep(_SETTLE)
        ear.silence = 0.0
        if by_docker:
            _move_by_hand(here, there, "plain")
        else:
            migrate("plain", here, there)
        _hear(ear, 100_000)
    return ear.silence * 1e3


def _move_by_hand(here: LocalNode, there: LocalNode, name: str) -> None:
    source, target = _inspect(here, name), _inspect(there, name)
    roots = [_checkpoints(here, source), _checkpoints(there, target)]
    _docker(here, "checkpoint", "create", name, "ckpt1")
    shutil.copytree(roots[0] / "ckpt1", roots[1] / "ckpt1")
    layers = [found["GraphDriver"]["Data"]["UpperDir"] for found in (source, target)]
    here.run(["cp", "-a", f"{layers[0]}/.", layers[1]])
    _docker(here, "rm", "-f", name)
    _docker(there, "start", "--checkpoint", "ckpt1", name)


def docker(settings: Settings) -> Section:
    """The four kinds of move in turns, fresh containers each time."""
    section = Section("docker", "Blackout of a Docker container", "longest time without data at the peer")
    small: list[float] = []
    reported: list[float] = []
    plain: list[float] = []
    own: list[float] = []
    big: list[float] = []
    mib = 4.0
    try:
        remove_lab(LAB)
        with Lab.up(LAB, engine="docker", tell=settings.tell) as lab:
            _keep_network(lab)
            for turn in range(-settings.warm_up, settings.rounds):
                settings.tell(f"docker ({turn + 1}/{settings.rounds})")
                silence, said, mib = _with_rdma(lab, 65536)
                without = _without_rdma(lab, round(mib), by_docker=True)
                without_too = _without_rdma(lab, round(mib), by_docker=False)
                with_256, _, _ = _with_rdma(lab, BIG // 2)  # a buffer each way
                if turn < 0:
                    continue
                small.append(silence)
                reported.append(said)
                plain.append(without)
                own.append(without_too)
                big.append(with_256)
    except MigroceError as exc:
        raise BenchError(str(exc)) from exc
    ours = section.add("with RDMA, migroce", "ms", small)
    section.add("as migroce reports it", "ms", reported)
    theirs = section.add("without RDMA, docker's own commands", "ms", plain)
    bare = section.add("without RDMA, migroce", "ms", own)
    large = section.add("with RDMA and 256 MB, migroce", "ms", big)
    section.target(f"at most {LIMIT_MS:.0f} ms", ours, LIMIT_MS)
    section.target(f"with 256 MB at most {LIMIT_BIG_MS:.0f} ms", large, LIMIT_BIG_MS)
    for name, other in (("docker's own commands", theirs), ("migroce", bare)):
        ratio = section.ratio(f"ratio to that without RDMA, {name}", ours, other)
        section.target(f"at most {LIMIT_RATIO} times that without RDMA, {name}", ratio, LIMIT_RATIO)
    return section
