# SPDX-License-Identifier: BSD-3-Clause
"""MPI over UCX's verbs transports: NetPIPE, which checks the data that it exchanges, moved while it runs."""

from __future__ import annotations

import contextlib
import shlex
import shutil

import pytest
from tests.e2e.stage import Box, Stage, wait_for

from migroce.errors import MigroceError

pytestmark = pytest.mark.slow

UCX = ("UCX_NET_DEVICES=rxe0:1", "UCX_TLS=rc_verbs,ud_verbs,self", "UCX_WARN_UNUSED_ENV_VARS=n")
NETPIPE = "-i -l 1024 -u 65536 -n"
"""Integrity instead of speed, sizes from and to, rounds of each size."""
END = "HYDRA_LAUNCH_END"
ADDRESSES = ("10.0.1.251", "10.0.1.252")
"""Of the hosts that MPICH is told before they are there; a stage gives others."""


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: netpipe-openmpi, netpipe-mpich2)")


def journey(main: Box, boxes: list[Box]) -> bool:
    """Move each there and back while they exchange; False: it was over before."""
    for box in (*boxes, *boxes):
        try:
            assert box.move().warnings == []
        except MigroceError:
            if not over(main):
                raise
        trafficking(main, 20)
    return not over(main)


def over(box: Box) -> bool:
    return bool(box.info()["status"] == "exited")


def trafficking(box: Box, packets: int) -> None:
    """Wait until its QPs have sent and received so many more, or it is over."""

    def seen() -> int:
        with contextlib.suppress(MigroceError):  # it has just ended
            return box.packets()
        return 0

    wait_for("queue pairs", lambda: over(box) or seen())
    before = seen()
    wait_for("traffic", lambda: over(box) or seen() > before + packets)


def launched(box: Box) -> list[str]:
    """What Hydra asks to be run on each host; empty until it has said it all."""
    said = box.file("/launch").read_text() if box.file("/launch").exists() else ""
    lines = [line.partition("HYDRA_LAUNCH:")[2] for line in said.splitlines() if "HYDRA_LAUNCH:" in line]
    return lines if END in said else []


def test_ranks_in_two_containers_move(stage: Stage) -> None:
    """MPICH, whose launcher's parts find each other by TCP."""
    needs("mpirun.mpich", "NPmpich2")
    for rounds in (500, 2_000, 8_000):
        run = f"env {' '.join(UCX)} mpirun.mpich -launcher manual -hosts {','.join(ADDRESSES)} -n 2 "
        run += f"NPmpich2 {NETPIPE} {rounds} -o /result </dev/null >/launch 2>&1"
        part = "while ! [ -e /part ]; do sleep 0.1; done; "
        first = stage.box("rank", "a", ["sh", "-c", f"{run} & {part} sh /part; wait $!"], ip=ADDRESSES[0])
        second = stage.box("rank", "b", ["sh", "-c", f"{part} exec sh /part"], ip=ADDRESSES[1])
        lines = wait_for("the launcher", lambda first=first: launched(first))  # type: ignore[misc]
        for box, line in zip((second, first), reversed(lines), strict=True):
            box.file("/part~").write_text(f"exec env {' '.join(UCX)} {line}\n")
            box.file("/part~").rename(box.file("/part"))
        trafficking(first, 200)
        whole = journey(first, [first, second])
        statuses, said = (first.wait(300), second.wait()), first.file("/launch").read_text()
        assert statuses == (0, 0), f"{said}{second.log()}"
        assert "failed" not in said.lower()
        if whole:
            return
        for box in (first, second):
            box.node.call("delete", container=box.name)
    pytest.fail("it always ended before it had been moved")


def test_both_ranks_of_a_container_move_with_their_launcher(stage: Stage) -> None:
    """Open MPI, whose mpirun has pseudo-terminals and sessions; the ranks' peer is their own address."""
    needs("mpirun.openmpi", "NPopenmpi")
    for rounds in (500, 2_000, 8_000):
        argv = ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "-np", "2", "--mca", "pml", "ucx"]
        for each in UCX:
            argv += ["-x", each]
        line = f"{shlex.join(argv)} NPopenmpi {NETPIPE} {rounds} -o /result </dev/null"
        box = stage.box("openmpi", "a", ["sh", "-c", f"exec {line}"])
        trafficking(box, 200)
        whole = journey(box, [box])
        assert box.wait(300) == 0, box.log()
        assert "failed" not in box.log().lower()
        if whole:
            return
    pytest.fail("it always ended before it had been moved")
