# SPDX-License-Identifier: BSD-3-Clause
"""Two (or more) connected engines for directed tests: a few lines for each situation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from migroce import dump as dumps

from .records import MS, Caps, CqMode, Link, Path, Reason, S, Sge, Wc, Wr, gid
from .standins import StandIns
from .verbs import ALL_ACCESS, Access, QpState, QpType, SendFlag, WrOpcode
from .world import Cq, Engine, Mr, Qp, World


@dataclass(slots=True)
class Node:
    """An engine with one PD, one MR over all its memory and one QP (see `Pair.more` for others)."""

    engine: Engine
    pd: int
    cq: Cq
    mr: Mr
    qp: Qp
    path: Path
    used: int = 4096
    wcs: list[Wc] = field(default_factory=list)

    def put(self, data: bytes) -> Sge:
        """Data into fresh memory."""
        sge = self.space(len(data))
        self.engine.memory[sge.addr - self.engine.base :][: len(data)] = data
        return sge

    def space(self, size: int) -> Sge:
        """Fresh zeroed memory."""
        at, self.used = self.used, self.used + size + 64
        return Sge(self.engine.base + at, size, self.mr.lkey)

    def get(self, sge: Sge) -> bytes:
        """What is in some memory of ours."""
        at = sge.addr - self.engine.base
        return bytes(self.engine.memory[at : at + sge.length])

    def remote(self, sge: Sge) -> dict[str, int]:
        """How a peer names it, for Wr."""
        return {"remote_addr": sge.addr, "rkey": self.mr.rkey}

    def send(self, wr_id: int, data: bytes, **more: Any) -> None:
        """A signalled SEND."""
        self.post(wr_id, WrOpcode.SEND, [self.put(data)], **more)

    def write(self, wr_id: int, data: bytes, to: Sge, peer: Node, **more: Any) -> None:
        """A signalled RDMA WRITE."""
        self.post(wr_id, WrOpcode.RDMA_WRITE, [self.put(data)], **(peer.remote(to) | more))

    def read(self, wr_id: int, size: int, source: Sge, peer: Node, **more: Any) -> Sge:
        """A signalled RDMA READ; returns where it goes."""
        to = self.space(size)
        self.post(wr_id, WrOpcode.RDMA_READ, [to], **(peer.remote(source) | more))
        return to

    def post(self, wr_id: int, opcode: WrOpcode, sges: Iterable[Sge], **more: Any) -> None:
        self.qp.post_send(Wr(wr_id, tuple(sges), opcode, **({"flags": SendFlag.SIGNALED} | more)))

    def recv(self, wr_id: int, size: int) -> Sge:
        """Post a receive; returns its memory."""
        sge = self.space(size)
        self.qp.post_recv(Wr(wr_id, (sge,)))
        return sge

    def recvs(self, n: int, size: int) -> list[Sge]:
        return [self.recv(i, size) for i in range(n)]

    def dump(self) -> dumps.QpRecord:
        """Our QP's record in a dump."""
        return next(q for q in dumps.parse(self.engine.dump()).qps if q.qpn == self.qp.num)

    def done(self) -> list[tuple[int, int]]:
        """(wr_id, status) of all completions so far."""
        return [(wc.wr_id, wc.status) for wc in self.wcs]


class Pair(World):
    """Nodes `a` and `b`, connected with the given Path and Caps; more nodes by `more`."""

    def __init__(
        self,
        *,
        caps: Caps = Caps(),
        sig_all: bool = False,
        mode: CqMode = CqMode.POLL,
        cqe: int = 512,
        arena: int = 1 << 20,
        link: Link = Link(),
        connect: bool = True,
        seed: int = 0,
        b_state: QpState = QpState.RTS,
        kind: QpType = QpType.RC,
        engine: dict[str, Any] | None = None,
        **path: Any,
    ):
        super().__init__(seed)
        self.link(link)
        self.standins = StandIns(self)
        self.nodes: list[Node] = []
        for i in range(2):
            e = super().engine(f"10.0.0.{i + 1}", seed=seed * 7 + i + 1, arena=arena, **(engine or {}))
            pd = e.pd()
            mr = e.mr(pd, 0, arena, ALL_ACCESS)
            cq = e.cq(cqe, mode)
            qp = e.qp(pd, cq, cq, caps, sig_all, kind)
            self.nodes.append(Node(e, pd, cq, mr, qp, Path(e.gid, 0)))
        self.a, self.b = self.nodes
        psn = (0xFFFFF0, 0x123456)
        for i, (me, peer) in enumerate((self.nodes, self.nodes[::-1])):
            base = Path(peer.engine.gid, peer.qp.num, rq_psn=psn[1 - i], sq_psn=psn[i])
            me.path = replace(base, **path)
        if connect:
            self.a.qp.connect(self.a.path)
            self.b.qp.connect(self.b.path, b_state)

    def go(self, duration: int = 200 * MS) -> None:
        """Let virtual time pass; completions go to the nodes' `wcs`."""
        end = self.now + duration
        while (reason := self.run(end)) not in (Reason.UNTIL, Reason.QUIET):
            assert reason is not Reason.VIOLATION, self.violation()
            assert reason is not Reason.BUDGET
            if reason is Reason.STANDIN:
                self.standins.answer()
        assert self.violation() is None
        for wc in self.wcs():
            self.nodes[wc.engine].wcs.append(wc)

    def settle(self, duration: int = 2 * S) -> None:
        """Until both ends know each other (capability, tokens)."""
        self.go(duration)
        assert all(node.engine.stop_ready() for node in self.nodes)

    def stop(self, node: Node, *, standin: bool = True) -> int:
        """Stop a node as the agent does; returns its stand-in's number."""
        node.engine.stop()
        node.engine.attach(False)
        number = self.standins.add(dumps.parse(node.engine.dump()), node.engine.index)
        if standin:
            self.standins.on(number)
        return number

    def resume(self, node: Node, number: int, address: str | None = None, clock: int = 0) -> None:
        """Bring it back, at a new address if one is given."""
        if address is None:
            self.standins.off(number)
        else:
            self.standins.moved(number, gid(address))
        node.engine.attach(True)
        node.engine.resume(None if address is None else gid(address), clock)

    def echo(self, tag: int = 0) -> None:
        """Prove that messages pass both ways, byte for byte."""
        for x, y in ((self.a, self.b), (self.b, self.a)):
            data = bytes((tag + i) & 0xFF for i in range(1500))
            into = y.recv(1_000_000 + tag, 1600)
            before = len(x.wcs), len(y.wcs)
            x.send(2_000_000 + tag, data)
            self.go(10 * S)
            assert [(wc.wr_id, wc.status) for wc in x.wcs[before[0] :]] == [(2_000_000 + tag, 0)]
            assert [(wc.wr_id, wc.status) for wc in y.wcs[before[1] :]] == [(1_000_000 + tag, 0)]
            assert y.get(into)[:1500] == data


def no_write() -> Access:
    """Access for reading only."""
    return Access.LOCAL_WRITE | Access.REMOTE_READ
