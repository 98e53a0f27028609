# SPDX-License-Identifier: BSD-3-Clause
"""What must hold at the end of a run: memory as in the model, states, and dumps that agree."""

from __future__ import annotations

from migroce import dump as dumps

from .process import Process
from .program import End, InvariantError
from .records import CqMode
from .schedule import Fatal
from .verbs import Event, QpState


def check_end(procs: list[Process], ends: list[End], *, capable: bool, damage: bool) -> None:
    """All that must hold. `capable`: the ends see each other's capability bit; `damage`: it may be wrong."""
    for end in ends:
        end.finish_model()
    for proc in procs:
        _check_memory(proc)
        _check_counters(proc)
    for end in ends:
        _check_error_state(end)
    _check_dumps(procs, ends, capable, damage)


def _check_memory(proc: Process) -> None:
    have, want = bytearray(proc.engine.memory), proc.arena.model
    for at, size in proc.arena.masked:
        have[at : at + size] = want[at : at + size]
    if have != want:
        at = next(i for i in range(len(want)) if have[i] != want[i])
        n = sum(x != y for x, y in zip(have, want, strict=True))
        raise InvariantError(
            "memory", f"{proc.host.address}: {n} wrong bytes, the first is {proc.arena.owner(at)}"
        )


def _check_counters(proc: Process) -> None:
    c = proc.engine.counters()
    if c["rx_malformed"]:
        raise InvariantError(
            "counters", f"{proc.host.address}: {c['rx_malformed']} intact packets seemed malformed"
        )


def _check_error_state(end: End) -> None:
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
    if peers in (Fatal.BAD_RKEY, Fatal.OUT_OF_BOUNDS, Fatal.NO_ACCESS) and end.events != [
        Event.QP_ACCESS_ERR
    ]:
        raise InvariantError("event", f"{end.name}: events {end.events} instead of one QP_ACCESS_ERR")


def _check_dumps(procs: list[Process], ends: list[End], capable: bool, damage: bool) -> None:
    """Both ends' records agree with each other and with what has happened."""
    records: dict[int, dumps.QpRecord] = {}
    for proc in procs:
        dump = proc.dump(stopped=False)
        qps = {q.qpn: q for q in dump.qps}
        if any(cq.fill for cq in dump.cqs) and CqMode(proc.host.cq_mode) is not CqMode.SOLICITED:
            raise InvariantError("dump", f"{proc.host.address}: completions nobody polled: {dump.cqs}")
        for end in proc.ends:
            records[end.stream] = qps[end.qp.num]
    for end in ends:
        if not end.mistaken():
            _check_record(end, records[end.stream], records[end.peer.stream], capable, damage)


def _check_record(end: End, q: dumps.QpRecord, p: dumps.QpRecord, capable: bool, damage: bool) -> None:
    sent = 0 if end.side.only_rtr else end.packets()
    psn = (end.side.psn + sent) & 0xFFFFFF
    n_msgs = 0 if end.peer.side.only_rtr else end.peer.messages()
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
    if not capable and damage:
        del facts["peer_capable"]  # the bit is not in the ICRC: a damaged one counts
    if capable:
        facts["have_peer_token"] = (q.have_peer_token, 1)
        facts["token_acked"] = (q.token_acked, 1)
        facts["peer_token"] = (q.peer_token, p.token)
    if end.side.only_rtr:
        del facts["next_psn"], facts["una_psn"]
    for name, (have, want) in facts.items():
        if have != want:
            raise InvariantError("dump", f"{end.name}: {name} is {have!r}, should be {want!r}")
