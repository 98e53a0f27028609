# SPDX-License-Identifier: BSD-3-Clause
"""What is run between the kernel's driver and ours: each row in both directions."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.interop.ends import V4, V6, End, Outcome, run, run_cm
from tests.interop.net import loss

PORTS = {"ib": 18515, "ibv": 18515, "mgcheck": 18515}
MTUS = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Row:
    """One program with its options."""

    group: str
    command: str
    family: int = V4
    received: int | None = None
    """Every how manieth packet from the machine is lost."""
    sent: int | None = None
    environment: dict[str, str] = field(default_factory=dict, hash=False)
    seconds: float = 45

    @property
    def title(self) -> str:
        """As the table has it."""
        extras = [f"every {n}th packet {what} lost" for n, what in
                  ((self.received, "from rdma_rxe"), (self.sent, "to rdma_rxe")) if n]  # fmt: skip
        return f"`{self.command}`" + "".join(f", {extra}" for extra in extras)

    @property
    def id(self) -> str:
        lost = f" lose {self.received}/{self.sent}" if self.received or self.sent else ""
        return f"{self.group}: {self.command}{lost}"

    def run(self, server: End, client: End) -> Outcome:
        """Run it."""
        program, *options = self.command.split()
        argv, gid_option = [program, "-d", "rxe0", *options], "-x"
        if program.startswith("ibv_"):
            gid_option = "-g"
        with loss(self.received, self.sent):
            return run(
                server, client, argv, port=PORTS[program.split("_")[0]], gid_option=gid_option,
                family=self.family, seconds=self.seconds, **self.environment,
            )  # fmt: skip


@dataclass(frozen=True)
class CmRow:
    """A program on librdmacm: what the server and the client are told; `{}` is the server's address."""

    server: str
    client: str
    family: int = V4
    group: str = "rdma_cm"

    @property
    def title(self) -> str:
        """As the table has it."""
        return f"`{self.client.format('SERVER')}`" + (", IPv6" if self.family == V6 else "")

    @property
    def id(self) -> str:
        return f"{self.group}: {self.title}"

    def run(self, server: End, client: End) -> Outcome:
        """Run it."""
        address = server.address(self.family)
        lines = (line.format(address).split() for line in (self.server, self.client))
        return run_cm(server, client, *lines, family=self.family)


def _rc() -> list[Row]:
    bandwidth = [
        f"ib_{op}_bw {options}"
        for op in ("send", "write", "read")
        for options in ("-n 200", "-n 100 -b", "-n 100 -q 4", "-n 10 -s 1000001", "-n 500 -s 1")
    ]
    latency = [
        f"ib_{op}_lat -n 100{options}" for op in ("send", "write", "read") for options in ("", " -s 10000")
    ]
    events = [f"ib_{test} -n 100 -e" for test in ("send_bw", "read_bw", "send_lat", "read_lat")]
    special = [
        "ib_send_bw -n 500 -s 8 -I 8", "ib_write_bw -n 500 -s 64 -I 64",
        "ib_send_bw -n 256 -s 256 -l 32", "ib_send_bw -n 500 -r 8 -t 32", "ib_read_bw -n 200 -o 1",
        "ib_send_bw -n 200 --use_old_post_send",
        "ibv_rc_pingpong -n 200", "ibv_rc_pingpong -n 200 -e", "ibv_rc_pingpong -n 50 -s 100000",
        "ibv_rc_pingpong -n 200 --new_send",
    ]  # fmt: skip
    return [Row("RC", command) for command in (*bandwidth, *latency, *events, *special)]


def _checked() -> list[Row]:
    plain = "mgcheck --no-fence --stall 30 --messages"
    return [
        Row("RC, every byte checked", f"{plain} 150"),
        Row("RC, every byte checked", f"{plain} 150 --events"),
        Row("RC, every byte checked", f"{plain} 150 --new-api --cq per-qp --sges 1"),
        Row("RC, every byte checked", f"{plain} 60 --qps 16"),
        Row("RC, every byte checked", f"{plain} 200 --psn 16777200"),
        Row("RC, every byte checked", f"{plain} 200 --rnr-every 10"),
        *(Row("RC, every byte checked", f"{plain} 80 --mtu {mtu}") for mtu in MTUS),
        *(Row("RC, every byte checked", f"{plain} 100 --ops {op}")
          for op in ("send,send_imm", "write,write_imm", "read")),
    ]  # fmt: skip


def _ipv6() -> list[Row]:
    return [
        Row("RC, IPv6", command, V6)
        for command in (
            "ib_send_bw -n 200 -b", "ib_write_bw -n 200", "ib_read_bw -n 200", "ib_send_lat -n 100",
            "ib_write_lat -n 100", "ibv_rc_pingpong -n 200", "mgcheck --no-fence --stall 30 --messages 100",
        )
    ]  # fmt: skip


def _lossy() -> list[Row]:
    check = "mgcheck --no-fence --stall 60 --messages 60 --max-size 65536"
    rows = [
        Row("RC, loss", check, received=every, sent=other, seconds=90)
        for every, other in ((31, None), (None, 31), (43, 37))
    ]
    rows += [
        Row("RC, loss", f"ib_{op}_bw -n 100 -s 8192", received=41, sent=29, seconds=90)
        for op in ("send", "write", "read")
    ]
    # single packets lost, not trains
    rows.append(Row("RC, loss", check + " --qps 2", V6, 37, 41, {"MIGROCE_NO_GSO": "1"}, 90))
    return rows


def _atomics() -> list[Row]:
    return [
        Row("RC, atomics", f"ib_atomic_{line}")
        for line in (
            "bw -n 200", "bw -n 200 -A CMP_AND_SWAP", "bw -n 100 -b -q 4", "bw -n 200 -e -o 1", "lat -n 100",
            "lat -n 100 -A CMP_AND_SWAP",
        )
    ]  # fmt: skip


def _mtus() -> list[Row]:
    return [
        Row("RC, every MTU", f"ib_{op}_bw -n 50 -s 10000 -m {mtu}")
        for op in ("send", "write", "read")
        for mtu in MTUS
    ]


def _shared() -> list[Row]:
    return [
        Row("RC, shared receive queue", line)
        for line in (
            "ib_send_bw -n 200 --use-srq -q 4", "ib_send_bw -n 100 --use-srq -q 4 -b -e",
            "ib_send_lat -n 100 --use-srq", "ibv_srq_pingpong -n 100", "ibv_srq_pingpong -n 100 -q 4 -e",
        )
    ]  # fmt: skip


def _unreliable() -> list[Row]:
    """UC and UD lose what finds no receive posted: no more messages than perftest posts receives (512)."""
    uc = (
        "ib_send_bw -n 200 -c UC -s 1000", "ib_send_bw -n 100 -c UC -s 4096 -b -q 2",
        "ib_send_bw -n 20 -c UC -s 30000",
        "ib_send_lat -n 100 -c UC -s 1000", "ib_write_bw -n 200 -c UC", "ib_write_bw -n 50 -c UC -b -s 10001",
        "ib_write_lat -n 100 -c UC", "ibv_uc_pingpong -n 100", "ibv_uc_pingpong -n 100 -e -s 20000 -m 1024",
    )  # fmt: skip
    ud = (
        "ib_send_bw -n 200 -c UD -s 1000", "ib_send_bw -n 100 -c UD -s 4096 -b",
        "ib_send_bw -n 100 -c UD -s 64 -q 4",
        "ib_send_bw -n 100 -c UD -s 300 --use-srq", "ib_send_lat -n 100 -c UD -s 1000",
        "ib_send_lat -n 100 -c UD -e -s 32 -I 64", "ibv_ud_pingpong -n 100",
        "ibv_ud_pingpong -n 100 -e -s 1000",
    )  # fmt: skip
    six_uc = ("ib_send_bw -n 100 -c UC -s 1000", "ib_write_lat -n 100 -c UC", "ibv_uc_pingpong -n 100")
    six_ud = ("ib_send_bw -n 100 -c UD -s 1000", "ib_send_lat -n 100 -c UD -s 1000", "ibv_ud_pingpong -n 100")
    return [
        *(Row("UC", line) for line in uc), *(Row("UC, IPv6", line, V6) for line in six_uc),
        *(Row("UD", line) for line in ud), *(Row("UD, IPv6", line, V6) for line in six_ud),
        Row("UD, multicast", "ib_send_bw -n 100 -c UD -s 1000 -g -M 0:0:0:0:0:0:0:0:0:0:255:255:239:1:1:1"),
        Row("UD, multicast", "ib_send_bw -n 100 -c UD -s 1000 -g -M 255:14:0:0:0:0:0:0:0:0:0:0:0:0:1:1", V6),
    ]  # fmt: skip


def _rdma_cm() -> list[CmRow]:
    both = [f"ib_{line}" for line in (
        "send_bw -n 100 -R", "send_bw -n 100 -R -b -q 2", "write_bw -n 100 -R", "read_bw -n 100 -R",
        "send_lat -n 50 -R", "write_lat -n 50 -R", "atomic_bw -n 50 -R", "send_bw -n 100 -s 1000 -R -c UD",
    )]  # fmt: skip
    pairs = [
        *((line, f"{line} {{}}") for line in both),
        ("rping -s -a {} -C 20 -v", "rping -c -a {} -C 20 -v"),
        ("rping -s -a {} -C 5 -S 10000", "rping -c -a {} -C 5 -S 10000"),
        ("ucmatose -b {}", "ucmatose -s {}"),
        ("ucmatose -b {} -c 3 -S 500", "ucmatose -s {} -c 3 -S 500"),
        ("udaddy -b {}", "udaddy -s {}"),
        ("rdma_server", "rdma_client -s {}"),
        ("ucmatose -b {} -C 50", "ucmatose -s {} -C 50"),
    ]
    six = [
        ("rping -s -a {} -C 20 -v", "rping -c -a {} -C 20 -v"),
        ("ucmatose -b {}", "ucmatose -s {}"),
        ("udaddy -b {}", "udaddy -s {}"),
    ]
    return [*(CmRow(*pair) for pair in pairs), *(CmRow(*pair, V6) for pair in six)]


ROWS: list[Row | CmRow] = [
    *_rc(), *_checked(), *_ipv6(), *_lossy(), *_atomics(), *_mtus(), *_shared(), *_unreliable(), *_rdma_cm()
]  # fmt: skip

Lines = tuple[str, ...]
_TWO = ("send SUCCESS", "send SUCCESS")
_INVALID = ("send REM_INV_REQ_ERR", "send WR_FLUSH_ERR")
_ACCESS = ("send REM_ACCESS_ERR", "send WR_FLUSH_ERR")
_OPERATION = ("send REM_OP_ERR", "send WR_FLUSH_ERR")
_FLUSHED = ("recv WR_FLUSH_ERR", "recv WR_FLUSH_ERR")
_GONE = ("send RETRY_EXC_ERR", "send WR_FLUSH_ERR")
_IMM = " imm 1234abcd"

SCENARIOS: dict[str, tuple[Lines, Lines]] = {
    # what mgerr prints: the requester, the responder
    "send": (_TWO, ("recv SUCCESS 3000 bytes", "recv SUCCESS 0 bytes")),
    "send_empty": (_TWO, ("recv SUCCESS 0 bytes", "recv SUCCESS 0 bytes")),
    "send_imm": (_TWO, ("recv SUCCESS 3000 bytes" + _IMM, "recv SUCCESS 0 bytes")),
    "write_empty": (_TWO, ("recv SUCCESS 0 bytes",)),
    "write_imm": (_TWO, ("recv SUCCESS 3000 bytes" + _IMM, "recv SUCCESS 0 bytes")),
    "write_imm_empty": (_TWO, ("recv SUCCESS 0 bytes" + _IMM, "recv SUCCESS 0 bytes")),
    "read_empty": (_TWO, ("recv SUCCESS 0 bytes",)),
    "write_bad_rkey": (_ACCESS, _FLUSHED),
    "write_out_of_bounds": (_ACCESS, _FLUSHED),
    "write_no_access_mr": (_ACCESS, _FLUSHED),
    "write_no_access_qp": (_INVALID, _FLUSHED),
    "read_bad_rkey": (_ACCESS, _FLUSHED),
    "read_out_of_bounds": (_ACCESS, _FLUSHED),
    "read_no_access_mr": (_ACCESS, _FLUSHED),
    "read_no_access_qp": (_INVALID, _FLUSHED),
    "send_too_long": (_INVALID, ("recv LOC_LEN_ERR", "recv WR_FLUSH_ERR")),
    "send_into_bad_lkey": (_OPERATION, ("recv LOC_PROT_ERR", "recv WR_FLUSH_ERR")),
    "rnr_then_receive": (_TWO, ("recv SUCCESS 3000 bytes", "recv SUCCESS 0 bytes")),
    "rnr_write_imm_then_receive": (_TWO, ("recv SUCCESS 3000 bytes" + _IMM, "recv SUCCESS 0 bytes")),
    "rnr_retries_exceeded": (("send RNR_RETRY_EXC_ERR", "send WR_FLUSH_ERR"), ()),
    "retries_exceeded_send": (_GONE, ()),
    "retries_exceeded_write": (_GONE, ()),
    "retries_exceeded_read": (_GONE, ()),
}

KERNELS_ANSWERS: dict[str, tuple[Lines, Lines]] = {
    # where rdma_rxe as the responder does not do what the standard says (IBA table 61: invalid request)
    "send_too_long": (_OPERATION, ("recv LOC_QP_OP_ERR", "recv WR_FLUSH_ERR")),
    "send_into_bad_lkey": (_OPERATION, ("recv LOC_QP_OP_ERR", "recv WR_FLUSH_ERR")),
}
