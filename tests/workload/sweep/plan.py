# SPDX-License-Identifier: BSD-3-Clause
"""What is run: each program with each of its options, one at a time, and combinations that share code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

PORT = "{port}"
ADDRESS = "{address}"
ADDRESS6 = "{address6}"
"""Stand for a free port and the server's addresses in a command line."""


class Ready(Enum):
    """How a server is seen to be ready for its client."""

    TCP = "listens on the TCP port"
    CM = "waits for an event of rdma_cm"
    SOCKETS = "librdmacm's thread polls its listener"


class Ends(Enum):
    """How a run comes to its end."""

    ITSELF = "both programs end"
    CLIENT = "the client ends; then SIGINT for the server"
    INTERRUPTED = "SIGINT for both, once the client has reported twice"


@dataclass(frozen=True, slots=True)
class Case:
    """One run. `name` tells it from all others."""

    name: str
    server: tuple[str, ...]
    client: tuple[str, ...]
    ready: Ready = Ready.TCP
    ends: Ends = Ends.ITSELF

    @property
    def options(self) -> frozenset[str]:
        """The words of the name."""
        return frozenset(self.name.split())


PERFTEST = {
    "ib_send_bw": ("RC", "UC", "UD", "XRC"),
    "ib_send_lat": ("RC", "UC", "UD", "XRC"),
    "ib_write_bw": ("RC", "UC", "XRC"),
    "ib_write_lat": ("RC", "UC", "XRC"),
    "ib_read_bw": ("RC", "XRC"),
    "ib_read_lat": ("RC", "XRC"),
    "ib_atomic_bw": ("RC", "XRC"),
    "ib_atomic_lat": ("RC", "XRC"),
}
"""Programs and their connection types; perftest refuses the others (SRD and DC need devices of their own)."""

ITERATIONS = "-n 96"
"""Unless the options say: perftest wants a multiple of its lists' lengths."""

OPTIONS = (
    "", "-b", "-e", "-e -b", "-q 4", "-q 4 -b", "-q 4 -e", "-q 16",
    "--use-srq", "--use-srq -q 4", "--use-srq -e", "--use-srq -b", "--use-srq -q 4 -e -b",
    "-R", "-R -e", "-R -b", "-R -q 4", "-R -q 4 -b -e", "-R --use-srq", "-R -T 8", "-R -s 100001",
    "-a -n 8", "-a -n 8 -b", "-n 5", "-n 17", "-n 1001", "-n 3000 -s 64",
    "-s 1", "-s 3000", "-s 65536", "-s 100001 -b", "-s 8388608 -n 8",
    "-m 256", "-m 512", "-m 1024", "-m 2048", "-m 4096", "-m 256 -s 100001",
    "-I 0", "-I 64 -s 64", "-I 128 -s 64 -l 8", "-I 100000",
    "-l 8", "-l 8 -q 2", "-l 4 -b", "--recv_post_list 8", "-l 8 --recv_post_list 4 -b -q 2",
    "-t 1", "-r 1", "-t 1 -r 1", "-t 1024 -r 1024", "-Q 1", "-Q 7", "-t 8 -Q 8",
    "-x 0", "-x 1", "-x 2", "-x 3", "-x 99", "--ipv6",
    "-o 1", "-o 16", "-o 128", "-o 1000", "-A FETCH_AND_ADD", "-A CMP_AND_SWAP", "-A CMP_AND_SWAP -q 4 -b",
    "-u 10", "-S 3", "--tclass 16", "-L 3", "--pkey_index 0", "--pkey_index 1", "--retry_count 3", "-i 2",
    "-D 1", "-D 1 -b", "-D 1 -e", "-D 1 -q 4", "-D 1 --cpu_util", "-D 1 --run_infinitely",
    "--use_old_post_send", "--use_old_post_send -b", "--use_old_post_send -e -q 2",
    "--use_old_post_send -l 8",
    "--write_with_imm", "--write_with_imm -b -q 2", "--mr_per_qp", "--mr_per_qp -q 4", "--inline_recv 32",
    "--rate_limit 1", "--rate_limit 1 --rate_limit_type SW", "--rate_limit 1 --rate_limit_type PP", "-w 1",
    "-y 10",
    "--report_gbits", "--report-both -b", "--out_json --out_json_file /dev/null", "-N", "-H", "-C", "-U",
    "-F",
    "--output bandwidth", "--output latency", "--output message_rate", "--reversed", "--latency_gap 10",
    "--flows 4", "--perform_warm_up", "--wait_destroy 1", "--disable_pcie_relaxed", "--force-link Ethernet",
    "--dont_xchg_versions", "--odp", "--use_hugepages", "-z", "-O", "-X 0", "-W counters/port_xmit_data",
    "-g -M 0:0:0:0:0:0:0:0:0:0:255:255:239:1:1:1", "-g -x 0 -M 255:14:0:0:0:0:0:0:0:0:0:0:0:0:1:1",
    "-g -x 0",
    "--unsolicited_write", "--no_lock", "--use-null-mr", "--data_validation", "--connectionless",
)  # fmt: skip


def perftest(directory: str = "") -> Iterator[Case]:
    """All of perftest; `directory`: where its programs are, with a slash, if not on the PATH."""
    for program, types in PERFTEST.items():
        for kind in types:
            for options in OPTIONS:
                name = f"{program} -c {kind} {options}".rstrip()
                words = options.split()
                command = (directory + program, "-d", "rxe0", "-p", PORT, "-c", kind, *words)
                if not {"-n", "-D"} & set(words):
                    command += tuple(ITERATIONS.split())
                yield Case(
                    name,
                    command,
                    (*command, ADDRESS),
                    ready=Ready.CM if {"-R", "-z"} & set(words) else Ready.TCP,
                    ends=Ends.INTERRUPTED if "--run_infinitely" in words else Ends.ITSELF,
                )
