# SPDX-License-Identifier: BSD-3-Clause
"""What a stopped container answers on the wire, from its dumps alone. Sans-I/O, no clock.

docs/protocol.md says why. In short, to a request from a QP's peer:

- with the capability bit: NAK stopped for its PSN, on which the peer pauses and probes;
- without it, PSN expected or beyond: RNR NAK for the expected PSN, so that the peer waits and sends again;
- without it, duplicate SEND or WRITE: the acknowledgement of the last SEND or WRITE again, but not beyond a
  READ or atomic, whose answer that would declare lost (and never one that names a READ or atomic: rdma_rxe
  would complete it without its data); duplicate atomic: its recorded result
  (ATOMIC WRITE, FLUSH: the empty READ response);
  duplicate READ: RNR NAK for its own PSN (the data is frozen; without an answer a peer with short timeouts
  would give up), and nothing for what follows in the same round: it comes again behind it;
- unasked, at the beginning: NAK stopped for the expected PSN to each peer with the extension;
- responses and TOKEN: nothing, their senders repeat them; UC and UD: nothing, they may be lost;
- RESUME of a peer that was moved meanwhile (proven by its token): its new address is noted and the
  acknowledgement of what was executed sent again, a sign of life; the RESUME itself is repeated until
  the container can take it.

After the container moved to another address, any packet with the capability bit to its main address is
answered by a RESUME that names the new one. Packets that are damaged, or not from the QP's peer, are never
answered.
"""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from migroce.dump import Dump, QpRecord
from migroce.wire import (
    BTH4_CAPABLE,
    BTH_LEN,
    ICRC_LEN,
    OPINFO,
    P_ATOMIC,
    P_LAST,
    P_ONLY,
    P_READ,
    P_REQUEST,
    P_SEND,
    P_WRITE,
    PSN_MASK,
    ROCE_PORT,
    SVC_MASK,
    SVC_RC,
    SVC_UC,
    SVC_XRC,
    Aeth,
    Flow,
    Meh,
    Op,
    Packet,
    Syndrome,
    WireError,
    build,
    check_icrc,
    parse,
    rnr_timer_code,
)

RNR_TIMERS_NS = (160_000_000, 320_000_000, 655_360_000)
"""How long a peer without the extension is asked to wait: the first, second, each further time.

A short blackout is then not made much longer by the waiting, and a peer that gives up after six RNR
NAKs holds out for three seconds.
"""

V4_PREFIX = b"\0" * 10 + b"\xff\xff"
_SERVICES = {2: SVC_RC, 3: SVC_UC, 9: SVC_XRC, 10: SVC_XRC}
"""The service of a QP's packets, by its type; we answer for these."""
_ASKED = (2, 10)
"""The types whose peers send requests that wait for an answer."""
_RNR_CODES = tuple(rnr_timer_code(ns) for ns in RNR_TIMERS_NS)


@dataclass(frozen=True, slots=True)
class Reply:
    """A UDP payload to send (ICRC included) from and to port `ROCE_PORT` of these GIDs."""

    data: bytes
    src_gid: bytes
    dst_gid: bytes
    src_port: int = ROCE_PORT
    dst_port: int = ROCE_PORT


@dataclass(slots=True, eq=False)
class _Qp:
    """What is remembered of a stopped QP."""

    record: QpRecord
    ack_psn: int
    """The last that was executed and is acknowledged by an ACK: not a READ's or atomic's."""
    atomics: dict[int, int]
    """PSN of an atomic, ATOMIC WRITE or FLUSH that was executed -> its result."""
    peer_gid: bytes
    """Where the peer is: it may move while we stand in."""
    peer_epoch: int
    answered: list[int]
    """First PSNs of the READs and atomics that were executed and may be asked for again."""
    rnr_sent: int = 0
    main: bool = True
    """Whether it is at the container's main address, which a move may change: others stay or go elsewhere."""
    asked: int | None = None
    """PSN of the last request without the capability bit: one that is not beyond it begins a new round."""
    read_waits: bool = False
    """A READ was told to wait in this round."""


class StandIn:
    """Answers for the QPs of some dumps. `counts`: packets seen, by what was done about them."""

    def __init__(self, dumps: Iterable[Dump]) -> None:
        self._qps: dict[int, _Qp] = {}
        self._moved_to: bytes | None = None
        self.counts: Counter[str] = Counter()
        for dump in dumps:
            atomics: dict[int, dict[int, int]] = {}
            answered: dict[int, dict[int, int]] = {}
            for res in dump.resources:
                answered.setdefault(res.qpn, {})[res.last_psn] = res.first_psn
                if res.opcode != Op.READ_REQ:
                    atomics.setdefault(res.qpn, {})[res.first_psn] = res.atomic_orig
            for qp in dump.qps:
                if qp.connected and qp.type in _SERVICES:
                    ack_psn = _before(qp.epsn, answered.get(qp.qpn, {}))
                    main = qp.local_gid == dump.context.gid
                    self._qps[qp.qpn] = _Qp(
                        qp, ack_psn, atomics.get(qp.qpn, {}), qp.peer_gid, qp.peer_epoch,
                        list(answered.get(qp.qpn, {}).values()), main=main,
                    )  # fmt: skip

    def __len__(self) -> int:
        return len(self._qps)

    def moved(self, gid: bytes) -> None:
        """From now on point peers to the container's new address."""
        self._moved_to = gid

    def announce(self) -> Iterator[Reply]:
        """What peers are told unasked, for the network may go away before they ask; it may be lost."""
        for qp in self._qps.values():
            if qp.record.peer_capable and qp.record.type in _ASKED and self._moved_to is None:
                yield self._ack(qp, qp.record.epsn, Syndrome.NAK_STOPPED)

    def respond(self, packet: bytes, src_gid: bytes, src_port: int, dst_gid: bytes) -> list[Reply]:
        """The answers to a received UDP payload; mostly none or one. Raises nothing."""
        reply, why = self._answer(packet, src_gid, src_port, dst_gid)
        self.counts[why] += 1
        return [] if reply is None else [reply]

    def _answer(
        self, packet: bytes, src_gid: bytes, src_port: int, dst_gid: bytes
    ) -> tuple[Reply | None, str]:
        if len(packet) < BTH_LEN + ICRC_LEN:
            return None, "malformed"
        qp = self._qps.get(int.from_bytes(packet[5:8], "big"))
        if qp is None:
            return None, "no_qp"
        record = qp.record
        opcode = packet[0]
        if dst_gid != record.local_gid or (src_gid != qp.peer_gid and opcode != Op.RESUME):
            return None, "bad_source"
        info = OPINFO.get(opcode)
        # Header version 0, and no partition but the default one in either membership.
        if info is None or packet[1] & 0x0F or packet[2] & 0x7F != 0x7F or packet[3] != 0xFF:
            return None, "malformed"
        if len(packet) < info.hdr_len + ICRC_LEN:
            return None, "malformed"
        if not intact(packet, src_gid, src_port, dst_gid):
            return None, "bad_icrc"
        capable = bool(packet[4] & BTH4_CAPABLE)
        psn = int.from_bytes(packet[9:12], "big")
        if opcode == Op.RESUME and not self._peer_moved(qp, packet, src_gid):
            return None, "bad_resume"
        if self._moved_to is not None:
            if not capable or not qp.main:
                return None, "ignored"
            return self._resume(qp, self._moved_to), "resume"
        if opcode == Op.RESUME:
            return self._ack(qp, qp.ack_psn, Syndrome.ACK), "resume_heard"
        service = _SERVICES[record.type]
        if service == SVC_UC or opcode & SVC_MASK != service or not info.mask & P_REQUEST:
            return None, "ignored"
        if capable:
            return self._ack(qp, psn, Syndrome.NAK_STOPPED), "nak_stopped"
        if qp.asked is None or not _is_before(qp.asked, psn):
            qp.read_waits = False
        qp.asked = psn
        if qp.read_waits:
            return None, "ignored"
        if not _is_before(psn, record.epsn):
            return self._not_ready(qp, psn)
        return self._duplicate(qp, psn, opcode, ackreq=bool(packet[8] & 0x80))

    def _not_ready(self, qp: _Qp, psn: int) -> tuple[Reply | None, str]:
        """A new request: RNR NAK, once per round, for each one costs the peer a retry."""
        record = qp.record
        if psn != record.epsn and qp.rnr_sent:
            return None, "ignored"
        return self._rnr_nak(qp, record.epsn)

    def _rnr_nak(self, qp: _Qp, psn: int) -> tuple[Reply | None, str]:
        code = _RNR_CODES[min(qp.rnr_sent, len(_RNR_CODES) - 1)]
        qp.rnr_sent += 1
        return self._ack(qp, psn, Syndrome.RNR_NAK + code), "rnr_nak"

    def _duplicate(self, qp: _Qp, psn: int, opcode: int, *, ackreq: bool) -> tuple[Reply | None, str]:
        mask = OPINFO[opcode].mask
        if mask & (P_SEND | P_WRITE):
            if ackreq or mask & (P_LAST | P_ONLY):
                beyond = any(_is_before(psn, at) and _is_before(at, qp.ack_psn) for at in qp.answered)
                return self._ack(qp, psn if beyond else qp.ack_psn, Syndrome.ACK), "ack"
        elif mask & P_ATOMIC and psn in qp.atomics:
            return self._ack(qp, psn, Syndrome.ACK, orig=qp.atomics[psn]), "atomic_ack"
        elif opcode & ~SVC_MASK in (Op.FLUSH, Op.ATOMIC_WRITE) and psn in qp.atomics:
            return self._ack(qp, psn, Syndrome.ACK, opcode=Op.READ_RESP_ONLY), "read_ack"
        elif mask & P_READ:
            qp.read_waits = True
            return self._rnr_nak(qp, psn)
        return None, "ignored"

    def _peer_moved(self, qp: _Qp, packet: bytes, src_gid: bytes) -> bool:
        """Whether a RESUME is the peer's, by the rules of docs/protocol.md 5; its address is noted."""
        record = qp.record
        try:
            meh = parse(packet).meh
        except WireError:
            return False
        if meh is None or meh.version != 1 or meh.src_qpn != record.peer_qpn or not meh.epoch:
            return False
        newer = (meh.epoch - qp.peer_epoch) & 0xFFFFFFFF
        if newer >= 0x80000000:
            return False
        if not record.have_peer_token:
            return src_gid == meh.gid == qp.peer_gid
        # The old socket cannot reach another address family.
        same_family = meh.gid.startswith(V4_PREFIX) == qp.peer_gid.startswith(V4_PREFIX)
        if not hmac.compare_digest(meh.token, record.peer_token) or not same_family:
            return False
        if newer:
            qp.peer_gid, qp.peer_epoch = meh.gid, meh.epoch
        return True

    def _ack(self, qp: _Qp, psn: int, syndrome: int, orig: int | None = None, opcode: int = Op.ACK) -> Reply:
        record = qp.record
        service = _SERVICES[record.type]
        if service == SVC_UC:  # which has none: as in the announcement (docs/protocol.md, 1)
            service = SVC_RC
        if orig is not None:
            opcode = Op.ATOMIC_ACK
        opcode += service
        return _reply(
            qp,
            Packet(
                opcode, record.peer_qpn, psn, capable=True, aeth=Aeth(syndrome, record.msn), atomic_orig=orig
            ),
        )

    def _resume(self, qp: _Qp, gid: bytes) -> Reply:
        record = qp.record
        meh = Meh(record.qpn, (record.epoch + 1) & 0xFFFFFFFF, record.epsn, record.token, gid)
        return _reply(qp, Packet(Op.RESUME, record.peer_qpn, 0, capable=True, meh=meh))


def _is_before(psn: int, other: int) -> bool:
    """Whether a PSN comes before another one."""
    return (psn - other) & 0x800000 != 0


def _before(epsn: int, answered: dict[int, int]) -> int:
    """The PSN before `epsn` and all requests in `answered` (last PSN -> first) that lie right below it."""
    psn = (epsn - 1) & PSN_MASK
    for _ in answered:  # each once: they may lie
        psn = (answered.get(psn, psn + 1) - 1) & PSN_MASK
    return psn


def intact(packet: bytes, src_gid: bytes, src_port: int, dst_gid: bytes) -> bool:
    """Whether the ICRC is right with some IP id, DF set (as everybody does) or not."""
    for df in (True, False):
        if check_icrc(Flow(src_gid, dst_gid, src_port, df=df), packet) is not None:
            return True
    return False


def _reply(qp: _Qp, packet: Packet) -> Reply:
    flow = Flow(qp.record.local_gid, qp.peer_gid, ROCE_PORT)
    return Reply(build(packet, flow), qp.record.local_gid, qp.peer_gid)
