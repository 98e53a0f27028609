# SPDX-License-Identifier: BSD-3-Clause
"""What is shown: inspect, progress, the timeline, the live view."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from migroce import dump as dumps
from migroce.demo.state import DemoState, End
from migroce.migration.report import Report, event
from migroce.report import console, live, progress
from migroce.report.series import Series
from migroce.report.timeline import Span, draw

from .conftest import Migroce

GID = dumps.gid_bytes("10.0.1.7")
PEER = dumps.gid_bytes("10.0.1.3")


def a_dump() -> dumps.Dump:
    qp = dumps.make_qp(
        0x2F329, type=2, state=3, mstate=1, path_mtu=4096, local_gid=GID, peer_gid=PEER, peer_qpn=0x183C6,
        next_psn=0xABCDEF, una_psn=0xABCDE0, token=b"S" * 16, peer_token=b"T" * 16, sq_depth=128, sq_fill=3,
    )  # fmt: skip
    context = dumps.ContextRecord(GID, 0, 1 << 18, 0, 1, 4096)
    mr = dumps.MrRecord(0x7F0000000000, 65536, 0x7F0000000000, 0x1234, 0x5678, 3, 1)
    return dumps.Dump(context, mrs=(mr,), qps=(qp,), counters={"tx_packets": 7, "rx_packets": 0})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    (tmp_path / "rdma").mkdir()
    (tmp_path / "rdma" / "rdma-0.dump").write_bytes(dumps.build(a_dump()))
    return tmp_path


def test_inspect_shows_what_a_move_must_keep(saved: Path, migroce: Migroce) -> None:
    shown = migroce("inspect", str(saved)).stdout
    for wanted in (
        "0x2f329",
        "RTS, stopped",
        "10.0.1.3",
        "0x183c6",
        "0xabcdef",
        "3/128",
        "0x5678",
        "tx packets 7",
    ):
        assert wanted in shown
    assert "rx packets" not in shown


def test_inspect_never_shows_tokens(saved: Path, migroce: Migroce) -> None:
    for args in ((), ("--json",)):
        shown = migroce("inspect", str(saved), *args).stdout
        assert "53535353" not in shown
        assert "SSSS" not in shown


def test_inspect_gives_json(saved: Path, migroce: Migroce) -> None:
    found = json.loads(migroce("inspect", str(saved), "--json").stdout)
    (context,) = found["contexts"]
    assert context["qps"][0]["next_psn"] == 0xABCDEF
    assert context["context"]["gid"] == "10.0.1.7"


def two_series() -> dict[str, Series]:
    made = {"server": Series(), "client": Series()}
    for i in range(100):
        for one in made.values():
            one.add(5 + i * 0.02, i * 1000)
    return made


def test_the_timeline_is_drawn_as_png_and_svg(tmp_path: Path) -> None:
    spans = [Span("stop", 5.5, 5.51), Span("dump", 5.51, 5.7), Span("restore", 5.7, 5.9)]
    written = draw(tmp_path / "x", two_series(), spans, title="T", blackout=(5.5, 5.9))
    assert [path.name for path in written] == ["x.png", "x.svg"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in written[1].read_text()


def test_a_timeline_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sample"):
        draw(tmp_path / "x", {"a": Series()}, [], title="T")


def test_progress_names_each_phase_and_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    console.console.cache_clear()
    with progress.Printer() as printer:
        printer(event("stop", "start"))
        printer(event("stop", "done", "1 QP"))
        printer(event("dump", "start"))
        printer(event("dump", "failed", "disk full"))
    shown = capsys.readouterr().out
    console.console.cache_clear()
    assert re.search(r"stop +\d+\.\d ms +1 QP", shown)
    assert re.search(r"dump +failed", shown)


def test_json_progress_is_lines_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    progress.json_event(event("stop", "start"))
    progress.json_report(Report("migrate", "c", "node-a", "node-b", blackout=200.5))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["event"]["phase"] == "stop"
    assert lines[1]["report"]["blackout"] == 200.5


def entry(state: str, received: int) -> dict[str, object]:
    data = a_dump().to_json()
    data["qps"][0].update(state="RTS", mstate="normal", peer_capable=True)
    data["counters"] = {"rx_bytes": received, "tx_bytes": 0}
    return {"id": "c", "state": state, "contexts": [{"dump": data}]}


def test_a_moved_end_is_followed_to_its_new_node() -> None:
    end = End("c", "server", "10.0.1.7", "node-a")
    end.take(1.0, "node-a", entry("running", 100))
    end.take(1.1, "node-a", entry("stopped", 200))
    end.take(1.2, "node-b", entry("prepared", 200))
    assert (end.node, end.received.last) == ("node-a", 200)
    end.take(1.3, "node-b", entry("running", 300))
    end.take(1.4, "node-a", entry("stopped", 200))
    assert (end.node, end.received.last, end.connected) == ("node-b", 300, True)


def test_the_live_view_shows_ends_and_phases() -> None:
    from rich.console import Console

    state = DemoState(End("c1", "server", "10.0.1.7", "node-a"), End("c2", "client", "10.0.1.3", "node-b"))
    state.phase("stop", "start", 1.0)
    state.phase("stop", "done", 1.03)
    state.phase("dump", "start", 1.03)
    out = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    out.print(live.render(state))
    shown = out.export_text()
    out.file.close()
    assert "c1 server" in shown
    assert "stop 30 ms" in shown
    assert "dump" in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (1 << 60, "1048576.0 TiB")],
)
def test_bytes_for_people(value: int, text: str) -> None:
    assert console.human_bytes(value) == text


@pytest.mark.parametrize(("value", "text"), [(5, "5 b/s"), (2.5e6, "2 Mb/s"), (19.8e9, "19.8 Gb/s")])
def test_rates_for_people(value: float, text: str) -> None:
    assert console.human_rate(value) == text
