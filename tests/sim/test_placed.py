# SPDX-License-Identifier: BSD-3-Clause
"""Promises about ATOMIC WRITE and FLUSH (IBA annex A19): done once, answered by an empty READ response."""

from __future__ import annotations

import pytest

from migroce.wire import Op, parse

from .pair import Node, Pair
from .records import MS, Action, Link, S, Sge, VerbsError, Wr
from .verbs import ALL_ACCESS, Access, Event, SendFlag, WcOpcode, WcStatus, WrOpcode

FLUSH, ATOMIC_WRITE = WrOpcode.FLUSH, WrOpcode.ATOMIC_WRITE
GLOBAL, PERSISTENT, REGION = 1, 2, 1 << 8


def _word(node: Node, data: bytes = bytes(8)) -> Sge:
    node.used += -node.used % 8
    return node.put(data)


def _flush(w: Pair, wr_id: int, at: Sge, how: int = GLOBAL, **more: int) -> None:
    w.a.post(wr_id, FLUSH, (), **(w.b.remote(at) | {"compare_add": how, "swap": at.length} | more))


def test_an_atomic_write_changes_one_word() -> None:
    with Pair() as w:
        w.settle()
        word = _word(w.b)
        w.a.post(1, ATOMIC_WRITE, [w.a.put(b"abc"), w.a.put(b"defgh")], **w.b.remote(word))
        w.go(MS)
        assert w.b.get(word) == b"abcdefgh"
        # Inline needs no room that was asked for.
        flags = SendFlag.SIGNALED | SendFlag.INLINE
        w.a.post(2, ATOMIC_WRITE, [w.a.put(b"12345678")], flags=flags, **w.b.remote(word))
        w.go(MS)
        assert w.b.get(word) == b"12345678"
        assert [(x.wr_id, x.status, x.opcode, x.byte_len) for x in w.a.wcs] == [
            (1, 0, WcOpcode.ATOMIC_WRITE, 8), (2, 0, WcOpcode.ATOMIC_WRITE, 8),
        ]  # fmt: skip


def test_both_are_answered_by_an_empty_read_response_and_nothing_else() -> None:
    with Pair() as w:
        w.settle()
        word = _word(w.b)
        w.rule(Action.CAPTURE)
        w.a.post(1, ATOMIC_WRITE, [w.a.put(b"12345678")], **w.b.remote(word))
        _flush(w, 2, word)
        _flush(w, 3, word, GLOBAL | REGION)
        w.go(MS)
        seen = [parse(x.data) for x in w.captured()]
        assert sorted(p.opcode for p in seen) == [Op.READ_RESP_ONLY] * 3 + [Op.FLUSH] * 2 + [Op.ATOMIC_WRITE]
        assert all(not p.payload for p in seen if p.opcode == Op.READ_RESP_ONLY)
        flushes = [(p.feth.type, p.feth.level, p.reth.length) for p in seen if p.feth and p.reth]
        assert flushes == [(1, 0, 8), (1, 1, 8)]
        assert [(x.wr_id, x.status, x.opcode) for x in w.a.wcs][1:] == [
            (2, 0, WcOpcode.FLUSH), (3, 0, WcOpcode.FLUSH),
        ]  # fmt: skip


@pytest.mark.parametrize("op", [Op.ATOMIC_WRITE, Op.READ_RESP_ONLY])
def test_a_lost_answer_does_not_make_an_atomic_write_undo_a_later_change(op: int) -> None:
    with Pair() as w:
        w.settle()
        word = _word(w.b)
        w.a.post(1, ATOMIC_WRITE, [w.a.put(bytes(8))], **w.b.remote(word))
        w.go(MS)
        w.rule(Action.DROP, op, count=2)
        w.a.post(2, ATOMIC_WRITE, [w.a.put((5).to_bytes(8, "little"))], **w.b.remote(word))
        into = w.a.space(8)
        w.a.post(3, WrOpcode.ATOMIC_FETCH_AND_ADD, [into], compare_add=10, **w.b.remote(word))
        w.go(1 * S)
        assert w.a.done() == [(1, 0), (2, 0), (3, 0)]
        assert (w.a.get(into), w.b.get(word)) == ((5).to_bytes(8, "little"), (15).to_bytes(8, "little"))


@pytest.mark.parametrize("strip", [0, 1])
@pytest.mark.parametrize("who", ["a", "b"])
def test_in_flight_at_a_move_they_are_carried_out_once(who: str, strip: int) -> None:
    with Pair(link=Link(strip=strip)) as w:
        w.go(1 * S)
        word, other = _word(w.b), _word(w.b)
        w.rule(Action.DROP, Op.READ_RESP_ONLY)
        w.a.post(1, ATOMIC_WRITE, [w.a.put(b"12345678")], **w.b.remote(word))
        _flush(w, 2, word)
        w.a.post(3, ATOMIC_WRITE, [w.a.put(b"abcdefgh")], **w.b.remote(other))
        w.go(MS // 2)
        w.b.engine.memory[word.addr - w.b.engine.base :][:8] = b"changed!"
        number = w.stop(getattr(w, who))
        w.clear_rules()
        w.go(200 * MS)
        w.resume(getattr(w, who), number)
        w.go(3 * S)
        assert w.a.done() == [(1, 0), (2, 0), (3, 0)]
        assert (w.b.get(word), w.b.get(other)) == (b"changed!", b"abcdefgh")


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [1, 4])
def test_an_atomic_write_must_be_aligned(offset: int) -> None:
    with Pair() as w:
        w.settle()
        word = _word(w.b)
        w.a.post(1, ATOMIC_WRITE, [w.a.space(8)], remote_addr=word.addr + offset, rkey=w.b.mr.rkey)
        w.go(1 * S)
        assert w.a.done() == [(1, WcStatus.REM_INV_REQ_ERR)]
        assert Event.QP_REQ_ERR in [e.type for e in w.events()]


@pytest.mark.parametrize("size", [0, 7, 9, 16])
@pytest.mark.parametrize("flags", [0, SendFlag.INLINE])
def test_an_atomic_write_has_8_bytes(size: int, flags: int) -> None:
    with Pair() as w, pytest.raises(VerbsError, match="EINVAL"):
        w.a.qp.post_send(Wr(1, (w.a.space(size),), ATOMIC_WRITE, flags))


@pytest.mark.parametrize(
    ("access", "opcode", "how"),
    [
        (ALL_ACCESS & ~Access.REMOTE_WRITE, ATOMIC_WRITE, 0),
        (ALL_ACCESS & ~Access.FLUSH_GLOBAL, FLUSH, GLOBAL),
        (ALL_ACCESS, FLUSH, PERSISTENT), (ALL_ACCESS, FLUSH, GLOBAL | PERSISTENT),
    ],
)  # fmt: skip
def test_what_the_qp_does_not_offer_is_an_invalid_request(access: int, opcode: WrOpcode, how: int) -> None:
    with Pair(access=access) as w:
        w.settle()
        word = _word(w.b)
        if opcode is FLUSH:
            _flush(w, 1, word, how)
        else:
            w.a.post(1, opcode, [w.a.space(8)], **w.b.remote(word))
        w.go(1 * S)
        assert w.a.done() == [(1, WcStatus.REM_INV_REQ_ERR)]


@pytest.mark.parametrize("how", [GLOBAL, GLOBAL | REGION])
@pytest.mark.parametrize("which", ["key", "access", "pd"])
def test_a_flush_needs_a_key_that_allows_it(how: int, which: str) -> None:
    with Pair() as w:
        w.settle()
        word = _word(w.b)
        pd = w.b.engine.pd() if which == "pd" else w.b.pd
        access = ALL_ACCESS & ~Access.FLUSH_GLOBAL if which == "access" else ALL_ACCESS
        mr = w.b.engine.mr(pd, 0, 1 << 20, access)
        _flush(w, 1, word, how, rkey=mr.rkey ^ (which == "key"))
        w.go(1 * S)
        assert w.a.done() == [(1, WcStatus.REM_ACCESS_ERR)]


def test_a_range_to_flush_lies_in_its_region_and_an_empty_one_needs_no_key() -> None:
    with Pair() as w:
        w.settle()
        _flush(w, 1, Sge(0, 0, 0), rkey=0)
        w.go(MS)
        assert w.a.done() == [(1, 0)]
        _flush(w, 2, Sge(w.b.engine.base + (1 << 20) - 8, 9, 0))
        w.go(1 * S)
        assert w.a.done()[1:] == [(2, WcStatus.REM_ACCESS_ERR)]


@pytest.mark.parametrize(("how", "length"), [(0, 8), (4, 8), (GLOBAL | 2 << 8, 8), (GLOBAL, 1 << 32)])
def test_a_flush_of_no_known_kind_is_not_posted(how: int, length: int) -> None:
    with Pair() as w, pytest.raises(VerbsError, match="EINVAL"):
        w.a.qp.post_send(Wr(1, (), FLUSH, 0, compare_add=how, swap=length))


def test_both_count_as_reads_in_max_rd_atomic() -> None:
    with Pair(max_rd_atomic=2, max_dest_rd_atomic=2, link=Link(delay=5 * MS), timeout=14) as w:
        w.settle()
        word = _word(w.b)
        w.rule(Action.CAPTURE, (Op.FLUSH, Op.ATOMIC_WRITE), src=0)
        for i in range(0, 6, 2):
            w.a.post(i, ATOMIC_WRITE, [w.a.put(bytes([i]) * 8)], **w.b.remote(word))
            _flush(w, i + 1, word)
        w.go(7 * MS)
        assert len({p.data[9:12] for p in w.captured()}) == 2
        w.go(1 * S)
        assert w.a.done() == [(i, 0) for i in range(6)]
