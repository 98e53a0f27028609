# SPDX-License-Identifier: BSD-3-Clause
"""Unmodified programs of perftest and ibverbs-utils, between two namespaces and alone."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from verbs_pair import FURTHER, Outcome, Pair
from verbs_programs import Preload

PERFTEST_PORT = 18515
PINGPONG_PORT = 18515

MTUS = (256, 512, 1024, 2048)

# One line per property of a program's traffic that something once could get wrong.
PERFTEST = (
    "ib_send_bw -n 500",
    "ib_send_bw -n 500 -b",
    "ib_send_bw -n 500 -e",
    "ib_send_bw -n 500 -b -e",
    "ib_send_bw -n 500 --use_old_post_send",
    "ib_send_bw -n 2000 -s 8 -I 8",
    "ib_send_bw -n 500 -q 8",
    "ib_send_bw -n 500 -q 8 -b",
    "ib_send_bw -n 1024 -s 256 -l 32",
    "ib_send_bw -n 1000 -Q 100",
    "ib_send_bw -n 1000 -Q 1 -t 4 -r 8",
    "ib_send_bw -n 50 -s 1000001",
    "ib_send_bw -n 20 -s 8388608",
    "ib_send_bw -n 500 --use-srq -q 4",
    "ib_send_bw -n 500 --use-srq -q 4 -b -e",
    "ib_send_lat -n 300 --use-srq",
    *(f"ib_{op} -n 300 -c XRC -q 2" for op in ("send_bw", "send_bw -b -e", "write_bw", "read_bw")),
    *(f"ib_{op} -n 100 -c XRC" for op in ("send_lat", "write_lat", "read_lat")),
    "ib_send_bw -n 300 -c XRC -q 2 --use_old_post_send",
    "ib_write_bw -n 500",
    "ib_write_bw -n 500 -b",
    "ib_write_bw -n 500 -b -q 8",
    "ib_write_bw -n 50 -s 1000001",
    "ib_write_bw -n 1024 -s 64 -l 16 -I 64",
    "ib_write_bw -n 500 --write_with_imm",
    "ib_read_bw -n 500",
    "ib_read_bw -n 500 -b -e -q 4",
    "ib_read_bw -n 50 -s 1000001",
    "ib_read_bw -n 500 -o 1",
    "ib_send_lat -n 500",
    "ib_send_lat -n 200 -e",
    "ib_send_lat -n 50 -s 1000001",
    "ib_send_lat -n 500 -s 2 -I 0",
    # Both ends spin on memory: on a crowded CPU each turn takes a time slice.
    "ib_write_lat -n 100",
    "ib_write_lat -n 50 -s 1000001",
    "ib_read_lat -n 500",
    "ib_read_lat -n 200 -e",
    "ib_read_lat -n 50 -s 1000001",
    "ib_atomic_bw -n 500",
    "ib_atomic_bw -n 500 -A CMP_AND_SWAP",
    "ib_atomic_bw -n 500 -b -q 4",
    "ib_atomic_bw -n 500 -e -o 1",
    "ib_atomic_bw -n 500 --use_old_post_send",
    "ib_atomic_lat -n 500",
    "ib_atomic_lat -n 200 -e -A CMP_AND_SWAP",
    *(f"ib_send_{op} -n 500 -c {service} -s 1000" for op in ("bw", "lat") for service in ("UC", "UD")),
    # UC and UD lose what finds no receive posted: no more messages than perftest posts receives (512,
    # an SRQ's shared by all QPs).
    "ib_send_bw -n 512 -c UD -q 4 -s 64 -l 16",
    "ib_send_bw -n 500 -c UD -s 1024 -e --use_old_post_send",
    "ib_send_bw -n 500 -c UD -s 4096 -b",
    "ib_send_bw -n 500 -c UC -s 4096 -b -q 2",
    "ib_send_bw -n 500 -c UC -s 300 --use-srq",
    "ib_send_bw -n 500 -c UD -s 300 --use-srq",
    "ib_send_lat -n 200 -c UD -e -s 32 -I 64",
    "ib_send_bw -n 500 -c UD -s 1000 -g -M 0:0:0:0:0:0:0:0:0:0:255:255:239:1:1:1",
    "ib_send_lat -n 200 -c UD -s 100 -g -x 0 -M 255:14:0:0:0:0:0:0:0:0:0:0:0:0:1:1",
    "ib_write_bw -n 500 -c UC",
    "ib_write_bw -n 100 -c UC -b -q 4 -s 100001",
    "ib_write_lat -n 100 -c UC",
    "ib_write_lat -n 50 -c UC -s 100001",
    *(f"ib_{op}_bw -n 300 -s 10000 -m {mtu}" for op in ("send", "write", "read") for mtu in MTUS),
)
PINGPONG = (
    "ibv_rc_pingpong -g 1 -n 500",
    "ibv_rc_pingpong -g 1 -n 300 -e",
    "ibv_rc_pingpong -g 1 -n 300 -e -s 100000",
    "ibv_rc_pingpong -g 1 -n 500 --new_send",
    "ibv_rc_pingpong -g 1 -n 100 -m 4096 -s 1000000",
    "ibv_rc_pingpong -g 1 -n 500 -c",
    "ibv_rc_pingpong -g 1 -n 300 -t",
    "ibv_uc_pingpong -g 1 -n 500",
    "ibv_uc_pingpong -g 1 -n 200 -e -s 20000 -m 1024",
    "ibv_uc_pingpong -g 1 -n 200 -c -s 9000",
    "ibv_uc_pingpong -g 0 -n 200",
    "ibv_ud_pingpong -g 1 -n 500",
    "ibv_ud_pingpong -g 1 -n 200 -e -s 1000",
    "ibv_ud_pingpong -g 1 -n 200 -c",
    "ibv_ud_pingpong -g 0 -n 200",
    "ibv_rc_pingpong -g 0 -n 200",
    *(f"ibv_{service}_pingpong -g 2 -n 200" for service in ("rc", "uc", "ud")),
    "ibv_srq_pingpong -g 1 -n 200",
    "ibv_srq_pingpong -g 1 -n 200 -q 64 -r 500 -e",
    "ibv_srq_pingpong -g 1 -n 100 -c -s 20000",
    "ibv_xsrq_pingpong -g 1 -n 200",
    "ibv_xsrq_pingpong -g 1 -n 200 -e",
)


def _command(line: str) -> list[str]:
    program, *rest = line.split()
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")
    return [path, "-d", "rxe0", *rest]


# Every size: perftest measures the processor's clock for half a second at each of the 23.
ALL_SIZES = [
    pytest.param(f"ib_{op}_{kind} -a -n 10", marks=pytest.mark.slow)
    for op in ("send", "write", "read")
    for kind in ("bw", "lat")
]


def _perftest(pair: Pair, line: str) -> Outcome:
    """Run to its end; again if it could not measure the clock."""
    for _ in range(3):
        outcome = pair.run(_command(line), port=PERFTEST_PORT, timeout=250 if " -a " in line else 100)
        if not outcome.had_no_clock:
            break
    outcome.check()
    return outcome


@pytest.mark.parametrize("line", [*PERFTEST, *ALL_SIZES])
def test_perftest_completes(pair: Pair, line: str) -> None:
    command = _command(line)
    if "--write_with_imm" in command and "write_with_imm" not in _help(command[0]):
        pytest.skip("this perftest has no --write_with_imm")
    _perftest(pair, line)


def _help(program: str) -> str:
    return subprocess.run([program, "--help"], capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("line", PINGPONG)
def test_pingpong_completes(pair: Pair, line: str) -> None:
    pair.run(_command(line), port=PINGPONG_PORT).check()


FURTHER_PINGPONG = tuple(f"ibv_{kind}_pingpong -g 2 -n 200" for kind in ("rc", "uc", "ud", "srq", "xsrq"))


@pytest.mark.parametrize("line", FURTHER_PINGPONG)
def test_a_further_address_is_pinged_from_and_to(pair: Pair, line: str) -> None:
    outcome = replace(pair, by_interface=True).run(_command(line), port=PINGPONG_PORT)
    outcome.check()
    for run, own in zip((outcome.server, outcome.client), FURTHER, strict=True):
        assert re.search(rf"local(?: address)?: .*GID ::ffff:{own}$", run.stdout, re.MULTILINE)


@pytest.mark.parametrize("line", [
    "ib_send_bw -n 500 -b -q 4 -x 2",
    "ib_write_bw -n 500 -s 100001 -x 2",
    "ib_read_bw -n 500 -x 2",
    "ib_atomic_lat -n 200 -e -x 2",
    "ib_send_lat -n 200 -c UD -x 2",
    "ib_send_bw -n 500 -c UC -s 1000 -x 2",
])  # fmt: skip
def test_perftest_completes_between_further_addresses(pair: Pair, line: str) -> None:
    outcome = _perftest(replace(pair, by_interface=True), line)
    for run, own in zip((outcome.server, outcome.client), FURTHER, strict=True):
        gid = ":".join(f"{int(byte):02d}" for byte in own.split("."))
        assert re.search(rf"^ GID: .*:255:255:{gid}\s*$", run.stdout, re.MULTILINE)


def test_a_group_hears_what_is_sent_from_a_further_address(pair: Pair) -> None:
    group = "0:0:0:0:0:0:0:0:0:0:255:255:239:1:1:1"
    line = f"ib_send_bw -n 500 -c UD -s 1000 -g -x 2 -M {group}"
    _perftest(replace(pair, by_interface=True), line)


def test_pingpong_validates_what_arrives(pair: Pair) -> None:
    """-c makes ibv_rc_pingpong fill and check each buffer; a wrong byte is said, not counted."""
    outcome = pair.run(_command("ibv_rc_pingpong -g 1 -n 200 -s 70000 -c"), port=PINGPONG_PORT)
    outcome.check()
    assert "invalid data" not in outcome.server.stdout + outcome.client.stdout


def test_ibv_devices_lists_the_device(preload: Preload) -> None:
    done = preload.alone(Path(_command("ibv_devices")[0]))
    assert done.returncode == 0
    assert re.search(r"^\s+rxe0\s+[0-9a-f]{16}$", done.stdout, re.MULTILINE)


def test_ibv_devinfo_tells_everything(preload: Preload) -> None:
    done = preload.alone(Path(_command("ibv_devinfo")[0]), "-v")
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "hca_id:\trxe0", "transport:\t\t\tInfiniBand (0)", "state:\t\t\tPORT_ACTIVE (4)",
        "link_layer:\t\tEthernet", "phys_state:\t\tLINK_UP (5)", "max_mtu:\t\t4096 (5)",
    ):  # fmt: skip
        assert line in done.stdout
    assert re.search(r"GID\[ +1\]:\s+::ffff:127\.0\.0\.1, RoCE v2", done.stdout)


def test_ibv_asyncwatch_waits_for_events(preload: Preload) -> None:
    with subprocess.Popen(
        _command("ibv_asyncwatch"), env=preload.environment("127.0.0.1"), stdout=subprocess.PIPE, text=True
    ) as watch:
        try:
            assert watch.stdout is not None
            assert re.fullmatch(r"rxe0: async event FD \d+\n", watch.stdout.readline())
            assert watch.poll() is None
        finally:
            watch.kill()
