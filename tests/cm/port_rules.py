# SPDX-License-Identifier: BSD-3-Clause
"""Which ports two ids of rdma_cm can have beside each other: the kernel's rules, for its device and ours."""

from __future__ import annotations

V4, V6 = "the IPv4 address", "the IPv6 address"
ANY, ANY6 = "0.0.0.0", "::"

# What the first process has, what the second one gets when it binds an id with these options to that.
RULES = [
    ("tcp", V4, "", "tcp", V4, "", "EADDRINUSE"),
    ("tcp", V4, "", "udp", V4, "", "0"),
    ("udp", ANY, "", "udp", V4, "", "EADDRNOTAVAIL"),
    ("tcp", V4, "", "tcp", ANY, "", "EADDRNOTAVAIL"),
    ("tcp", ANY, "", "tcp", ANY, "", "EADDRNOTAVAIL"),
    ("tcp", ANY, "", "tcp", ANY6, "", "EADDRNOTAVAIL"),
    ("tcp", ANY, "", "tcp", ANY6, "only", "0"),
    ("tcp", ANY, "", "tcp", V6, "", "EADDRNOTAVAIL"),
    ("tcp", V4, "", "tcp", V6, "", "0"),
    ("tcp", V6, "", "tcp", ANY6, "only", "EADDRNOTAVAIL"),
    ("tcp", ANY, "reuse", "tcp", ANY, "", "EADDRNOTAVAIL"),
    ("tcp", ANY, "", "tcp", ANY, "reuse", "EADDRNOTAVAIL"),
    ("tcp", ANY, "reuse", "tcp", ANY, "reuse", "0"),
    ("tcp", V4, "reuse", "tcp", V4, "reuse", "0"),
]
