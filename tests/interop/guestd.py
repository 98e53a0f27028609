# SPDX-License-Identifier: BSD-3-Clause
"""Process 1 of the emulated machine: brings up the network and rxe0, then runs what it is told to.

One TCP connection (over a network card of its own, so that what happens to the RDMA traffic does not touch
it) is one request, a line of JSON; its answer is another:

    {"run": [ARG...]}                  {"status": N, "output": "..."}   when the program has ended
    {"listen": PORT, "seconds": S}     {"ok": true|false}               whether anything listens at a TCP port
    {"put": PATH, "size": N} N bytes   {"ok": true}

A connection that is closed before its program has ended kills the program.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

PORT = 7000
MULTICAST = ("239.1.1.1", "ff0e::101", "239.7.7.7")
"""Groups of the UD tests, and of t_ud."""
MODULES = (
    "virtio_pci", "virtio_net", "virtio_rng", "crc32_generic", "crc32_pclmul", "ib_core", "ib_uverbs",
    "ib_umad", "rdma_cm", "rdma_ucm", "rdma_rxe", "ipv6",
)  # fmt: skip


def sh(*argv: str, must: bool = True) -> None:
    """Run a command; say so on the console if it fails."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, check=False)
    if done.returncode and must:
        print(f"guest: {' '.join(argv)}: status {done.returncode}", flush=True)


def set_up() -> None:
    """Mounts, modules, network, rxe0."""
    for kind, where in (("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/run"), ("tmpfs", "/tmp")):
        Path(where).mkdir(exist_ok=True)
        sh("mount", "-t", kind, kind, where)
    for where in ("/dev/shm", "/dev/pts"):
        Path(where).mkdir(exist_ok=True)
    sh("mount", "-t", "tmpfs", "shm", "/dev/shm")
    sh("mount", "-t", "devpts", "devpts", "/dev/pts")
    for module in MODULES:
        sh("modprobe", module, must=module not in ("crc32_pclmul", "virtio_pci", "ipv6"))
    Path("/etc").mkdir(exist_ok=True)
    Path("/etc/hosts").write_text("127.0.0.1 localhost guest\n")
    words = dict(word.split("=", 1) for word in Path("/proc/cmdline").read_text().split() if "=" in word)
    by_mac = {
        (path / "address").read_text().strip(): path.name for path in Path("/sys/class/net").iterdir()
    }
    data, control = by_mac[words["mg.data"]], by_mac[words["mg.control"]]
    sh("ip", "link", "set", "lo", "up")
    sh("sysctl", "-qw", "net.core.rmem_max=16777216", "net.ipv6.conf.all.accept_dad=0", must=False)
    sh("ip", "link", "set", data, "name", "data0")
    sh("ip", "link", "set", "data0", "mtu", words["mg.mtu"], "up")
    for address in words["mg.addresses"].split(","):
        sh("ip", "addr", "add", address, "dev", "data0", *(["nodad"] if ":" in address else []))
    sh("ip", "link", "set", control, "up")
    sh("ip", "addr", "add", "10.0.2.15/24", "dev", control)
    sh("rdma", "link", "add", "rxe0", "type", "rxe", "netdev", "data0")
    sh("ip", "route", "add", "224.0.0.0/4", "dev", "data0")


def join(stack: contextlib.ExitStack) -> None:
    """Be a member of the groups: rdma_rxe joins none of the IP layer, which drops what nobody has joined.

    By sockets, not as addresses of the interface (`autojoin`): what is sent to an own address goes to `lo`.
    """
    index = socket.if_nametoindex("data0")
    for group in MULTICAST:
        family = socket.AF_INET6 if ":" in group else socket.AF_INET
        member = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        name = socket.inet_pton(family, group)
        if family == socket.AF_INET6:
            member.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, name + struct.pack("@I", index))
        else:
            wanted = name + bytes(4) + struct.pack("@I", index)  # struct ip_mreqn
            member.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, wanted)


def listens(port: int) -> bool:
    """Whether a TCP socket listens at a port."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    lines += Path("/proc/net/tcp6").read_text().splitlines()[1:]
    return any(f[1].endswith(f":{port:04X}") and f[3] == "0A" for f in map(str.split, lines))


def run(argv: list[str], caller: socket.socket) -> dict[str, Any] | None:
    """A program's end, None if the caller went away first."""
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as exc:
            return {"status": 127, "output": f"{argv[0]}: {exc.strerror}"}
        gone = False
        ended = os.pidfd_open(process.pid)
        try:
            ready, _, _ = select.select([caller, ended], [], [])
            if caller in ready:
                gone = True
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        finally:
            os.close(ended)
        if gone:
            return None
        output.seek(0)
        return {"status": status, "output": output.read().decode(errors="replace")}


def answer(request: dict[str, Any], caller: socket.socket, rest: bytes) -> dict[str, Any] | None:
    """What a request asks for."""
    if "run" in request:
        return run(request["run"], caller)
    if "listen" in request:
        end = time.monotonic() + request["seconds"]
        while not (found := listens(request["listen"])) and time.monotonic() < end:
            time.sleep(0.05)
        return {"ok": found}
    path = Path(request["put"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(rest)
        left = request["size"] - len(rest)
        while left > 0 and (data := caller.recv(min(left, 1 << 20))):
            file.write(data)
            left -= len(data)
    path.chmod(0o755)
    return {"ok": left == 0}


def serve(caller: socket.socket) -> None:
    """One connection."""
    with caller:
        head = b""
        while b"\n" not in head:
            data = caller.recv(65536)
            if not data:
                return
            head += data
        line, rest = head.split(b"\n", 1)
        reply = answer(json.loads(line), caller, rest)
        if reply is not None:
            caller.sendall(json.dumps(reply).encode() + b"\n")


def reap() -> None:
    """Orphans end up here; programs of `run` are waited for by their own threads."""
    while True:
        time.sleep(5)
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError, ValueError):
                stat = (entry / "stat").read_text()
                fields = stat[stat.rindex(")") + 2 :].split()
                session = int(fields[3])
                if fields[0] == "Z" and fields[1] == "1" and session != int(entry.name):
                    os.waitpid(int(entry.name), os.WNOHANG)


def main() -> None:
    os.environ["PATH"] = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    os.environ["HOME"] = "/"
    set_up()
    threading.Thread(target=reap, daemon=True).start()
    with contextlib.ExitStack() as stack, socket.create_server(("", PORT), backlog=64) as server:
        join(stack)
        print("guest: ready", flush=True)
        while True:
            caller, _ = server.accept()
            threading.Thread(target=serve, args=(caller,), daemon=True).start()


if __name__ == "__main__":
    main()
