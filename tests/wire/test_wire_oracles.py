# SPDX-License-Identifier: BSD-3-Clause
"""Two implementations that are not ours, scapy and tshark, agree with what we build."""

from __future__ import annotations

import logging
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from wire_native import Native
from wire_pcap import frame, write_pcap

from migroce import wire

V4 = wire.Flow(wire.gid_from_ip("10.0.1.7"), wire.gid_from_ip("10.0.1.3"), 50000, ip_id=0x4321)
V6 = wire.Flow(wire.gid_from_ip("fd00::1:7"), wire.gid_from_ip("fd00::1:3"), 60001)


def samples() -> list[wire.Packet]:
    """One packet of every opcode with every field set to something of its own."""
    out = []
    for code, info in wire.OPINFO.items():
        mask = info.mask
        out.append(
            wire.Packet(
                code, 0x10_0000 + code, 0x20_0000 + code, 0xFFFF,
                solicited=code % 2 == 0, migreq=code % 3 == 0, ackreq=code % 5 == 0, capable=True,
                pad=3 if mask & wire.H_PAYLOAD else 0,
                deth=wire.Deth(0x1234_5678, 0x30_0000 + code) if mask & wire.H_DETH else None,
                xrc_srqn=0x40_0000 + code if mask & wire.H_XRCETH else None,
                reth=wire.Reth(0x1122_3344_5566_7700 + code, 0xAABB_CCDD, 0x0102_0304)
                if mask & wire.H_RETH else None,
                atomic=wire.AtomicEth(0x8877_6655_4433_2200 + code, 0xDEAD_BEEF, 0x0123_4567_89AB_CDEF, 9)
                if mask & wire.H_ATOMIC else None,
                aeth=wire.Aeth(0x60 + code % 5, 0x50_0000 + code) if mask & wire.H_AETH else None,
                atomic_orig=0xCAFE_F00D_0000_0000 + code if mask & wire.H_ATOMICACK else None,
                imm=0x7700_0000 + code if mask & wire.H_IMM else None,
                ieth=0x6600_0000 + code if mask & wire.H_IETH else None,
                meh=wire.Meh(1, 2, 3, b"t" * 16, V4.src) if mask & wire.H_MEH else None,
                feth=wire.Feth(1 + code % 3, code % 2) if mask & wire.H_FETH else None,
                payload=b"migroce payload, 33 bytes long..." if mask & wire.H_PAYLOAD else b"",
            )
        )  # fmt: skip
    return out


@pytest.mark.parametrize("flow", [V4, V6], ids=["ipv4", "ipv6"])
def test_scapy_builds_the_same_bytes_with_the_same_icrc(native: Native, flow: wire.Flow) -> None:
    logging.getLogger("scapy").setLevel(logging.ERROR)
    pytest.importorskip("scapy", reason="scapy is not installed")
    from scapy.contrib.roce import BTH
    from scapy.layers.inet import IP, UDP
    from scapy.layers.inet6 import IPv6
    from scapy.packet import Raw

    src, dst = wire.ip_from_gid(flow.src), wire.ip_from_gid(flow.dst)
    ip = IP(src=src, dst=dst, id=flow.ip_id, flags="DF") if flow is V4 else IPv6(src=src, dst=dst)
    for pkt in samples():
        ours = wire.build(pkt, flow)
        bth = BTH(
            opcode=pkt.opcode, solicited=pkt.solicited, migreq=pkt.migreq, padcount=pkt.pad, pkey=pkt.pkey,
            resv6=wire.BTH4_CAPABLE, dqpn=pkt.dest_qpn, ackreq=pkt.ackreq, psn=pkt.psn,
        )  # fmt: skip
        theirs = bytes(ip / UDP(sport=flow.sport, dport=flow.dport) / bth / Raw(ours[12:-4]))
        assert theirs[-len(ours) :] == ours, pkt.info.name
        body = native.build_body(pkt)
        assert body + struct.pack("<I", native.icrc(flow, body)) == ours


TSHARK_FIELDS = (
    "bth.opcode", "bth.se", "bth.m", "bth.padcnt", "bth.tver", "bth.p_key", "bth.destqp", "bth.a", "bth.psn",
    "deth.q_key", "deth.srcqp", "reth.va", "reth.r_key", "reth.dmalen", "atomiceth.swapdt", "atomiceth.cmpdt",
    "aeth.syndrome", "aeth.msn", "atomicacketh.origremdt", "immdt", "ieth", "invariant.crc",
)  # fmt: skip


@pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is not installed")
@pytest.mark.parametrize("flow", [V4, V6], ids=["ipv4", "ipv6"])
def test_tshark_reads_what_we_meant(tmp_path: Path, flow: wire.Flow) -> None:
    unknown = (wire.Op.FLUSH, wire.Op.ATOMIC_WRITE)  # younger than tshark's tables
    packets = [
        pkt for pkt in samples()
        if pkt.opcode & wire.SVC_MASK not in (wire.SVC_XRC, wire.SVC_MIG) and pkt.opcode not in unknown
    ]  # fmt: skip
    built = [wire.build(pkt, flow) for pkt in packets]
    write_pcap(tmp_path / "ours.pcap", [frame(flow, buf) for buf in built])
    fields = ["-E", "occurrence=f"] + [arg for name in TSHARK_FIELDS for arg in ("-e", f"infiniband.{name}")]
    capture = str(tmp_path / "ours.pcap")
    result = subprocess.run(
        ["tshark", "-r", capture, "--disable-protocol", "rpcordma", "-T", "fields", *fields],
        capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    lines = result.stdout.splitlines()
    assert len(lines) == len(packets)
    for line, pkt, buf in zip(lines, packets, built, strict=True):
        columns = zip(TSHARK_FIELDS, line.split("\t"), strict=True)
        seen = {name: _number(name, text) for name, text in columns if text}
        assert seen == _meant(pkt, buf), pkt.info.name


def _number(field: str, text: str) -> int:
    return int(text, 16 if field in ("immdt", "ieth") else 0)


def _meant(pkt: wire.Packet, buf: bytes) -> dict[str, int]:
    meant = {
        "bth.opcode": pkt.opcode, "bth.se": pkt.solicited, "bth.m": pkt.migreq, "bth.padcnt": pkt.pad,
        "bth.tver": 0, "bth.p_key": pkt.pkey, "bth.destqp": pkt.dest_qpn, "bth.a": pkt.ackreq,
        "bth.psn": pkt.psn, "invariant.crc": int.from_bytes(buf[-4:], "big"),
    }  # fmt: skip
    if pkt.deth:
        meant |= {"deth.q_key": pkt.deth.qkey, "deth.srcqp": pkt.deth.src_qpn}
    if pkt.reth:
        meant |= {"reth.va": pkt.reth.va, "reth.r_key": pkt.reth.rkey, "reth.dmalen": pkt.reth.length}
    if pkt.atomic:
        meant |= {"reth.va": pkt.atomic.va, "reth.r_key": pkt.atomic.rkey,
                  "atomiceth.swapdt": pkt.atomic.swap_add, "atomiceth.cmpdt": pkt.atomic.compare}  # fmt: skip
    if pkt.aeth:
        meant |= {"aeth.syndrome": pkt.aeth.syndrome, "aeth.msn": pkt.aeth.msn}
    if pkt.atomic_orig is not None:
        meant["atomicacketh.origremdt"] = pkt.atomic_orig
    if pkt.imm is not None:
        meant["immdt"] = pkt.imm
    if pkt.ieth is not None:
        meant["ieth"] = pkt.ieth
    return meant
