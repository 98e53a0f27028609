# SPDX-License-Identifier: BSD-3-Clause
"""Packets that are damaged on their way, between the kernel's driver and ours.

Each is a packet of a real connection with some bytes overwritten and its ICRC left as it was; mgcheck
compares every byte at both ends, so that a damaged one that is taken shows.
"""

from __future__ import annotations

import pytest
from tests.interop import net
from tests.interop.ends import End
from tests.interop.matrix import Row

# What is overwritten: (first bit from the UDP header on, bits, value). The BTH begins at bit 64 (IBA 9.2).
COVERED = {
    "opcode": (64, 8, 0x0A),
    "P_Key": (80, 16, 0x1234),
    "destination QP": (104, 24, 0x000001),
    "PSN": (136, 24, 0x000000),
    "header or data": (192, 16, 0x5AA5),
    "UDP length": (32, 16, 0x0010),
}
"""Fields that the ICRC covers, or that say where it is: the packet is to be dropped."""
RESERVED = (96, 8, 0x3F)
"""resv6: not covered by the ICRC (annex A17.3.3), and ignored by a receiver (IBA 9.2)."""


@pytest.mark.timeout(150)
@pytest.mark.parametrize("field", COVERED)
def test_no_damaged_packet_is_taken(field: str, direction: tuple[End, End]) -> None:
    row = Row("damage", "mgcheck --no-fence --stall 60 --messages 60 --max-size 65536", seconds=90)
    with net.damage(*COVERED[field], every=37):
        outcome = row.run(*direction)
    assert outcome.good, outcome


@pytest.mark.timeout(150)
def test_reserved_bits_are_ignored(direction: tuple[End, End]) -> None:
    row = Row("damage", "mgcheck --no-fence --stall 60 --messages 60 --max-size 65536", seconds=90)
    with net.damage(*RESERVED, every=1):
        outcome = row.run(*direction)
    assert outcome.good, outcome
