# SPDX-License-Identifier: BSD-3-Clause
"""Who has nothing to ask is told that its peer stops: docs/protocol.md, 4."""

from __future__ import annotations

import pytest

from migroce import dump as dumps

from .pair import Pair
from .records import MS, US, Action, S
from .verbs import WcStatus


def _nak_stopped(w: Pair, psn: int) -> bytes:
    """A NAK stopped for a, as b's stand-in sends it (without its ICRC)."""
    bth = bytes((17, 0x40, 0xFF, 0xFF, 1)) + w.a.qp.num.to_bytes(3, "big") + psn.to_bytes(4, "big")
    return bth + bytes((0x7F, 0, 0, 0))


@pytest.mark.parametrize("comes_back", [True, False])
@pytest.mark.parametrize("acked", [True, False], ids=["nothing in flight", "an acknowledgement lost"])
def test_a_silent_qp_is_told_unasked_and_waits(comes_back: bool, acked: bool) -> None:
    """The network is gone before it says its next word."""
    with Pair(timeout=8, retry_cnt=1) as w:
        w.settle()
        into = [w.b.recv(n, 16) for n in (1, 2)]
        if not acked:
            w.rule(Action.DROP, 17, src=1, count=1)
        w.a.send(1, b"before")
        w.go(100 * US)
        number = w.stop(w.b)
        w.go(100 * US)
        w.standins.off(number)
        assert w.a.done() == ([(1, 0)] if acked else [])
        assert w.a.dump().mstate == dumps.MSTATES.index("paused")
        w.a.send(2, b"after")
        w.go(50 * S)
        assert len(w.a.wcs) <= acked
        if comes_back:
            w.resume(w.b, number)
            w.go(1 * S)
            assert w.a.done()[-1] == (2, 0)
            assert [w.b.get(each)[:5] for each in into] == [b"befor", b"after"]
        else:
            w.go(100 * S)
            assert w.a.done()[-1][1] in (WcStatus.RETRY_EXC_ERR, WcStatus.WR_FLUSH_ERR)


def test_an_announcement_that_comes_late_delays_nothing_for_long() -> None:
    """It is repeated, and may be overtaken by the container's return."""
    with Pair(timeout=8, retry_cnt=1) as w:
        w.settle()
        w.a.send(1, b"x")
        w.b.recvs(2, 16)
        w.go(10 * MS)
        w.inject(w.b.engine.gid, w.a.engine.gid, _nak_stopped(w, w.a.dump().next_psn))
        w.go(20 * US)
        assert w.a.dump().mstate == dumps.MSTATES.index("paused")
        w.a.send(2, b"y")
        w.go(40 * MS)
        assert w.a.done() == [(1, 0), (2, 0)]
        assert w.a.dump().mstate == dumps.MSTATES.index("normal")
