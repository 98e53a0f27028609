# SPDX-License-Identifier: BSD-3-Clause
"""The IPv4 addresses of network interfaces, as the kernel lists them to the calling thread's namespace."""

from __future__ import annotations

import fcntl
import socket
import struct
from ctypes import addressof, create_string_buffer

_SIOCGIFCONF = 0x8912
_IFREQ = struct.Struct("16sHH4s16x")
_ROOM = 1024
"""Entries asked for: more addresses than that are not seen."""


def listed() -> list[tuple[str, bytes]]:
    """Interface and address (4 bytes) of all IPv4 ones, an interface's in the kernel's order. OSError."""
    room = create_string_buffer(_ROOM * _IFREQ.size)
    request = struct.pack("iP", len(room), addressof(room))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        (length,) = struct.unpack_from("i", fcntl.ioctl(sock, _SIOCGIFCONF, request))
    found = []
    for name, family, _port, address in _IFREQ.iter_unpack(room.raw[:length]):
        if family == socket.AF_INET:  # an address may have a label of its own: eth0:1
            found.append((name.split(b"\0", 1)[0].decode().partition(":")[0], address))
    return found
