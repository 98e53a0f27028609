# SPDX-License-Identifier: BSD-3-Clause
"""The emulated machine with the kernel's SoftRoCE: boot it, run programs in it.

    our namespace                              the machine (qemu, TCG)
      br0 10.77.0.1, fd77::1 -- tap0 ========= data0 10.77.0.2, fd77::2: rxe0
      lo 127.0.0.1:PORT      -- qemu's slirp - control card: guestd.py

qemu dies with the process that started it, by whatever end, and takes the tap with it.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.interop import guestd
from tests.interop.image import HERE, Image, overlay

MTU = 9000
DATA_MAC, CONTROL_MAC = "52:54:00:77:00:02", "52:54:00:77:00:03"
TAP = "tap0"
_INIT = b"""#!/bin/bash
export PYTHON_COLORS=0
mount -t devtmpfs dev /dev
exec /usr/bin/python3 -I -S /guestd.py
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """A program that has ended."""

    status: int
    output: str


class Running:
    """A program in the machine."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._line = bytearray()
        self._ended: Ended | None = None

    def wait(self, seconds: float) -> Ended | None:
        """Its end; None if it does not end in time."""
        if self._ended is None:
            self._link.settimeout(seconds)
            try:
                reply = _read_line(self._link, self._line)
            except (TimeoutError, BlockingIOError):  # the latter: of 0 seconds
                return None
            self._ended = Ended(int(reply["status"]), str(reply["output"]))
        return self._ended

    def kill(self) -> None:
        """End it, if it has not ended."""
        self._link.close()

    close = kill


def _read_line(link: socket.socket, line: bytearray | None = None) -> dict[str, Any]:
    line = bytearray() if line is None else line
    while not line.endswith(b"\n"):
        data = link.recv(65536)
        if not data:
            raise ConnectionError("the machine closed the connection")
        line += data
    return dict(json.loads(line))


class _PanicError(RuntimeError):
    """Its kernel has given up."""


class Guest:
    """The machine, running in the calling thread's network namespace."""

    def __init__(self, image: Image, work: Path, files: dict[str, Path], addresses: Sequence[str]) -> None:
        """Boot; `files` (path there -> file here) are put in, `addresses` (with prefix) are its own."""
        self.log = work / "console.log"
        init = work / "init"
        init.write_bytes(_INIT)
        extra = work / "extra.cpio"
        overlay({**files, "/init": init, "/guestd.py": HERE / "guestd.py"}, extra)
        initrd = work / "initrd"
        with initrd.open("wb") as out:
            for part in (image.initrd, extra):
                with part.open("rb") as source:
                    shutil.copyfileobj(source, out, 1 << 20)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        forward = f"hostfwd=tcp:127.0.0.1:{self._port}-10.0.2.15:{guestd.PORT}"
        words = (
            f"console=ttyS0 quiet panic=-1 mitigations=off mg.data={DATA_MAC} mg.control={CONTROL_MAC} "
            f"mg.mtu={MTU} mg.addresses={','.join(addresses)}"
        )
        argv = [
            "setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-name", "migroce-interop", "-M", "q35",
            "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "2048", "-smp", "2", "-nodefaults",
            "-no-user-config", "-display", "none", "-no-reboot", "-kernel", str(image.kernel),
            "-initrd", str(initrd), "-append", words,
            "-serial", f"file:{self.log}", "-device", "virtio-rng-pci",
            "-netdev", f"tap,id=data,ifname={TAP},script=no,downscript=no",
            "-device", f"virtio-net-pci,netdev=data,mac={DATA_MAC},host_mtu={MTU},romfile=",
            "-netdev", f"user,id=control,restrict=on,{forward}",
            "-device", f"virtio-net-pci,netdev=control,mac={CONTROL_MAC},romfile=",
        ]  # fmt: skip
        # Emulated, the kernel sometimes traps in code that it patches, before anything of ours is there.
        for last in (False, False, True):
            self._boot(argv)
            try:
                self._wait_until_up(240)
                return
            except BaseException as error:
                self.close()
                if last or not isinstance(error, _PanicError):
                    raise
                warnings.warn(f"booted again: {error}", stacklevel=2)

    def _boot(self, argv: list[str]) -> None:
        self.log.write_bytes(b"")
        self._qemu = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def _said(self) -> str:
        return self.log.read_text(errors="replace")

    def _wait_until_up(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while "guest: ready" not in self._said():
            if self._qemu.poll() is not None:
                said = self._qemu.stdout.read().decode(errors="replace") if self._qemu.stdout else ""
                kind = _PanicError if "Kernel panic" in self._said() else RuntimeError
                raise kind(f"the emulated machine has ended: {said}{self._last_words()}")
            if time.monotonic() > end:
                raise RuntimeError(f"the emulated machine does not come up: {self._last_words()}")
            time.sleep(0.1)

    def _last_words(self) -> str:
        said = self._said()
        first = re.search(r"^.*(BUG:|Oops|int3:|invalid opcode|general protection)", said, re.MULTILINE)
        return said[first.start() :] if first else "\n".join(said.splitlines()[-15:])

    def close(self) -> None:
        """Switch it off."""
        self._qemu.kill()
        self._qemu.communicate()

    def start(self, argv: Sequence[str]) -> Running:
        """Start a program; closing the connection would end it."""
        return Running(self._ask({"run": list(argv)}))

    def run(self, argv: Sequence[str], seconds: float = 60) -> Ended:
        """Run a program to its end. Raises TimeoutError."""
        with contextlib.closing(self.start(argv)) as running:
            ended = running.wait(seconds)
        if ended is None:
            raise TimeoutError(f"{argv[0]} takes longer than {seconds} s in the machine")
        return ended

    def listens(self, port: int, seconds: float) -> bool:
        """Wait until something listens at a TCP port; whether anything does."""
        with contextlib.closing(self._ask({"listen": port, "seconds": seconds})) as link:
            link.settimeout(seconds + 30)
            return bool(_read_line(link)["ok"])

    def put(self, path: Path, inside: str) -> None:
        """Copy a file into the machine, executable."""
        data = path.read_bytes()
        with contextlib.closing(self._ask({"put": inside, "size": len(data)})) as link:
            link.sendall(data)
            if not _read_line(link)["ok"]:
                raise OSError(f"{inside} could not be written in the machine")

    def _ask(self, request: dict[str, Any]) -> socket.socket:
        link = socket.create_connection(("127.0.0.1", self._port), timeout=60)
        link.sendall(json.dumps(request).encode() + b"\n")
        return link
