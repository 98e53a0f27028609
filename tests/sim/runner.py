# SPDX-License-Identifier: BSD-3-Clause
"""Run a schedule: build its world, let its programs and moves happen, check what must hold.

`run` returns a Result or raises InvariantError, whose text ends with the command that replays the
run. What is checked at each completion is in program.py; here is what concerns whole runs: nothing
gets stuck, memory is as the model says, the dumps agree with each other, and all falls silent.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from .final import check_end
from .process import Process
from .program import End, InvariantError
from .records import MS, NEVER, Action, CqMode, Mutation, Reason, S, Stats, gid
from .schedule import Move, Schedule
from .standins import StandIns
from .verbs import Event
from .world import World

LIMIT = 20 * S
"""Virtual time within which everything must be done after the last thing that a schedule asks for."""
LIMIT_MISTAKEN = 130 * S
"""Likewise with a mistake: somebody may wait for two minutes for a peer that has broken off."""
LIMIT_PLAIN = 1000 * S
"""Likewise with peers that do not know of each other's extension: a lost tail costs them
the standard's time, 67 ms each on a bad link."""
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


class Run:
    """One run of one schedule."""

    def __init__(
        self, schedule: Schedule, *, trace: bool = False, mutation: tuple[Mutation, int] | None = None
    ):
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
        self.limit = LIMIT_PLAIN if schedule.link.strip else LIMIT

    # ---- building --------------------------------------------------------------------------------

    def build(self) -> None:
        s, w = self.schedule, self.world
        rough = bool(s.link.loss or s.link.late or s.link.corrupt or s.link.queue or s.drops or s.moves)
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
            w.rule(
                Action.DROP, d.op, count=d.count, skip=d.skip, syndrome=None if d.syndrome < 0 else d.syndrome
            )
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
            tx_batch=h.tx_batch, id_mode=h.id_mode, early_timer=h.early_timer, train=h.train,
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

    def elapsed(self) -> int:
        """ns since the start."""
        return self.world.now - self.start

    def _stop(self, move: Move, asked_at: int = -1) -> None:
        proc = self.procs[move.engine]
        if proc.moving and asked_at < 0:
            self.at(self.elapsed() + MS, None, lambda: self._stop(move))
            return
        proc.moving = True
        asked_at = self.elapsed() if asked_at < 0 else asked_at
        ready = proc.engine.stop_ready()
        if not ready and self.elapsed() - asked_at < move.ready_wait:
            self.at(self.elapsed() + MS // 5, None, lambda: self._stop(move, asked_at))
            return
        engine = proc.engine
        engine.stop()
        if not engine.stopped():
            raise InvariantError("stop", "mg_stop did not stop")
        engine.attach(False)
        dump = proc.dump(stopped=True)
        if any(q.connected and not q.token_acked for q in dump.qps):
            # A peer without our token cannot be told of another address: it must not be left.
            move = replace(move, address="")
        number = -1
        if move.standin:
            number = self.standins.add(dump, engine.index)
            self.at(self.elapsed() + move.gap, None, lambda: self.standins.on(number))
        self.at(self.elapsed() + min(move.freeze, move.pause), None, lambda: self._freeze(proc))
        self.at(
            self.elapsed() + max(move.pause, move.gap + EPSILON),
            None,
            lambda: self._resume(move, proc, number),
        )

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

    # ---- running ---------------------------------------------------------------------------------------

    def describe(self) -> str:
        return "; ".join(end.describe() for end in self.ends)

    def execute(self) -> Result:
        """All of it. Raises InvariantError."""
        self.build()
        mistaken = any(end.mistaken() for end in self.ends)
        if mistaken:
            self.limit = max(self.limit, LIMIT_MISTAKEN)
        while not (self.moves_left == 0 and all(end.finished() for end in self.ends)):
            reason = self.step()
            if self.world.now >= self.horizon + self.limit or (reason is Reason.QUIET and not self.queue):
                if self.moves_left == 0 and all(end.finished() for end in self.ends):
                    break
                raise InvariantError("stuck", f"at {self.elapsed() / MS:.3f} ms: " + self.describe())
        done_at = self.elapsed()
        self.horizon = self.world.now + SILENCE - self.limit
        while self.world.now < self.horizon + self.limit:
            if self.step() is Reason.QUIET and not self.queue:
                break
        else:
            if not mistaken:
                raise InvariantError("noise", "the engines do not fall silent")
        quiet_at = self.elapsed()
        check_end(
            self.procs,
            self.ends,
            capable=not self.schedule.link.strip,
            damage=bool(self.schedule.link.corrupt),
        )
        result = Result(
            done_at, quiet_at, self.world.stats(), tuple(p.engine.counters() for p in self.procs),
            self.standins.answered,
        )  # fmt: skip
        self.destroy()
        return result

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
        when = f"at {r.elapsed() / MS:.3f} ms of virtual time"
        e.args = (f"{e.args[0]}\n  {when}; replay: python -m tests.sim.replay {schedule.token()}",)
        raise
    finally:
        r.world.close()
