# SPDX-License-Identifier: BSD-3-Clause
"""Two programs that open memory to each other by windows and take it back, as storage protocols do.

The owner of a window binds it over a part of its memory and tells the peer its key in the message
behind. The peer reads, writes and counts in there, and gives the window back: by SEND with invalidate,
or by a plain SEND, upon which the owner invalidates the window itself (or, type 1, binds it elsewhere).
Then the memory must be what the peer has made of it, and the window opens another part under another key.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from migroce import dump as dumps

from .pair import Node, Pair
from .program import InvariantError
from .records import MS, US, Caps, Link, S, Sge, Wc, Wr
from .shared import rough, turn
from .verbs import Event, QpState, QpType, SendFlag, WcFlag, WcOpcode, WcStatus, WrOpcode
from .windows import bind, invalidate
from .world import Mw, Qp, Srq

SIZE = 2000
"""Bytes of a window."""
ACCESS = (WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE, WrOpcode.ATOMIC_FETCH_AND_ADD)
RECVS = 40


@dataclass(slots=True)
class Grant:
    """A part of memory while it is open: where, and what the owner will have to find there."""

    at: Sge
    key: int
    state: bytearray


@dataclass(slots=True)
class Window:
    """A window, its owner's program and the peer's part in it."""

    number: int
    kind: int
    rounds: int
    mw: Mw | None = None
    grant: Grant | None = None


@dataclass(slots=True)
class Peer:
    """What one node does, as an owner of its windows and as a user of the other's."""

    node: Node
    windows: list[Window]
    srq: Srq | None
    expected: list[tuple[int, WcOpcode]] = field(default_factory=list)
    """Requests posted, in order; each completes once, in its turn."""
    reads: dict[int, tuple[Sge, bytes]] = field(default_factory=dict)
    recvs: list[Sge] = field(default_factory=list)
    received: int = 0
    told: list[tuple[int, bool]] = field(default_factory=list)
    """Messages to the peer, in order: (window, whether it invalidates); a grant is (-1 - window, False)."""
    next_wr: int = 0


class Grants(Pair):
    """One run, drawn from a seed."""

    def __init__(self, seed: int, link: Link, *, shared: bool, rounds: int):
        self.rng = random.Random(seed)
        rng = self.rng
        super().__init__(seed=seed, link=link, arena=1 << 21, cqe=2048, connect=False)
        self.peers: list[Peer] = []
        for node in self.nodes:
            srq = node.engine.srq(node.pd, RECVS) if shared else None
            node.qp = node.engine.qp_of(
                QpType.RC, pd=node.pd, send_cq=node.cq, recv_cq=node.cq, srq=srq, caps=Caps(256, RECVS, 4, 4)
            )
            windows = [
                Window(i, rng.choice((1, 2, 2)), rng.randint(1, rounds)) for i in range(rng.randint(0, 3))
            ]
            self.peers.append(Peer(node, windows, srq))
        mtu = rng.choice((256, 1024))
        for me, peer in (self.nodes, self.nodes[::-1]):
            me.path = replace(
                me.path, dgid=peer.engine.gid, dest_qpn=peer.qp.num, mtu=mtu, timeout=12, rq_psn=7, sq_psn=7,
                max_rd_atomic=rng.choice((1, 4)), max_dest_rd_atomic=4,
            )  # fmt: skip
        for peer in self.peers:
            for window in peer.windows:
                window.mw = peer.node.engine.mw(peer.node.pd, window.kind)
            self._connect(peer.node.qp, peer)
        self.break_on(wc=True)

    def _connect(self, qp: Qp, peer: Peer) -> None:
        qp.modify(QpState.INIT, peer.node.path)
        for _ in range(RECVS):
            self._recv(peer)
        qp.modify(QpState.RTR, peer.node.path)
        qp.modify(QpState.RTS, peer.node.path)

    # ---- posting ---------------------------------------------------------------------------------

    def _recv(self, p: Peer) -> None:
        sge = p.node.space(64)
        wr = Wr(1 << 32 | len(p.recvs), (sge,))
        p.recvs.append(sge)
        if p.srq:
            p.srq.post(wr)
        else:
            p.node.qp.post_recv(wr)

    def _number(self, p: Peer, opcode: WcOpcode) -> int:
        p.next_wr += 1
        p.expected.append((p.next_wr, opcode))
        return p.next_wr

    def grant(self, p: Peer, w: Window) -> None:
        """Bind a window and tell the peer, in one go."""
        assert w.mw is not None
        p.node.used += -p.node.used % 8
        content = self.rng.randbytes(SIZE)
        at = p.node.put(content)
        request = bind(self._number(p, WcOpcode.BIND_MW), w.mw, p.node.mr, at.addr, SIZE)
        w.grant = Grant(at, request.rkey, bytearray(content))
        w.rounds -= 1
        p.told.append((-1 - w.number, False))
        p.node.qp.post_send(request, self._message(p, WrOpcode.SEND))

    def _message(self, p: Peer, opcode: WrOpcode, key: int = 0, flags: int = 0) -> Wr:
        data = p.node.put(bytes((len(p.told) & 0xFF,)) * self.rng.randint(1, 60))
        return Wr(
            self._number(p, WcOpcode.SEND), (data,), opcode, SendFlag.SIGNALED | flags, key
        )  # fmt: skip

    def use(self, user: Peer, w: Window) -> None:
        """The peer of an owner is told of a window: it does what it likes in there and gives it back."""
        rng, grant, node = self.rng, w.grant, user.node
        assert grant is not None
        wrs = []
        for _ in range(rng.randint(0, 4)):
            opcode = rng.choice(ACCESS)
            size = 8 if opcode is WrOpcode.ATOMIC_FETCH_AND_ADD else rng.randint(1, SIZE)
            at = rng.randint(0, SIZE - size)
            at -= at % 8 if size == 8 else 0
            remote = {"remote_addr": grant.at.addr + at, "rkey": grant.key}
            before = bytes(grant.state[at : at + size])
            fence = SendFlag.SIGNALED | SendFlag.FENCE
            if opcode is WrOpcode.RDMA_WRITE:
                data = rng.randbytes(size)
                grant.state[at : at + size] = data
                number = self._number(user, WcOpcode.RDMA_WRITE)
                wrs.append(Wr(number, (node.put(data),), opcode, fence, 0, **remote))
                continue
            into = node.space(size)
            if opcode is WrOpcode.RDMA_READ:
                number, add = self._number(user, WcOpcode.RDMA_READ), 0
            else:
                number, add = self._number(user, WcOpcode.FETCH_ADD), rng.getrandbits(64)
                value = (int.from_bytes(before, "little") + add) & (2**64 - 1)
                grant.state[at : at + size] = value.to_bytes(8, "little")
            user.reads[number] = (into, before)
            wrs.append(Wr(number, (into,), opcode, fence, 0, compare_add=add, **remote))
        # What was read must be there before the window closes: the fence.
        inv = w.kind == 2 and rng.random() < 0.6
        opcode = WrOpcode.SEND_WITH_INV if inv else WrOpcode.SEND
        user.told.append((w.number, inv))
        wrs.append(self._message(user, opcode, grant.key if inv else 0, SendFlag.FENCE))
        while wrs:
            n = rng.randint(1, len(wrs))
            node.qp.post_send(*wrs[:n])
            del wrs[:n]

    # ---- completions -----------------------------------------------------------------------------

    def on_wc(self, wc: Wc) -> None:
        """Hold a completion against the model and go on from there."""
        me, other = self.peers if wc.engine == 0 else self.peers[::-1]
        if wc.status != WcStatus.SUCCESS:
            raise InvariantError("wc", f"{WcStatus(wc.status).name}: {wc}")
        if wc.wr_id >> 32:
            self._received(me, other, wc)
            return
        number, opcode = me.expected.pop(0)
        if (wc.wr_id, wc.opcode) != (number, opcode):
            raise InvariantError("order", f"{wc} instead of {number}, {opcode.name}")
        if number in me.reads:
            into, want = me.reads.pop(number)
            if me.node.get(into) != want:
                raise InvariantError("data", f"{opcode.name} {number} brought something else")

    def _received(self, me: Peer, other: Peer, wc: Wc) -> None:
        number, inv = other.told[me.received]
        me.received += 1
        if wc.opcode != WcOpcode.RECV or bool(wc.flags & WcFlag.WITH_INV) != inv:
            raise InvariantError("wc", f"{wc} for {number}, {inv}")
        data = me.node.get(me.recvs[wc.wr_id & 0xFFFFFFFF])[: wc.byte_len]
        if data != bytes((me.received & 0xFF,)) * wc.byte_len:
            raise InvariantError("data", f"message {me.received} is {data!r}")
        self._recv(me)
        if number < 0:
            self.use(me, other.windows[-1 - number])
            return
        w = me.windows[number]
        assert w.grant is not None
        if inv and wc.imm != w.grant.key:
            raise InvariantError("wc", f"{wc} names another key than {w.grant.key:#x}")
        if me.node.get(w.grant.at) != w.grant.state:
            raise InvariantError("data", f"window {number} was given back with something else in it")
        if w.kind == 2 and not inv:
            me.node.qp.post_send(invalidate(self._number(me, WcOpcode.LOCAL_INV), w.grant.key))
        w.grant = None
        if w.rounds:
            self.grant(me, w)

    # ---- time ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """All windows are opened for the first time."""
        for p in self.peers:
            for w in p.windows:
                self.grant(p, w)

    def advance(self, until: int) -> None:
        """Let time pass, the programs doing their part."""
        while self.now < until:
            if not turn(self, self.standins, until, self.on_wc):
                return

    def move(self, who: int, pause: int, address: str | None) -> None:
        """Stop a node, stand in for it, and bring it back `pause` later."""
        node = self.nodes[who]
        dump = dumps.parse(node.engine.dump())
        if any(q.connected and not q.token_acked for q in dump.qps):
            address = None  # a peer without our token cannot be told
        number = self.stop(node)
        self.advance(self.now + pause)
        self.resume(node, number, address, self.rng.getrandbits(62))

    def open_grants(self) -> int:
        return sum(w.grant is not None for p in self.peers for w in p.windows)

    def finish(self, limit: int = 100 * S) -> None:
        """Until every window was given back for the last time. Raises InvariantError."""
        end = self.now + limit
        while self.now < end and (self.open_grants() or any(p.expected for p in self.peers)):
            self.advance(min(end, self.now + 10 * MS))
        if self.open_grants() or any(p.expected for p in self.peers):
            raise InvariantError("stuck", f"{self.open_grants()} windows open, {self.peers}")
        if events := [e for e in self.events() if e.type != Event.COMM_EST]:
            raise InvariantError("event", f"{events}")
        for p in self.peers:
            bound = {m.rkey for m in dumps.parse(p.node.engine.dump()).mws if m.length}
            left = {w.mw.rkey for w in p.windows if w.mw and w.kind == 1}
            if bound != left:
                raise InvariantError("dump", f"bound are {bound}, should be {left}")


def schedule(seed: int) -> None:
    """A random run. Raises InvariantError."""
    rng = random.Random(seed)
    link = rough(rng)
    with Grants(seed, link, shared=rng.random() < 0.4, rounds=rng.choice((2, 6))) as g:
        if rng.random() < 0.5:
            g.advance(g.now + rng.randint(1, 3000) * MS)
        g.begin()
        for n in range(rng.choice((0, 1, 2, 3))):
            g.advance(g.now + rng.randint(1, 2000) * US)
            relocate = not link.strip and rng.random() < 0.5
            who = rng.randrange(2)
            g.move(who, rng.randint(1, 100_000) * US, f"10.1.{n}.{who + 1}" if relocate else None)
        g.finish()
