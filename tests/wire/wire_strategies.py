# SPDX-License-Identifier: BSD-3-Clause
"""Hypothesis strategies: packets and flows of every kind."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from migroce import wire

u8, u16, u24 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 24))
u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (32, 64))
bytes16 = st.binary(min_size=16, max_size=16)

_EXTENSIONS: dict[int, tuple[str, st.SearchStrategy[object]]] = {
    wire.H_DETH: ("deth", st.builds(wire.Deth, u32, u24)),
    wire.H_XRCETH: ("xrc_srqn", u24),
    wire.H_FETH: ("feth", st.builds(wire.Feth, st.integers(0, 15), st.integers(0, 3))),
    wire.H_RETH: ("reth", st.builds(wire.Reth, u64, u32, u32)),
    wire.H_ATOMIC: ("atomic", st.builds(wire.AtomicEth, u64, u32, u64, u64)),
    wire.H_AETH: ("aeth", st.builds(wire.Aeth, u8, u24)),
    wire.H_ATOMICACK: ("atomic_orig", u64),
    wire.H_IMM: ("imm", u32),
    wire.H_IETH: ("ieth", u32),
    wire.H_MEH: ("meh", st.builds(wire.Meh, u24, u32, u24, bytes16, bytes16, u8, u8)),
}


def payloads(max_size: int = 600) -> st.SearchStrategy[bytes]:
    """Payloads, long ones made of a repeated short one so that they are cheap."""
    return st.builds(lambda chunk, size: (chunk * (size // len(chunk) + 1))[:size],
                     st.binary(min_size=1, max_size=16), st.integers(0, max_size))  # fmt: skip


@st.composite
def packets(draw: st.DrawFn, opcode: int | None = None, max_payload: int = 600) -> wire.Packet:
    """Any packet that can be built."""
    code = draw(st.sampled_from(sorted(wire.OPINFO))) if opcode is None else opcode
    mask = wire.OPINFO[code].mask
    payload = draw(payloads(max_payload)) if mask & (wire.H_PAYLOAD | wire.P_CONTROL) else b""
    pad = draw(st.integers(0, 3)) if mask & (wire.H_PAYLOAD | wire.P_CONTROL) else 0
    optional: dict[str, Any] = {
        name: draw(values) for bit, (name, values) in _EXTENSIONS.items() if mask & bit
    }
    optional |= {"pad": pad, "payload": payload}
    for flag in ("solicited", "migreq", "ackreq", "capable", "fecn", "becn"):
        optional[flag] = draw(st.booleans())
    return wire.Packet(code, draw(u24), draw(u24), draw(u16), **optional)


def flows() -> st.SearchStrategy[wire.Flow]:
    """IPv4 and IPv6."""
    v4 = st.binary(min_size=4, max_size=4).map(lambda a: bytes(10) + b"\xff\xff" + a)
    v6 = bytes16.filter(lambda gid: gid[:12] != bytes(10) + b"\xff\xff")
    return st.one_of(
        st.builds(wire.Flow, v4, v4, u16, u16, u16, st.booleans()),
        st.builds(wire.Flow, v6, v6, u16, u16),
    )
