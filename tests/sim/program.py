# SPDX-License-Identifier: BSD-3-Clause
"""The simulated program: posts what its Side says, and checks every completion it gets.

An `End` is one side of a connection. It lays out its memory, posts its operations and receives, and
holds them against the model: what must arrive, in which order, with which bytes. What a whole run
must have in common at its end is checked by runner.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .memory import Arena, Region, content, imm_of, operands, pieces, span
from .records import Caps, Path, Sge, VerbsError, Wc, Wr
from .schedule import Connection, Fatal, Kind, Op, Side
from .verbs import ALL_ACCESS, Access, QpState, SendFlag, WcFlag, WcOpcode, WcStatus, WrOpcode
from .world import Cq, Engine, Mr, Qp

_WR_OPCODE = {
    Kind.SEND: WrOpcode.SEND, Kind.SEND_IMM: WrOpcode.SEND_WITH_IMM, Kind.WRITE: WrOpcode.RDMA_WRITE,
    Kind.WRITE_IMM: WrOpcode.RDMA_WRITE_WITH_IMM, Kind.READ: WrOpcode.RDMA_READ,
    Kind.CMP_SWAP: WrOpcode.ATOMIC_CMP_AND_SWP, Kind.FETCH_ADD: WrOpcode.ATOMIC_FETCH_AND_ADD,
    Kind.ATOMIC_WRITE: WrOpcode.ATOMIC_WRITE, Kind.FLUSH: WrOpcode.FLUSH,
}  # fmt: skip
_WC_OPCODE = {
    Kind.SEND: WcOpcode.SEND, Kind.SEND_IMM: WcOpcode.SEND, Kind.WRITE: WcOpcode.RDMA_WRITE,
    Kind.WRITE_IMM: WcOpcode.RDMA_WRITE, Kind.READ: WcOpcode.RDMA_READ,
    Kind.CMP_SWAP: WcOpcode.COMP_SWAP, Kind.FETCH_ADD: WcOpcode.FETCH_ADD,
    Kind.ATOMIC_WRITE: WcOpcode.ATOMIC_WRITE, Kind.FLUSH: WcOpcode.FLUSH,
}  # fmt: skip
# How a mistake shows: at the requester; in the receive completion; whether the responder ends too.
_FATAL_SEND = {
    Fatal.BAD_RKEY: WcStatus.REM_ACCESS_ERR, Fatal.OUT_OF_BOUNDS: WcStatus.REM_ACCESS_ERR,
    Fatal.NO_ACCESS: WcStatus.REM_ACCESS_ERR, Fatal.BAD_LKEY: WcStatus.LOC_PROT_ERR,
    Fatal.SHORT_RECV: WcStatus.REM_INV_REQ_ERR,
}  # fmt: skip
RECV_BIT = 1 << 31
FLUSH_REGION = 1 << 8 | 1
"""Make all of a region globally visible, as Wr.compare_add says it."""
READ_PART = 262144
"""Bytes that the requester asks for by one READ request."""


class InvariantError(AssertionError):
    """The transport broke a promise. `kind` is a word for each invariant."""

    def __init__(self, kind: str, text: str):
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class End:
    """One side of a connection; `stream` names it in contents."""

    def __init__(self, conn: Connection, side: Side, stream: int, arena: Arena, name: str, rough: bool):
        self.conn, self.side, self.stream, self.arena, self.name = conn, side, stream, arena, name
        self.rough = rough
        self.peer: End
        self.qp: Qp
        self.engine: Engine
        self.ops = side.ops
        self.fatal_at = next((i for i, op in enumerate(side.ops) if op.fatal), len(side.ops))
        self.src: list[list[tuple[int, int]]] = []
        self.recvs: list[list[tuple[int, int]]] = []
        self.incoming: list[tuple[int, Op]] = []
        self.regions: dict[int, Region] = {}
        self.expect_read: dict[int, bytes] = {}
        self.operands: dict[int, tuple[int, int]] = {
            i: (FLUSH_REGION, 0) for i, op in enumerate(side.ops) if op.kind is Kind.FLUSH
        }
        self.posted = self.next_send = self.done = 0
        self.recv_posted = self.next_recv = 0
        self.failed: WcStatus | None = None
        self.failed_at = 0
        self.recv_bad = False
        self.recv_ok = 0
        self.connected = False
        self.events: list[int] = []
        self.later: Callable[[int, Callable[[], None]], None]
        self.now: Callable[[], int]
        self.wr_base = stream << 32

    def broken(self, kind: str, text: str) -> InvariantError:
        """An error about this end."""
        return InvariantError(kind, f"{self.name}: {text}")

    # ---- layout, before there is an engine -----------------------------------------------------

    def lay_out(self) -> None:
        """Own buffers: sources and READ destinations, then receives for what the peer will send."""
        for i, op in enumerate(self.ops):
            at = self.arena.take(span(op.size, op.sges), f"{self.name} op {i} ({op.kind.name})")
            self.src.append(pieces(at, op.size, op.sges))
        self.incoming = [(i, op) for i, op in enumerate(self.peer.ops) if op.kind.receives]
        for i, op in self.incoming:
            want = op.size + self.side.recv_extra if op.kind.sends else self.side.recv_extra
            if op.fatal is Fatal.SHORT_RECV:
                want = max(0, op.size - 1)
            at = self.arena.take(span(want, self.side.recv_sges), f"{self.name} receive for op {i}")
            self.recvs.append(pieces(at, want, self.side.recv_sges))
        self.local_end = self.arena.size

    def lay_out_exposed(self) -> None:
        """Memory that the peer reads and writes; `self.peer.regions` is its model."""
        self.exposed = self.arena.take(0, "alignment", 8)
        for i, op in enumerate(self.peer.ops):
            if not op.kind.sends and op.target < 0:
                name = f"{self.name} memory for peer's op {i} ({op.kind.name})"
                at = self.arena.take(op.size, name, 8 if op.kind.atomic else 1)
                self.peer.regions[i] = Region(at, op.size, bytearray(op.size))
        self.exposed_end = self.arena.size
        for i, op in enumerate(self.peer.ops):
            if op.kind.answered and op.target < 0:
                self.peer.regions[i].state[:] = content(self.stream ^ 0x55, i, op.size)

    # ---- start ---------------------------------------------------------------------------------

    def set_up(self, engine: Engine, pd: int, send_cq: Cq, recv_cq: Cq) -> None:
        """Create the QP and MRs and fill memory; regions and layout of both ends are there."""
        side, arena = self.side, self.arena
        self.engine = engine
        caps = Caps(
            send_wr=side.depth, recv_wr=side.recv_depth,
            send_sge=max([1, *(op.sges for op in self.ops)]), recv_sge=side.recv_sges,
            inline=max([0, *(op.size for op in self.ops if op.inline)]),
        )  # fmt: skip
        self.qp = engine.qp(pd, send_cq, recv_cq, caps, side.sig_all)
        self.local = engine.mr(pd, 0, arena.size, Access.LOCAL_WRITE)
        length = max(1, self.exposed_end - self.exposed)
        # A remote view that is not the address: iova must be honoured.
        self.open = engine.mr(pd, self.exposed, length, ALL_ACCESS, 0x7000_0000_0000 + (self.stream << 32))
        self.closed = engine.mr(pd, self.exposed, length, Access.LOCAL_WRITE)
        self.mrs: list[Mr] = [self.local, self.open, self.closed]
        for region in self.peer.regions.values():
            self._put(region.offset, bytes(region.state))
        for i, op in enumerate(self.ops):
            if not op.kind.answered:
                self._put_pieces(self.src[i], content(self.stream, i, op.size))

    def _put(self, offset: int, data: bytes) -> None:
        self.engine.memory[offset : offset + len(data)] = data
        self.arena.model[offset : offset + len(data)] = data

    def _put_pieces(self, where: list[tuple[int, int]], data: bytes) -> None:
        pos = 0
        for at, length in where:
            self._put(at, data[pos : pos + length])
            pos += length

    def _model_pieces(self, where: list[tuple[int, int]], data: bytes) -> None:
        pos = 0
        for at, length in where:
            part = data[pos : pos + length]
            self.arena.model[at : at + len(part)] = part
            pos += length

    def _get_pieces(self, where: list[tuple[int, int]], size: int) -> bytes:
        return b"".join(bytes(self.engine.memory[at : at + length]) for at, length in where)[:size]

    def connect(self) -> None:
        """To RTS, or to RTR only."""
        c, s = self.conn, self.side
        path = Path(
            dgid=self.peer.engine.gid, dest_qpn=self.peer.qp.num, rq_psn=self.peer.side.psn, sq_psn=s.psn,
            mtu=c.mtu, timeout=c.timeout, retry_cnt=c.retry_cnt, rnr_retry=c.rnr_retry,
            min_rnr_timer=c.min_rnr_timer, max_rd_atomic=s.reads, max_dest_rd_atomic=self.peer.side.reads,
        )  # fmt: skip
        self.qp.modify(QpState.INIT, path)
        if s.recv_at <= s.connect_at:
            self.post_recvs()
        self.qp.modify(QpState.RTR, path)
        if not s.only_rtr:
            self.qp.modify(QpState.RTS, path)
        self.connected = True

    # ---- posting -------------------------------------------------------------------------------

    def post_recvs(self) -> None:
        """As many receives as fit and are still to come."""
        if self.recv_bad or self.failed:
            return
        batch: list[Wr] = []
        while self.recv_posted < len(self.recvs) and self.recv_posted - self.next_recv < self.side.recv_depth:
            sges = [Sge(self.engine.base + at, n, self.local.lkey) for at, n in self.recvs[self.recv_posted]]
            batch.append(Wr(self.wr_base | RECV_BIT | self.recv_posted, sges))
            self.recv_posted += 1
            if len(batch) == 16:
                self.qp.post_recv(*batch)
                batch = []
        if batch:
            self.qp.post_recv(*batch)

    def post_sends(self) -> None:
        """Whatever is due and fits into the send queue."""
        if not self.connected or self.side.only_rtr or self.failed or self.recv_bad:
            return
        while batch := list(self._due()):
            try:
                self.qp.post_send(*batch)
            except VerbsError as e:
                raise self.broken("post", f"ibv_post_send refused a valid request: {e}") from e
            for i in range(self.posted - len(batch), self.posted):
                op = self.ops[i]
                if op.inline and not op.kind.answered:
                    # Inline data is the engine's from the call's return on.
                    self._put_pieces(self.src[i], bytes(op.size))

    def _due(self) -> Iterator[Wr]:
        now = self.now()
        for _ in range(self.side.chain):
            i = self.posted
            if i == len(self.ops) or self.ops[i].at > now or i - self.done >= self.side.depth:
                return
            self.posted += 1
            yield self._wr(i)

    def signaled(self, i: int) -> bool:
        """Whether op i asks for a completion: also when the queue would fill up without any."""
        last = i + 1 == len(self.ops) or self.ops[i + 1].at > self.ops[i].at
        return self.side.sig_all or self.ops[i].signaled or last or i % self.side.depth == self.side.depth - 1

    def _wr(self, i: int) -> Wr:
        op = self.ops[i]
        flags = SendFlag(0)
        if self.signaled(i) and not self.side.sig_all:
            flags |= SendFlag.SIGNALED
        if op.solicited:
            flags |= SendFlag.SOLICITED
        if op.inline and not op.kind.answered:
            flags |= SendFlag.INLINE
        if op.fence:
            flags |= SendFlag.FENCE
        lkey = self.local.lkey ^ (0x5A5A00 if op.fatal is Fatal.BAD_LKEY else 0)
        sges = [Sge(self.engine.base + at, n, lkey) for at, n in self.src[i] if op.kind is not Kind.FLUSH]
        remote = rkey = 0
        if not op.kind.sends:
            p = self.peer
            region = self.regions[self.target(i)]
            remote = p.open.iova + region.offset - p.exposed
            rkey = p.open.rkey
            if op.fatal is Fatal.BAD_RKEY:
                rkey ^= 0x1234
            elif op.fatal is Fatal.OUT_OF_BOUNDS:
                remote = p.open.iova + max(1, p.exposed_end - p.exposed) - op.size + 1
                if op.kind.atomic:
                    remote += -remote % 8
            elif op.fatal is Fatal.NO_ACCESS:
                remote, rkey = p.closed.iova + region.offset - p.exposed, p.closed.rkey
        imm = imm_of(self.stream, i)
        return Wr(
            self.wr_base | i, sges, _WR_OPCODE[op.kind], flags, imm, remote, rkey, *self.operands.get(i, ())
        )  # fmt: skip

    def target(self, i: int) -> int:
        return i if self.ops[i].target < 0 else self.ops[i].target

    # ---- the model -----------------------------------------------------------------------------

    def run_model(self) -> None:
        """What the operations before the first mistake do, in their order, to the peer's memory."""
        for i, op in enumerate(self.ops[: self.fatal_at]):
            if op.kind is Kind.READ:
                self.expect_read[i] = bytes(self.regions[self.target(i)].state[: op.size])
            elif op.kind.answered:
                self._model_atomic(i, op)
            elif not op.kind.sends:
                self.regions[self.target(i)].state[: op.size] = content(self.stream, i, op.size)

    def _model_atomic(self, i: int, op: Op) -> None:
        state = self.regions[self.target(i)].state
        self.expect_read[i] = bytes(state)
        before = int.from_bytes(state, "little")
        self.operands[i] = compare_add, swap = operands(op.kind, self.stream, i, before)
        if op.kind is Kind.FETCH_ADD:
            state[:] = ((before + compare_add) & (2**64 - 1)).to_bytes(8, "little")
        elif before == compare_add:
            state[:] = swap.to_bytes(8, "little")

    # ---- completions -----------------------------------------------------------------------------

    def on_wc(self, wc: Wc) -> None:
        """Hold a completion against the model. Raises InvariantError."""
        if wc.qp_num != self.qp.num:
            raise self.broken("wc", f"completion {wc} names QP {wc.qp_num:#x}, not {self.qp.num:#x}")
        index = wc.wr_id & (RECV_BIT - 1)
        if wc.wr_id & RECV_BIT:
            self._on_recv(wc, index)
        else:
            self._on_send(wc, index)

    def _on_send(self, wc: Wc, i: int) -> None:
        status = WcStatus(wc.status)
        if not self.next_send <= i < self.posted:
            raise self.broken("order", f"completion of op {i}, expected {self.next_send}..{self.posted - 1}")
        for k in range(self.next_send, i):
            if self.signaled(k) or self.failed:
                raise self.broken("order", f"completion of op {i} before that of op {k}")
        if self.failed:
            if status is not WcStatus.WR_FLUSH_ERR:
                raise self.broken("flush", f"op {i} after the error has {status.name}")
        elif status is not WcStatus.SUCCESS:
            self.failed = status
            self.failed_at = i
            self._check_failure(i, status)
            for k in range(self.next_send, i):
                self._check_read(k)
        else:
            if i >= self.fatal_at:
                raise self.broken("error", f"op {i} ({self.ops[self.fatal_at].fatal.name}) succeeded")
            if not self.signaled(i):
                raise self.broken("unsignaled", f"op {i} was not signalled, but completed")
            if wc.opcode != _WC_OPCODE[self.ops[i].kind]:
                raise self.broken("wc", f"op {i} {self.ops[i].kind.name} completed as opcode {wc.opcode}")
            for k in range(self.next_send, i + 1):
                self._check_read(k)
        self.next_send = i + 1
        self.done = i + 1
        if not self.failed:
            self.post_sends()

    def _check_failure(self, i: int, status: WcStatus) -> None:
        op, peer = self.ops[i], self.peer
        if self.rough and self.mistaken() and status is WcStatus.RETRY_EXC_ERR and i <= self.fatal_at:
            return  # the peer's last words were lost, and it says nothing more
        if i == self.fatal_at:
            if status is _FATAL_SEND[op.fatal] or (self._peer_mistake() and status in _BYSTANDER):
                return
            raise self.broken("error", f"op {i} ({op.fatal.name}) failed with {status.name}")
        if peer.fatal_at < len(peer.ops) and status in _BYSTANDER:
            return
        raise self.broken("error", f"op {i} {op.kind.name} failed with {status.name} without reason")

    def _peer_mistake(self) -> bool:
        return self.peer.fatal_at < len(self.peer.ops)

    def _check_read(self, i: int) -> None:
        if i in self.expect_read:
            want = self.expect_read[i]
            if self._get_pieces(self.src[i], len(want)) != want:
                raise self.broken("data", f"{self.ops[i].kind.name} op {i} completed with wrong data")
            self._model_pieces(self.src[i], want)

    def _on_recv(self, wc: Wc, k: int) -> None:
        status = WcStatus(wc.status)
        if k != self.next_recv or k >= self.recv_posted:
            raise self.broken("order", f"receive {k} completed, expected {self.next_recv}")
        self.next_recv = k + 1
        i, op = self.incoming[k]
        if status is not WcStatus.SUCCESS:
            self._on_bad_recv(k, i, op, status)
            return
        if self.recv_bad:
            raise self.broken("flush", f"receive {k} succeeded after a failed one")
        self.recv_ok += 1
        if i >= self.peer.fatal_at and not self.peer.late_mistake():
            raise self.broken("error", f"received op {i}, which must fail ({op.fatal.name})")
        if i >= self.peer.posted:
            raise self.broken("order", f"received op {i} before it was posted")
        want_op = WcOpcode.RECV if op.kind.sends else WcOpcode.RECV_RDMA_WITH_IMM
        has_imm = op.kind is not Kind.SEND
        if wc.opcode != want_op or wc.byte_len != op.size or bool(wc.flags & WcFlag.WITH_IMM) != has_imm:
            raise self.broken("wc", f"receive {k} of {op} completed as {wc}")
        if has_imm and wc.imm != imm_of(self.peer.stream, i):
            raise self.broken("data", f"receive {k} has the wrong immediate {wc.imm:#x}")
        if op.kind.sends:
            data = content(self.peer.stream, i, op.size)
            if self._get_pieces(self.recvs[k], op.size) != data:
                raise self.broken("data", f"receive {k} (op {i}) has the wrong bytes")
            self._model_pieces(self.recvs[k], data)
        self._check_visible(i)
        if self.recv_posted < len(self.recvs):
            self.later(self.side.recv_delay, self.post_recvs)

    def _check_visible(self, before: int) -> None:
        """A message is the sign that all WRITEs posted before it are in memory."""
        peer = self.peer
        if before and peer.ops[before - 1].kind is Kind.WRITE and peer.ops[before - 1].target < 0:
            i = before - 1
            if not any(op.target == i for op in peer.ops):
                r = peer.regions[i]
                if bytes(self.engine.memory[r.offset : r.offset + r.size]) != content(peer.stream, i, r.size):
                    raise self.broken("data", f"op {before} arrived before the WRITE ahead of it")

    def _on_bad_recv(self, k: int, i: int, op: Op, status: WcStatus) -> None:
        first, self.recv_bad = not self.recv_bad, True
        expected = op.fatal is Fatal.SHORT_RECV and i == self.peer.fatal_at
        if expected and first and status is WcStatus.LOC_LEN_ERR:
            return
        if status is not WcStatus.WR_FLUSH_ERR or not self.mistaken():
            raise self.broken("error", f"receive {k} failed with {status.name}")

    # ---- the end -------------------------------------------------------------------------------

    def mistaken(self) -> bool:
        """Whether its connection must end in an error, by either side's mistake."""
        return self._peer_mistake() or self.fatal_at < len(self.ops)

    def late_mistake(self) -> bool:
        """Whether its mistake shows only when later operations may be done: READ data without a place."""
        bad = self.ops[self.fatal_at]
        return bad.fatal is Fatal.BAD_LKEY and bad.kind.answered

    def finished(self) -> bool:
        """Whether this end waits for nothing more."""
        if self.failed or self.recv_bad or (self.mistaken() and self.qp.state() is QpState.ERR):
            return self.next_send == self.posted and self.next_recv == self.recv_posted
        sends = 0 if self.side.only_rtr else len(self.ops)
        if self.done < sends or self.fatal_at < len(self.ops):
            return False
        if self._peer_mistake():
            # A mistake that only the peer can see need not show here.
            arriving = sum(1 for i, _ in self.incoming if i < self.peer.fatal_at)
            return self.peer.ops[self.peer.fatal_at].fatal is Fatal.BAD_LKEY and self.next_recv >= arriving
        return self.next_recv == len(self.recvs)

    def describe(self) -> str:
        """Progress in one line, for messages."""
        return (
            f"{self.name}: {self.qp.state().name}, "
            f"sends {self.done}/{self.posted}/{len(self.ops)} (done/posted/all), "
            f"receives {self.next_recv}/{self.recv_posted}/{len(self.recvs)}"
            + (f", failed {self.failed.name}" if self.failed else "")
        )

    def messages(self) -> int:
        """Requests that the peer's responder counts: a long READ is asked for in parts."""
        return sum(max(1, -(-op.size // READ_PART)) if op.kind is Kind.READ else 1 for op in self.ops)

    def packets(self) -> int:
        """PSNs that its operations take."""
        return sum(max(1, -(-op.size // self.conn.mtu)) for op in self.ops)

    def finish_model(self) -> None:
        """Put what its operations did to the peer's memory into the peer's model; mask what is open."""
        peer = self.peer
        good = self.done_ok()
        for r in self.regions.values():
            peer.arena.model[r.offset : r.offset + r.size] = r.state
        for i in range(good, len(self.ops)):
            if not self.ops[i].kind.sends:
                r = self.regions[self.target(i)]
                peer.arena.masked.append((r.offset, r.size))
            if self.ops[i].kind.answered:
                self.arena.masked += self.src[i]
        for where in self.recvs[self.recv_ok :]:
            self.arena.masked += where

    def done_ok(self) -> int:
        return self.failed_at if self.failed else self.done


_BYSTANDER = (WcStatus.WR_FLUSH_ERR, WcStatus.RETRY_EXC_ERR)
