# SPDX-License-Identifier: BSD-3-Clause
"""What users do wrong and machines lack: a sentence, a container that runs on, nothing left on any node."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.docker.footprint import footprint
from tests.docker.stage import Box, Stage, as_begins
from tests.e2e.stage import NotSeenError, wait_for

from migroce.errors import MigrationError
from migroce.lab.docker import IMAGE, NETWORK
from migroce.migration.report import Event
from migroce.nodes import LocalNode


def fails(
    stage: Stage, box: Box, *words: str, at: str = "", do: Callable[[], None] = lambda: None
) -> None:  # fmt: skip
    """A move to node-b fails with these words, `do` being done as the phase `at` begins (`image`: as an image
    begins to be sent). The container runs on, and all is as before.
    """
    home, pid = box.home, box.pid()
    before = footprint(stage.lab)

    def strike(event: Event) -> None:
        what = "image" if event.detail.startswith("image") else event.phase
        if (what, event.state) == (at, "start"):
            do()

    with pytest.raises(MigrationError) as caught:
        box.move("node-b", strike)
    box.home = home
    for word in words:
        assert word in str(caught.value)
    assert caught.value.running_on == home
    assert box.pid() == pid
    box.counts_on()
    same(stage, before)


def same(stage: Stage, before: set[str]) -> None:
    """Everything on the nodes is as it was, some of it a moment later."""
    with contextlib.suppress(NotSeenError):
        wait_for("the nodes as before", lambda: footprint(stage.lab) == before, 10)
    assert footprint(stage.lab) ^ before == set()


def root(node: LocalNode) -> Path:
    """Its Docker's directory."""
    return Path(node.run(["docker", "info", "-f", "{{.DockerRootDir}}"]).stdout.decode().strip())


class Disk:
    """A node's disk, now a small one; `fill` fills it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._filler = directory / "filler"

    def size(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self._directory)], check=True)

    def fill(self, spare: int = 0) -> None:
        """Leave `spare` bytes."""
        with self._filler.open("wb") as filler:
            while (left := self._free() - spare) > 0:
                with contextlib.suppress(OSError):  # Docker has written meanwhile
                    os.posix_fallocate(filler.fileno(), 0, left)
                    break

    def _free(self) -> int:
        stat = os.statvfs(self._directory)
        return stat.f_bavail * stat.f_frsize

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(node: LocalNode) -> Iterator[Disk]:
    """Give a node's Docker a small disk meanwhile."""
    directory = root(node)
    if not directory.is_mount():
        pytest.skip("this machine has too little memory for Docker's directory there")
    made = Disk(directory)
    made.size("1G")
    try:
        yield made
    finally:
        made.empty()
        made.size("50%")


@pytest.fixture
def disk(stage: Stage) -> Iterator[Disk]:
    with small_disk(stage.lab.node("b")) as made:
        yield made


@pytest.mark.parametrize("at", ["check", "prepare", "stop", "transfer", "restore"])
def test_a_disk_that_is_full(stage: Stage, disk: Disk, at: str) -> None:
    box = stage.counter("a", rdma=True)
    try:
        fails(stage, box, "node-b", "docker system prune", at=at, do=disk.fill)
    finally:
        disk.empty()
    box.move("node-b")  # the address was not lost
    box.counts_on()


def test_an_image_without_a_name_does_not_stay_where_its_container_did_not(stage: Stage, disk: Disk) -> None:
    here = stage.lab.node("a")
    here.run(["docker", "run", "--name", "made", IMAGE, "touch", "/small"])
    image = here.run(["docker", "commit", "made"]).stdout.decode().strip()
    here.run(["docker", "rm", "made"])
    box = stage.counter("a", image=image)
    try:
        fails(stage, box, "node-b", "docker system prune", at="restore", do=disk.fill)
    finally:
        disk.empty()
        box.docker("rm", "-f", box.name)
        here.run(["docker", "rmi", image])


def test_a_disk_that_an_image_fills(stage: Stage, disk: Disk) -> None:
    there = stage.lab.node("a")
    write = ["dd", "if=/dev/urandom", "of=/big", "bs=1M", "count=64"]
    there.run(["docker", "run", "--name", "made", IMAGE, *write])
    there.run(["docker", "commit", "made", "big"])
    there.run(["docker", "rm", "made"])
    box = stage.counter("a", image="big")
    words = ("image could not be stored on node-b", "no space left", "docker system prune")
    try:
        fails(stage, box, *words, at="image", do=lambda: disk.fill(32 << 20))
    finally:
        box.docker("rm", "-f", box.name)
        there.run(["docker", "rmi", "big"])


def test_an_image_that_goes_while_the_move_begins(stage: Stage) -> None:
    here, there = stage.lab.node("a"), stage.lab.node("b")
    here.run(["docker", "run", "--name", "made", IMAGE, "touch", "/small"])
    here.run(["docker", "commit", "made", "small"])
    here.run(["docker", "rm", "made"])
    box = stage.counter("a", image="small")
    with here.popen(["docker", "save", "small"], stdout=subprocess.PIPE) as saved:
        there.popen(["docker", "load", "-q"], stdin=saved.stdout, stdout=subprocess.DEVNULL).wait()
    home, pid = box.home, box.pid()
    with pytest.raises(MigrationError, match="small is not on node-b any more; start again") as caught:
        box.move("node-b", as_begins("prepare", lambda: there.run(["docker", "rmi", "small"])))
    box.home = home
    assert (caught.value.running_on, box.pid()) == (home, pid)
    box.docker("tag", "small", "other")
    box.docker("rmi", "-f", "small", "other")  # its name is gone; it is known by its id
    box.move("node-b")
    box.counts_on()
    (image,) = {box.inspect()["Image"]}
    box.docker("rm", "-f", box.name)
    there.run(["docker", "rmi", image])


def test_an_address_that_another_takes_meanwhile(stage: Stage) -> None:
    box = stage.counter("a")
    there = stage.lab.node("b")

    def take() -> None:
        where = ["--network", NETWORK, "--ip", box.ip]
        there.run(["docker", "run", "-d", "--name", "thief", *where, IMAGE, "sleep", "1000"])

    words = (f"address {box.ip} of {NETWORK} was taken meanwhile by thief", "remove thief")
    with pytest.raises(MigrationError) as caught:
        box.move("node-b", as_begins("transfer", take))
    box.home = "node-a"
    assert all(each in str(caught.value) for each in words)
    assert caught.value.running_on == "node-a"
    box.counts_on()
    there.run(["docker", "rm", "-f", "thief"])
    stage.nothing_in_the_middle()


def test_an_address_that_another_has_on_a_network_of_the_node_s_own(stage: Stage) -> None:
    own = ["network", "create", "--subnet", "10.99.0.0/24", "own"]
    for node in stage.lab.nodes.values():
        node.run(["docker", *own])
    try:
        there = stage.lab.node("b")
        place = ["--network", "own", "--ip", "10.99.0.7"]
        there.run(["docker", "run", "-d", "--name", "holder", *place, IMAGE, "sleep", "1000"])
        box = stage.counter("a")
        box.docker("network", "connect", "--ip", "10.99.0.7", "own", box.name)
        fails(stage, box, "address 10.99.0.7 is in use on node-b by holder; stop that one first")
        box.docker("rm", "-f", box.name)
        there.run(["docker", "rm", "-f", "holder"])
    finally:
        for node in stage.lab.nodes.values():
            node.run(["docker", "network", "rm", "own"], check=False)


def test_a_node_that_cannot_be_reached(stage: Stage) -> None:
    """From the command line: nothing is asked of the container before the destination answers."""
    box = stage.counter("a")
    before = footprint(stage.lab)
    lab = stage.lab.name
    for to, words in {
        "nowhere": "there is no node nowhere",
        "ssh://root@": "names no host; write ssh://user@host",
        "ssh://root@127.0.0.1?pyton=x": "has an unknown parameter pyton; only python=",
        "ssh://root@127.0.0.1:1": "ssh cannot connect: connection refused; see whether the machine is up",
        "ssh://root@no-such-host.invalid": "there is no host no-such-host.invalid",
        "tcp://192.0.2.1:2375": "is no node; write `local`, a lab node or ssh://user@host",
        f"{lab}/node-a": "is on node-a already",
    }.items():
        assert words in command("migrate", box.name, "--from", f"{lab}/node-a", "--to", to)
    said = command(
        "migrate", box.name, "--from", f"{lab}/node-a", "--to", f"{lab}/node-b", "--ip", "10.0.1.99"
    )
    assert f"{box.name} keeps its address, as Docker has given it; move it without --ip" in said
    assert "has no container nobody (it has" in command(
        "migrate", "nobody", "--from", f"{lab}/node-a", "--to", lab
    )
    box.counts_on()
    same(stage, before)


def command(*args: str) -> str:
    """What the command says as it fails."""
    argv = [sys.executable, "-m", "migroce", *args]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return " ".join(done.stderr.split())


def test_a_directory_that_has_no_room_for_a_checkpoint(stage: Stage, tmp_path: Path) -> None:
    box = stage.counter("a", rdma=True)
    before = footprint(stage.lab)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "small", str(tmp_path)], check=True)
    try:
        on = ["--on", f"{stage.lab.name}/node-a"]
        said = command("checkpoint", box.name, str(tmp_path / "saved"), *on)
        assert f"no space left on device; {box.name} runs on node-a as before" in said.lower()
        assert list(tmp_path.iterdir()) == []
        assert "is not empty" in command("checkpoint", box.name, "/etc", *on)
        assert "manifest.json" in command("restore", str(tmp_path), *on)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    box.counts_on()
    same(stage, before)
