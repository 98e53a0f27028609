# SPDX-License-Identifier: BSD-3-Clause
"""Promises about atomics: each is executed exactly once, its result is the value before, whatever happens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from migroce import dump as dumps
from migroce.wire import AtomicEth, Op, Packet, build_body

from .pair import Node, Pair
from .records import MS, US, Action, Link, S, Sge, VerbsError, Wr
from .test_srq import Two
from .verbs import ALL_ACCESS, Event, QpState, SendFlag, WcOpcode, WcStatus, WrOpcode

CMP_SWAP, FETCH_ADD = WrOpcode.ATOMIC_CMP_AND_SWP, WrOpcode.ATOMIC_FETCH_AND_ADD
MASK = (1 << 64) - 1


def _word(node: Node, value: int) -> Sge:
    """An aligned word of a node's memory."""
    node.used += -node.used % 8
    return node.put(value.to_bytes(8, "little"))


def _value(node: Node, word: Sge) -> int:
    return int.from_bytes(node.get(word), "little")


def _add(w: Pair, wr_id: int, word: Sge, n: int, **more: int) -> Sge:
    """a adds to a word of b's; returns where the result goes."""
    into = w.a.space(8)
    w.a.post(wr_id, FETCH_ADD, [into], **(w.b.remote(word) | {"compare_add": n} | more))
    return into


def test_both_bring_back_what_was_there_and_change_it_only_as_they_say() -> None:
    with Pair() as w:
        w.settle()
        word = _word(w.b, MASK - 1)
        guard = w.b.engine.memory[word.addr - w.b.engine.base + 8 :][:8].tobytes()
        into = [w.a.space(8) for _ in range(3)]
        remote = w.b.remote(word)
        w.a.post(1, FETCH_ADD, [into[0]], compare_add=5, **remote)
        w.a.post(2, CMP_SWAP, [into[1]], compare_add=7, swap=99, **remote)
        w.a.post(3, CMP_SWAP, [into[2]], compare_add=3, swap=0x1122334455667788, **remote)
        w.go()
        assert [_value(w.a, x) for x in into] == [MASK - 1, 3, 3]
        assert _value(w.b, word) == 0x1122334455667788
        assert w.b.engine.memory[word.addr - w.b.engine.base + 8 :][:8].tobytes() == guard
        wcs = [(wc.wr_id, wc.status, wc.opcode, wc.byte_len) for wc in w.a.wcs]
        assert wcs == [
            (1, 0, WcOpcode.FETCH_ADD, 8), (2, 0, WcOpcode.COMP_SWAP, 8), (3, 0, WcOpcode.COMP_SWAP, 8),
        ]  # fmt: skip


def test_atomics_of_many_qps_on_one_word_add_up() -> None:
    """Each result comes once: nothing is lost, nothing done twice, though every packet may be."""
    with Pair(link=Link(loss=100_000, dup=50_000, reorder=50_000, fair=2), seed=5, max_rd_atomic=2) as w:
        word = _word(w.b, 0)
        qps = [w.a.qp]
        for _ in range(4):
            x, y = (n.engine.qp(n.pd, n.cq, n.cq) for n in w.nodes)
            x.connect(w.a.path.__class__(w.b.engine.gid, y.num))
            y.connect(w.b.path.__class__(w.a.engine.gid, x.num))
            qps.append(x)
        into = []
        for i in range(200):
            into.append(w.a.space(8))
            wr = Wr(i, (into[i],), FETCH_ADD, SendFlag.SIGNALED, 0, word.addr, w.b.mr.rkey, 1)
            qps[i % 5].post_send(wr)
        w.go(20 * S)
        assert sorted(w.a.done()) == [(i, 0) for i in range(200)]
        assert sorted(_value(w.a, x) for x in into) == list(range(200))
        assert _value(w.b, word) == 200


@pytest.mark.parametrize("op", [Op.FETCH_ADD, Op.ATOMIC_ACK])
@pytest.mark.parametrize("losses", [1, 3])
def test_a_lost_request_or_answer_is_mended_without_a_second_execution(op: int, losses: int) -> None:
    with Pair() as w:
        w.settle()
        word = _word(w.b, 100)
        rule = w.rule(Action.DROP, op, count=losses)
        into = [_add(w, i, word, 10) for i in range(4)]
        w.go(2 * S)
        assert w.hits(rule) == losses
        assert [_value(w.a, x) for x in into] == [100, 110, 120, 130]
        assert _value(w.b, word) == 140


def test_answers_come_in_order_behind_the_reads_before_them() -> None:
    """An acknowledgement of a later request never overtakes READ data (IBA 9.7.4.1.2)."""
    with Pair(link=Link(ps_per_byte=1000)) as w:
        w.settle()
        word, data = _word(w.b, 1), w.b.put(bytes(range(250)) * 80)
        got = w.a.read(1, 20_000, data, w.b)
        _add(w, 2, word, 1)
        got2 = w.a.read(3, 20_000, data, w.b)
        w.go(1 * S)
        assert w.a.done() == [(1, 0), (2, 0), (3, 0)]
        assert w.a.get(got) == w.a.get(got2) == w.b.get(data)
        assert w.a.engine.counters()["retransmits"] == 0


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_reads_and_atomics_share_max_rd_atomic(limit: int) -> None:
    with Pair(max_rd_atomic=limit, max_dest_rd_atomic=limit, link=Link(delay=5 * MS), timeout=14) as w:
        w.settle()
        word, data = _word(w.b, 0), w.b.put(bytes(100))
        w.rule(Action.CAPTURE, (Op.READ_REQ, Op.FETCH_ADD), src=0)
        for i in range(0, 12, 2):
            w.a.read(i, 100, data, w.b)
            _add(w, i + 1, word, 1)
        w.go(7 * MS)
        # ACK, ATOMIC_ACK and READ responses of b are between READ_REQ and FETCH_ADD, but not from a.
        assert len({p.data[9:12] for p in w.captured()}) == limit
        w.go(1 * S)
        assert w.a.done() == [(i, 0) for i in range(12)]
        assert _value(w.b, word) == 6


def test_a_fenced_send_waits_for_the_atomic_before_it() -> None:
    with Pair(link=Link(delay=MS), timeout=14) as w:
        w.settle()
        got = w.b.recv(1, 8)
        into = _add(w, 1, _word(w.b, 42), 1)
        # What the SEND sends is the atomic's result: it must be there before the data is read.
        w.a.post(2, WrOpcode.SEND, [into], flags=SendFlag.SIGNALED | SendFlag.FENCE)
        w.go(1 * S)
        assert w.b.wcs[0].byte_len == 8
        assert _value(w.b, got) == 42


@pytest.mark.parametrize("lost", [Op.ATOMIC_ACK, Op.READ_RESP_ONLY, Op.FETCH_ADD, Op.ATOMIC_WRITE])
def test_xrc_has_them_all_too_each_done_once(lost: int) -> None:
    with Two(xrc=True) as w:
        w.settle()
        word, into = _word(w.b, 5), [w.a.space(8) for _ in range(3)]
        w.rule(Action.DROP, 0xA0 + lost, count=2)
        base = Wr(0, (), FETCH_ADD, SendFlag.SIGNALED, 0, word.addr, w.b.mr.rkey, 10, srqn=w.srq.num)
        new = w.a.put((100).to_bytes(8, "little"))
        w.src[0].post_send(
            base._replace(wr_id=1, sges=(into[0],)),
            base._replace(wr_id=2, sges=(new,), opcode=WrOpcode.ATOMIC_WRITE),
            base._replace(wr_id=3, opcode=WrOpcode.FLUSH, compare_add=1, swap=8),
            base._replace(wr_id=4, sges=(into[1],)),
            base._replace(wr_id=5, sges=(into[2],), opcode=CMP_SWAP, compare_add=110, swap=7),
        )
        w.go(2 * S)
        assert w.a.done() == [(i, 0) for i in range(1, 6)]
        assert [_value(w.a, x) for x in into] == [5, 100, 110]
        assert _value(w.b, word) == 7


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", [CMP_SWAP, FETCH_ADD])
@pytest.mark.parametrize("offset", [1, 4, 7])
def test_an_address_that_is_not_aligned_is_an_invalid_request(opcode: WrOpcode, offset: int) -> None:
    """IBA 9.7.4.1.6: the responder says so; nothing is changed."""
    with Pair() as w:
        w.settle()
        word = _word(w.b, 7)
        before = bytes(w.b.engine.memory)
        w.a.post(1, opcode, [w.a.space(8)], remote_addr=word.addr + offset, rkey=w.b.mr.rkey, compare_add=7)
        w.go(1 * S)
        assert w.a.done() == [(1, WcStatus.REM_INV_REQ_ERR)]
        assert Event.QP_REQ_ERR in [e.type for e in w.events()]
        assert bytes(w.b.engine.memory) == before
        assert w.b.qp.state() is QpState.ERR


def test_an_aligned_remote_view_of_an_unaligned_word_is_refused_too() -> None:
    with Pair() as w:
        w.settle()
        mr = w.b.engine.mr(w.b.pd, 4097, 64, ALL_ACCESS, 0x1000)
        w.a.post(1, FETCH_ADD, [w.a.space(8)], remote_addr=0x1000, rkey=mr.rkey, compare_add=1)
        w.go(1 * S)
        assert w.a.done() == [(1, WcStatus.REM_INV_REQ_ERR)]
        assert bytes(w.b.engine.memory[4096:4200]) == bytes(104)


@pytest.mark.parametrize("opcode", [CMP_SWAP, FETCH_ADD])
@pytest.mark.parametrize(
    ("key", "at"), [(1, 0), (0, -8), (0, 1 << 20), (0, 1 << 63)], ids=["key", "before", "behind", "far"]
)
def test_memory_that_is_not_open_is_not_changed(opcode: WrOpcode, key: int, at: int) -> None:
    with Pair() as w:
        w.settle()
        before = bytes(w.b.engine.memory)
        where = (w.b.engine.base + at) & MASK
        w.a.post(1, opcode, [w.a.space(8)], remote_addr=where, rkey=w.b.mr.rkey ^ key)
        w.go(1 * S)
        assert w.a.done() == [(1, WcStatus.REM_ACCESS_ERR)]
        assert bytes(w.b.engine.memory) == before


def test_a_region_without_remote_atomic_refuses_atomics_only() -> None:
    with Pair() as w:
        w.settle()
        word = _word(w.b, 1)
        mr = w.b.engine.mr(w.b.pd, 0, 1 << 20, ALL_ACCESS & ~8)
        w.a.post(1, WrOpcode.RDMA_READ, [w.a.space(8)], remote_addr=word.addr, rkey=mr.rkey)
        w.a.post(2, FETCH_ADD, [w.a.space(8)], remote_addr=word.addr, rkey=mr.rkey, compare_add=1)
        w.go(1 * S)
        assert w.a.done() == [(1, 0), (2, WcStatus.REM_ACCESS_ERR)]
        assert _value(w.b, word) == 1


def test_a_result_without_a_place_fails_locally() -> None:
    with Pair() as w:
        w.settle()
        into = w.a.space(8)
        w.a.post(1, FETCH_ADD, [Sge(into.addr, 8, into.lkey ^ 1)], **w.b.remote(_word(w.b, 1)))
        w.go(1 * S)
        assert w.a.done() == [(1, WcStatus.LOC_PROT_ERR)]
        assert w.b.qp.state() is QpState.RTS


@pytest.mark.parametrize("size", [0, 7])
def test_a_result_needs_8_bytes(size: int) -> None:
    with Pair() as w:
        w.settle()
        sge = w.a.space(8)
        with pytest.raises(VerbsError, match="EINVAL"):
            w.a.qp.post_send(Wr(1, (Sge(sge.addr, size, sge.lkey),), FETCH_ADD))
        with pytest.raises(VerbsError, match="EINVAL"):
            w.a.qp.post_send(Wr(1, (sge,), FETCH_ADD, SendFlag.INLINE))


def test_a_larger_place_is_filled_with_8_bytes_in_all_its_pieces() -> None:
    with Pair() as w:
        w.settle()
        x, y = w.a.space(3), w.a.space(20)
        w.a.post(1, FETCH_ADD, [x, y], **w.b.remote(_word(w.b, 0x0807060504030201)))
        w.go(1 * S)
        assert w.a.get(x) + w.a.get(y) == bytes(range(1, 9)) + bytes(15)


def test_no_atomics_without_max_rd_atomic_at_either_end() -> None:
    with Pair(max_rd_atomic=0, max_dest_rd_atomic=4) as w, pytest.raises(VerbsError, match="EINVAL"):
        w.a.qp.post_send(Wr(1, (w.a.space(8),), FETCH_ADD))
    with Pair(max_rd_atomic=4, max_dest_rd_atomic=0) as w:
        w.settle()
        _add(w, 1, _word(w.b, 1), 1)
        w.go(1 * S)
        assert w.a.done() == [(1, WcStatus.REM_INV_REQ_ERR)]


# ---- moves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["a", "b"])
@pytest.mark.parametrize("address", [None, "10.0.9.9"])
@pytest.mark.parametrize("lost", [Op.FETCH_ADD, Op.ATOMIC_ACK])
def test_an_atomic_in_flight_at_a_move_is_executed_once(who: str, address: str | None, lost: int) -> None:
    """Executed before the move, with its answer lost: the replay record moves along."""
    with Pair() as w:
        w.settle()
        word = _word(w.b, 1000)
        w.rule(Action.DROP, lost)
        into = [_add(w, i, word, 1) for i in range(3)]
        w.go(MS)
        node = getattr(w, who)
        number = w.stop(node)
        w.clear_rules()
        w.go(300 * MS)
        w.resume(node, number, address)
        w.go(2 * S)
        assert w.a.done() == [(0, 0), (1, 0), (2, 0)]
        assert [_value(w.a, x) for x in into] == [1000, 1001, 1002]
        assert _value(w.b, word) == 1003


def test_a_stopped_end_answers_a_stranger_s_duplicate_from_the_dump() -> None:
    """A peer without the extension gets the recorded result from the stand-in, during the move."""
    with Pair(link=Link(strip=1)) as w:
        w.go(1 * S)
        word = _word(w.b, 7)
        rule = w.rule(Action.DROP, Op.ATOMIC_ACK)
        into = [_add(w, i, word, 3) for i in range(3)]
        w.go(MS // 2)
        assert w.hits(rule) == 3
        w.stop(w.b)
        records = [r for r in dumps.parse(w.b.engine.dump()).resources if r.opcode == Op.FETCH_ADD]
        assert [r.atomic_orig for r in records] == [7, 10, 13]
        w.clear_rules()
        w.go(1 * S)
        assert w.a.done() == [(0, 0), (1, 0), (2, 0)]
        assert [_value(w.a, x) for x in into] == [7, 10, 13]
        assert _value(w.b, word) == 16


# ---- other depths, in SQD ---------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3, 16])
def test_another_depth_in_sqd_keeps_what_may_be_asked_for_again(depth: int) -> None:
    """The responder's: its newest results stay, so that a repetition is still no second execution."""
    with Pair() as w:
        w.settle()
        word = _word(w.b, 7)
        for i in range(3):
            _add(w, i, word, 3)
            w.go(MS)
        rule = w.rule(Action.DROP, Op.ATOMIC_ACK, count=1)
        into = _add(w, 3, word, 3)
        w.go(MS // 2)
        assert w.hits(rule) == 1
        w.b.qp.modify(QpState.SQD)
        w.b.qp.modify(QpState.SQD, replace(w.b.path, max_dest_rd_atomic=depth))
        w.go(1 * S)
        assert w.a.done() == [(i, 0) for i in range(4)]
        assert (_value(w.a, into), _value(w.b, word)) == (16, 19)
        w.b.qp.modify(QpState.RTS)
        w.echo()


def test_a_depth_in_sqd_is_no_lower_than_what_is_under_way() -> None:
    with Pair(link=Link(ps_per_byte=1000)) as w:
        w.settle()
        data = w.b.put(bytes(range(250)) * 80)
        got = [w.a.read(i, 20_000, data, w.b) for i in range(3)]
        w.go(MS // 40)
        w.a.qp.modify(QpState.SQD)
        with pytest.raises(VerbsError, match="EINVAL"):
            w.a.qp.modify(QpState.SQD, replace(w.a.path, max_rd_atomic=1))
        w.a.qp.modify(QpState.SQD, replace(w.a.path, max_rd_atomic=7))
        w.go(1 * S)
        assert w.a.done() == [(i, 0) for i in range(3)]
        assert [w.a.get(x) for x in got] == [w.b.get(data)] * 3
        w.a.qp.modify(QpState.SQD, replace(w.a.path, max_rd_atomic=1))
        w.a.qp.modify(QpState.RTS)
        w.echo()


@pytest.mark.parametrize("op", [WrOpcode.RDMA_READ, FETCH_ADD], ids=["read", "atomic"])
@pytest.mark.parametrize("limit", [1, 3])
def test_a_copy_that_comes_in_one_go_with_what_is_asked_next_takes_nobody_s_place(
    op: WrOpcode, limit: int
) -> None:
    """Who asks for one more has the answer to the oldest, also where a copy of it waits to be answered."""
    train = {"batch_window": 50 * US, "train": True}
    with Pair(max_rd_atomic=limit, max_dest_rd_atomic=limit, engine=train) as w:
        w.settle()
        word = _word(w.b, 1)
        asked = Op.READ_REQ if op == WrOpcode.RDMA_READ else Op.FETCH_ADD

        def ask(first: int) -> None:
            for n in range(limit):
                w.a.post(first + n, op, [w.a.space(8)], compare_add=1, **w.b.remote(word))

        w.rule(Action.DUP, asked, count=limit, delay=200 * US)
        ask(0)
        w.go(205 * US)  # the copies are on their way
        assert len(w.a.wcs) == limit
        ask(limit)
        w.go()
        assert w.b.engine.counters()["duplicates"] == limit
        assert w.a.done() == [(n, 0) for n in range(2 * limit)]
        assert [e for e in w.events() if e.type != Event.COMM_EST] == []


@pytest.mark.parametrize("address", [None, "10.0.9.9"], ids=["stays", "new address"])
@pytest.mark.parametrize("who", ["requester", "responder"])
def test_what_came_in_one_go_and_was_not_answered_before_a_move_is_executed_once(
    who: str, address: str | None
) -> None:
    with Pair(engine={"batch_window": 50 * US, "train": True}) as w:
        w.settle()
        word = _word(w.b, 7)
        w.b.recvs(3, 8)
        into = [w.a.space(8) for _ in range(3)]
        w.a.post(1, WrOpcode.RDMA_READ, into[:1], **w.b.remote(word))
        w.a.send(2, b"one")
        w.a.post(3, FETCH_ADD, into[1:2], compare_add=1, **w.b.remote(word))
        w.a.send(4, b"two")
        w.a.post(5, FETCH_ADD, into[2:], compare_add=1, **w.b.remote(word))
        w.a.send(6, b"three")
        w.go(70 * US)  # a has sent, b has executed and not yet answered
        assert (len(w.a.wcs), len(w.b.wcs)) == (0, 3)
        moves = w.a if who == "requester" else w.b
        number = w.stop(moves)
        w.go(300 * MS)
        w.resume(moves, number, address)
        w.go(1 * S)
        assert w.a.done() == [(n, 0) for n in range(1, 7)]
        assert w.b.done() == [(0, 0), (1, 0), (2, 0)]
        assert [int.from_bytes(w.a.get(sge), "little") for sge in into[1:]] == [7, 8]
        assert int.from_bytes(w.b.get(word), "little") == 9


# ---- hostile ------------------------------------------------------------------------------------


def test_a_duplicate_that_names_another_word_is_not_answered() -> None:
    with Pair() as w:
        w.settle()
        word, other = _word(w.b, 5), _word(w.b, 6)
        psn = w.a.dump().next_psn
        _add(w, 1, word, 1)
        w.go()
        rule = w.rule(Action.CAPTURE, Op.ATOMIC_ACK)
        w.link(Link(down=1), src=0, dst=1)  # a's own repetitions
        for eth in (
            AtomicEth(other.addr, w.b.mr.rkey, 1, 0), AtomicEth(word.addr, w.b.mr.rkey ^ 1, 1, 0),
            AtomicEth(word.addr, w.b.mr.rkey, 1, 0),
        ):  # fmt: skip
            data = build_body(Packet(Op.FETCH_ADD, w.b.qp.num, psn, atomic=eth))
            w.inject(w.a.engine.gid, w.b.engine.gid, data)
            w.go()
        assert w.hits(rule) == 1, "only the true duplicate is answered"
        assert (_value(w.b, word), _value(w.b, other)) == (6, 6)


def test_an_answer_nobody_asked_for_changes_nothing() -> None:
    with Pair() as w:
        w.settle()
        w.a.send(1, b"x" * 8)
        w.go(MS // 10)
        q = w.a.dump()
        for psn in (q.una_psn - 1, q.una_psn, q.una_psn + 1):
            head = bytes((Op.ATOMIC_ACK, 0, 0xFF, 0xFF, 1)) + w.a.qp.num.to_bytes(3, "big")
            body = b"\x00" + (psn & 0xFFFFFF).to_bytes(3, "big") + b"\x1f\0\0\1" + b"\xaa" * 8
            w.inject(w.b.engine.gid, w.a.engine.gid, head + body)
            w.go(MS)
        w.b.recv(1, 8)
        w.go(1 * S)
        w.b.recv(2, 1600)
        assert w.a.done() == [(1, 0)]
        assert b"\xaa" * 8 not in bytes(w.a.engine.memory)
