# SPDX-License-Identifier: BSD-3-Clause
"""Every packet that programs make us send, captured and judged from outside (tests/wire/wire_annex.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from verbs_pair import ADDRESSES
from verbs_programs import sanitized

from migroce import paths
from migroce.agent import netns
from migroce.wire import OPINFO, Op

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "wire"), str(TESTS / "cm")]
from cm_programs import CmPair, Preload, command  # noqa: E402
from wire_annex import Seen, Tap, faults, icrc, roce, tshark_complaints  # noqa: E402
from wire_pcap import CAPTURES, frames  # noqa: E402

pytestmark = pytest.mark.skipif(
    sanitized(), reason="test_programs.py runs them sanitized; that changes no byte that is sent"
)
PORT = 18515
XRC = 0xA0
# Command, service, the opcodes that must be among the packets (the low five bits; IBA table 38), IP version.
# Odd sizes: padding. Few packets: they wait in the socket's buffer until the programs have ended.
PROGRAMS = (
    ("ib_send_bw -n 20 -s 9001 -b -m 4096", "RC", {0, 1, 2, 17}, 4),
    ("ib_send_bw -n 40 -s 1 -I 8", "RC", {4, 17}, 4),
    ("ib_write_bw -n 20 -s 9002 -b -m 4096", "RC", {6, 7, 8, 17}, 4),
    ("ib_write_lat -n 20 -s 3", "RC", {10, 17}, 4),
    ("ib_read_bw -n 20 -s 9003 -m 4096", "RC", {12, 13, 14, 15}, 4),
    ("ib_read_lat -n 20 -s 5", "RC", {12, 16}, 4),
    ("ib_atomic_bw -n 20", "RC", {18, 20}, 4),
    ("ib_atomic_bw -n 20 -A CMP_AND_SWAP", "RC", {18, 19}, 4),
    ("ib_send_bw -n 20 -c UC -s 9001 -m 4096", "UC", {0, 1, 2}, 4),
    ("ib_write_bw -n 20 -c UC -s 9001 -m 4096", "UC", {6, 7, 8}, 4),
    ("ibv_uc_pingpong -g 1 -n 20 -s 30", "UC", {4}, 4),
    ("ib_send_bw -n 40 -c UD -s 1001 -b", "UD", {4}, 4),
    ("ib_send_bw -n 20 -c XRC -q 2 -s 9001 -m 4096", "XRC", {0, 1, 2, 17}, 4),
    ("ib_read_bw -n 20 -c XRC -q 2 -s 9001 -m 4096", "XRC", {12, 13, 14, 15}, 4),
    ("ibv_rc_pingpong -g 0 -n 20 -s 9001", "RC", {0, 2, 17}, 6),
    ("ibv_uc_pingpong -g 0 -n 20 -s 9001", "UC", {0, 2}, 6),
    ("ibv_ud_pingpong -g 0 -n 20 -s 1001", "UD", {4}, 6),
    ("ib_read_bw -n 20 -s 9003 -x 0 -m 4096", "RC", {12, 13, 14, 15}, 6),
)
CM_PSN = {0x0010: 44, 0x0013: 20}
"""Attribute id of REQ and REP -> where in its data the starting PSN is (IBA tables 107 and 110)."""
LAST_REQUEST = 0x0C
"""The RC opcodes up to READ are requests (none of rping's is an atomic)."""
SIX = "fd99::1"
OPCHECK = paths.library().parent.parent / "tests" / "workload" / "opcheck"
OPCHECK_PORT = 7475
OPCODES = {int(op) for op in OPINFO} - {
    # No XRC target has a window of type 2, which alone may be invalidated; Resume is of moves (tests/e2e).
    *(XRC | op for op in (Op.SEND_LAST_INV, Op.SEND_ONLY_INV)), Op.RESUME, Op.RESUME_ACK,
}  # fmt: skip
ON_CM = (
    (f"rping -s -a {ADDRESSES[0]} -C 3", f"rping -c -a {ADDRESSES[0]} -C 3", 4),
    (f"rping -s -a {SIX} -C 3", f"rping -c -a {SIX} -C 3", 6),
    ("udaddy", f"udaddy -s {ADDRESSES[0]}", 4),
)


@pytest.fixture(scope="module")
def pair(preload: Preload) -> Iterator[CmPair]:
    """Two namespaces; trains (UDP segmentation) are cut before the cable, as before a real network's."""
    if os.geteuid() != 0:
        pytest.skip("needs root for network namespaces")
    made = CmPair.up(preload)
    assert isinstance(made, CmPair)
    try:
        for name in made.names():
            inside = ["nsenter", f"--net=/run/netns/{name}"]
            argv = [*inside, "ethtool", "-K", "veth", "tx-udp-segmentation", "off"]
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        yield made
    finally:
        made.down()


@pytest.fixture
def tap(pair: CmPair) -> Iterator[Tap]:
    """The server's interface: what it sends and what it gets."""
    fd = netns.open_path(f"/run/netns/{pair.names()[0]}")
    try:
        opened = netns.run_in(fd, lambda: Tap("veth"))
    finally:
        os.close(fd)
    yield opened
    opened.close()


def _judge(packets: list[Seen], family: int, directory: Path) -> None:
    """Both ends have sent, and nothing can be said against any packet."""
    assert {packet.outgoing for packet in packets} == {True, False}
    assert {packet.family for packet in packets} == {family}
    hop_limits = {packet.frame[14 + (8 if family == 4 else 7)] for packet in packets}
    assert hop_limits == {64}, "the route's, as with the kernel's drivers, whatever the program asks for"
    assert [fault for packet in packets for fault in faults(packet)] == []
    if shutil.which("tshark"):
        assert tshark_complaints(directory / "seen.pcap", packets) == []


@pytest.mark.root
@pytest.mark.parametrize(("line", "service", "opcodes", "family"), PROGRAMS, ids=[row[0] for row in PROGRAMS])
def test_every_packet_of_a_service_is_well_formed_and_has_the_right_icrc(
    pair: CmPair, tap: Tap, line: str, service: str, opcodes: set[int], family: int, tmp_path: Path
) -> None:
    outcome = pair.run([*command(line), "-d", "rxe0"], port=PORT)
    if outcome.had_no_clock:
        outcome = pair.run([*command(line), "-d", "rxe0"], port=PORT)
    outcome.check()
    packets = tap.take()
    _judge(packets, family, tmp_path)
    of_service = [packet for packet in packets if packet.service == service]
    assert opcodes <= {packet.bth[0] & 0x1F for packet in of_service}


@pytest.mark.root
@pytest.mark.parametrize(("server", "client", "family"), ON_CM, ids=["rping", "rping, IPv6", "udaddy"])
def test_every_packet_of_the_connection_manager_is_well_formed_and_has_the_right_icrc(
    pair: CmPair, tap: Tap, server: str, client: str, family: int, tmp_path: Path
) -> None:
    pair.both(server, client).check()
    packets = tap.take()
    _judge(packets, family, tmp_path)
    mads = [packet for packet in packets if packet.service == "UD" and packet.bth[5:8] == b"\0\0\1"]
    assert {packet.outgoing for packet in mads} == {True, False}
    assert {len(packet.bth) for packet in mads} == {12 + 8 + 256}


def test_each_end_begins_with_the_psn_that_the_others_message_asks_for(pair: CmPair, tap: Tap) -> None:
    """IBA 12.7.31: the PSN at which the recipient of the message begins to send. rdma_rxe insists on it."""
    server, client, _ = ON_CM[0]
    pair.both(server, client).check()
    packets = tap.take()
    asked, began = {}, {}
    for packet in packets:
        bth = packet.bth
        if packet.service == "UD" and (message := CM_PSN.get(int.from_bytes(bth[36:38], "big"))):
            asked[not packet.outgoing] = bth[44 + message : 44 + message + 3]
        if packet.service == "RC" and bth[0] <= LAST_REQUEST:
            began.setdefault(packet.outgoing, bth[9:12])
    assert len(asked) == 2
    assert began == asked


@pytest.mark.root
def test_every_opcode_there_is_is_among_the_packets_that_are_judged(
    pair: CmPair, tap: Tap, tmp_path: Path
) -> None:
    """Each operation of RC, XRC, UC and UD in one packet and in three, both ways; opcheck.c checks."""
    pair.run([str(OPCHECK)], port=OPCHECK_PORT).check()
    packets = tap.take()
    _judge(packets, 4, tmp_path)
    for outgoing in (True, False):
        assert {packet.bth[0] for packet in packets if packet.outgoing == outgoing} == OPCODES


def _captured() -> list[Seen]:
    """What the kernel's driver sent (tests/data/rxe-pcaps)."""
    every = (frame for path in sorted(CAPTURES.glob("*.pcap")) for frame in frames(path))
    return [packet for frame in every if (packet := roce(frame))]


def test_the_judge_finds_the_icrcs_of_the_kernels_driver_right() -> None:
    seen = _captured()
    assert {packet.family for packet in seen} == {4, 6}
    assert {packet.service for packet in seen} >= {"RC", "UC", "UD"}
    assert [packet for packet in seen if packet.icrc != icrc(packet)] == []


@pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is not installed")
def test_tshark_finds_a_packet_whose_header_is_cut_off(tmp_path: Path) -> None:
    whole = next(packet for packet in _captured() if packet.family == 4 and packet.bth[0] == LAST_REQUEST)
    cut = bytearray(whole.frame[: whole.udp + 8 + 12 + 4])  # the RETH is missing
    cut[16:18] = (len(cut) - 14).to_bytes(2, "big")
    cut[38:40] = (len(cut) - 34).to_bytes(2, "big")
    packet = roce(bytes(cut))
    assert packet is not None
    assert len(tshark_complaints(tmp_path / "cut.pcap", [whole, packet])) == 1


@pytest.mark.parametrize("family", [4, 6])
def test_the_judge_finds_every_damaged_bit_that_the_icrc_covers(family: int) -> None:
    packet = next(each for each in _captured() if each.family == family and len(each.bth) > 12)
    head = 14
    # what may change on the way, and what says where things are
    variant = {1, 8, 10, 11} if family == 4 else {0, 1, 2, 3, 7}
    lengths = {0, 2, 3, 9} if family == 4 else {4, 5, 6}
    udp = packet.udp - head
    not_seen = variant | lengths | {udp + 2, udp + 3, udp + 6, udp + 7, udp + 12}
    for at in range(packet.end - head):
        for bit in range(8):
            damaged = bytearray(packet.frame)
            damaged[head + at] ^= 1 << bit
            found = roce(bytes(damaged))
            if at not in not_seen:
                assert found is not None
                assert found.icrc != icrc(found), (at, bit)
