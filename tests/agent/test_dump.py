# SPDX-License-Identifier: BSD-3-Clause
"""The dump reader: what it promises about good, longer, newer and hostile dumps."""

from __future__ import annotations

import contextlib
import json
import random
import re
import struct
import time
import zlib
from pathlib import Path

import pytest

from migroce import dump as d
from migroce import dump_records as records

ROOT = Path(__file__).resolve().parents[2]
GID_A, GID_B = d.gid_bytes("10.0.1.7"), d.gid_bytes("10.0.1.3")


def sample(n_qp: int = 3) -> d.Dump:
    ctx = d.ContextRecord(GID_A, 0, 1 << 18, 0, 5, 4096, n_qp, 1, 1, 1, 1, 1)
    qps = tuple(
        d.make_qp(0x100 + i, peer_qpn=0x2000 + i, local_gid=GID_A, peer_gid=GID_B, epsn=i, una_psn=7,
                  token=bytes([i & 255]) * 16, tclass_hop=0x6040)
        for i in range(n_qp)
    )
    return d.Dump(
        ctx,
        pds=(d.PdRecord(1, 4),),
        mrs=(d.MrRecord(0x7F0000000000, 65536, 0x7F0000000000, 0x1100, 0x1101, 7, 1),),
        cqs=(d.CqRecord(1, 128, 2, 1, 99, 8, 1),),
        srqs=(d.SrqRecord(2, 0x4711, 1, 1, 3, 64, 7, 2, 5, 1, 1000),),
        xrcds=(d.XrcdRecord(3, 2),),
        mws=(d.MwRecord(0x2277, 2, 1, 6, 0x1100, 0x100, 0x7F0000000000, 512),),
        qps=qps,
        resources=(d.ResourceRecord(0x100, 12, 3, 5, 0x7F0000000000, 0x1101, 4096, 0),),
        counters=dict.fromkeys(d.COUNTER_NAMES, 1),
    )


def reseal(data: bytearray) -> bytes:
    """Give damaged bytes a right CRC, so that the checks behind it are reached."""
    data[-8:-4] = struct.pack("<I", zlib.crc32(bytes(data[:-16])))
    return bytes(data)


def test_what_is_built_is_read_back() -> None:
    assert d.parse(d.build(sample())) == sample()


def test_longer_and_unknown_records_are_read_as_far_as_known() -> None:
    got = d.parse(d.build(sample(), extra=[(76, b"srq"), (77, b"x" * 40), (77, b"")], grow=24))
    assert got.qps == sample().qps
    assert got.unknown == {76: 1, 77: 2}


def test_the_layout_is_that_of_dump_h() -> None:
    text = (ROOT / "native/transport/dump.h").read_text()
    sizes = {k: int(v) for k, v in re.findall(r"sizeof\(struct mg_dump_(\w+)\) == (\d+)", text)}
    ours = {"header": d._HEADER, "context": records.CONTEXT, "mr": records.MR, "cq": records.CQ,
            "qp": records.QP, "resource": records.RESOURCE, "srq": records.SRQ, "xrcd": records.XRCD,
            "mw": records.MW}
    for name, layout in ours.items():
        assert layout.size == sizes[name], name
    text = (ROOT / "native/transport/engine.h").read_text()
    counters = re.search(r"enum mg_counter \{(.*?)MG_CNT_MAX", text, re.DOTALL)
    assert counters
    names = [n.lower() for n in re.findall(r"MG_CNT_(\w+)", counters[1])]
    assert names == list(d.COUNTER_NAMES)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: b[:20], "too few"),
        (lambda b: b"\x7fELF" + b[4:], "not an RDMA dump"),
        (lambda b: b.replace(b"\r\n", b"\n", 1), "text mode"),
        (lambda b: b[:8] + b"\2" + b[9:], "version 2"),
        (lambda b: b[:-1], "truncated"),
        (lambda b: b + b"\0", "followed by other data"),
        (lambda b: b[:100] + b"\xff" + b[101:], "CRC"),
        (lambda b: b[:36] + struct.pack("<I", 0xFFFFFFF8) + b[40:], "claims 4294967288 bytes"),
        (lambda b: b[:12] + struct.pack("<I", 0x7FFFFFF8) + b[16:], "header claims"),
    ],
)
def test_a_damaged_dump_is_refused_with_a_reason(change: object, says: str) -> None:
    with pytest.raises(d.DumpError, match=says):
        d.parse(change(d.build(sample())))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"epsn": 1 << 24}, "over 24 bits"),
        ({"state": 9}, "in state 9"),
        ({"path_mtu": 100}, "path MTU of 100"),
    ],
)
def test_an_inconsistent_qp_is_refused(fields: dict[str, int], says: str) -> None:
    bad = sample()
    with pytest.raises(d.DumpError, match=says):
        d.parse(d.build(d.Dump(bad.context, qps=(d.make_qp(0x100, **fields),))))


def test_qpns_are_unique_and_in_the_contexts_range() -> None:
    ctx = sample().context
    with pytest.raises(d.DumpError, match="twice"):
        d.parse(d.build(d.Dump(ctx, qps=(d.make_qp(5), d.make_qp(5)))))
    with pytest.raises(d.DumpError, match="outside"):
        d.parse(d.build(d.Dump(ctx, qps=(d.make_qp(1 << 18),))))


def test_random_damage_never_raises_anything_but_dump_error() -> None:
    rng = random.Random(4791)
    good = d.build(sample())
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            bad[rng.randrange(len(bad))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        if rng.random() < 0.1:
            del bad[rng.randrange(len(bad)) :]
        data = reseal(bad) if len(bad) == len(good) and rng.random() < 0.8 else bytes(bad)
        with contextlib.suppress(d.DumpError):
            json.dumps(d.parse(data).to_json(secrets=True))


def test_json_holds_the_tables_but_not_the_tokens() -> None:
    j = sample().to_json()
    assert j["context"]["gid"] == "10.0.1.7"
    assert j["qps"][0]["state"] == "RTS"
    assert j["qps"][0]["mstate"] == "stopped"
    assert (j["qps"][0]["tclass"], j["qps"][0]["hop_limit"]) == (0x60, 64)
    assert "token" not in j["qps"][0]
    assert sample().to_json(secrets=True)["qps"][2]["token"] == "02" * 16
    assert json.loads(json.dumps(j)) == j


def test_gids_go_to_text_and_back() -> None:
    for text in ("10.0.1.7", "fe80::1", ""):
        assert d.gid_text(d.gid_bytes(text)) == text
    with pytest.raises(ValueError, match="neither"):
        d.gid_bytes("10.0.1")


def test_a_file_that_is_no_dump_is_named_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "x.dump"
    with pytest.raises(d.DumpError, match=r"x\.dump: cannot be read: No such file"):
        d.read(path)
    path.write_bytes(b"hello")
    with pytest.raises(d.DumpError, match=r"x\.dump: not an RDMA dump"):
        d.read(path)
    path.write_bytes(d.build(sample()))
    assert d.read(path) == sample()
    with pytest.raises(d.DumpError, match="not a regular file"):
        d.read("/dev/null")


def test_4096_qps_are_read_quickly() -> None:
    data = d.build(sample(4096))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        d.parse(data)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1  # 8-12 ms on an idle machine; generous, for tests run on busy ones
