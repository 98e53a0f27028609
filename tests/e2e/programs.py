# SPDX-License-Identifier: BSD-3-Clause
"""Programs that nobody here wrote: how each one's ends are run for as long as a test needs."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable

from tests.native.procfs import polls_a_listener, waits_for_events


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """Command lines of a server and a client; {ip} is the server's address, {n} how long it runs."""

    server: str
    client: str
    runs: int
    """The first {n}; four times as much when it was over before its moves were."""
    ready: int | str | Callable[[int], bool] = waits_for_events
    """The TCP port that the server listens at, or words it says then, or what is seen of its process."""


def perftest(options: str) -> Program:
    """A benchmark of perftest, for {n} seconds, or where it refuses that, as often."""
    program, *rest = options.split()
    amount, runs = ("-n", 50_000) if "-e" in rest else ("-D", 20)
    common = shlex.join([program, "-d", "rxe0", *rest, amount, "{n}"])
    return Program(common, f"{common} {{ip}}", runs, waits_for_events if "-R" in rest else 18515)


def ucx(transports: str, options: str, runs: int) -> Program:
    """ucx_perftest by the messages of UCX's protocols."""
    names = f"env UCX_NET_DEVICES=rxe0:1 UCX_WARN_UNUSED_ENV_VARS=n UCX_TLS={transports} ucx_perftest"
    return Program(f"{names} {options} -n {{n}}", f"{names} {{ip}} {options} -n {{n}}", runs, 13337)


def fio(verb: str) -> Program:
    """fio's rdma engine at 150 MB/s; fio asks for no RNR retries, so its server posts more than can come."""
    both = f"[global]\nioengine=rdma\nport=9990\nbs=64k\nsize={{n}}M\nverb={verb}\n"
    server = f"{both}[server]\nrw=read\niodepth=16\n"
    client = f"{both}hostname={{ip}}\niodepth=8\n[client]\nrw=write\nrate=150m\n"
    lines = [f"printf %s {shlex.quote(job)} >/job; exec fio /job" for job in (server, client)]
    return Program(*lines, 2500, "waiting for connection")


def pingpong(options: str, clients: str = "") -> Program:
    """One of libibverbs' examples; `clients`: what the server is told of their number."""
    program, *rest = options.split()
    common = shlex.join([program, "-d", "rxe0", "-g", "1", *rest, "-n", "{n}"])
    return Program(f"{common} {clients}", f"{common} {{ip}}", 200_000, 18515)


def rsockets(options: str, runs: int = 20_000) -> Program:
    """librdmacm's sockets."""
    return Program(f"{options} -C {{n}}", f"{options} -C {{n}} -s {{ip}}", runs, polls_a_listener)


def qperf(test: str) -> Program:
    """qperf by rdma_cm, for {n} seconds; without that it cannot work on RoCE (docs/programs.md)."""
    return Program("qperf", f"qperf {{ip}} -t {{n}} -cm1 {test} && exec qperf {{ip}} quit", 20, 19765)


def libfabric(endpoint: str, provider: str) -> Program:
    """libfabric's pingpong with data compared, by its providers on verbs."""
    common = f"fi_pingpong -p '{provider}' -e {endpoint} -c -S 4096 -I {{n}}"
    return Program(common, f"{common} {{ip}}", 10_000, 47592)


def dapl(operations: str) -> Program:
    """uDAPL's own test, each byte compared (-V); its server ends when it is asked to."""
    provider = 'rxe u2.0 nonthreadsafe default libdaplofa.so.2 dapl.2.0 "eth0 0" ""'
    begin = f"printf '%s\\n' '{provider}' >/dat.conf; export DAT_OVERRIDE=/dat.conf;"
    client = f"dapltest -T T -s {{ip}} -D rxe -i {{n}} -t 2 -w 4 -V {operations}"
    return Program(
        f"{begin} exec dapltest -T S -D rxe",
        f"{begin} {client} && exec dapltest -T Q -s {{ip}} -D rxe",
        2000,
        "Service Point Ready",
    )


PROGRAMS = {
    "ib_send_bw -R": perftest("ib_send_bw -R -b"),
    "ib_send_bw -R -e": perftest("ib_send_bw -R -e"),
    "ib_send_bw, 16 QPs": perftest("ib_send_bw -q 16 -b"),
    "ib_send_bw, shared queue": perftest("ib_send_bw --use-srq -q 4"),
    "ib_send_bw, XRC": perftest("ib_send_bw -c XRC -q 2"),
    "ib_send_bw, UC": perftest("ib_send_bw -c UC"),
    "ib_send_bw, UD": perftest("ib_send_bw -c UD"),
    "ib_write_bw, chains": perftest("ib_write_bw --post_list 8 -q 4"),
    "ib_write_bw, 1024 QPs": dataclasses.replace(perftest("ib_write_bw -q 1024 -t 4 -s 1024"), runs=40),
    "ib_write_lat": perftest("ib_write_lat"),
    "ib_read_bw, 16 QPs, both ways": perftest("ib_read_bw -q 16 -b"),
    "ib_atomic_bw": perftest("ib_atomic_bw -q 4"),
    "ibv_srq_pingpong, events": pingpong("ibv_srq_pingpong -e -q 8"),
    "ibv_xsrq_pingpong": pingpong("ibv_xsrq_pingpong -e"),
    "ucmatose": Program(
        "ucmatose -c 4 -C 400 -S {n}", "ucmatose -c 4 -C 400 -S {n} -s {ip}", 4_000_000, waits_for_events
    ),
    "rstream": rsockets("rstream -S 65536"),
    "rstream, blocking, verified": rsockets("rstream -S 65536 -T b -T v", 5000),
    "riostream": rsockets("riostream -S 65536"),
    "ucx, messages": ucx("rc_verbs,ud_verbs,self", "-t tag_bw -s 65536", 100_000),
    "ucx, puts": ucx("rc_verbs,ud_verbs,self", "-t ucp_put_bw -s 65536", 100_000),
    "ucx, datagrams": ucx("ud_verbs,self", "-t tag_lat -s 4096", 100_000),
    "libfabric, messages": libfabric("msg", "verbs"),
    "libfabric, rdm": libfabric("rdm", "verbs;ofi_rxm"),
    "qperf": qperf("rc_bw"),
    "uDAPL": dapl(
        "client SR 1024 2 server SR 1024 2 client RW 4096 server RR 8192 client SR 256 server SR 256"
    ),
    "fio, writes": fio("write"),
    "fio, reads": fio("read"),
}
