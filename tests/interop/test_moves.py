# SPDX-License-Identifier: BSD-3-Clause
"""A container of ours moves, with its address, while its peer is the kernel's own driver (moves.py).

The peer knows nothing of us: the stand-in has to hold it with the standard's own words.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from tests.e2e.stage import wait_for
from tests.interop import net
from tests.interop.ends import V4, V6
from tests.interop.moves import MGCHECK, UDCHECK, Both, Pair, until_the_clock_is_measured

GROUPS = {V4: "239.1.1.1", V6: "ff0e::101"}
"""guestd.py has the machine join them."""
CHECK = f"{MGCHECK} --no-fence --stall 60 --rate 200 --seconds 600"
"""It ends when the container's end is told to, and takes the other along."""

_further = itertools.count(242)
"""Each once: the machine remembers an earlier container's hardware address. Behind those of stage.py."""

pytestmark = pytest.mark.timeout(300)
sides = pytest.mark.parametrize("container", ["server", "client"])
families = pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])


@sides
@pytest.mark.parametrize(
    "command",
    [
        "ib_send_bw -s 4096", "ib_send_bw -b -s 4096", "ib_write_bw -s 4096", "ib_read_bw -s 4096",
        "ib_send_bw -q 4 -s 4096", "ib_write_bw -q 4 -s 4096", "ib_send_bw -q 4 -b --use-srq -s 4096",
        "ib_atomic_bw -b", "ib_atomic_bw -A CMP_AND_SWAP",
    ],
)  # fmt: skip
@until_the_clock_is_measured
def test_an_unmodified_peer_survives_a_move_there_and_back(command: str, container: str, stage: Both) -> None:
    pair = Pair(stage, f"{command} -n 10000", container)
    pair.goes_on_across_moves()
    pair.finish()


@sides
@pytest.mark.parametrize("command", ["ib_send_bw -b", "ib_write_bw", "ib_read_bw"])
@until_the_clock_is_measured
def test_an_unmodified_peer_survives_moves_over_ipv6(command: str, container: str, stage: Both) -> None:
    pair = Pair(stage, f"{command} -s 4096 -n 10000", container, family=V6)
    pair.goes_on_across_moves()
    pair.finish()


@sides
@pytest.mark.parametrize("command", ["ib_send_bw", "ib_write_bw -b", f"{CHECK} --qps 2"])
@until_the_clock_is_measured
def test_an_unmodified_peer_survives_moves_of_a_further_address(
    command: str, container: str, stage: Both
) -> None:
    perftest = "" if command.startswith(MGCHECK) else " -s 4096 -n 10000"
    further = f"10.0.1.{next(_further)}"
    pair = Pair(stage, command + perftest, container, further=further)
    pair.goes_on_across_moves()
    assert {qp["local_gid"] for qp in pair.box.qps()} == {further}
    pair.finish()


@sides
@pytest.mark.parametrize("command", ["ib_send_bw", "ib_write_bw", "ib_read_bw"])
@until_the_clock_is_measured
def test_an_unmodified_peer_survives_moves_under_loss(command: str, container: str, stage: Both) -> None:
    with net.loss_on_the_cable(100, V4):
        pair = Pair(stage, f"{command} -s 4096 -n 5000", container)
        pair.goes_on_across_moves()
        pair.finish()


@sides
@pytest.mark.parametrize("command", ["ib_send_bw", "ib_write_bw", "ib_read_bw"])
@until_the_clock_is_measured
def test_an_unmodified_peer_waits_for_a_container_that_is_away_for_long(
    command: str, container: str, stage: Both, tmp_path: Path
) -> None:
    pair = Pair(stage, f"{command} -s 4096 -n 5000", container)
    pair.away(tmp_path / pair.box.name)
    pair.goes_on()
    pair.finish()


@sides
@families
@pytest.mark.parametrize("lost", [None, 100], ids=["no loss", "1 % lost"])
def test_every_byte_is_right_across_moves(lost: int | None, family: int, container: str, stage: Both) -> None:
    with net.loss_on_the_cable(lost, family):
        pair = Pair(stage, f"{CHECK} --qps 4", container, family=family)
        pair.goes_on_across_moves()
        pair.finish()


@sides
@pytest.mark.parametrize(
    "options",
    ["--rnr-every 10", "--ops send,send_imm", "--ops write,write_imm", "--ops read", "--ops atomic,send"],
)
def test_each_kind_of_request_is_executed_once_across_moves(
    options: str, container: str, stage: Both
) -> None:
    pair = Pair(stage, f"{CHECK} --qps 2 {options}", container)
    pair.goes_on_across_moves()
    pair.finish()


@sides
def test_every_byte_is_right_after_a_long_absence(container: str, stage: Both, tmp_path: Path) -> None:
    pair = Pair(stage, f"{CHECK} --qps 4", container)
    pair.goes_on()
    pair.away(tmp_path / "saved")
    pair.goes_on()
    pair.finish()


def test_a_connection_that_was_idle_across_moves_is_whole(stage: Both) -> None:
    pair = Pair(stage, f"{CHECK} --qps 4", "client", idle=True)
    wait_for("the connection", lambda: pair.progress().get("state") == "idle")
    pair.move()
    pair.move()
    assert pair.progress().get("received", 0) == 0
    pair.go()
    pair.goes_on()
    pair.finish()


@sides
@pytest.mark.parametrize("command", ["ib_write_bw -c UC", "ib_send_bw -c UC", "ib_send_bw -c UD"])
@until_the_clock_is_measured
def test_a_service_that_may_lose_goes_on_after_a_move(command: str, container: str, stage: Both) -> None:
    pair = Pair(stage, f"{command} -s 1024 -D 30", container)
    pair.goes_on_across_moves()
    pair.finish()


@sides
@families
def test_datagrams_go_on_after_a_move(family: int, container: str, stage: Both) -> None:
    """What is sent while the container is away is lost, as UD may; all that arrives is right."""
    pair = Pair(stage, f"{UDCHECK} --group {GROUPS[family]}", container, family=family)
    pair.goes_on_across_moves()
    assert pair.progress()["by_group"] > 0
    pair.finish()
