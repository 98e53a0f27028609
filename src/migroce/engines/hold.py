# SPDX-License-Identifier: BSD-3-Clause
"""The smallest program that does nothing: it holds a network of Docker's on a node before anybody needs it.

An overlay network comes to a node with the first container on it (a namespace, a bridge, a VXLAN interface, a
load balancer: half a second) and goes with the last. A container that moves there would wait for that while
it stands still.
"""

from __future__ import annotations

import platform
import struct
from pathlib import Path

_BASE = 0x400000
_HEADER, _SEGMENT = 64, 56
# for (;;) pause();  aarch64 has no pause: ppoll(NULL, 0, NULL, NULL, 0)
_CODE = {
    "x86_64": (62, "b822000000 0f05 ebf7"),
    "aarch64": (183, "000080d2 010080d2 020080d2 030080d2 040080d2 280980d2 010000d4 f9ffff17"),
}


def program(machine: str = "") -> bytes | None:
    """The ELF file for `machine` (default: this one), None for one that is not known."""
    known = _CODE.get(machine or platform.machine())
    if known is None:
        return None
    number, code = known[0], bytes.fromhex(known[1])
    start = _HEADER + _SEGMENT
    size = start + len(code)
    elf = b"\x7fELF\2\1\1" + bytes(9)
    sizes = (_HEADER, _SEGMENT, 1, 0, 0, 0)
    elf += struct.pack("<HHIQQQIHHHHHH", 2, number, 1, _BASE + start, _HEADER, 0, 0, *sizes)
    elf += struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return elf + code


def write(path: Path) -> bool:
    """Write the program for this machine to `path`; False if there is none. Raises OSError."""
    data = program()
    if data is None:
        return False
    path.write_bytes(data)
    path.chmod(0o755)
    return True
