# SPDX-License-Identifier: BSD-3-Clause
"""Ports of rdma_cm belong to the processes behind an address together, by the rules of the kernel's cma.c."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from cm_programs import ADDRESSES, CmPair
from tests.cm.port_rules import ANY, RULES, V4, V6
from tests.e2e.stage import Binder, built

A = ADDRESSES[0]
PORT = 7300


@pytest.fixture
def two(pair: CmPair, agents: list[Path], tmp_path: Path) -> Iterator[tuple[Binder, Binder]]:
    """Two processes behind one address."""
    binders = []
    with contextlib.ExitStack() as stack:
        for name in ("one", "other"):
            directory = tmp_path / name
            directory.mkdir()
            argv = ["env", f"MIGROCE_AGENT={agents[0]}", str(built("tests/workload/cmports")), str(directory)]
            process = pair._start(0, argv)
            stack.callback(process.communicate)
            stack.callback(process.kill)
            binders.append(Binder(directory, process))
        yield binders[0], binders[1]


@pytest.mark.parametrize(("ps", "address", "option", "ps2", "address2", "option2", "answer"), RULES)
def test_a_port_of_another_process_is_taken(
    two: tuple[Binder, Binder], ps: str, address: str, option: str, ps2: str, address2: str, option2: str,
    answer: str,
) -> None:  # fmt: skip
    one, other = two
    own = {V4: A, V6: "fd99::1"}
    address, address2 = own.get(address, address), own.get(address2, address2)
    for binder, space, set_option in ((one, ps, option), (other, ps2, option2)):
        assert binder.do("new", 0, space) == "0 0"
        if set_option:
            assert binder.do(set_option, 0) == "0 0"
    assert one.do("bind", 0, address, PORT) == f"0 {PORT}"
    got = other.do("bind", 0, address2, PORT)
    assert got.split()[0] == answer
    if answer != "0":  # until the other lets go of it
        assert one.do("drop", 0) == "0 0"
        assert other.do("bind", 0, address2, PORT) == f"0 {PORT}"


def test_who_shares_a_port_listens_alone(two: tuple[Binder, Binder]) -> None:
    one, other = two
    for binder in two:
        for command in ("new 0 tcp", "reuse 0"):
            binder.do(command)
        assert binder.do("bind", 0, ANY, PORT) == f"0 {PORT}"
    assert one.do("listen", 0) == "EADDRNOTAVAIL"
    assert other.do("drop", 0) == "0 0"
    assert one.do("listen", 0) == f"0 {PORT}"
    other.do("new", 0, "tcp")
    other.do("reuse", 0)
    assert other.do("bind", 0, ANY, PORT) == "EADDRNOTAVAIL"  # no longer shared


def test_the_ports_of_a_process_end_with_it(two: tuple[Binder, Binder]) -> None:
    one, other = two
    one.do("new", 0, "tcp")
    assert one.do("bind", 0, ANY, PORT) == f"0 {PORT}"
    other.do("new", 0, "tcp")
    assert other.do("bind", 0, ANY, PORT) == "EADDRNOTAVAIL"
    assert one.process is not None
    one.process.kill()
    one.process.wait()
    assert other.do("bind", 0, ANY, PORT) == f"0 {PORT}"


def test_a_port_that_was_not_asked_for_by_number_is_nobody_elses(two: tuple[Binder, Binder]) -> None:
    """Nor of an id that connects."""
    one, other = two
    for at, command in enumerate((("bind", 0, A, 0), ("resolve", 1, A, PORT))):
        one.do("new", at, "tcp")
        other.do("new", at, "tcp")
        ret, port = one.do(*command).split()
        assert ret == "0"
        assert int(port) >= 32768
        assert other.do("bind", at, A, port) == "EADDRINUSE"
