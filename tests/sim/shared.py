# SPDX-License-Identifier: BSD-3-Clause
"""Many senders and one receiver whose QPs take from shared queues: its model and its random schedules.

Which request a message gets is decided by when it begins, so the model does not say where a message
arrives, but that it does: once, whole, in its QP's order, in a request of the right queue that was
posted and not used before; and that requests are used in the order they were posted in.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from migroce import dump as dumps

from .memory import content, imm_of
from .program import InvariantError
from .records import MS, US, Caps, CqMode, Link, Path, Reason, S, Sge, Wc, Wr, gid
from .standins import StandIns
from .verbs import QpType, SendFlag, WcFlag, WcOpcode, WcStatus, WrOpcode
from .world import Cq, Engine, Mr, Qp, Srq, World

RECEIVER = 0


@dataclass(frozen=True, slots=True)
class Message:
    """What a sender posts, and for which of the receiver's queues."""

    opcode: WrOpcode
    size: int
    queue: int

    @property
    def receives(self) -> bool:
        return self.opcode is not WrOpcode.RDMA_READ


@dataclass(slots=True)
class Stream:
    """A sender's QP and the receiver's."""

    number: int
    src: Qp
    dst: Qp
    messages: list[Message]
    at: int
    """Where its messages lie in its engine's memory."""
    posted: int = 0
    sent: int = 0
    received: int = 0

    def arrivals(self) -> list[int]:
        return [i for i, m in enumerate(self.messages) if m.receives]


@dataclass(slots=True)
class Queue:
    """A shared queue: requests are numbered as they are posted; `used` of them."""

    srq: Srq
    size: int
    """Bytes of each request."""
    total: int
    posted: int = 0
    base: int = 0
    used: set[int] = field(default_factory=set)


def turn(world: World, standins: StandIns, until: int, on_wc: Callable[[Wc], None]) -> bool:
    """Run to what happens next and do the programs' part of it; False: nothing more will happen."""
    reason = world.run(until)
    if reason in (Reason.VIOLATION, Reason.BUDGET):
        raise InvariantError("engine", world.violation() or "livelock")
    if reason is Reason.STANDIN:
        standins.answer()
    wcs = world.wcs()
    for wc in wcs:
        on_wc(wc)
    return reason is not Reason.QUIET or bool(wcs)


class Shared(World):
    """One run, drawn from a seed. `xrc`: requests name their queue, QPs are halves."""

    def __init__(
        self, seed: int, *, xrc: bool, link: Link = Link(), senders: int = 2, qps: int = 2, queues: int = 2,
        messages: int = 12, depth: int = 4, mtu: int = 1024, clocks: bool = False,
    ):  # fmt: skip
        super().__init__(seed)
        self.rng = random.Random(seed)
        self.xrc, self.depth, self.mtu = xrc, depth, mtu
        self.link(link)
        self.standins = StandIns(self)
        self.machines: list[Engine] = []
        self.pds: list[int] = []
        self.cqs: list[Cq] = []
        self.mrs: list[Mr] = []
        self.limit_events = 0
        plans = [self._plan(i, queues, messages) for i in range(senders * qps)]
        arena = 65536 + 5 * mtu * sum(len(plan) + 1 for plan in plans)
        for i in range(senders + 1):
            clock = self.rng.getrandbits(62) if clocks else 0
            e = self.engine(f"10.0.0.{i + 1}", seed=seed * 31 + i, arena=arena, clock_offset=clock)
            pd = e.pd()
            self.machines.append(e)
            self.pds.append(pd)
            self.cqs.append(e.cq(4096, CqMode.POLL))
            self.mrs.append(e.mr(pd, 0, arena))
        self.receiver = self.machines[RECEIVER]
        self.domain = self.receiver.xrcd() if xrc else -1
        self.taken = [65536] * (senders + 1)
        self.queues = [self._queue(q, plans) for q in range(queues)]
        self.streams = [self._stream(i, 1 + i % senders, plans[i]) for i in range(senders * qps)]
        self.by_number = {s.dst.num: s for s in self.streams}
        self.by_source = {(s.src.engine.index, s.src.num): s for s in self.streams}
        self.break_on(wc=True)

    def _plan(self, stream: int, queues: int, messages: int) -> list[Message]:
        out = []
        for _ in range(self.rng.randint(1, messages)):
            opcode = self.rng.choice(
                (WrOpcode.SEND, WrOpcode.SEND, WrOpcode.SEND_WITH_IMM, WrOpcode.RDMA_WRITE_WITH_IMM,
                 WrOpcode.RDMA_READ)
            )  # fmt: skip
            size = self.rng.choice((0, 1, self.rng.randint(0, self.mtu), self.rng.randint(0, 5 * self.mtu)))
            queue = self.rng.randrange(queues) if self.xrc else stream % queues
            out.append(Message(opcode, size, queue))
        return out

    def _queue(self, number: int, plans: list[list[Message]]) -> Queue:
        total = sum(m.queue == number and m.receives for plan in plans for m in plan)
        pd = self.pds[RECEIVER]
        cq = self.cqs[RECEIVER] if self.xrc else None
        srq = self.receiver.srq(pd, max(1, self.depth), xrcd=self.domain, cq=cq)
        base = self.taken[RECEIVER]
        self.taken[RECEIVER] += total * 5 * self.mtu
        return Queue(srq, 5 * self.mtu, total, base=base)

    def _stream(self, number: int, engine: int, plan: list[Message]) -> Stream:
        e, r, caps = self.machines[engine], self.receiver, Caps(send_wr=8, recv_wr=1)
        cq, rcq = self.cqs[engine], self.cqs[RECEIVER]
        if self.xrc:
            src = e.qp_of(QpType.XRC_SEND, pd=self.pds[engine], send_cq=cq, caps=caps)
            dst = r.qp_of(QpType.XRC_RECV, xrcd=self.domain)
        else:
            src = e.qp(self.pds[engine], cq, cq, caps)
            srq = self.queues[plan[0].queue].srq
            dst = r.qp_of(QpType.RC, pd=self.pds[RECEIVER], send_cq=rcq, recv_cq=rcq, srq=srq)
        place = at = self.taken[engine]
        for i, m in enumerate(plan):
            if m.receives:
                e.memory[place : place + m.size] = content(number, i, m.size)
            place += m.size
        self.taken[engine] = place
        path = Path(r.gid, dst.num, rq_psn=number, sq_psn=0xFFFFFC, mtu=self.mtu, timeout=12)
        src.connect(path)
        dst.connect(replace(path, dgid=e.gid, dest_qpn=src.num, rq_psn=0xFFFFFC, sq_psn=number))
        return Stream(number, src, dst, plan, at)

    # ---- the programs ----------------------------------------------------------------------------

    def refill(self) -> None:
        """Keep each queue as full as it may be, with requests of their own."""
        for q in self.queues:
            while q.posted < q.total and q.posted - len(q.used) < self.depth:
                at = self.receiver.base + q.base + q.posted * q.size
                sge = Sge(at, q.size, self.mrs[RECEIVER].lkey)
                q.srq.post(Wr(q.srq.index << 32 | q.posted, (sge,)))
                q.posted += 1

    def post(self) -> None:
        """Whatever fits into the send queues."""
        for s in self.streams:
            while s.posted < len(s.messages) and s.posted - s.sent < s.src.caps.send_wr:
                s.src.post_send(self._wr(s, s.posted))
                s.posted += 1

    def _wr(self, s: Stream, i: int) -> Wr:
        m, mr = s.messages[i], self.mrs[s.src.engine.index]
        at = s.src.engine.base + s.at + sum(x.size for x in s.messages[:i])
        remote = {"remote_addr": self.receiver.base, "rkey": self.mrs[RECEIVER].rkey}
        return Wr(
            s.number << 32 | i, (Sge(at, m.size, mr.lkey),), m.opcode, SendFlag.SIGNALED,
            imm_of(s.number, i), srqn=self.queues[m.queue].srq.num,
            **({} if m.opcode in (WrOpcode.SEND, WrOpcode.SEND_WITH_IMM) else remote),
        )  # fmt: skip

    def on_wc(self, wc: Wc) -> None:
        """Hold a completion against the model."""
        if wc.status != WcStatus.SUCCESS:
            raise InvariantError("wc", f"{WcStatus(wc.status).name}: {wc}")
        if wc.engine != RECEIVER:
            s = self.by_source[wc.engine, wc.qp_num]
            if wc.wr_id != s.number << 32 | s.sent:
                raise InvariantError("order", f"sender {s.number}: {wc.wr_id:#x} is not number {s.sent}")
            s.sent += 1
            return
        s = self.by_number[wc.qp_num]
        i = s.arrivals()[s.received]
        m = s.messages[i]
        q, number = self.queues[m.queue], wc.wr_id & 0xFFFFFFFF
        if wc.wr_id >> 32 != q.srq.index or number >= q.posted or number in q.used:
            raise InvariantError("request", f"message {i} of {s.number} in request {wc.wr_id:#x}")
        q.used.add(number)
        write = m.opcode is WrOpcode.RDMA_WRITE_WITH_IMM
        want = WcOpcode.RECV_RDMA_WITH_IMM if write else WcOpcode.RECV
        imm = imm_of(s.number, i) if m.opcode is not WrOpcode.SEND else 0
        flags = WcFlag.WITH_IMM if m.opcode is not WrOpcode.SEND else 0
        if (wc.opcode, wc.byte_len, wc.imm, wc.flags, wc.src_qp) != (want, m.size, imm, flags, s.src.num):
            raise InvariantError("wc", f"message {i} of {s.number}, {m}: {wc}")
        at = q.base + number * q.size
        if not write and bytes(self.receiver.memory[at : at + m.size]) != content(s.number, i, m.size):
            raise InvariantError("data", f"message {i} of {s.number} arrived changed")
        s.received += 1

    # ---- time ------------------------------------------------------------------------------------

    def go(self, until: int, *, refill: bool = True) -> None:
        """Let time pass, the programs doing their part."""
        while self.now < until:
            if refill:
                self.refill()
            self.post()
            if not turn(self, self.standins, until, self.on_wc):
                return

    def move(self, index: int, pause: int, address: str | None) -> None:
        """Stop an engine, stand in for it, and resume it `pause` later."""
        e = self.machines[index]
        e.stop()
        e.attach(False)
        dump = dumps.parse(e.dump())
        if any(q.connected and not q.token_acked for q in dump.qps):
            address = None  # a peer without our token cannot be told
        number = self.standins.add(dump, e.index)
        self.standins.on(number)
        self.go(self.now + pause, refill=index != RECEIVER)
        if address is None:
            self.standins.off(number)
        else:
            self.standins.moved(number, gid(address))
        e.attach(True)
        e.resume(gid(address) if address else None, self.rng.getrandbits(62))

    def finish(self, limit: int = 100 * S) -> None:
        """Until all has arrived. Raises InvariantError."""
        end = self.now + limit
        while self.now < end and any(
            s.sent < len(s.messages) or s.received < len(s.arrivals()) for s in self.streams
        ):
            self.go(min(end, self.now + 10 * MS))
        for s in self.streams:
            if s.sent < len(s.messages) or s.received < len(s.arrivals()):
                raise InvariantError("stuck", f"{s.number}: {s.sent} sent, {s.received} received, {s}")
        for q in self.queues:
            if q.used != set(range(q.total)):
                raise InvariantError("request", f"requests used are {sorted(q.used)} of {q.total}")
        if violation := self.violation():
            raise InvariantError("engine", violation)

    def check_dump(self) -> None:
        """The receiver's dump agrees with the model."""
        dump = dumps.parse(self.receiver.dump())
        by_num = {srq.num: srq for srq in dump.srqs}
        for q in self.queues:
            record = by_num[q.srq.num]
            waiting = q.posted - record.total
            if (record.depth, record.fill, bool(record.xrcd)) != (max(1, self.depth), waiting, self.xrc):
                raise InvariantError("dump", f"{record} with {q.posted} posted")
        users = sum(srq.refs for srq in dump.srqs)
        if users != (0 if self.xrc else len(self.streams)):
            raise InvariantError("dump", f"{users} QPs use the queues")


def rough(rng: random.Random) -> Link:
    """A link that loses, doubles, changes and overtakes."""
    loss = rng.choice((0, 10_000, 50_000, 120_000))
    return Link(
        delay=rng.choice((2, 10, 60)) * US, jitter=rng.choice((0, 20)) * US, loss=loss, fair=2,
        dup=rng.choice((0, 50_000)), corrupt=rng.choice((0, 20_000)), reorder=rng.choice((0, 100_000)),
        reorder_by=100 * US, strip=int(rng.random() < 0.1),
    )  # fmt: skip


def schedule(seed: int, *, xrc: bool) -> None:
    """A random run. Raises InvariantError."""
    rng = random.Random(seed * 2 + xrc)
    link = rough(rng)
    with Shared(
        seed, xrc=xrc, link=link, senders=rng.randint(1, 3), qps=rng.randint(1, 3), queues=rng.randint(1, 3),
        messages=rng.choice((3, 12)), depth=rng.choice((1, 2, 4, 16)),
        mtu=rng.choice((256, 1024, 4096)), clocks=rng.random() < 0.5,
    ) as w:  # fmt: skip
        for n in range(rng.choice((0, 1, 2, 3))):
            w.go(w.now + rng.randint(1, 4000) * US)
            w.check_dump()
            relocate = not link.strip and rng.random() < 0.5
            who = rng.randrange(len(w.machines))
            w.move(who, rng.randint(1, 100_000) * US, f"10.1.{n}.{who + 1}" if relocate else None)
        w.finish()
        w.check_dump()
