# SPDX-License-Identifier: BSD-3-Clause
"""native/wire through cffi, in the terms of migroce.wire."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from cffi import FFI

from migroce import wire

HDR_MAX = 64


def declarations(header: str) -> str:
    """What cffi's parser takes of wire.h: all but preprocessor lines and inline functions."""
    text = re.sub(r"^static inline .*?^}$", "", header, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    return "struct iovec { void *iov_base; size_t iov_len; };\n" + text


class Native:
    """The C codec. Methods take and return what their namesakes in migroce.wire do."""

    def __init__(self, cdef: str, library: Path) -> None:
        self.ffi = FFI()
        self.ffi.cdef(cdef)
        self.lib: Any = self.ffi.dlopen(str(library))

    def opinfo(self) -> dict[int, wire.OpInfo]:
        """The opcode table."""
        table = self.lib.mg_opinfo
        return {
            code: wire.OpInfo(
                self.ffi.string(table[code].name).decode(), table[code].mask, table[code].hdr_len
            )
            for code in range(256)
            if table[code].name
        }

    def parse(self, buf: bytes) -> wire.Packet | None:
        """Decode; None where C says -EBADMSG."""
        hdrs = self.ffi.new("struct mg_hdrs *")
        data = self.ffi.new("uint8_t[]", bytes(buf) or b"\0")
        if (error := self.lib.mg_hdrs_parse(data, len(buf), hdrs)) != 0:
            assert error == -74  # EBADMSG
            return None
        h: Any = hdrs
        offset = int(self.ffi.cast("uintptr_t", h.payload)) - int(self.ffi.cast("uintptr_t", data))
        assert 0 <= offset <= offset + h.payload_len <= len(buf)
        has = {bit: bool(h.mask & bit) for bit, _ in wire._HDR_LENS}
        m = h.meh
        return wire.Packet(
            opcode=h.opcode, dest_qpn=h.dest_qpn, psn=h.psn, pkey=h.pkey, solicited=h.solicited,
            migreq=h.migreq, ackreq=h.ackreq, capable=h.capable, fecn=h.fecn, becn=h.becn, pad=h.pad,
            deth=wire.Deth(h.deth.qkey, h.deth.src_qpn) if has[wire.H_DETH] else None,
            xrc_srqn=h.xrc_srqn if has[wire.H_XRCETH] else None,
            reth=wire.Reth(h.reth.va, h.reth.rkey, h.reth.length) if has[wire.H_RETH] else None,
            atomic=wire.AtomicEth(h.atomic.va, h.atomic.rkey, h.atomic.swap_add, h.atomic.compare)
            if has[wire.H_ATOMIC] else None,
            aeth=wire.Aeth(h.aeth.syndrome, h.aeth.msn) if has[wire.H_AETH] else None,
            atomic_orig=h.atomic_orig if has[wire.H_ATOMICACK] else None,
            imm=h.imm if has[wire.H_IMM] else None,
            ieth=h.ieth if has[wire.H_IETH] else None,
            meh=wire.Meh(m.src_qpn, m.epoch, m.psn, bytes(m.token), bytes(m.gid), m.version, m.flags)
            if has[wire.H_MEH] else None,
            payload=bytes(buf[offset : offset + h.payload_len]),
            feth=wire.Feth(h.feth.type, h.feth.level) if has[wire.H_FETH] else None,
        )  # fmt: skip

    def build_body(self, pkt: wire.Packet) -> bytes:
        """Headers by C, payload and pad behind them."""
        h = self.ffi.new("struct mg_hdrs *")
        for name in (
            "opcode", "dest_qpn", "psn", "pkey", "solicited", "migreq", "ackreq", "capable", "fecn", "becn",
            "pad",
        ):  # fmt: skip
            setattr(h, name, getattr(pkt, name))
        for name in ("deth", "feth", "reth", "atomic", "aeth", "meh"):
            ext = getattr(pkt, name)
            for member in getattr(ext, "__slots__", ()) if ext is not None else ():
                setattr(getattr(h, name), member, getattr(ext, member))
        for name in ("xrc_srqn", "atomic_orig", "imm", "ieth"):
            if (value := getattr(pkt, name)) is not None:
                setattr(h, name, value)
        guard = b"\xa5" * 16
        out = self.ffi.new("uint8_t[]", bytes(HDR_MAX) + guard)
        length = self.lib.mg_hdrs_build(h, out)
        assert length <= HDR_MAX
        assert bytes(out)[HDR_MAX : HDR_MAX + len(guard)] == guard
        return bytes(out)[:length] + pkt.payload + bytes(pkt.pad)

    def flow(self, flow: wire.Flow) -> Any:
        """struct mg_flow."""
        return self.ffi.new(
            "struct mg_flow *",
            {
                "src": flow.src, "dst": flow.dst, "sport": flow.sport, "dport": flow.dport,
                "ip_id": flow.ip_id, "df": flow.df,
            },
        )  # fmt: skip

    def icrc(self, flow: wire.Flow, body: bytes, cuts: tuple[int, ...] = ()) -> int:
        """ICRC of a body handed over in pieces that end at `cuts`."""
        ends = [0, *cuts, len(body)]
        pieces = [self.ffi.new("uint8_t[]", body[a:b] or b"\0") for a, b in pairwise(ends)]
        iov = self.ffi.new("struct iovec[]", len(pieces))
        for i, piece in enumerate(pieces):
            iov[i].iov_base, iov[i].iov_len = piece, ends[i + 1] - ends[i]
        return int(self.lib.mg_icrc(self.flow(flow), iov, len(pieces), len(body)))

    def check_icrc(self, flow: wire.Flow, buf: bytes) -> int | None:
        """The IP id found, or None when the packet is damaged."""
        found = self.ffi.new("uint16_t *", 0xDEAD)
        ok = self.lib.mg_icrc_check(self.flow(flow), self.ffi.from_buffer("uint8_t[]", buf), len(buf), found)
        if not ok:
            assert found[0] == 0xDEAD
            return None
        return int(found[0])
