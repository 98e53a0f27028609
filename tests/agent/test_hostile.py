# SPDX-License-Identifier: BSD-3-Clause
"""Garbage on every socket: it ends the connection it came by and hurts nothing else."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from migroce import control as c
from migroce.agent.client import AgentError
from migroce.agent.unix import bind_unix

from .rawlib import RawLib
from .rig import Agent, Fake, Wires, eventually
from .test_agent import container, contexts


@pytest.fixture
def sock(agent: Agent, wires: Wires) -> Path:
    """The agent.sock of a container."""
    return container(agent, wires)


@pytest.fixture
def witness(agent: Agent, wires: Wires, start_fake: Callable[..., Fake]) -> Callable[[], None]:
    """A process in another container; calling this checks that it is served as ever."""
    directory = agent.client.container_add("witness", netns=wires.path(wires.b))
    fake = start_fake(directory / "agent.sock", "5")
    fake.expect("welcome")

    def check() -> None:
        assert agent.client.ps("witness")[0]["contexts"][0]["dump"]["context"]["n_qp"] == 1
        assert fake.quiet()

    return check


def fds_of(agent: Agent) -> int:
    return len(list(Path(f"/proc/{agent.process.pid}/fd").iterdir()))


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("<IHHII", c.MAGIC, kind, 1, len(body), 1) + body


HELLO = c.encode(c.Hello(b"i" * 16, 1, 0), 1)


@pytest.mark.parametrize(
    "first",
    [
        b"x",
        b"\0" * 4096,
        b"GET / HTTP/1.1\r\n\r\n",
        message(1, b"short"),
        c.encode(c.Hello(b"i" * 16, 1, 9), 1),
        c.encode(c.Stopped(0, 1, 1), 1),
        c.encode(c.Resumed(0, 1), 1),
        c.encode(c.Welcome(0), 1),
        c.encode(c.Stop(), 1),
        message(1, b"x" * 8000),
    ],
    ids=range(10),
)
def test_a_bad_first_message_ends_the_connection(
    sock: Path, agent: Agent, witness: Callable[[], None], first: bytes
) -> None:
    lib = RawLib(sock)
    lib.sock.send(first)
    assert lib.ended()
    lib.close()
    witness()
    assert not contexts(agent, "c1")


@pytest.mark.parametrize(
    "then",
    [HELLO, c.encode(c.Welcome(0), 1), c.encode(c.DumpReq(), 1), b"junk", message(4, b"")],
    ids=range(5),
)
def test_a_bad_later_message_ends_the_connection(
    sock: Path, witness: Callable[[], None], then: bytes
) -> None:
    lib = RawLib(sock)
    assert lib.hello().status == 0
    lib.sock.send(then)
    assert lib.ended()
    lib.close()
    witness()


def test_answers_nobody_asked_for_are_ignored(
    sock: Path, agent: Agent, witness: Callable[[], None], tmp_path: Path
) -> None:
    lib = RawLib(sock)
    lib.hello()
    memfd = os.memfd_create("x")
    for msg in (c.Resumed(0, 1), c.Resumed(5, 1), c.DumpReply(0, 10), c.Stopped(5)):
        socket.send_fds(lib.sock, [c.encode(msg, 77)], [memfd])
    lib.sock.send(message(99, b"a later version's message"))
    os.close(memfd)
    with pytest.raises(AgentError, match="did not stop"):
        agent.client.container_stop("c1", tmp_path / "d", timeout_ms=100)
    witness()
    lib.close()


def test_a_process_cannot_take_anothers_place(sock: Path, agent: Agent, witness: Callable[[], None]) -> None:
    owner, thief = RawLib(sock), RawLib(sock)
    mine = owner.hello()
    claim = (mine.slot, mine.qpn_base, mine.qpn_count)
    assert thief.hello(c.HelloState.STOPPED, *claim).status == errno.EBUSY
    for state, where, fds, status in (
        (c.HelloState.STOPPED, claim, (), errno.EBUSY),
        (c.HelloState.RUNNING, claim, (), errno.EBUSY),
        (c.HelloState.STOPPED, (63, 0, 1 << 24), (), errno.EINVAL),
        (c.HelloState.STOPPED, (1 << 31, 0, 1 << 18), (), errno.EINVAL),
        (c.HelloState.STOPPED, (0, 0, 1 << 24), (), errno.EBUSY),
        (c.HelloState.RUNNING, (5, 5 << 18, 1 << 18), (), errno.EINVAL),
        (c.HelloState.RUNNING, (5, 5 << 18, 1 << 18), (0,), errno.EINVAL),
    ):
        thief.close()
        thief = RawLib(sock)
        assert thief.hello(state, *where, fds=fds).status == status
        assert thief.ended()
    thief.close()
    thief = RawLib(sock)
    assert thief.hello(instance=owner.instance).status == errno.EBUSY
    assert [x["slot"] for x in contexts(agent, "c1")] == [mine.slot]
    witness()
    for lib in (owner, thief):
        lib.close()


def test_bad_sockets_are_refused(sock: Path, witness: Callable[[], None]) -> None:
    kinds = ((socket.AF_INET, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_DGRAM),
             (socket.AF_INET, socket.SOCK_DGRAM))  # the last is not bound to our port
    made = [socket.socket(*kind) for kind in kinds]
    pipe = os.pipe()
    for fds in (*((s.fileno(),) for s in made), (pipe[0],), (made[2].fileno(), made[2].fileno())):
        lib = RawLib(sock)
        assert lib.hello(c.HelloState.RUNNING, 0, 0, 1 << 18, fds=fds).status == errno.EINVAL
        lib.close()
    for s in made:
        s.close()
    for fd in pipe:
        os.close(fd)
    fresh = RawLib(sock)
    assert fresh.hello().slot == 0
    fresh.close()
    witness()


def test_a_crowd_of_connections_is_limited(sock: Path, agent: Agent, witness: Callable[[], None]) -> None:
    before = fds_of(agent)
    crowd = []
    for _ in range(600):
        s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        s.connect(str(sock))
        crowd.append(s)
    witness()
    assert fds_of(agent) <= before + 2 * 256 + 8
    for s in crowd:
        s.close()
    eventually(lambda: fds_of(agent) <= before)
    lib = RawLib(sock)
    assert lib.hello().status == 0
    lib.close()


def test_random_messages_leak_nothing(sock: Path, agent: Agent, witness: Callable[[], None]) -> None:
    rng = random.Random(11)
    seeds = [HELLO, *(c.encode(m, 1) for m in (c.Stopped(0, 1, 64), c.Resumed(0, 1), c.DumpReply(0, 64)))]
    before = fds_of(agent)
    memfd = os.memfd_create("x")
    os.write(memfd, b"\xff" * 64)
    for _ in range(300):
        lib = RawLib(sock)
        with contextlib.suppress(OSError):
            for _ in range(rng.randint(1, 5)):
                data = bytearray(rng.choice(seeds) if rng.random() < 0.7 else HELLO)
                for _ in range(rng.choice((0, 0, 1, 3))):
                    data[rng.randrange(len(data))] = rng.randrange(256)
                fds = array.array("i", [rng.choice((0, memfd)) for _ in range(rng.randint(0, 6))])
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
                lib.sock.sendmsg([bytes(data)], rights)
        lib.close()
    os.close(memfd)
    witness()
    eventually(lambda: not contexts(agent, "c1"))
    eventually(lambda: fds_of(agent) <= before)


def test_a_process_cannot_block_the_agent_by_not_reading(
    sock: Path, agent: Agent, witness: Callable[[], None]
) -> None:
    lib = RawLib(sock)
    lib.hello()
    for _ in range(40):
        ctx = agent.client.call("ps", container="witness")["containers"][0]["contexts"][0]
        assert ctx["dump"]
    answers = [agent.client.ps("c1")[0]["contexts"][0] for _ in range(2)]
    assert all("gave no snapshot" in a["error"] for a in answers)
    witness()
    lib.close()


def admin(agent: Agent) -> socket.socket:
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(60)
    s.connect(str(agent.run_dir / "admin.sock"))
    return s


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"hello", b"not valid JSON"),
        (b"[]", b"a request is a JSON object"),
        (b'"x"', b"a request is a JSON object"),
        (b"{}", b"there is no command None"),
        (b'{"id":1,"cmd":["x"]}', b"there is no command"),
        (b'{"id":1,"cmd":"container.add"}', b"container must be a non-empty string"),
        (b'{"id":1,"cmd":"container.add","container":"../x"}', b"is no container id"),
        (b'{"id":1,"cmd":"container.add","container":"' + b"x" * 200 + b'"}', b"is no container id"),
        (b'{"id":1,"cmd":"container.add","container":"x","gid":"nowhere"}', b"neither an IPv4 nor an IPv6"),
        (b'{"id":1,"cmd":"container.add","container":"x","netns":7}', b"netns must be a string or null"),
        (b'{"id":1,"cmd":"container.stop","container":"c1","dump_dir":"d"}', b"must be an absolute path"),
        (b'{"id":1,"cmd":"container.stop","container":"c1","dump_dir":"/d","timeout_ms":"1"}', b"timeout_ms"),
        (b'{"id":1,"cmd":"container.resume","container":"c1","timeout_ms":NaN}', b"timeout_ms"),
        (b'{"id":1,"cmd":"container.prepare","container":"p","dumps":"/x"}', b"must be a list of paths"),
        (b'{"id":1,"cmd":"container.prepare","container":"c1","dumps":[]}', b"already here and running"),
        (b'{"id":1,"cmd":"container.moved","container":"c1","gid":"10.0.0.1"}', b"running, not stopped"),
        (b'{"id":1,"cmd":"migration.begin","journal":"j"}', b"must be an absolute path"),
        (b"[" * 100000, b"not valid JSON"),
        (b"\xff\xfe", b"not valid JSON"),
    ],
    ids=range(19),
)
def test_a_bad_admin_request_is_answered_with_a_reason(
    agent: Agent, sock: Path, line: bytes, says: bytes
) -> None:
    assert sock.exists()
    with admin(agent) as s:
        s.sendall(line + b"\n")
        answer = s.recv(65536)
        assert says in answer
        assert b'"ok":false' in answer
        s.sendall(b'{"id":2,"cmd":"status"}\n')
        assert b'"ok":true' in s.recv(65536)


def test_an_endless_admin_line_ends_the_connection(agent: Agent, witness: Callable[[], None]) -> None:
    with admin(agent) as s, contextlib.suppress(OSError):
        while True:
            s.sendall(b"x" * 65536)
    witness()


def test_the_admin_socket_is_for_its_owner(agent: Agent) -> None:
    assert (agent.run_dir / "admin.sock").stat().st_mode & 0o777 == 0o600
    assert (agent.run_dir / "agent.sock").stat().st_mode & 0o777 == 0o666


def test_making_a_socket_changes_no_file_that_a_link_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container could put a link in the socket's place while its mode is still to be set."""
    secret, where = tmp_path / "shadow", tmp_path / "c"
    secret.write_text("x")
    secret.chmod(0o600)
    where.mkdir()
    bind = socket.socket.bind

    def outrun(sock: socket.socket, address: str) -> None:
        bind(sock, address)
        Path(address).unlink()
        Path(address).symlink_to(secret)

    monkeypatch.setattr(socket.socket, "bind", outrun)
    bind_unix(where / "agent.sock", socket.SOCK_SEQPACKET, 0o666).close()
    assert (where / "agent.sock").is_symlink()
    assert secret.stat().st_mode & 0o777 == 0o600
