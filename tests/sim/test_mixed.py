# SPDX-License-Identifier: BSD-3-Clause
"""RC, UC and UD QPs of the same processes at once, under loss and moves: each keeps its own promise."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from .pair import Node, Pair
from .records import MS, US, Caps, Link, Path, Sge, Wr, gid
from .verbs import QpState, QpType, SendFlag, WcStatus, WrOpcode
from .world import Qp

QKEY = 0x77
GROUP = gid("239.9.9.9")
MESSAGES = 40
MAX = 1000
KINDS = (QpType.RC, QpType.UC, QpType.UD)


@dataclass(slots=True)
class Stream:
    """What one side sends to the other by one QP, and what came."""

    kind: QpType
    number: int
    me: Node
    peer: Node
    qp: Qp
    to: Qp
    sent: list[bytes] = field(default_factory=list)
    into: list[Sge] = field(default_factory=list)
    completed: list[int] = field(default_factory=list)
    arrived: list[int] = field(default_factory=list)

    @property
    def tag(self) -> int:
        return self.number << 16

    def post_recvs(self) -> None:
        for i in range(MESSAGES * 2):
            sge = self.peer.space(MAX + 64)
            self.into.append(sge)
            self.to.post_recv(Wr(1 << 31 | self.tag | i, (sge,)))

    def send(self, rng: random.Random, handles: tuple[int, int]) -> None:
        n = len(self.sent)
        data = n.to_bytes(2, "big") + rng.randbytes(rng.randint(0, MAX - 2))
        self.sent.append(data)
        group = self.kind is QpType.UD and rng.random() < 0.3
        more = {}
        if self.kind is QpType.UD:
            qpn = 0xFFFFFF if group else self.to.num
            more = {"ah": handles[group], "remote_qpn": qpn, "remote_qkey": QKEY}
        wr = Wr(self.tag | n, (self.me.put(data),), WrOpcode.SEND, SendFlag.SIGNALED, **more)
        self.qp.post_send(wr)

    def check(self) -> None:
        """Completions in order and all there; what came is whole, in order, never twice."""
        assert self.completed == list(range(len(self.sent)))
        got = [self.peer.get(self.into[i])[:size] for i, size in enumerate(self.arrived)]
        numbers = [int.from_bytes(data[:2], "big") for data in got]
        assert got == [self.sent[number] for number in numbers]
        assert numbers == sorted(set(numbers))
        if self.kind is QpType.RC:
            assert len(numbers) == len(self.sent)


def streams_of(p: Pair) -> tuple[list[Stream], dict[int, tuple[int, int]]]:
    """QPs of all three services between both nodes, connected, with receives posted."""
    qps: dict[tuple[int, QpType], Qp] = {}
    for i, node in enumerate(p.nodes):
        for kind in KINDS:
            qps[i, kind] = node.engine.qp(node.pd, node.cq, node.cq, Caps(64, 128), False, kind)
    streams = []
    for i, (me, peer) in enumerate((p.nodes, p.nodes[::-1])):
        for k, kind in enumerate(KINDS):
            path = Path(peer.engine.gid, qps[1 - i, kind].num, mtu=256, qkey=QKEY, rq_psn=5, sq_psn=5)
            qps[i, kind].connect(replace(path))
            streams.append(Stream(kind, 3 * i + k, me, peer, qps[i, kind], qps[1 - i, kind]))
        qps[i, QpType.UD].mcast(GROUP)
    for stream in streams:
        stream.post_recvs()
    handles = {
        id(me): (me.engine.ah(me.pd, peer.engine.gid), me.engine.ah(me.pd, GROUP))
        for me, peer in ((p.a, p.b), (p.b, p.a))
    }
    return streams, handles


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_each_service_keeps_its_promise(first: int) -> None:
    """RC: all, in order. UC: whole, in order, at most once. UD: whole, at most once. All sends complete."""
    arrived = dict.fromkeys(KINDS, 0)
    for seed in range(first, first + 10):
        rng = random.Random(seed)
        link = Link(
            jitter=10 * US, loss=rng.choice((0, 10_000, 50_000)), corrupt=rng.choice((0, 10_000)), fair=2,
            reorder=rng.choice((0, 20_000)), reorder_by=50 * US,
        )  # fmt: skip
        with Pair(seed=seed, link=link, arena=1 << 21, cqe=4096, connect=False) as p:
            streams, handles = streams_of(p)
            p.go(rng.choice((0, 3 * MS, 2000 * MS)))
            left = [stream for stream in streams for _ in range(MESSAGES)]
            rng.shuffle(left)
            number = None
            mover = p.a
            while left or number is not None:
                for _ in range(rng.randint(0, 6)):
                    if left:
                        stream = left.pop()
                        stream.send(rng, handles[id(stream.me)])
                if number is not None and rng.random() < 0.4:
                    p.resume(mover, number, clock=rng.getrandbits(40))
                    number = None
                elif number is None and rng.random() < 0.1:
                    mover = rng.choice((p.a, p.b))
                    number = p.stop(mover)
                p.go(rng.choice((10 * US, 100 * US, 2 * MS)))
            p.go(3000 * MS)
            for wc in (*p.a.wcs, *p.b.wcs):
                assert wc.status == WcStatus.SUCCESS, (seed, wc)
                stream = streams[wc.wr_id >> 16 & 0x7FFF]
                if wc.wr_id >> 31:
                    assert wc.wr_id & 0xFFFF == len(stream.arrived)
                    stream.arrived.append(wc.byte_len)
                else:
                    stream.completed.append(wc.wr_id & 0xFFFF)
            for stream in streams:
                assert stream.qp.state() is QpState.RTS
                arrived[stream.kind] += len(stream.arrived)
                if stream.kind is QpType.UD:
                    check_datagrams(streams, stream)
                else:
                    stream.check()
    assert arrived[QpType.RC] == 10 * 2 * MESSAGES
    assert arrived[QpType.UC] > 10 * MESSAGES
    assert arrived[QpType.UD] > 10 * MESSAGES


def check_datagrams(streams: list[Stream], stream: Stream) -> None:
    """A UD QP also hears itself and the other one by the group: each datagram is one that somebody sent."""
    assert stream.completed == list(range(len(stream.sent)))
    sent = {data for other in streams if other.kind is QpType.UD for data in other.sent}
    got = [stream.peer.get(stream.into[i])[40:size] for i, size in enumerate(stream.arrived)]
    assert len(set(got)) == len(got)
    assert set(got) <= sent
