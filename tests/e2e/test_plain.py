# SPDX-License-Identifier: BSD-3-Clause
"""Containers move with their TCP connections, their files and their exit status; also those others made."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from tests.e2e.stage import Box, Check, Stage, wait_for
from tests.native.procfs import polls

from migroce.errors import MigroceError
from migroce.migration.report import Event

SERVER = """
import socket
listening = socket.create_server(("", 5000))
print("listening", flush=True)
peer, _ = listening.accept()
count = 0
while data := peer.recv(1):
    count += 1
    peer.sendall(b"%d\\n" % count)
print("served", count, flush=True)
raise SystemExit(7)
"""
CLIENT = """
import os, socket, sys
peer = socket.create_connection((sys.argv[1], 5000)); peer.settimeout(60)
answers = peer.makefile("rb")
count = 0
while not os.path.exists("/stop"):
    peer.sendall(b"x")
    count += 1
    assert int(answers.readline()) == count
    with open("/count~", "w") as f: f.write(str(count))
    os.rename("/count~", "/count")
print("asked", count, flush=True)
"""

SIGNALLED = """
import signal
signals = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGBUS}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
print("waiting", flush=True)
while True:
    number = signal.sigwaitinfo(signals).si_signo
    print(signal.Signals(number).name, flush=True)
    if number == signal.SIGTERM:
        break
"""

POLLING = """
import ctypes, os, signal, threading
class Fd(ctypes.Structure):
    _fields_ = [("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short)]
libc = ctypes.CDLL(None, use_errno=True)  # Python's own calls try again
def wait(milliseconds):
    fds = (Fd * 1)(Fd(fifo, 1, 0))
    print(libc.poll(fds, 1, milliseconds), ctypes.get_errno(), flush=True)
os.mkfifo("/go~")
fifo = os.open("/go~", os.O_RDWR)
waits = [threading.Thread(target=wait, args=[milliseconds]) for milliseconds in (-1, 3_600_000)]
for each in waits: each.start()
os.rename("/go~", "/go")
for each in waits: each.join()
signal.signal(signal.SIGUSR1, lambda *_: None)
fifo = os.open("/", os.O_RDONLY | os.O_PATH)
fifo = os.pipe()[0]
print("handles", flush=True)
wait(-1)
"""


def counted(box: Box) -> int:
    """How far the client has come."""
    path = box.file("/count")
    return int(path.read_text()) if path.exists() else 0


def test_tcp_connections_output_and_exit_status_move_along(stage: Stage) -> None:
    server = stage.box("tcp-server", "a", ["python3", "-c", SERVER], device=False)
    wait_for("the server", lambda: "listening" in server.log())
    client = stage.box("tcp-client", "b", ["python3", "-c", CLIENT, server.ip], device=False)
    wait_for("answers", lambda: counted(client) > 20)
    for box in (server, client, server):
        box.move()
        before = counted(client)
        wait_for("answers after the move", lambda before=before: counted(client) > before + 20)  # type: ignore[misc]
    client.file("/stop").touch()
    assert client.wait() == 0, client.log()
    assert server.wait() == 7
    count = int(client.log().split()[-1])
    assert server.log().split() == ["listening", "served", str(count)]


def test_a_move_is_no_signal(stage: Stage) -> None:
    """A program that waits for signals gets those that are sent to it, and none of a move's."""
    box = stage.box("signalled", "a", ["python3", "-c", SIGNALLED])
    wait_for("its beginning", lambda: "waiting" in box.log())
    for _ in range(3):
        box.move()
    box.kill("TERM")
    assert box.wait() == 0, box.log()
    assert box.log().split() == ["waiting", "SIGTERM"]


def test_the_writable_layer_moves_with_owners_links_and_attributes(stage: Stage) -> None:
    script = """set -e
mkdir -p /data/deep; echo one >/data/deep/file; chown 12:34 /data/deep/file; chmod 640 /data/deep/file
ln /data/deep/file /data/hard; ln -s deep/file /data/soft; mkfifo /data/pipe
rm -f /etc/hostname; rm -rf /usr/share/doc; mkdir /usr/share/doc; echo mine >/usr/share/doc/mine
echo shared >/dev/shm/segment; touch /ready
exec sleep 1000"""
    box = stage.box("files", "a", ["sh", "-c", script], device=False)
    wait_for("its files", lambda: box.file("/ready").exists())
    look = """stat -c '%n %a %u %g %s %Y %h %F' /data /data/* /data/deep/file; readlink /data/soft
ls /usr/share/doc; cat /data/hard /dev/shm/segment; test -e /etc/hostname; echo $?"""

    def seen() -> str:
        argv = stage.lab.command(box.name, ["sh", "-c", look])
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    before = seen()
    assert "mine\n" in before
    box.move()
    assert seen() == before
    box.move()
    assert seen() == before


MAPPED = """
import mmap, os, time
with open("/mapped", "w+b") as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)
count = 0
while not os.path.exists("/stop"):
    count += 1
    memory[:8] = count.to_bytes(8, "little")
    time.sleep(0.001)
    assert int.from_bytes(memory[:8], "little") == count
    os.close(os.open("/ready", os.O_CREAT))
"""


def test_what_is_written_through_a_mapping_until_the_freeze_is_not_lost(stage: Stage) -> None:
    box = stage.box("mapped", "a", ["python3", "-c", MAPPED], device=False)
    wait_for("counting", lambda: box.file("/ready").exists())
    for _ in range(2):
        box.move()
        box.file("/ready").unlink()
        wait_for("counting on", lambda: box.file("/ready").exists() or box.info()["status"] == "exited")
    box.file("/stop").touch()
    assert box.wait() == 0, box.log()


def users_bundle(directory: Path, netns: str | None) -> Path:
    """A bundle as a user makes it: `runc spec`, a root file system, a few changes."""
    directory.mkdir()
    subprocess.run(["runc", "spec"], cwd=directory, check=True)
    config = json.loads((directory / "config.json").read_text())
    config["process"]["terminal"] = False
    count = "i=0; while :; do i=$((i+1)); echo $i >/c; mv /c /count; sleep 0.01; done"
    config["process"]["args"] = ["sh", "-c", count]
    config["root"] = {"path": "rootfs", "readonly": False}
    for host in ("/usr", "/bin", "/lib", "/lib64", "/etc"):
        (directory / "rootfs" / host[1:]).mkdir(parents=True)
        config["mounts"].append(
            {"destination": host, "type": "bind", "source": host, "options": ["rbind", "ro"]}
        )
    for namespace in config["linux"]["namespaces"]:
        if namespace["type"] == "network" and netns is not None:
            namespace["path"] = netns
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_container_that_the_user_made_with_runc_moves(stage: Stage, tmp_path: Path) -> None:
    bundle = users_bundle(tmp_path / "bundle", None)
    node = stage.lab.node("a")
    root = str(node.context.runc_root)
    run = ["runc", "--root", root, "run", "--detach", "--bundle", str(bundle), "users-own"]
    subprocess.run(node.command(run), stdin=-3, stdout=-3, stderr=-3, check=True)
    box = Box(stage.lab, "users-own", "node-a", "")
    count = bundle / "rootfs" / "count"
    wait_for("counting", count.exists)
    (shown,) = [info for info in node.call("list") if info["id"] == "users-own"]
    assert shown["args"] == json.loads((bundle / "config.json").read_text())["process"]["args"]
    box.move("node-b")
    reached = int(count.read_text())
    wait_for("counting on", lambda: int(box.file("/count").read_text()) > reached + 5)
    assert box.where() == ["node-b"]
    box.move("node-a")
    assert box.where() == ["node-a"]
    wait_for("counting on", lambda: int(box.file("/count").read_text()) > reached + 10)


def test_what_cannot_move_is_refused_with_the_reason(stage: Stage, tmp_path: Path) -> None:
    bundle = users_bundle(tmp_path / "bundle", None)
    config = json.loads((bundle / "config.json").read_text())
    config["linux"]["namespaces"] = [ns for ns in config["linux"]["namespaces"] if ns["type"] != "network"]
    (bundle / "config.json").write_text(json.dumps(config))
    node = stage.lab.node("a")
    root = str(node.context.runc_root)
    run = ["runc", "--root", root, "run", "--detach", "--bundle", str(bundle), "on-host"]
    subprocess.run(node.command(run), stdin=-3, stdout=-3, stderr=-3, check=True)
    with pytest.raises(MigroceError, match="network of the node"):
        Box(stage.lab, "on-host", "node-a", "").move("node-b")
    ended = stage.box("ended", "a", ["true"], device=False)
    ended.wait()
    with pytest.raises(MigroceError, match="exited, not running"):
        ended.move("node-b")
    with pytest.raises(MigroceError, match="already"):
        ended.move("node-a")


def test_a_traced_program_is_refused_and_runs_on(stage: Stage) -> None:
    check = Check(stage)
    pid = int(check.server.info()["pid"])
    with subprocess.Popen(["strace", "-f", "-o", "/dev/null", "-p", str(pid)], stderr=-3) as strace:
        status = Path(f"/proc/{pid}/status")
        wait_for("strace", lambda: f"TracerPid:\t{strace.pid}" in status.read_text())
        reason = rf"mgcheck \(pid {pid}\).* traced by strace \(pid {strace.pid}\)"
        with pytest.raises(MigroceError, match=reason):
            check.server.move()
        strace.terminate()
    check.more(20)
    check.server.move()
    check.more(20)
    check.finish()


def test_a_program_stopped_by_a_signal_is_refused_with_the_mend(stage: Stage) -> None:
    box = stage.box("pingpong", "a", ["ibv_rc_pingpong", "-d", "rxe0", "-g", "1"])
    wait_for("its device", lambda: box.qps())
    pid = int(box.info()["pid"])
    box.kill("STOP")
    wait_for("its stop", lambda: "State:\tT" in Path(f"/proc/{pid}/status").read_text())
    with pytest.raises(MigroceError, match=f"kill -CONT {pid}"):
        box.move()
    os.kill(pid, signal.SIGCONT)
    box.move()
    assert len(box.qps()) == 1


def test_what_was_put_into_a_container_from_outside_is_refused(stage: Stage) -> None:
    """`runc exec`'s process is none of init's: CRIU would leave it behind without a word."""
    box = stage.box("entered", "a", ["sleep", "1000"], device=False)
    runc = ["runc", "--root", str(box.node.context.runc_root)]
    command = box.node.command([*runc, "exec", box.name, "sh", "-c", "echo in; exec sleep 1001"])
    with subprocess.Popen(command, stdin=-3, stdout=-1, text=True) as entered:
        assert entered.stdout is not None
        assert entered.stdout.readline() == "in\n"
        with pytest.raises(MigroceError, match=r"from outside: s\w+ \(pid \d+\)"):
            box.move()
        subprocess.run(box.node.command([*runc, "exec", box.name, "pkill", "-f", "1001"]), check=True)
    box.move()
    assert box.where() == ["node-b"]


def test_a_program_that_ends_during_its_move_is_said_to_have_ended(stage: Stage) -> None:
    """Once it is checked and before it is frozen; its exit status is kept."""
    box = stage.box("ending", "a", ["python3", "-c", SIGNALLED])
    wait_for("its beginning", lambda: "waiting" in box.log())

    def end(what: Event) -> None:
        if (what.phase, what.state) == ("stop", "start"):
            box.kill("TERM")
            assert box.wait() == 0

    with pytest.raises(MigroceError, match=r"has ended by itself on node-a, with status 0"):
        box.move(progress=end)
    assert box.where() == []
    assert box.wait() == 0
    assert box.log().split() == ["waiting", "SIGTERM"]


def test_two_moves_of_one_container_at_once_are_one(stage: Stage) -> None:
    """The second is told so; the container has moved once, its peer notices nothing."""
    check = Check(stage)

    def meanwhile(what: Event) -> None:
        if (what.phase, what.state) == ("stop", "start"):
            with pytest.raises(MigroceError, match="is being moved already"):
                Box(stage.lab, check.server.name, "node-a", check.server.ip).move("node-b")

    check.server.move("node-b", progress=meanwhile)
    assert check.server.where() == ["node-b"]
    check.more(20)
    check.finish()


def test_a_poll_waits_on_as_if_nothing_had_been_and_only_a_handler_interrupts_it(stage: Stage) -> None:
    """CRIU itself gives each poll(2) EINTR, which signal(7) does not allow and programs take for an error."""
    box = stage.box("polling", "a", ["python3", "-c", POLLING])
    wait_for("two threads in poll", lambda: polls(box.info()["pid"]) == [1, 1])
    box.move()
    assert box.log() == ""
    box.file("/go").write_bytes(b"x")
    wait_for("its handler", lambda: "handles" in box.log())
    wait_for("it in poll", lambda: polls(box.info()["pid"]) == [1])
    box.move()
    box.kill("USR1")
    assert box.wait() == 0
    assert box.log().split() == ["1", "0", "1", "0", "handles", "-1", str(errno.EINTR)]
