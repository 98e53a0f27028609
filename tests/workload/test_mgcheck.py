# SPDX-License-Identifier: BSD-3-Clause
"""The checking workload between two namespaces: it runs, and it notices what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.native.netns import Node

from migroce import paths

PATIENCE = 100.0
KINDS = ("send", "send_imm", "write", "write_imm", "read", "atomic")
Nodes = tuple[Node, Node]


def _binary() -> Path:
    base = Path(os.environ.get("MIGROCE_BUILD", str(paths.library().parent.parent)))
    path = base / "tests" / "workload" / "mgcheck"
    if not path.is_file():
        pytest.skip(f"{path} is not built")
    return path


class End:
    """A running mgcheck."""

    def __init__(self, node: Node, options: Sequence[str]) -> None:
        env = {**os.environ, "LD_PRELOAD": str(paths.library()), "MIGROCE_AGENT": "/nonexistent"}
        self.process = subprocess.Popen(
            node.command(str(_binary()), *options), env=env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said = ""

    def finish(self) -> dict[str, Any]:
        """Wait for the end; the verdict (empty if there is none)."""
        with self.process:
            out, self.said = self.process.communicate(timeout=PATIENCE)
        found: dict[str, Any] = json.loads(out) if out else {}
        return found

    def end(self) -> None:
        """End it if it has not ended by itself."""
        with self.process:
            self.process.kill()

    @property
    def status(self) -> int | None:
        """Exit status, None while it runs."""
        return self.process.poll()


@contextmanager
def _both(nodes: Nodes, server: Sequence[str] = (), client: Sequence[str] = ()) -> Iterator[tuple[End, End]]:
    first = End(nodes[0], server)
    try:
        second = End(nodes[1], [*client, nodes[0].address])
        try:
            yield first, second
        finally:
            second.end()
    finally:
        first.end()


def _run(
    nodes: Nodes, client: Sequence[str], server: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both verdicts (server's, client's); both ends must be content."""
    with _both(nodes, server, client) as (first, second):
        theirs, ours = second.finish(), first.finish()
        assert (first.status, second.status) == (0, 0), first.said + second.said
    return ours, theirs


def _state(progress: Path) -> str:
    try:
        return str(json.loads(progress.read_text())["state"])
    except (OSError, ValueError):
        return ""


def _wait_for_state(progress: Path, state: str, end: End) -> None:
    until = time.monotonic() + PATIENCE
    while _state(progress) != state:
        assert end.status is None, end.finish()
        assert time.monotonic() < until, f"never {state}"
        time.sleep(0.01)


@pytest.mark.root
@pytest.mark.parametrize(
    ("server", "client"),
    [
        ([], []),
        (["--events"], ["--events", "--cq", "split"]),
        (["--new-api", "--cq", "per-qp"], ["--new-api", "--events"]),
        (["--events", "--cq", "per-qp"], ["--new-api", "--cq", "split"]),
    ],
    ids=["polling", "events", "new-interface", "mixed"],
)
def test_every_kind_of_message_arrives_right(nodes: Nodes, server: list[str], client: list[str]) -> None:
    ours, theirs = _run(nodes, [*client, "--messages", "300", "--rnr-every", "100"], server)
    for one, other in ((ours, theirs), (theirs, ours)):
        assert one["verdict"] == "ok"
        assert one["sent"]["messages"] == 4 * 300
        assert one["received"]["messages"] == 4 * 300
        assert all(one["sent"][kind] == other["received"][kind] > 0 for kind in KINDS)
        assert one["inline"] > 0
        assert one["unsignalled"] > 0
        assert one["several_sges"] > 0
        assert one["rnr_holds"] > 0
        assert one["errors"] == 0


@pytest.mark.root
@pytest.mark.parametrize("kind", ["send", "write"])
def test_a_spoilt_message_is_noticed(nodes: Nodes, kind: str) -> None:
    options = ["--messages", "100", "--ops", kind, "--corrupt-every", "70", "--qps", "1"]
    with _both(nodes, client=options) as (server, client):
        theirs, ours = client.finish(), server.finish()
    assert (server.status, client.status) == (1, 1)
    assert ours["errors"] == 1
    assert "1 of" in ours["error_messages"][0]
    assert theirs["verdict"] == "wrong"
    assert theirs["corrupted"] == 1


@pytest.mark.root
@pytest.mark.parametrize(("option", "sender"), [("--one-way", 1), ("--reverse", 0)])
def test_one_direction_alone_works(nodes: Nodes, option: str, sender: int) -> None:
    ends = _run(nodes, [option, "--messages", "200"])
    assert ends[sender]["sent"]["messages"] == 800
    assert ends[sender]["received"]["messages"] == 0
    assert ends[1 - sender]["received"]["messages"] == 800
    assert ends[1 - sender]["sent"]["messages"] == 0


@pytest.mark.root
@pytest.mark.parametrize(
    "options",
    [
        ["--size", "0"],
        ["--size", "1", "--qps", "1", "--depth", "512"],
        ["--mtu", "256", "--max-size", "5000"],
        ["--psn", str(0xFFFFF0), "--qps", "2"],
        ["--qps", "128", "--max-size", "2000", "--messages", "20"],
        ["--ops", "read", "--messages", "300"],
        ["--ops", "write", "--messages", "300", "--recv-depth", "4"],
    ],
    ids=lambda options: " ".join(options),
)
def test_sizes_numbers_and_kinds(nodes: Nodes, options: list[str]) -> None:
    _run(nodes, ["--messages", "200", *options])


@pytest.mark.root
def test_the_ends_manage_without_a_control_connection(nodes: Nodes) -> None:
    options = ["--no-tcp-after-setup", "--messages", "200", "--linger", "300"]
    ours, theirs = _run(nodes, options, ["--linger", "300"])
    assert ours["received"]["messages"] == theirs["sent"]["messages"] == 800


@pytest.mark.root
def test_sigterm_ends_both_ends_with_everything_delivered(nodes: Nodes, tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    options = ["--seconds", "600", "--progress", str(progress)]
    with _both(nodes, client=options) as (server, client):
        _wait_for_state(progress, "running", client)
        client.process.send_signal(signal.SIGTERM)
        theirs, ours = client.finish(), server.finish()
        assert (server.status, client.status) == (0, 0), server.said + client.said
    assert ours["received"]["messages"] == theirs["sent"]["messages"]
    assert _state(progress) == "ok"


@pytest.mark.root
def test_an_idle_end_says_nothing_until_it_is_told(nodes: Nodes, tmp_path: Path) -> None:
    progress, go = tmp_path / "progress", tmp_path / "go"
    options = ["--idle-until", str(go), "--messages", "50", "--progress", str(progress)]
    with _both(nodes, client=options) as (server, client):
        _wait_for_state(progress, "idle", client)
        assert json.loads(progress.read_text())["sent"] == 0
        go.touch()
        theirs = client.finish()
        server.finish()
        assert (server.status, client.status) == (0, 0), server.said + client.said
    assert theirs["sent"]["messages"] == 200


@pytest.mark.root
def test_a_peer_that_dies_is_noticed(nodes: Nodes, tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    options = ["--seconds", "600", "--stall", "30", "--progress", str(progress)]
    with _both(nodes, client=options) as (server, client):
        _wait_for_state(progress, "running", client)
        server.process.kill()
        theirs = client.finish()
    assert client.status == 1
    assert theirs["errors"] >= 1
