# SPDX-License-Identifier: BSD-3-Clause
"""Every packet between rdma_rxe and us, captured at its machine and judged from outside (tests/wire)."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
from tests.interop.ends import V4, V6, End
from tests.interop.guest import TAP
from tests.interop.matrix import CmRow, Row

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "wire"))
from wire_annex import Tap, faults, tshark_complaints

CHECK = "mgcheck --no-fence --stall 60 --max-size 20000 --messages"
# Odd sizes: padding. Few packets: they wait in the socket's buffer until the programs have ended.
ROWS: tuple[Row | CmRow, ...] = (
    Row("wire", f"{CHECK} 40"),
    Row("wire", f"{CHECK} 40", V6),
    Row("wire", f"{CHECK} 40", received=23, sent=19, seconds=90),
    Row("wire", f"{CHECK} 60 --rnr-every 10"),
    Row("wire", "ib_atomic_bw -n 20"),
    Row("wire", "ib_atomic_bw -n 20 -A CMP_AND_SWAP"),
    Row("wire", "ib_write_bw -n 20 -c UC -s 9001 -m 4096"),
    Row("wire", "ib_send_bw -n 20 -c UC -s 9001 -m 4096"),
    Row("wire", "ibv_uc_pingpong -n 20 -s 9001", V6),
    Row("wire", "ib_send_bw -n 40 -c UD -s 1001"),
    Row("wire", "ibv_ud_pingpong -n 20 -s 1001", V6),
    CmRow("rping -s -a {} -C 5 -v", "rping -c -a {} -C 5 -v"),
    CmRow("rping -s -a {} -C 5 -v", "rping -c -a {} -C 5 -v", V6),
    CmRow("udaddy -b {}", "udaddy -s {}"),
)  # fmt: skip


@pytest.mark.timeout(150)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.id} IPv{row.family}")
def test_nothing_can_be_said_against_any_packet(
    row: Row | CmRow, direction: tuple[End, End], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIGROCE_NO_GSO", "1")  # trains are cut only behind where we look
    with contextlib.closing(Tap(TAP)) as tap:
        outcome = row.run(*direction)
        assert outcome.good, str(outcome)
        packets = tap.take()
    assert {packet.family for packet in packets} == {row.family}
    assert [fault for packet in packets for fault in faults(packet, capable=int(packet.outgoing))] == []
    # rdma_rxe's UDP checksum over IPv6 is 0, which tshark does not like
    told = [packet for packet in packets if packet.outgoing or packet.family == V4]
    assert tshark_complaints(tmp_path / "seen.pcap", told) == []
