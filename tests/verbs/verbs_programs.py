# SPDX-License-Identifier: BSD-3-Clause
"""Build the C test programs and run programs with the library preloaded, in namespaces of their own."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "c"
FLAGS = (
    "-std=gnu17", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror",
    "-Wno-missing-field-initializers",
)  # fmt: skip
PROGRAMS = (
    "t_device", "t_memory", "t_qp", "t_data", "t_errors", "t_events", "t_ex", "t_files", "t_threads",
    "t_args", "t_atomics", "t_modify", "t_post", "t_windows", "t_srq", "t_ud", "t_gone", "t_port", "t_fork",
)
FORWARD = "t_forward"
DLOPEN = "t_dlopen"


def cases_of(program: str) -> list[str]:
    """Names of the tests a program holds, from its TV_MAIN list."""
    text = (SOURCES / f"{program}.c").read_text()
    return re.findall(r"\bT\((\w+)\)", text[text.index("TV_MAIN") :])


def sanitized() -> bool:
    """The library under test is a sanitized build (several times slower)."""
    return bool(os.environ.get("MIGROCE_SANITIZER"))


@dataclass(frozen=True, slots=True)
class Builder:
    """Compiles test programs into a directory."""

    library: Path
    out: Path

    def program(self, name: str) -> Path:
        """A test program, linked with the real libibverbs."""
        return self._link(name, ["-libverbs"])

    def forward_program(self) -> Path:
        """The program that stands on the stub of libibverbs (found by its run path)."""
        stub = self.out / "stub"
        stub.mkdir()
        real = stub / "libibverbs.so.1"
        script = SOURCES / "stub_ibverbs.map"
        self._cc(
            "-shared", "-fPIC", "-Wl,-soname,libibverbs.so.1", f"-Wl,--version-script={script}",
            SOURCES / "stub_ibverbs.c", "-o", real,
        )  # fmt: skip
        # What the stub lacks is found in our library, as it is when an older libibverbs lacks it.
        return self._link(FORWARD, [str(real), str(self.library), f"-Wl,-rpath,{stub}"])

    def dlopen_program(self) -> Path:
        """The program that is not linked with libibverbs, beside a plugin that is."""
        self._cc("-shared", "-fPIC", SOURCES / "plugin.c", "-o", self.out / "tvplugin.so", "-libverbs")
        # Without what tv.c has for programs that are.
        options = ("-ffunction-sections", "-Wl,--gc-sections", "-Wl,--export-dynamic-symbol=getppid")
        return self._link(DLOPEN, [*options, f"-Wl,-rpath,{self.out}"])

    def _link(self, name: str, libraries: Sequence[str]) -> Path:
        out = self.out / name
        self._cc(SOURCES / f"{name}.c", SOURCES / "tv.c", "-o", out, *libraries, "-lpthread", "-ldl")
        return out

    def _cc(self, *args: str | Path) -> None:
        subprocess.run(["cc", *FLAGS, *map(str, args)], check=True)


@dataclass(frozen=True, slots=True)
class Preload:
    """How to start a program with the device in it."""

    library: Path

    def environment(self, address: str, **extra: str) -> dict[str, str]:
        """A program's environment: the library preloaded, no agent, the device on `address`."""
        runtime = os.environ.get("MIGROCE_SANITIZER_RUNTIME")
        first = f"{runtime}:" if runtime else ""
        return {
            **os.environ,
            "LD_PRELOAD": f"{first}{self.library}",
            "MIGROCE_ADDR": address,
            "MIGROCE_AGENT": "/nonexistent/agent.sock",
            **extra,
        }

    def alone(self, program: Path, *args: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
        """Run on the loopback interface of a new network namespace."""
        # The sanitizer runtimes are for the program, not for the shell in front of it.
        environment = self.environment("127.0.0.1")
        preload = environment.pop("LD_PRELOAD")
        command = 'ip link set lo up && exec env LD_PRELOAD="$0" "$@"'
        return subprocess.run(
            ["unshare", "--net", "sh", "-c", command, preload, str(program), *args],
            env=environment, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip


def symbols(library: Path) -> set[str]:
    """Defined dynamic symbols, with `@version` where they have one."""
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", "--with-symbol-versions", str(library)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return {line.split()[2] for line in listing.splitlines() if line.split()[1] in "TBDW"}


def imports(binary: Path) -> set[str]:
    """Undefined ibv_* and rdma_* symbols of a program or library, without their versions."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", str(binary)], check=True, capture_output=True, text=True
    ).stdout
    names: Iterable[str] = (line.split()[-1].split("@")[0] for line in listing.splitlines())
    return {name for name in names if re.match(r"_?ibv_|rdma_", name)}
