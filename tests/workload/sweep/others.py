# SPDX-License-Identifier: BSD-3-Clause
"""What is run of the examples of libibverbs and librdmacm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tests.workload.sweep.plan import ADDRESS, ADDRESS6, PORT, Case, Ends, Ready

PINGPONG = (
    "", "-e", "-n 1", "-n 1000", "-s 1", "-s 2000", "-r 1", "-r 4", "-l 3", "-g 0", "-g 2", "-g 3", "-g 3 -e",
    "-c", "-c -e", "-o", "-O", "-P", "-j", "-t", "-t -e", "-N", "-N -e", "-N -c", "-t -N",
    "-m 256", "-m 512", "-m 1024", "-m 2048", "-m 4096", "-s 100001 -m 256", "-s 1000000", "-s 1000000 -e -c",
    "-q 1", "-q 64 -r 1000", "-q 64 -r 1000 -e",
)  # fmt: skip
"""Programs tell those options apart that they do not have."""

CM = {
    ("rping -s", "rping -c -a"): (
        "-C 1", "-C 50", "-C 10 -V", "-C 3 -v -d", "-C 10 -V -S 1000", "-C 10 -V -S 65535", "-C 5 -q",
        "-C 5 -p 7999",
    ),
    ("ucmatose", "ucmatose -s"): (
        "", "-c 1", "-c 30", "-C 100", "-S 1 -C 20", "-S 60000 -C 20", "-t 8", "-m", "-a 14",
        "-c 10 -C 20 -S 1000 -m",
        "-p 7999", "-f ip",
    ),
    ("udaddy", "udaddy -s"): (
        "", "-c 1", "-c 10", "-C 100 -S 100", "-C 10 -S 4000", "-t 8", "-f ip", "-p 0x2",
    ),
    ("rdma_server", "rdma_client -s"): ("", "-p 7999"),
    ("rdma_xserver", "rdma_xclient -s"): ("", "-c r", "-c x", "-p 7999"),
}  # fmt: skip
"""Programs of each end, and their options."""

SERVES = {("cmtime", "cmtime -s"): ("-c 1", "-c 50", "-p 7999 -c 10")}
"""Its server serves for ever."""

CM6 = {
    ("rping -s -a", "rping -c -a"): ("-C 10 -V",),
    ("ucmatose -f ip -b", "ucmatose -f ip -s"): ("", "-c 5 -C 5"),
}
"""Between IPv6 addresses; the server is told its own."""

SOCKETS = (
    "-S 64 -C 100", "-S 4096 -C 100", "-S 1000000 -C 10", "-S 64 -C 100 -T b", "-S 4096 -C 100 -T b -T v",
    "-S 4096 -C 100 -T n", "-S 100000 -C 20 -T v", "-S 4096 -C 100 -B 65536", "-S 64 -C 100 -i 128",
    "-S 4096 -C 100 -p 7999",
    "-S 4096 -C 100 -k 5", "-S 4096 -C 100 -T r", "-S 4096 -C 20 -I 5", "-S 4096 -C 20 -f ip",
)  # fmt: skip


def ibverbs(directory: str = "") -> Iterator[Case]:
    """libibverbs' pingpongs."""
    for kind in ("rc", "uc", "ud", "srq", "xsrq"):
        program = f"ibv_{kind}_pingpong"
        for options in PINGPONG:
            words = tuple(options.split())
            command = (directory + program, "-d", "rxe0", "-p", PORT, *words)
            if "-g" not in words:
                command += ("-g", "1")
            if "-n" not in words and kind != "xsrq":
                command += ("-n", "100")
            yield Case(f"{program} {options}".rstrip(), command, (*command, ADDRESS))


def rdmacm(directory: str = "") -> Iterator[Case]:
    """librdmacm's examples and its sockets."""
    for (server, client), every in CM.items():
        for options in every:
            yield _cm(directory, server.split(), [*client.split(), ADDRESS], options, server)
    for (server, client), every in SERVES.items():
        for options in every:
            case = _cm(directory, server.split(), [*client.split(), ADDRESS], options, server)
            yield replace(case, ends=Ends.CLIENT)
    for (server, client), every in CM6.items():
        for options in every:
            yield _cm(
                directory, [*server.split(), ADDRESS6], [*client.split(), ADDRESS6], options, f"{server} IPv6"
            )
    for program in ("rstream", "riostream"):
        for options in SOCKETS:
            yield _cm(directory, [program], [program, "-s", ADDRESS], options, program, Ready.SOCKETS)


def _cm(
    directory: str, server: list[str], client: list[str], options: str, name: str, ready: Ready = Ready.CM
) -> Case:
    words = options.split()
    return Case(
        f"{name} {options}".rstrip(),
        (directory + server[0], *server[1:], *words),
        (directory + client[0], *client[1:], *words),
        ready=ready,
    )
