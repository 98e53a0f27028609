# SPDX-License-Identifier: BSD-3-Clause
"""`migroce top`: rates from two looks."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

from migroce.report import top


def _qp(qpn: int, tx: int, rx: int, again: int = 0, mstate: str = "normal") -> dict[str, Any]:
    bytes_ = {"tx_bytes": tx, "rx_bytes": rx}
    return {"qpn": qpn, "state": "RTS", "mstate": mstate, "retransmits": again, **bytes_}


def _container(name: str, node: str, *qps: dict[str, Any], slot: int = 0) -> dict[str, Any]:
    context = {"slot": slot, "comm": "ib_send_bw", "pid": 7, "state": "running", "dump": {"qps": list(qps)}}
    return {"id": name, "node": node, "contexts": [context]}


def test_rates_are_payload_in_bits_and_the_busiest_comes_first() -> None:
    before = [_container("a", "n", _qp(1, 0, 0)), _container("b", "n", _qp(1, 1000, 1000))]
    now = [_container("a", "n", _qp(1, 10, 0)), _container("b", "n", _qp(1, 3000, 2000, again=4))]
    first, second = top.rows(before, now, 2.0)
    assert (first.container, first.tx_bits, first.rx_bits, first.sent_again) == ("b", 8000.0, 4000.0, 2.0)
    assert (second.container, second.tx_bits) == ("a", 40.0)


def test_a_moved_container_goes_on_and_what_is_new_begins_at_nothing() -> None:
    before = [_container("a", "node-a", _qp(1, 100, 0))]
    now = [_container("a", "node-b", _qp(1, 200, 0), _qp(2, 10**9, 0)), _container("new", "n", _qp(1, 5, 5))]
    first, second = top.rows(before, now, 1.0)
    assert (first.node, first.tx_bits) == ("node-b", 800.0)
    assert (second.container, second.tx_bits, second.rx_bits) == ("new", 0.0, 0.0)


def test_a_restarted_process_has_no_negative_rate() -> None:
    now = [_container("a", "n", _qp(1, 5, 5))]
    assert top.rows([_container("a", "n", _qp(1, 100, 100))], now, 1.0)[0].tx_bits == 0


def test_states_of_a_move_are_counted_apart() -> None:
    now = [_container("a", "n", _qp(1, 0, 0), _qp(2, 0, 0, mstate="paused"), _qp(3, 0, 0, mstate="paused"))]
    assert top.rows([], now, 1.0)[0].qps == {"RTS": 1, "paused": 2}


def test_a_process_that_tells_nothing_is_shown_all_the_same() -> None:
    silent = _container("a", "n")
    silent["contexts"][0]["dump"] = None
    row = top.rows([], [silent], 1.0)[0]
    assert (row.program, row.qps, row.tx_bits) == ("ib_send_bw", {}, 0.0)
    assert top.view([row]).row_count == 1


def test_the_command_prints_a_line_of_json_for_each_look(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from migroce.cli import app, common, show

    class Here:
        spec = "local"

    looks = iter(range(10))
    monkeypatch.setattr(common, "local_nodes", lambda: ["local"])
    monkeypatch.setattr(common, "opened", lambda _: contextlib.nullcontext([Here()]))
    monkeypatch.setattr(show, "collect", lambda _: [_container("a", "local", _qp(1, 100 * next(looks), 0))])
    done = CliRunner().invoke(app.app, ["top", "--json", "--count", "2", "--interval", "0.1"])
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2, done.output
    assert all(line["processes"][0]["tx_bits"] > 0 for line in lines)
