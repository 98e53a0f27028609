# SPDX-License-Identifier: BSD-3-Clause
"""A simulated world as Python objects: thin, typed handles over native/sim/simapi.h.

Times are integers in ns of virtual time. A call that the engine refuses raises VerbsError (with
the errno); a world in which the engine broke engine.h's rules raises nothing by itself: `run`
returns Reason.VIOLATION and `violation()` says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from .lib import load
from .records import (
    ANY,
    ASYNC,
    MAX_PACKET,
    NEVER,
    WC,
    Action,
    Async,
    Caps,
    CqMode,
    Datagram,
    Link,
    Mutation,
    Path,
    Reason,
    Stats,
    VerbsError,
    Wc,
    Wr,
    check,
    gid,
)
from .verbs import ALL_ACCESS, QpState, QpType


class Engine:
    """A process with a device: its memory, address and engine."""

    def __init__(self, world: World, index: int, size: int, address: bytes, qpn_base: int, qpn_count: int):
        self.world = world
        self.index = index
        self.gid = address
        self.qpn_base = qpn_base
        self.qpn_count = qpn_count
        self.base = int(world.ffi.cast("uintptr_t", world.lib.mgs_arena(world.ptr, index)))
        self.memory: memoryview = memoryview(
            world.ffi.buffer(world.lib.mgs_arena(world.ptr, index), size)
        ).cast("B")

    def pd(self) -> int:
        return check(self.world.lib.mgs_pd_new(self.world.ptr, self.index))

    def cq(self, depth: int, mode: CqMode = CqMode.POLL) -> Cq:
        return Cq(self, check(self.world.lib.mgs_cq_new(self.world.ptr, self.index, depth, mode)))

    def mr(self, pd: int, offset: int, length: int, access: int = ALL_ACCESS, iova: int | None = None) -> Mr:
        """Memory [offset, offset+length) of the arena; `iova` defaults to its address."""
        at = self.base + offset if iova is None else iova
        w = self.world
        return Mr(w, check(w.lib.mgs_mr_new(w.ptr, pd, offset, length, at, access)), self.base + offset, at)

    def mw(self, pd: int, kind: int) -> Mw:
        """A memory window of type 1 or 2."""
        w = self.world
        return Mw(w, check(w.lib.mgs_mw_new(w.ptr, pd, kind)))

    def qp(
        self, pd: int, send_cq: Cq, recv_cq: Cq, caps: Caps = Caps(), sig_all: bool = False,
        kind: QpType = QpType.RC,
    ) -> Qp:  # fmt: skip
        w = self.world
        c = w.ffi.new(
            "struct mgs_caps *", (caps.send_wr, caps.recv_wr, caps.send_sge, caps.recv_sge, caps.inline)
        )
        index = check(w.lib.mgs_qp_new_type(w.ptr, pd, send_cq.index, recv_cq.index, c, int(sig_all), kind))
        granted = Caps(c.max_send_wr, c.max_recv_wr, c.max_send_sge, c.max_recv_sge, c.max_inline)
        return Qp(self, index, granted)

    def qp_of(
        self, kind: QpType, *, pd: int = -1, send_cq: Cq | None = None, recv_cq: Cq | None = None,
        srq: Srq | None = None, xrcd: int = -1, caps: Caps = Caps(),
    ) -> Qp:  # fmt: skip
        """A QP of any type, made of what that type needs."""
        w = self.world
        c = w.ffi.new(
            "struct mgs_caps *", (caps.send_wr, caps.recv_wr, caps.send_sge, caps.recv_sge, caps.inline)
        )
        parts = [kind, pd, *(-1 if x is None else x.index for x in (send_cq, recv_cq, srq)), xrcd]
        index = check(w.lib.mgs_qp_make(w.ptr, self.index, w.ffi.new("struct mgs_parts *", parts), c))
        granted = Caps(c.max_send_wr, c.max_recv_wr, c.max_send_sge, c.max_recv_sge, c.max_inline)
        return Qp(self, index, granted)

    def xrcd(self) -> int:
        return check(self.world.lib.mgs_xrcd_new(self.world.ptr, self.index))

    def srq(self, pd: int, max_wr: int, *, xrcd: int = -1, cq: Cq | None = None) -> Srq:
        """A shared receive queue; an XRC one with a domain and a CQ."""
        w = self.world
        at = -1 if cq is None else cq.index
        return Srq(self, check(w.lib.mgs_srq_new(w.ptr, pd, xrcd, at, max_wr, 4)))

    def ah(self, pd: int, address: bytes, *, tclass: int = 0, hop_limit: int = 64) -> int:
        """An address handle to a GID."""
        w = self.world
        fields = {"dgid": list(address), "tclass": tclass, "hop_limit": hop_limit}
        path = w.ffi.new("struct mgs_path *", fields)
        return check(w.lib.mgs_ah_new(w.ptr, pd, path))

    def attach(self, on: bool) -> None:
        """Whether packets to its address reach it."""
        self.world.lib.mgs_attach(self.world.ptr, self.index, int(on))

    def stop_ready(self) -> bool:
        return bool(self.world.lib.mgs_stop_ready(self.world.ptr, self.index))

    def stop(self) -> None:
        self.world.lib.mgs_stop(self.world.ptr, self.index)

    def stopped(self) -> bool:
        return bool(self.world.lib.mgs_stopped(self.world.ptr, self.index))

    def resume(self, address: bytes | None = None, clock_offset: int = 0) -> None:
        """Go on, at a new address if one is given, under a clock that is `clock_offset` ahead."""
        if address is not None:
            self.gid = address
        w = self.world
        w.lib.mgs_resume(w.ptr, self.index, w.ffi.NULL if address is None else address, clock_offset)

    def dump(self) -> bytes:
        w = self.world
        size = w.lib.mgs_dump(w.ptr, self.index, w.ffi.NULL, 0)
        buf = w.ffi.new("uint8_t[]", size)
        again = w.lib.mgs_dump(w.ptr, self.index, buf, size)
        assert again == size, f"mg_dump needed {size} bytes, then {again}"
        return bytes(w.ffi.buffer(buf))

    def counters(self) -> dict[str, int]:
        w = self.world
        return {
            w.ffi.string(w.lib.mgs_counter_name(i)).decode(): w.lib.mgs_counter(w.ptr, self.index, i)
            for i in range(w.lib.mgs_counter_count())
        }

    def deadline(self) -> int:
        return int(self.world.lib.mgs_deadline(self.world.ptr, self.index))

    def dry(self) -> bool:
        """A UC or UD receive queue ran dry, and nothing was posted since."""
        return bool(self.world.lib.mgs_rx_dry(self.world.ptr, self.index))

    def free(self) -> None:
        self.world.lib.mgs_engine_free(self.world.ptr, self.index)


class Mr:
    """A memory region; `addr` where it lies, `iova` how remote peers name it."""

    def __init__(self, world: World, index: int, addr: int, iova: int):
        self.world, self.index, self.addr, self.iova = world, index, addr, iova
        self.lkey = int(world.lib.mgs_mr_lkey(world.ptr, index))
        self.rkey = int(world.lib.mgs_mr_rkey(world.ptr, index))

    def free(self) -> None:
        check(self.world.lib.mgs_mr_free(self.world.ptr, self.index))


class Mw:
    """A memory window. `rkey` is the engine's idea of its key, new with each binding."""

    def __init__(self, world: World, index: int):
        self.world, self.index = world, index

    @property
    def rkey(self) -> int:
        return int(self.world.lib.mgs_mw_rkey(self.world.ptr, self.index))

    def free(self) -> None:
        check(self.world.lib.mgs_mw_free(self.world.ptr, self.index))


class Cq:
    """A completion queue."""

    def __init__(self, engine: Engine, index: int):
        self.engine, self.index, self.world = engine, index, engine.world

    def poll(self, n: int = 64) -> list[Wc]:
        """At most `n` (up to 64) completions; for CqMode.MANUAL."""
        out = self.world.ffi.new("struct mgs_wc[64]")
        got = self.world.lib.mgs_cq_poll(self.world.ptr, self.index, n, out)
        return [Wc._make(v) for v in WC.iter_unpack(self.world.ffi.buffer(out)[: got * WC.size])]

    def sweep(self) -> None:
        """Poll what is there into the world's log, whatever the mode."""
        self.world.lib.mgs_cq_sweep(self.world.ptr, self.index)

    def events(self) -> int:
        return int(self.world.lib.mgs_cq_events(self.world.ptr, self.index))

    def resize(self, depth: int) -> None:
        check(self.world.lib.mgs_cq_resize(self.world.ptr, self.index, depth))

    def free(self) -> None:
        check(self.world.lib.mgs_cq_free(self.world.ptr, self.index))


class Qp:
    """A queue pair. `caps`: what was granted."""

    def __init__(self, engine: Engine, index: int, caps: Caps):
        self.engine, self.index, self.caps, self.world = engine, index, caps, engine.world
        self.num = int(self.world.lib.mgs_qp_num(self.world.ptr, index))

    def modify(self, state: QpState, path: Path | None = None) -> None:
        w = self.world
        arg = w.ffi.NULL
        if path is not None:
            p = path
            arg = w.ffi.new(
                "struct mgs_path *",
                (
                    list(p.dgid), p.dest_qpn, p.rq_psn, p.sq_psn, p.mtu, p.access, p.timeout, p.retry_cnt,
                    p.rnr_retry, p.min_rnr_timer, p.max_rd_atomic, p.max_dest_rd_atomic, p.hop_limit,
                    p.tclass, p.qkey,
                ),
            )  # fmt: skip
        check(w.lib.mgs_qp_modify(w.ptr, self.index, state, arg))

    def connect(self, path: Path, upto: QpState = QpState.RTS) -> None:
        """From RESET through INIT and RTR to RTS, or not as far."""
        for state in (QpState.INIT, QpState.RTR, QpState.RTS):
            if state <= upto:
                self.modify(state, path)

    def state(self) -> QpState:
        return QpState(check(self.world.lib.mgs_qp_state(self.world.ptr, self.index)))

    def query(self) -> tuple[Path, Caps]:
        """What ibv_query_qp says."""
        w = self.world
        p, c = w.ffi.new("struct mgs_path *"), w.ffi.new("struct mgs_caps *")
        check(w.lib.mgs_qp_query(w.ptr, self.index, p, c))
        values = {name: int(getattr(p, name)) for name in Path.__slots__ if name != "dgid"}
        caps = Caps(c.max_send_wr, c.max_recv_wr, c.max_send_sge, c.max_recv_sge, c.max_inline)
        return Path(bytes(p.dgid), **values), caps

    def post_send(self, *wrs: Wr) -> None:
        """One chained ibv_post_send; VerbsError if any was refused."""
        self._post(self.world.lib.mgs_post_send, wrs)

    def post_recv(self, *wrs: Wr) -> None:
        self._post(self.world.lib.mgs_post_recv, wrs)

    def _post(self, call: Any, wrs: Sequence[Wr]) -> None:
        _post(self.world, self.index, call, wrs)

    def mcast(self, group: bytes, on: bool = True) -> None:
        """Attach to a multicast group, or detach."""
        check(self.world.lib.mgs_mcast(self.world.ptr, self.index, group, int(on)))

    def free(self) -> None:
        check(self.world.lib.mgs_qp_free(self.world.ptr, self.index))


class Srq:
    """A shared receive queue; `num`: how XRC requests name it."""

    def __init__(self, engine: Engine, index: int):
        self.engine, self.index, self.world = engine, index, engine.world
        self.num = int(self.world.lib.mgs_srq_num(self.world.ptr, index))

    def post(self, *wrs: Wr) -> None:
        _post(self.world, self.index, self.world.lib.mgs_post_srq_recv, wrs)

    def modify(self, *, max_wr: int = 0, limit: int = 0) -> None:
        """Set the limit and, unless 0, the size."""
        check(self.world.lib.mgs_srq_modify(self.world.ptr, self.index, max_wr, limit))

    def free(self) -> None:
        check(self.world.lib.mgs_srq_free(self.world.ptr, self.index))


def _post(w: World, index: int, call: Any, wrs: Sequence[Wr]) -> None:
    for i, wr in enumerate(wrs):
        s = w.wr[i]
        s.wr_id, s.opcode, s.flags, s.imm = wr.wr_id, wr.opcode, wr.flags, wr.imm
        s.remote_addr, s.rkey, s.n_sge = wr.remote_addr, wr.rkey, len(wr.sges)
        s.compare_add, s.swap, s.srqn = wr.compare_add, wr.swap, wr.srqn
        s.ah, s.remote_qpn, s.remote_qkey = wr.ah + 1, wr.remote_qpn, wr.remote_qkey
        s.mw_rkey, s.mr_lkey, s.mw_access = wr.mw_rkey, wr.mr_lkey, wr.mw_access
        for k, sge in enumerate(wr.sges):
            s.sge[k].addr, s.sge[k].length, s.sge[k].lkey = sge
    rc = call(w.ptr, index, w.wr, len(wrs), w.posted)
    if rc < 0:
        raise VerbsError(-rc, int(w.posted[0]))


class World:
    """The virtual clock and network. Use as a context manager: it owns C memory."""

    def __init__(self, seed: int = 0):
        self.ffi, self.lib = load()
        self.ptr = self.lib.mgs_world_new(seed & NEVER)
        self.wr = self.ffi.new("struct mgs_wr[64]")
        self.posted = self.ffi.new("int *")
        self._wcs = self.ffi.new("struct mgs_wc[256]")
        self._packet = self.ffi.new("uint8_t[]", MAX_PACKET)
        self._info = self.ffi.new("struct mgs_packet_info *")
        self.engines: list[Engine] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.ptr is not None:
            for e in self.engines:
                e.memory.release()
            self.lib.mgs_world_free(self.ptr)
            self.ptr = None

    def engine(
        self, address: str = "10.0.0.1", *, qpn_base: int = 0, qpn_count: int = 1 << 24, slot: int = 0,
        max_mtu: int = 4096, seed: int = 1, clock_offset: int = 0, arena: int = 1 << 20,
        batch_window: int = 0, timer_slack: int = 0, tx_batch: int = 16, id_mode: int = 1,
        early_timer: int = 0, train: bool = False,
    ) -> Engine:  # fmt: skip
        """A new engine; the parameters are those of struct mgs_engine_config."""
        address_gid = gid(address)
        cfg = self.ffi.new(
            "struct mgs_engine_config *",
            (
                list(address_gid), qpn_base, qpn_count, slot, max_mtu, seed & NEVER, clock_offset & NEVER,
                arena, batch_window, timer_slack, tx_batch, id_mode, early_timer,
                train,
            ),
        )  # fmt: skip
        index = check(self.lib.mgs_engine_new(self.ptr, cfg))
        e = Engine(self, index, arena, address_gid, qpn_base, qpn_count)
        self.engines.append(e)
        return e

    @property
    def now(self) -> int:
        return int(self.lib.mgs_now(self.ptr))

    def run(self, until: int = NEVER) -> Reason:
        return Reason(self.lib.mgs_run(self.ptr, until))

    def run_for(self, duration: int) -> Reason:
        return self.run(self.now + duration)

    def budget(self, events: int) -> None:
        self.lib.mgs_set_budget(self.ptr, events)

    def break_on(self, *, wc: bool = False, events: bool = False) -> None:
        """Whether `run` comes back at each completion, each asynchronous event."""
        self.lib.mgs_set_break(self.ptr, int(wc), int(events))

    def violation(self) -> str | None:
        text = self.lib.mgs_violation(self.ptr)
        return None if text == self.ffi.NULL else self.ffi.string(text).decode()

    def wcs(self) -> list[Wc]:
        """Completions logged since the last call, in the order they were polled."""
        out: list[Wc] = []
        while n := self.lib.mgs_wc_drain(self.ptr, self._wcs, 256):
            out += (Wc._make(v) for v in WC.iter_unpack(self.ffi.buffer(self._wcs)[: n * WC.size]))
        return out

    def events(self) -> list[Async]:
        out: list[Async] = []
        buf = self.ffi.new("struct mgs_async[16]")
        while n := self.lib.mgs_async_drain(self.ptr, buf, 16):
            out += (Async._make(v) for v in ASYNC.iter_unpack(self.ffi.buffer(buf)[: n * ASYNC.size]))
        return out

    def stats(self) -> Stats:
        s = self.ffi.new("struct mgs_stats *")
        self.lib.mgs_get_stats(self.ptr, s)
        return Stats(**{name: int(getattr(s, name)) for name in Stats.__slots__})

    def link(self, link: Link, src: int = ANY, dst: int = ANY) -> None:
        """Set the way from engine `src` to engine `dst`."""
        names = Link.__slots__
        c = self.ffi.new("struct mgs_link *", {name: getattr(link, name) for name in names})
        self.lib.mgs_link_set(self.ptr, src, dst, c)

    def rule(
        self, action: Action, op: int | tuple[int, int] = (0, 255), *, src: int = ANY, dst: int = ANY,
        syndrome: int | None = None, syndrome_mask: int = 255, skip: int = 0, count: int = 0, delay: int = 0,
    ) -> int:  # fmt: skip
        """Add a rule for single packets; returns its number for `hits`. count 0: for ever."""
        lo, hi = (op, op) if isinstance(op, int) else op
        rule = self.ffi.new(
            "struct mgs_rule *",
            (
                src, dst, lo, hi, 0 if syndrome is None else syndrome_mask, syndrome or 0, action, 0, skip,
                count, delay,
            ),
        )  # fmt: skip
        return check(self.lib.mgs_rule_add(self.ptr, rule))

    def hits(self, rule: int) -> int:
        return int(self.lib.mgs_rule_hits(self.ptr, rule))

    def clear_rules(self) -> None:
        self.lib.mgs_rules_clear(self.ptr)

    def standin(
        self, number: int, address: bytes, on: bool, qpn_base: int = 0, qpn_count: int = 1 << 24
    ) -> None:
        """Packets to `address` and these QPNs that no engine takes go to stand-in `number`."""
        check(self.lib.mgs_standin_set(self.ptr, number, address, qpn_base, qpn_count, int(on)))

    def next_for_standin(self) -> Datagram | None:
        got = self.lib.mgs_standin_next(self.ptr, self._info, self._packet, MAX_PACKET)
        return self._datagram() if got else None

    def captured(self) -> list[Datagram]:
        """What rules with CAPTURE or STEAL have kept, oldest first."""
        out: list[Datagram] = []
        while self.lib.mgs_captured(self.ptr, len(out), self._info, self._packet, MAX_PACKET):
            out.append(self._datagram())
        return out

    def _datagram(self) -> Datagram:
        i = self._info
        return Datagram(
            int(i.t), bytes(i.src), bytes(i.dst), int(i.sport), int(getattr(i, "from")), int(i.to),
            bytes(self.ffi.buffer(self._packet, i.len)), int(i.tclass), int(i.hop_limit),
        )  # fmt: skip

    def inject(
        self, src: bytes, dst: bytes, data: bytes, *, sport: int = 0xC000, sender: int = -1, icrc: bool = True
    ) -> None:
        """Send bytes from outside. `icrc`: add a right one; `sender`: whose links it takes (-1: at once)."""
        check(self.lib.mgs_inject(self.ptr, sender, src, dst, sport, data, len(data), int(not icrc)))

    def trace(self, on: bool = True) -> None:
        self.lib.mgs_trace(self.ptr, int(on))

    def trace_text(self) -> str:
        """What happened since the last call, one line each (only while tracing)."""
        text = self.ffi.new("const char **")
        n = self.lib.mgs_trace_text(self.ptr, text)
        return bytes(self.ffi.buffer(text[0], n)).decode() if n else ""

    def mutate(self, mutation: Mutation, n: int) -> None:
        """Make the n-th completion (from 1, of all engines) go wrong."""
        self.lib.mgs_mutate(self.ptr, mutation, n)
