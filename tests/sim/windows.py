# SPDX-License-Identifier: BSD-3-Clause
"""Work requests about memory windows."""

from __future__ import annotations

from .records import Wr
from .verbs import Access, WrOpcode
from .world import Mr, Mw

OPEN = Access.REMOTE_READ | Access.REMOTE_WRITE | Access.REMOTE_ATOMIC


def bind(
    wr_id: int, mw: Mw, mr: Mr, at: int, length: int, *, access: int = OPEN, key: int = 1, flags: int = 2
) -> Wr:  # fmt: skip
    """Bind `mw` to [at, at+length) of `mr`'s remote view under its next (or `key`-th next) key."""
    old = mw.rkey
    new = old & ~0xFF | (old + key) & 0xFF
    return Wr(
        wr_id, (), WrOpcode.BIND_MW, flags, remote_addr=at, rkey=new, compare_add=length,
        mw_rkey=old, mr_lkey=mr.lkey, mw_access=access,
    )  # fmt: skip


def invalidate(wr_id: int, rkey: int, flags: int = 2) -> Wr:
    """Close a type 2 window."""
    return Wr(wr_id, (), WrOpcode.LOCAL_INV, flags, imm=rkey)
