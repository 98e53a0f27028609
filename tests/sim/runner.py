# SPDX-License-Identifier: BSD-3-Clause
"""Run a schedule: build its world, let its programs and moves happen, check what must hold.

`run` returns a Result or raises InvariantError, whose text ends with the command that replays the
run. What is checked at each completion is in program.py; here is what concerns whole runs: nothing
gets stuck, memory is as the model says, the dumps agree with each other, and all falls silent.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from migroce import dump as dumps

from .program import Arena, End, InvariantError
from .schedule import Fatal, Host, Move, Schedule
from .standins import StandIns
from .verbs import Event, QpState
from .world import MS, NEVER, S, Action, Cq, CqMode, Engine, Mutation, Reason, Stats, World, gid

LIMIT = 20 * S
"""Virtual time within which everything must be done after the last thing that a schedule asks for."""
LIMIT_MISTAKEN = 70 * S
"""Likewise with a mistake: somebody may wait for a minute for a peer that has broken off."""
SILENCE = 20 * S
"""Virtual time within which the engines must have nothing more to say once all is done."""
EVENTS = 1_000_000
EPSILON = 1


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to. Times in ns of virtual time."""

    done_at: int
    quiet_at: int
    stats: Stats
    counters: tuple[dict[str, int], ...]
    stood_in: int
    """Packets answered by stand-ins."""


class Process:
    """An engine with its program's ends, and whether it is frozen."""

    def __init__(self, host: Host):
        self.host = host
        self.arena = Arena()
        self.ends: list[End] = []
        self.engine: Engine
        self.cqs: list[Cq] = []
        self.pd = -1
        self.frozen = False
        self.moving = False
        self.waiting: list[Callable[[], None]] = []
        self.clock = host.clock

    def qpn_range(self) -> tuple[int, int]:
        count = (1 << 24) // self.host.slots
        return self.host.slot * count, count


class Run:
    """One run of one schedule."""

    def __init__(self, schedule: Schedule, *, trace: bool = False, mutation: tuple[Mutation, int] | None = None):
        self.schedule = schedule
        self.world = World(schedule.seed)
        self.world.trace(trace)
        if mutation:
            self.world.mutate(*mutation)
        self.queue: list[tuple[int, int, Process | None, Callable[[], None]]] = []
        self.order = itertools.count()
        self.procs = [Process(h) for h in schedule.hosts]
        self.ends: list[End] = []
        self.by_stream: dict[int, End] = {}
        self.moves_left = len(schedule.moves)
        self.standins = StandIns(self.world)
        self.start = self.world.now
        self.horizon = self.start
        self.limit = LIMIT

    # ---- building --------------------------------------------------------------------------------

    def build(self) -> None:
        s, w = self.schedule, self.world
        rough = bool(s.link.loss or s.link.corrupt or s.link.queue or s.drops or s.moves)
        for n, c in enumerate(s.connections):
            pa, pb = self.procs[c.a.engine], self.procs[c.b.engine]
            a = End(c, c.a, 2 * n, pa.arena, f"connection {n} side a", rough)
            b = End(c, c.b, 2 * n + 1, pb.arena, f"connection {n} side b", rough)
            a.peer, b.peer = b, a
            for proc, end in ((pa, a), (pb, b)):
                end.lay_out()
                proc.ends.append(end)
                self.ends.append(end)
                self.by_stream[end.stream] = end
        for end in self.ends:
            end.lay_out_exposed()
        for i, proc in enumerate(self.procs):
            self._build_process(i, proc)
        for end in self.ends:
            proc = self.procs[end.side.engine]
            end.later = self._later(proc)
            end.now = lambda: w.now - self.start
            if proc.host.shared_cq:
                send_cq = recv_cq = proc.cqs[0]
            else:
                send_cq, recv_cq = proc.cqs[0], proc.cqs[1]
            end.set_up(proc.engine, proc.pd, send_cq, recv_cq)
        for end in self.ends:
            end.run_model()
            self._schedule_end(end)
        w.link(s.link)
        for d in s.drops:
            w.rule(Action.DROP, d.op, count=d.count, skip=d.skip, syndrome=None if d.syndrome < 0 else d.syndrome)
        w.break_on(wc=True, events=True)
        w.budget(EVENTS)
        for move in s.moves:
            self.at(move.at, None, lambda move=move: self._stop(move))  # type: ignore[misc]

    def _build_process(self, i: int, proc: Process) -> None:
        h = proc.host
        base, count = proc.qpn_range()
        size = proc.arena.size + 64
        proc.engine = self.world.engine(
            h.address, qpn_base=base, qpn_count=count, slot=h.slot, seed=self.schedule.seed * 31 + i + 1,
            clock_offset=h.clock, arena=size, batch_window=h.batch_window, timer_slack=h.timer_slack,
            tx_batch=h.tx_batch, id_mode=h.id_mode, early_timer=h.early_timer,
        )  # fmt: skip
        proc.arena.model = bytearray(size)
        proc.pd = proc.engine.pd()
        depth = sum(e.side.depth + e.side.recv_depth for e in proc.ends) + 1
        mode = CqMode(h.cq_mode)
        proc.cqs = [proc.engine.cq(depth, mode) for _ in range(1 if h.shared_cq else 2)]

    def _schedule_end(self, end: End) -> None:
        proc, side = self.procs[end.side.engine], end.side
        self.at(side.connect_at, proc, end.connect)
        if side.recv_at > side.connect_at:
            self.at(side.recv_at, proc, end.post_recvs)
        for t in sorted({max(side.connect_at, op.at) for op in side.ops} | {side.connect_at}):
            self.at(t, proc, end.post_sends)

    # ---- time --------------------------------------------------------------------------------------

    def at(self, t: int, proc: Process | None, what: Callable[[], None]) -> None:
        """Call `what` at `t` after the start; if `proc` is frozen then, when it goes on."""
        heapq.heappush(self.queue, (self.start + t, next(self.order), proc, what))
        self.horizon = max(self.horizon, self.start + t)

    def _later(self, proc: Process) -> Callable[[int, Callable[[], None]], None]:
        def later(delay: int, what: Callable[[], None]) -> None:
            if delay == 0 and not proc.frozen:
                what()
            else:
                self.at(self.world.now - self.start + delay, proc, what)

        return later

    def step(self) -> Reason:
        """Up to the next thing that concerns us."""
        w = self.world
        due = self.queue[0][0] if self.queue else NEVER
        reason = w.run(min(due, self.horizon + self.limit))
        if reason is Reason.VIOLATION:
            raise InvariantError("engine", w.violation() or "?")
        if reason is Reason.BUDGET:
            raise InvariantError("livelock", f"more than {EVENTS} events; " + self.describe())
        for wc in w.wcs():
            end = self.by_stream.get(wc.wr_id >> 32)
            if end is None or end.engine.index != wc.engine:
                raise InvariantError("wc", f"a completion of nobody's request: {wc}")
            end.on_wc(wc)
        self._events()
        if reason is Reason.STANDIN:
            self.standins.answer()
        # What was done now may have made new events: it is quiet only if nothing was.
        while self.queue and self.queue[0][0] <= w.now:
            _, _, proc, what = heapq.heappop(self.queue)
            reason = Reason.UNTIL
            if proc is not None and proc.frozen:
                proc.waiting.append(what)
            else:
                what()
        return reason

    def _events(self) -> None:
        for event in self.world.events():
            end = next((e for e in self.ends if e.qp.index == event.qp), None)
            if event.type == Event.COMM_EST:
                continue
            if end is None or not end.mistaken():
                raise InvariantError("event", f"an asynchronous event without reason: {event}")
            end.events.append(event.type)

    # ---- moves ---------------------------------------------------------------------------------------

    def _now(self) -> int:
        return self.world.now - self.start

    def _stop(self, move: Move, asked_at: int = -1) -> None:
        proc = self.procs[move.engine]
        if proc.moving and asked_at < 0:
            self.at(self._now() + MS, None, lambda: self._stop(move))
            return
        proc.moving = True
        asked_at = self._now() if asked_at < 0 else asked_at
        ready = proc.engine.stop_ready()
        if not ready and self._now() - asked_at < move.ready_wait:
            self.at(self._now() + MS // 5, None, lambda: self._stop(move, asked_at))
            return
        engine = proc.engine
        engine.stop()
        if not engine.stopped():
            raise InvariantError("stop", "mg_stop did not stop")
        engine.attach(False)
        dump = self._dump(proc, stopped=True)
        if any(q.connected and not q.token_acked for q in dump.qps):
            # A peer without our token cannot be told of another address: it must not be left.
            move = replace(move, address="")
        number = -1
        if move.standin:
            number = self.standins.add(dump, engine.index)
            self.at(self._now() + move.gap, None, lambda: self.standins.on(number))
        self.at(self._now() + min(move.freeze, move.pause), None, lambda: self._freeze(proc))
        self.at(self._now() + max(move.pause, move.gap + EPSILON), None, lambda: self._resume(move, proc, number))

    def _freeze(self, proc: Process) -> None:
        proc.frozen = True

    def _resume(self, move: Move, proc: Process, number: int) -> None:
        if move.clock >= 0:
            proc.clock = move.clock
        address = gid(move.address) if move.address else None
        if number >= 0:
            if address is None:
                self.standins.off(number)
            else:
                self.standins.moved(number, address)
        proc.frozen = False
        proc.engine.attach(True)
        proc.engine.resume(address, proc.clock)
        proc.moving = False
        self.moves_left -= 1
        waiting, proc.waiting = proc.waiting, []
        for what in waiting:
            what()

    def _dump(self, proc: Process, *, stopped: bool) -> dumps.Dump:
        try:
            dump = dumps.parse(proc.engine.dump())
        except dumps.DumpError as e:
            raise InvariantError("dump", f"{proc.host.address}: {e}") from e
        if dump.stopped != stopped or len(dump.qps) != len(proc.ends) or dump.context.gid != proc.engine.gid:
            raise InvariantError("dump", f"{proc.host.address}: {dump.context}, stopped {dump.stopped}")
        return dump

    # ---- running ---------------------------------------------------------------------------------------

    def describe(self) -> str:
        return "; ".join(end.describe() for end in self.ends)

    def execute(self) -> Result:
        """All of it. Raises InvariantError."""
        self.build()
        mistaken = any(end.mistaken() for end in self.ends)
        if mistaken:
            self.limit = LIMIT_MISTAKEN
        while not (self.moves_left == 0 and all(end.finished() for end in self.ends)):
            reason = self.step()
            if self.world.now >= self.horizon + self.limit or (reason is Reason.QUIET and not self.queue):
                if self.moves_left == 0 and all(end.finished() for end in self.ends):
                    break
                raise InvariantError("stuck", f"at {self._now() / MS:.3f} ms: " + self.describe())
        done_at = self._now()
        self.horizon = self.world.now + SILENCE - self.limit
        while self.world.now < self.horizon + self.limit:
            if self.step() is Reason.QUIET and not self.queue:
                break
        else:
            if not mistaken:
                raise InvariantError("noise", "the engines do not fall silent")
        quiet_at = self._now()
        self.check_end()
        result = Result(
            done_at, quiet_at, self.world.stats(), tuple(p.engine.counters() for p in self.procs),
            self.standins.answered,
        )  # fmt: skip
        self.destroy()
        return result

    def check_end(self) -> None:
        for end in self.ends:
            end.finish_model()
        for proc in self.procs:
            self._check_memory(proc)
            self._check_counters(proc)
        for end in self.ends:
            self._check_error_state(end)
        self._check_dumps()

    def _check_memory(self, proc: Process) -> None:
        have, want = bytearray(proc.engine.memory), proc.arena.model
        for at, size in proc.arena.masked:
            have[at : at + size] = want[at : at + size]
        if have != want:
            at = next(i for i in range(len(want)) if have[i] != want[i])
            n = sum(x != y for x, y in zip(have, want, strict=True))
            raise InvariantError("memory", f"{proc.host.address}: {n} wrong bytes, the first is {proc.arena.owner(at)}")

    def _check_counters(self, proc: Process) -> None:
        c = proc.engine.counters()
        if c["rx_malformed"]:
            raise InvariantError("counters", f"{proc.host.address}: {c['rx_malformed']} intact packets seemed malformed")

    def _check_error_state(self, end: End) -> None:
        state = end.qp.state()
        if not end.mistaken():
            want = QpState.RTR if end.side.only_rtr else QpState.RTS
            if state is not want:
                raise InvariantError("state", f"{end.name} is in {state.name}, not {want.name}")
            return
        own = end.fatal_at < len(end.ops)
        peers = end.peer.ops[end.peer.fatal_at].fatal if not own else Fatal.NONE
        if (own or end.failed or end.recv_bad or peers is not Fatal.BAD_LKEY) and state is not QpState.ERR:
            raise InvariantError("state", f"{end.name} is in {state.name} after an error")
        if peers in (Fatal.BAD_RKEY, Fatal.OUT_OF_BOUNDS, Fatal.NO_ACCESS) and end.events != [Event.QP_ACCESS_ERR]:
            raise InvariantError("event", f"{end.name}: events {end.events} instead of one QP_ACCESS_ERR")

    def _check_dumps(self) -> None:
        """Both ends' records agree with each other and with what has happened."""
        records: dict[int, dumps.QpRecord] = {}
        for proc in self.procs:
            dump = self._dump(proc, stopped=False)
            qps = {q.qpn: q for q in dump.qps}
            if any(cq.fill for cq in dump.cqs) and CqMode(proc.host.cq_mode) is not CqMode.SOLICITED:
                raise InvariantError("dump", f"{proc.host.address}: completions nobody polled: {dump.cqs}")
            for end in proc.ends:
                records[end.stream] = qps[end.qp.num]
        for end in self.ends:
            if not end.mistaken():
                self._check_record(end, records[end.stream], records[end.peer.stream])

    def _check_record(self, end: End, q: dumps.QpRecord, p: dumps.QpRecord) -> None:
        sent = 0 if end.side.only_rtr else end.packets()
        psn = (end.side.psn + sent) & 0xFFFFFF
        n_msgs = 0 if end.peer.side.only_rtr else len(end.peer.ops)
        capable = not self.schedule.link.strip
        facts = {
            "mstate": (q.mstate, 0),
            "sq_fill": (q.sq_fill, 0),
            "rq_fill": (q.rq_fill, end.recv_posted - end.next_recv),
            "next_psn": (q.next_psn, end.side.psn if end.side.only_rtr else psn),
            "una_psn": (q.una_psn, end.side.psn if end.side.only_rtr else psn),
            "the peer's epsn": (p.epsn, psn),
            "msn": (q.msn, n_msgs & 0xFFFFFF),
            "peer_gid": (q.peer_gid, end.peer.engine.gid),
            "local_gid": (q.local_gid, end.engine.gid),
            "peer_qpn": (q.peer_qpn, end.peer.qp.num),
            "peer_capable": (q.peer_capable, int(capable)),
        }
        if capable:
            facts["have_peer_token"] = (q.have_peer_token, 1)
            facts["token_acked"] = (q.token_acked, 1)
            facts["peer_token"] = (q.peer_token, p.token)
        if end.side.only_rtr:
            del facts["next_psn"], facts["una_psn"]
        for name, (have, want) in facts.items():
            if have != want:
                raise InvariantError("dump", f"{end.name}: {name} is {have!r}, should be {want!r}")

    def destroy(self) -> None:
        """Everything goes away in the order that verbs ask for, without complaint."""
        for end in self.ends:
            end.qp.free()
        for proc in self.procs:
            for end in proc.ends:
                for mr in end.mrs:
                    mr.free()
            for cq in proc.cqs:
                cq.free()
            if self.world.lib.mgs_pd_free(self.world.ptr, proc.pd):
                raise InvariantError("destroy", f"{proc.host.address}: the PD is still in use")
        if violation := self.world.violation():
            raise InvariantError("engine", violation)


def run(schedule: Schedule, *, mutation: tuple[Mutation, int] | None = None) -> Result:
    """Run a schedule. Raises InvariantError with the command that replays it."""
    r = Run(schedule, mutation=mutation)
    try:
        return r.execute()
    except InvariantError as e:
        e.args = (f"{e.args[0]}\n  at {r._now() / MS:.3f} ms of virtual time; replay: "
                  f"python -m tests.sim.replay {schedule.token()}",)  # fmt: skip
        raise
    finally:
        r.world.close()


def seconds(t: int) -> float:
    """ns as seconds, for messages."""
    return math.nan if t == NEVER else t / S
