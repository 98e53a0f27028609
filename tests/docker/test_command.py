# SPDX-License-Identifier: BSD-3-Clause
"""`migroce migrate` with Docker: what was there goes on elsewhere, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docker.stage import (
    COUNTER,
    Box,
    Check,
    Stage,
    as_begins,
    containers,
    drop_network,
    keep_network,
    kill_docker,
)
from tests.e2e.stage import wait_for
from tests.native.perftest import NO_CLOCK

from migroce.errors import MigrationError
from migroce.lab.api import Lab
from migroce.lab.docker import IMAGE
from migroce.migration.api import checkpoint, restore
from migroce.migration.journal import PHASES

SEEN_THROUGH = ("restore.end", "resume", "resume.end", "commit", "commit.end")
"""Faults after the destination's container has run: the move is finished."""


# -- containers without RDMA ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rdma", [False, True], ids=["runc", "migroce"])
def test_a_container_without_rdma_goes_on_with_its_files_and_settings(stage: Stage, rdma: bool) -> None:
    options = "-v data:/data -v /anonymous -e COLOUR=blue --label a=b --memory 200m --restart unless-stopped"
    more = "--hostname box --ulimit nofile=500:500"
    box = stage.counter("a", *options.split(), *more.split(), rdma=rdma)
    write = "echo one >/data/f; echo two >/anonymous/f; mkdir /d; echo 3 >/d/f; rm /bin/ls"
    box.docker("exec", box.name, "sh", "-c", write)
    before, at = box.inspect(), box.counts_on()
    box.move()
    assert box.where() == ["node-b"]
    assert box.counts_on(at) > at
    after = box.inspect()
    for key in ("Config", "Path", "Args", "RestartCount"):
        assert after[key] == before[key]
    for key in set(before["HostConfig"]) - {"Binds"}:
        assert after["HostConfig"][key] == before["HostConfig"][key], key
    assert box.file("/data/f").read_text() == "one\n"
    assert box.file("/anonymous/f").read_text() == "two\n"
    assert box.file("/d/f").read_text() == "3\n"
    assert not box.file("/bin/ls").exists()
    assert containers(stage.lab.node("a")) == []
    for _ in range(2):  # the volume's copy that stayed is replaced
        at = box.counts_on()
        box.move()
        box.counts_on(at)
    assert box.file("/data/f").read_text() == "one\n"
    stage.nothing_in_the_middle()


def test_the_output_so_far_moves_too(stage: Stage) -> None:
    script = "echo first; while ! [ -e /go ]; do sleep 0.05; done; echo last"
    box = stage.box("talker", "a", ["sh", "-c", script], rdma=False)
    wait_for("the first line", lambda: "first" in box.logs())
    box.move()
    box.file("/go").touch()
    assert box.wait() == 0
    assert box.logs() == "first\nlast\n"


def test_an_image_that_is_missing_comes_along(stage: Stage) -> None:
    box = stage.counter("a")
    box.docker("exec", box.name, "touch", "/in-the-image")
    box.docker("commit", box.name, "only-here:1")
    made = stage.box("made", "a", ["sh", "-c", COUNTER], rdma=False)
    made.docker("rm", "-f", made.name)
    made.docker("run", "-d", "--name", made.name, "--network", "rdma-net", "--ip", made.ip, "only-here:1",
                "sh", "-c", COUNTER)  # fmt: skip
    at = made.counts_on()
    assert made.move().image_bytes > 0
    made.counts_on(at)
    assert made.inspect()["Config"]["Image"] == "only-here:1"
    assert made.file("/in-the-image").exists()
    for node in stage.lab.nodes.values():
        node.run(["docker", "rm", "-f", made.name], check=False)
        node.run(["docker", "rmi", "only-here:1"], check=False)


def test_a_checkpoint_in_a_directory_is_restored_elsewhere(stage: Stage, tmp_path: Path) -> None:
    box = stage.counter("a", "-v", "data:/data")
    at = box.counts_on()
    checkpoint(box.node, box.name, tmp_path / "kept", leave_running=True)
    box.counts_on(at)
    checkpoint(box.node, box.name, tmp_path / "saved")
    assert box.where() == []
    restore(stage.lab.node("b"), tmp_path / "saved")
    box.home = "node-b"
    assert box.where() == ["node-b"]
    assert box.counts_on(at) < at + 1000
    stage.nothing_in_the_middle()


# -- containers with RDMA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["server", "client"])
def test_rdma_goes_on_there_and_back_five_times(stage: Stage, who: str) -> None:
    check = Check(stage)
    check.more()
    box: Box = getattr(check, who)
    for _ in range(5 if who == "server" else 1):
        box.move()
        check.more()
    check.finish()
    stage.nothing_in_the_middle()


@pytest.mark.parametrize("ways", ["-b", "-n"], ids=["two-way", "one-way"])
def test_perftest_ends_as_if_nothing_had_been(stage: Stage, ways: str) -> None:
    argv = ["ib_send_bw", "-d", "rxe0", "-D", "6", *(["-b"] if ways == "-b" else [])]
    for _ in range(5):
        server = stage.box("server", "a", argv)
        sockets = Path(f"/proc/{server.pid()}/net/tcp")
        wait_for("the server", lambda path=sockets: ":4853" in path.read_text())  # 18515
        client = stage.box("client", "b", [*argv, server.ip])
        wait_for("traffic", lambda box=server: _packets(box) > 1000)
        server.move()
        statuses, said = (client.wait(), server.wait()), client.logs() + server.logs()
        if NO_CLOCK not in said:
            break
    assert statuses == (0, 0), said
    assert "65536" in client.logs()


def _packets(box: Box) -> int:
    found = box.node.call("agent", method="ps", container=box.inspect()["Id"])
    dumps = [each.get("dump") or {} for container in found for each in container["contexts"]]
    return sum(qp["tx_packets"] + qp["rx_packets"] for dump in dumps for qp in dump.get("qps", []))


def test_two_containers_with_rdma_on_one_host(stage: Stage) -> None:
    one, other = Check(stage, "a", "b"), Check(stage, "b", "a")
    one.more()
    one.server.move()
    other.more()
    one.more()
    one.finish()
    other.finish()


ANSWERS = """use IO::Socket::INET; use IO::Select;
my $all = IO::Select->new(my $new = IO::Socket::INET->new(Listen => 100, LocalPort => 5000) or die);
while (1) { for my $each ($all->can_read) {
    if ($each == $new) { $all->add($new->accept); next }
    defined(my $many = sysread($each, my $byte, 1)) or die "read: $!";
    if (!$many) { $all->remove($each); next }
    syswrite($each, $byte) or die "write: $!";
} }"""
ASKS = """use IO::Socket::INET; use IO::Select;
my @all = map { IO::Socket::INET->new(PeerAddr => "$ARGV[0]:5000") or die "connect: $!" } 1 .. 100;
my $all = IO::Select->new(@all); my (%asked, $answers);
for (my $turn = 0; !-e "/stop" || %asked; $turn++) {
    my $next = $all[$turn % @all];
    if (!-e "/stop" && !$asked{$next}++) { syswrite($next, "x") or die "write: $!" }
    for my $each ($all->can_read(.005)) {
        sysread($each, my $byte, 1) or die "read: $!"; delete $asked{$each}; $answers++;
    }
    open(my $file, ">", "/answers~"); print $file $answers; close $file; rename "/answers~", "/answers";
}"""  # fmt: skip


def test_no_tcp_connection_is_lost_though_peers_send_at_any_moment_of_a_move(stage: Stage) -> None:
    """The kernel would answer with a reset as long as there is the address, but no socket yet."""
    server = stage.box("tcp-server", "a", ["perl", "-e", ANSWERS])
    wait_for("the server", lambda: ":1388" in Path(f"/proc/{server.pid()}/net/tcp").read_text())
    client = stage.box("tcp-client", "b", ["perl", "-e", ASKS, server.ip])

    def answers() -> int:
        path = client.file("/answers")
        return int(path.read_text() or 0) if path.exists() else 0

    wait_for("answers", lambda: answers() > 200)
    for box in (server, client, server):
        box.move()
        before = answers()
        wait_for("answers after the move", lambda before=before: answers() > before + 200)  # type: ignore[misc]
    client.file("/stop").touch()
    assert client.wait() == 0, client.logs()
    assert server.inspect()["State"]["Running"], server.logs()


def test_256_mb_of_touched_memory(stage: Stage) -> None:
    fill = "$| = 1; $data = join('', map { chr(rand(256)) } 1 .. 65536) x 4096; "
    look = "print unpack('%32C*', $data), qq(\\n); "
    wait = "select(undef, undef, undef, 0.05) until -e '/go'; "
    box = stage.box("big", "a", ["perl", "-e", fill + look + wait + look])
    wait_for("the memory", lambda: box.logs().strip())
    report = box.move()
    assert report.images_bytes > 256 << 20
    box.file("/go").touch()
    assert box.wait() == 0
    first, last = box.logs().split()
    assert first == last


# -- when it goes wrong --------------------------------------------------------------------------------------


def settled(stage: Stage, box: Box) -> str:
    """The one node that `box` runs on, when nothing is in the middle of anything any more."""

    def over() -> bool:
        return all(each["ended"] for node in stage.lab.nodes.values() for each in node.call("journals"))

    wait_for("the end of the recovery", over)
    wait_for("one running container", lambda: len(box.where()) == 1)
    (box.home,) = box.where()
    box.counts_on()
    for node in stage.lab.nodes.values():
        known = node.run(["docker", "ps", "-aq", "--filter", f"name=^{box.name}$"]).stdout.split()
        assert len(known) == (node.name == box.home)
    stage.nothing_in_the_middle()
    return box.home


@pytest.mark.parametrize("point", [point for phase in PHASES for point in (phase, f"{phase}.end")])
def test_a_failing_step_is_undone_or_seen_through(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    box = stage.counter("a", "-v", "data:/data")
    monkeypatch.setenv("MIGROCE_FAULT", point)
    if point in SEEN_THROUGH:
        assert box.move().warnings
    else:
        with pytest.raises(MigrationError) as caught:
            box.move("node-b")
        box.home = "node-a"
        assert (caught.value.step, caught.value.running_on) == (point, "node-a")
    monkeypatch.delenv("MIGROCE_FAULT")
    assert settled(stage, box) == ("node-b" if point in SEEN_THROUGH else "node-a")
    address = box.inspect()["NetworkSettings"]["Networks"]["rdma-net"]["IPAddress"]
    assert address == box.ip
    assert set(box.docker("exec", box.name, "hostname", "-i").split()) == {box.ip}


_COMMAND = "import sys; from migroce.migration.api import migrate; migrate(*sys.argv[1:])"


@pytest.mark.parametrize("point", ["dump", "dump.end", "transfer.end", "restore.end", "resume.end"])
def test_a_killed_command_is_recovered(stage: Stage, point: str) -> None:
    box = stage.counter("a")
    env = {**os.environ, "MIGROCE_FAULT": f"{point}:kill"}
    name = stage.lab.name
    argv = [sys.executable, "-c", _COMMAND, box.name, f"{name}/node-a", f"{name}/node-b"]
    assert subprocess.run(argv, env=env, check=False).returncode == -signal.SIGKILL
    assert settled(stage, box) == ("node-b" if point in SEEN_THROUGH else "node-a")


@pytest.mark.parametrize("phase", ["prepare", "dump", "restore"])
def test_a_killed_dockerd_at_the_destination_is_undone(stage: Stage, phase: str) -> None:
    box = stage.counter("a")
    with pytest.raises(MigrationError) as caught:
        box.move("node-b", as_begins(phase, lambda: kill_docker(stage.lab.node("b"))))
    box.home = "node-a"
    assert "Docker on node-b " in str(caught.value)
    assert box.where() == ["node-a"]
    box.counts_on()
    stage.lab.close()
    made = stage.lab.docker
    Lab.up(stage.lab.name, engine="docker", release=str(made.bin) if made and made.bin else None).close()
    keep_network(stage.lab)
    box.move("node-b")  # what was left there is not in the way
    box.counts_on()
    stage.nothing_in_the_middle()


def test_the_last_container_of_a_node_keeps_its_connections(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check(stage)
    check.more()
    drop_network(stage.lab, "a")
    try:
        for _ in range(3):  # node-a never leaves the network
            monkeypatch.setenv("MIGROCE_FAULT", "transfer")
            with pytest.raises(MigrationError):
                check.server.move("node-b")
            monkeypatch.delenv("MIGROCE_FAULT")
            check.server.home = "node-a"
            check.more()
        for _ in range(4):  # it does, and comes back
            check.server.move()
            check.more()
        check.finish()
    finally:
        keep_network(stage.lab)
    stage.nothing_in_the_middle()


def refused(stage: Stage, box: Box, *words: str) -> None:
    """The move is refused with these words, and nothing has happened to the container."""
    pid = box.pid()
    seen: list[str] = []
    with pytest.raises(MigrationError) as caught:
        box.move("node-b", lambda event: seen.append(event.phase))
    box.home = "node-a"
    for word in words:
        assert word in str(caught.value)
    assert caught.value.step == "check"
    assert set(seen) == {"check"}
    assert box.pid() == pid
    stage.nothing_in_the_middle()


def test_what_cannot_move_is_refused_before_anything_stops(stage: Stage, tmp_path: Path) -> None:
    there = stage.lab.node("b")
    box = stage.counter("a")
    there.run(["docker", "create", "--name", box.name, IMAGE, "true"])
    refused(stage, box, "node-b has a container", box.name, "docker rm")
    there.run(["docker", "rm", box.name])
    refused(stage, stage.counter("a", "--init"), "--init")
    box = stage.counter("a", "-v", f"{tmp_path}/gone:/x")
    (tmp_path / "gone").rmdir()
    refused(stage, box, f"node-b has no {tmp_path}/gone")
    box = stage.counter("a", "-v", "full:/x")
    there.run(["docker", "run", "--rm", "-v", "full:/x", IMAGE, "touch", "/x/precious"])
    refused(stage, box, "node-b has a volume full already", "docker volume rm full")
    box.node.run(["docker", "network", "create", "only-here"], check=False)
    box = stage.counter("a")
    box.docker("network", "connect", "only-here", box.name)
    refused(stage, box, "node-b has no network only-here")
    box.docker("rm", "-f", box.name)
    box.node.run(["docker", "network", "rm", "only-here"])


def test_processes_that_cannot_move_are_refused(stage: Stage) -> None:
    box = stage.counter("a", rdma=True)
    enter = ["nsenter", "-t", str(box.pid()), "-m", "-p", "--", "sh", "-c", "echo in; read _"]
    with subprocess.Popen(enter, stdin=-1, stdout=-1) as entered:
        assert entered.stdout is not None
        assert entered.stdout.readline() == b"in\n"
        refused(stage, box, f"{box.name} has processes that were put into it from outside: sh (pid ")
        entered.communicate()
    with subprocess.Popen(["strace", "-o", "/dev/null", "-p", str(box.pid())], stderr=-3) as strace:
        status = Path(f"/proc/{box.pid()}/status")
        wait_for("strace", lambda: f"TracerPid:\t{strace.pid}" in status.read_text())
        refused(stage, box, f"is traced by strace (pid {strace.pid})")
        strace.terminate()
    box.counts_on()
    box.move()
    box.counts_on()


def test_ps_shows_docker_s_containers(stage: Stage) -> None:
    box = stage.counter("a")
    argv = [sys.executable, "-m", "migroce", "ps", box.name, "--on", f"{stage.lab.name}/node-a", "--json"]
    (row,) = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)["containers"]
    assert (row["engine"], row["status"], row["ip"], row["image"]) == ("docker", "running", box.ip, IMAGE)
