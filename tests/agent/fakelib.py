# SPDX-License-Identifier: BSD-3-Clause
"""A stand-in for libmigroce.so in a process of its own: speaks the control protocol, moves no data.

Run as `python fakelib.py SOCKET [QPN_OFFSET...] [--opt value]`; tells what happens as JSON lines on
stdout, obeys lines on stdin ("quit", "close", "fork", "send <hex>"). Options make it misbehave.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import socket
import sys
import time
from typing import Any

from migroce import control as c
from migroce import dump as d


def tell(event: str, **more: Any) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


class FakeLib:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.instance = os.urandom(16)
        self.conn: socket.socket | None = None
        self.udp: list[socket.socket] = []
        self.slot, self.base, self.count = c.NO_SLOT, 0, 0
        self.gid = c.NO_GID
        self.state = c.HelloState.FRESH
        self.next_try = 0.0

    def hello(self) -> None:
        conn = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            conn.connect(self.args.socket)
            msg = c.Hello(self.instance, os.getpid(), self.state, self.slot, self.base, self.count,
                          self.args.comm, d.gid_bytes(self.args.gid))
            running = self.state == c.HelloState.RUNNING
            socket.send_fds(conn, [c.encode(msg, 1)], [s.fileno() for s in self.udp] if running else [])
        except OSError:
            conn.close()
            self.next_try = time.monotonic() + (0.002 if self.state == c.HelloState.STOPPED else 0.05)
            return
        self.conn = conn

    def lost(self) -> None:
        assert self.conn is not None
        self.conn.close()
        self.conn = None
        self.next_try = time.monotonic() + 0.002
        if self.state != c.HelloState.STOPPED:
            self.state = c.HelloState.RUNNING
            tell("lost")

    def on_control(self) -> None:
        assert self.conn is not None
        try:
            data, fds, _, _ = socket.recv_fds(self.conn, 4096, 4)
        except ConnectionError:
            data, fds = b"", []
        if not data:
            self.lost()
            return
        request, msg = c.decode(data)
        if isinstance(msg, c.Welcome):
            self.on_welcome(msg, [socket.socket(fileno=fd) for fd in fds])
        elif isinstance(msg, c.Stop):
            self.on_stop(request)
        elif isinstance(msg, c.DumpReq):
            with self.memfd(stopped=False) as (fd, size):
                socket.send_fds(self.conn, [c.encode(c.DumpReply(0, size), request)], [fd])

    def on_welcome(self, msg: c.Welcome, socks: list[socket.socket]) -> None:
        assert self.conn is not None
        if msg.status:
            tell("refused", status=msg.status)
            sys.exit(3)
        if socks:
            self.udp = socks
            for sock in socks:
                sock.setblocking(False)
        was = self.state
        self.slot, self.base, self.count, self.gid = msg.slot, msg.qpn_base, msg.qpn_count, msg.gid
        self.state = c.HelloState.RUNNING
        if was == c.HelloState.STOPPED:
            if self.args.resume_fails:
                self.args.resume_fails -= 1
                self.conn.send(c.encode(c.Resumed(99), 1))
                self.state = c.HelloState.STOPPED
                self.lost()
                return
            self.conn.send(c.encode(c.Resumed(0, len(self.args.qps)), 1))
        tell("welcome", was=int(was), slot=msg.slot, base=msg.qpn_base, count=msg.qpn_count,
             gid=d.gid_text(msg.gid), bound=[s.getsockname()[:2] for s in self.udp])

    def on_stop(self, request: int) -> None:
        assert self.conn is not None
        how = self.args.stop
        tell("stop")
        if how == "never":
            return
        if how == "fails":
            self.conn.send(c.encode(c.Stopped(5), request))
            return
        if how == "garbage":
            self.conn.send(b"\xff" * 64)
            return
        if how == "dies":
            os._exit(1)
        with self.memfd(stopped=how != "live") as (fd, size):
            if how == "pipe":
                fd = os.pipe()[0]
            elif how == "baddump":
                os.pwrite(fd, b"XXXX", 40)
            elif how == "short":
                size += 8
            socket.send_fds(self.conn, [c.encode(c.Stopped(0, len(self.args.qps), size), request)], [fd])
        for sock in self.udp:
            sock.close()
        self.udp = []
        self.state = c.HelloState.STOPPED
        tell("stopped")
        self.lost()

    @contextlib.contextmanager
    def memfd(self, *, stopped: bool) -> Any:
        ctx = d.ContextRecord(self.gid, self.base, self.count, self.slot, 1, 4096)
        peer = d.gid_bytes(self.args.peer)
        local = d.gid_bytes(self.args.gid)
        qps = tuple(
            d.make_qp(self.base + n, peer_qpn=0x900000 + n, local_gid=local, peer_gid=peer, epsn=1000,
                      next_psn=2000, una_psn=2000, msn=7, token=bytes([n & 0xFF]) * 16, epoch=4,
                      peer_capable=int(self.args.capable))
            for n in self.args.qps
        )
        fd = os.memfd_create("dump")
        data = d.build(d.Dump(ctx, qps=qps, stopped=stopped))
        os.write(fd, data)
        yield fd, len(data)
        os.close(fd)

    def on_udp(self, sock: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, address = sock.recvfrom(65536)
                tell("udp", family=int(sock.family), hex=data[:64].hex(), source=address[0])

    def on_stdin(self) -> None:
        line = sys.stdin.readline().split()
        if not line or line[0] == "quit":
            sys.exit(0)
        if line[0] == "fork":  # a child that keeps the sockets open
            pid = os.fork()
            if not pid:
                if self.conn is not None:
                    self.conn.close()
                os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
                time.sleep(60)
                os._exit(0)
            tell("forked", pid=pid)
        elif line[0] == "close" and self.conn is not None:
            self.conn.close()
            self.conn = None
            self.next_try = float("inf")
            for sock in self.udp:
                sock.close()
            self.udp = []
            tell("closed")
        elif line[0] == "send" and self.conn is not None:
            self.conn.send(bytes.fromhex(line[1]))

    def run(self) -> None:
        while True:
            now = time.monotonic()
            if self.conn is None and now >= self.next_try:
                self.hello()
            watch: list[Any] = [sys.stdin, *([] if self.args.deaf else self.udp)]
            timeout = None
            if self.conn is not None:
                watch.append(self.conn)
            elif self.next_try != float("inf"):
                timeout = max(0.0, self.next_try - now)
            for ready in select.select(watch, [], [], timeout)[0]:
                if ready is self.conn:
                    self.on_control()
                elif ready is sys.stdin:
                    self.on_stdin()
                elif ready in self.udp:
                    self.on_udp(ready)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("socket")
    p.add_argument("qps", nargs="*", type=lambda text: int(text, 0), default=[])
    p.add_argument("--gid", default="")
    p.add_argument("--capable", action="store_true")
    p.add_argument("--peer", default="")
    p.add_argument("--comm", default="fake")
    p.add_argument("--stop", default="well")
    p.add_argument("--deaf", action="store_true")
    p.add_argument("--resume-fails", type=int, default=0)
    FakeLib(p.parse_args()).run()


if __name__ == "__main__":
    main()
