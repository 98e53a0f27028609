# SPDX-License-Identifier: BSD-3-Clause
"""Windows as programs use them: opened for one peer, used, given back, while packets get lost and ends move.

In each round b binds a window over fresh memory and sends its key; a writes and reads through it and gives
it back by a SEND with invalidate. Nobody may see an error, and a key that was given back opens nothing.
"""

from __future__ import annotations

import random

import pytest

from .pair import Node, Pair
from .records import MS, US, Link, S
from .verbs import SendFlag, WcFlag, WrOpcode
from .windows import bind

ROUNDS = 12
LINK = Link(loss=60_000, dup=30_000, reorder=30_000, corrupt=10_000, fair=2)


def _wait(w: Pair, rng: random.Random, node: Node, wr_id: int) -> None:
    """Until `node` has a completion of `wr_id`; now and then an end is moved, perhaps to another address."""
    for _ in range(400):
        if any(wc.wr_id == wr_id for wc in node.wcs):
            return
        w.go(rng.randint(100 * US, 2 * MS))
        if rng.random() < 0.2:
            moved = rng.choice(w.nodes)
            if not moved.engine.stop_ready():
                continue
            number = w.stop(moved)
            w.go(rng.randint(1, 40) * MS)
            address = f"10.{rng.randrange(1, 200)}.{rng.randrange(256)}.7" if rng.random() < 0.5 else None
            w.resume(moved, number, address, rng.randrange(1 << 50))
    raise AssertionError(f"no completion of {wr_id}: {[n.done() for n in w.nodes]}")


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_windows_are_lent_and_given_back_through_loss_and_moves(seed: int, kind: int) -> None:
    rng = random.Random(seed)
    with Pair(link=LINK, seed=seed, timeout=12) as w:
        w.settle(3 * S)
        mw = w.b.engine.mw(w.b.pd, kind)
        for n in range(ROUNDS):
            size = rng.choice((1, 100, 1024, 5000))
            at = w.b.put(bytes([n]) * size)
            w.a.recv(1000 + n, 8)
            wr = bind(2000 + n, mw, w.b.mr, at.addr, size)
            w.b.qp.post_send(wr)
            w.b.send(3000 + n, wr.rkey.to_bytes(4, "big"))
            _wait(w, rng, w.a, 1000 + n)
            key = wr.rkey
            into = w.a.space(size)
            w.a.post(4000 + n, WrOpcode.RDMA_READ, [into], remote_addr=at.addr, rkey=key)
            flags = SendFlag.SIGNALED | SendFlag.FENCE
            data = w.a.put(bytes([0x80 | n]) * size)
            w.a.post(5000 + n, WrOpcode.RDMA_WRITE, [data], remote_addr=at.addr, rkey=key, flags=flags)
            w.b.recv(6000 + n, 8)
            if kind == 2:
                w.a.post(7000 + n, WrOpcode.SEND_WITH_INV, [w.a.put(b"back")], imm=key)
            else:
                w.a.send(7000 + n, b"back")
            _wait(w, rng, w.b, 6000 + n)
            _wait(w, rng, w.a, 7000 + n)
            assert w.a.get(into) == bytes([n]) * size
            assert w.b.get(at) == bytes([0x80 | n]) * size
            (wc,) = [x for x in w.b.wcs if x.wr_id == 6000 + n]
            assert (wc.flags == WcFlag.WITH_INV and wc.imm == key) == (kind == 2)
        assert all(status == 0 for node in w.nodes for _, status in node.done())
        ids = [i for node in w.nodes for i, _ in node.done()]
        assert len(ids) == len(set(ids)) == 7 * ROUNDS
        assert any(n.dump().epoch for n in w.nodes), "nobody was moved"
        if kind == 2:
            w.b.mr.free()  # nothing is bound to it any more
