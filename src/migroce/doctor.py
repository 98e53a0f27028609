# SPDX-License-Identifier: BSD-3-Clause
"""What this machine has and lacks for migroce, each with the mend.

Every check looks at the thing itself (runs CRIU, makes a namespace) rather than at what a
distribution promises. A check never raises: what it cannot find out it says.
"""

from __future__ import annotations

import ctypes.util
import enum
import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from migroce import criu, criucheck, paths

ROCE_PORT = 4791
_GOOD_BUFFER = 8 << 20  # bytes: what the agent asks for


class State(enum.StrEnum):
    """GOOD; WARN: works, but slower or not everywhere; BAD: containers can't be migrated here."""

    GOOD = "good"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `mend` is empty where nothing needs doing."""

    name: str
    state: State
    text: str
    mend: str = ""


def _good(name: str, text: str) -> Check:
    return Check(name, State.GOOD, text)


def _warn(name: str, text: str, mend: str = "") -> Check:
    return Check(name, State.WARN, text, mend)


def _bad(name: str, text: str, mend: str) -> Check:
    return Check(name, State.BAD, text, mend)


def examine(*, real: bool = True) -> list[Check]:
    """All checks, in the order they are shown. `real`: let CRIU dump and restore a process (0.2 s)."""
    checks: list[Callable[[], Check | None]] = [
        _kernel, _library, _libibverbs, _addresses, _port, _devices, _buffers, _memlock, _run_dir,
        lambda: _criu(real=real), _runtime, _namespaces, _root_filesystem, _vxlan, _nft, _tools,
        _ptrace, _programs, _docker,
    ]  # fmt: skip
    found = []
    for check in checks:
        try:
            result = check()
        except Exception as exc:  # noqa: BLE001 - a check that fails is a finding, not the end
            name = getattr(check, "__name__", "check").strip("_")
            result = Check(name, State.WARN, f"could not be found out: {exc}")
        if result is not None:
            found.append(result)
    return found


def as_json(checks: list[Check]) -> dict[str, object]:
    """The form of `migroce doctor --json`."""
    return {"ok": all(c.state is not State.BAD for c in checks), "checks": [asdict(c) for c in checks]}


def _output(*argv: str, timeout: float = 10) -> tuple[int, str]:
    """Exit status and the two outputs of a program; 127 if it is not there."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=criu.environment(),
            check=False,
        )
    except FileNotFoundError:
        return 127, f"{argv[0]} is not installed"
    except subprocess.TimeoutExpired:
        return 124, f"{argv[0]} did not end within {timeout:.0f} s"
    return done.returncode, (done.stdout + done.stderr).strip()


def _last(text: str) -> str:
    return text.splitlines()[-1] if text else "no reason given"


def _on_path(tool: str) -> str | None:
    return shutil.which(tool, path=criu.environment()["PATH"])


def _install(package: str) -> str:
    if _on_path("apt-get"):
        return f"apt-get install --no-install-recommends {package}"
    return f"install {package} with your distribution's package manager"


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def _kernel() -> Check:
    release = platform.release()
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < (5, 0):
        return _bad("kernel", f"{release}: too old for UDP receive offload", "run Linux 5.10 or newer")
    if version < (5, 10):
        return _warn("kernel", f"{release}: never tried with one so old", "run Linux 5.10 or newer")
    return _good("kernel", f"Linux {release} {platform.machine()}")


def _library() -> Check:
    try:
        return _good("device library", str(paths.library()))
    except paths.LibraryNotFoundError as exc:
        return _bad("device library", str(exc), "make build")


def _libibverbs() -> Check:
    found = ctypes.util.find_library("ibverbs")
    if found:
        return _good("libibverbs", found)
    return _warn("libibverbs", "not installed: verbs programs need it to start", _install("libibverbs1"))


def _addresses() -> Check:
    code, out = _output("ip", "-brief", "address", "show", "up")
    if code:
        return _warn("network", f"ip address failed: {_last(out)}", _install("iproute2"))
    lines = [line.split() for line in out.splitlines()]
    usable = [f"{f[0].split('@')[0]} {f[2].split('/')[0]}" for f in lines if len(f) > 2 and f[0] != "lo"]
    if not usable:
        return _warn(
            "network",
            "no interface but lo has an address: rxe0 will be on lo",
            "give an interface an address",
        )
    return _good("network", "rxe0 can be on " + ", ".join(usable[:6]))


def _port() -> Check:
    holders = []
    for name in ("udp", "udp6"):
        try:
            rows = Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        holders += [row.split() for row in rows if row.split()[1].endswith(f":{ROCE_PORT:04X}")]
    if not holders:
        return _good("port", f"UDP {ROCE_PORT} is free")
    if all(row[9] == "0" for row in holders):
        return _warn(
            "port",
            f"UDP {ROCE_PORT} is taken by the kernel's rdma_rxe",
            "rdma link delete its link, or modprobe -r rdma_rxe; containers are not concerned",
        )
    users = sorted({row[7] for row in holders})
    if users == [str(os.geteuid())]:
        return _good("port", f"UDP {ROCE_PORT} is held by your own agent or program")
    return _warn(
        "port",
        f"UDP {ROCE_PORT} is held by a program of user {', '.join(users)}",
        f"find it: ss -ulpn sport = :{ROCE_PORT}; containers are not concerned",
    )


def _devices() -> Check:
    base = Path("/sys/class/infiniband")
    devices = sorted(p.name for p in base.iterdir()) if base.is_dir() else []
    if not devices:
        return _good("RDMA hardware", "none (none is needed)")
    return _good("RDMA hardware", f"{', '.join(devices)}: stays usable beside rxe0, but cannot be migrated")


def _buffers() -> Check:
    if os.geteuid() == 0:
        return _good("socket buffers", "the agent runs as root and takes 8 MiB each")
    rmem, wmem = _number("/proc/sys/net/core/rmem_max"), _number("/proc/sys/net/core/wmem_max")
    if rmem is None or wmem is None:
        return _warn("socket buffers", "net.core.rmem_max cannot be read here")
    least = min(rmem, wmem)
    if least < _GOOD_BUFFER // 2:
        return _warn(
            "socket buffers",
            f"at most {least >> 10} KiB without root: bursts get lost",
            f"as root: sysctl -w net.core.rmem_max={_GOOD_BUFFER} net.core.wmem_max={_GOOD_BUFFER}",
        )
    return _good("socket buffers", f"up to {least >> 10} KiB without root")


def _memlock() -> Check:
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
    return _good("memlock limit", f"{limit} (rxe0 locks no memory; hardware devices do)")


def _run_dir() -> Check:
    directory = paths.run_dir()
    existing = directory
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        return _bad(
            "state directory", f"{directory} cannot be written", "set MIGROCE_RUN_DIR to a directory of yours"
        )
    from migroce.launch import answers

    idle = "no agent runs (one is started when needed)"
    running = "an agent runs" if answers(directory / "admin.sock") else idle
    return _good("agent", f"{running}; sockets in {directory}")


def _criu(*, real: bool) -> Check:
    mend = "scripts/criu (a CRIU of its own, nothing of the system is replaced), or set MIGROCE_CRIU"
    found = criu.find()
    if found is None:
        return _bad("CRIU", "not installed", mend)
    try:
        version = ".".join(map(str, criucheck.version(found)))
        if not real or os.geteuid() != 0:
            why = "" if not real else "; the check by a dump and a restore needs root"
            old = criucheck.version(found) < criucheck.MINIMUM
            return Check(
                "CRIU", State.WARN if old else State.GOOD, f"{version} ({found}){why}", mend if old else ""
            )
        took = criucheck.verify(found)
    except criucheck.CriuError as exc:
        return _bad("CRIU", str(exc), mend)
    return _good("CRIU", f"{version} ({found}): dumped and restored a process in {took * 1000:.0f} ms")


def _runtime() -> Check:
    found = _on_path("runc")
    if found is None:
        return _bad("OCI runtime", "runc is not installed", _install("runc"))
    code, out = _output(found, "--version")
    if code:
        return _bad("OCI runtime", f"{found} --version failed: {_last(out)}", _install("runc"))
    return _good("OCI runtime", f"{out.splitlines()[0]} ({found})")


def _namespaces() -> Check:
    code, out = _output("unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "true")
    if code == 0:
        return _good("namespaces", "network, mount, pid, uts and ipc namespaces can be made")
    if os.geteuid() != 0:
        code, _ = _output("unshare", "--user", "--map-root-user", "--net", "true")
        rootless = "can be made" if code == 0 else "can't be made"
        return _warn("namespaces", f"containers need root; user namespaces {rootless}", "run as root")
    return _bad(
        "namespaces",
        f"can't be made: {_last(out)}",
        "give this container or machine CAP_SYS_ADMIN and CAP_NET_ADMIN",
    )


def _root_filesystem() -> Check:
    from migroce.engines.mounts import filesystem

    kind = filesystem(Path("/"))
    if kind == "overlay":
        reason = "is an overlay (a container?): the lab's and the demo's containers can't be moved here"
        return _warn("root file system", reason, "use a real or virtual machine for them")
    return _good("root file system", kind)


def _vxlan() -> Check | None:
    if os.geteuid() != 0:
        return None
    script = "ip link add v0 type veth peer name v1 && ip link add x0 type vxlan id 1 dstport 4789 dev v0"
    code, out = _output("unshare", "--net", "sh", "-c", script)
    if code == 0:
        return _good("lab network", "veth and VXLAN can be made")
    return _warn(
        "lab network",
        f"no veth or VXLAN: {_last(out)} (the lab and the demo need them)",
        "modprobe veth vxlan",
    )


def _nft() -> Check:
    if _on_path("nft") is None:
        return _bad("nftables", "nft is not installed: it keeps TCP quiet while frozen", _install("nftables"))
    if os.geteuid() != 0:
        return _good("nftables", "nft is installed; trying it needs root")
    code, out = _output("unshare", "--net", "nft", "add table inet migroce_check")
    if code:
        return _bad("nftables", f"nft fails: {_last(out)}", "a kernel with CONFIG_NF_TABLES_INET")
    return _good("nftables", "a table can be made")


def _tools() -> Check:
    packages = {"ip": "iproute2", "nsenter": "util-linux", "unshare": "util-linux", "tar": "tar"}
    missing = [tool for tool in packages if _on_path(tool) is None]
    if missing:
        wanted = " ".join(sorted({packages[tool] for tool in missing}))
        return _bad("tools", f"missing: {', '.join(missing)}", _install(wanted))
    return _good("tools", ", ".join(packages))


def _ptrace() -> Check:
    scope = _number("/proc/sys/kernel/yama/ptrace_scope")
    if scope == 3:
        return _bad(
            "ptrace",
            "kernel.yama.ptrace_scope is 3: CRIU may not look into processes",
            "boot with kernel.yama.ptrace_scope at 2 or less (3 cannot be undone while running)",
        )
    return _good("ptrace", "allowed to root" + ("" if scope is None else f" (ptrace_scope {scope})"))


def _programs() -> Check:
    if _on_path("ib_send_bw") is None:
        return _warn("perftest", "not installed: the demo and the benchmark run it", _install("perftest"))
    return _good("perftest", _on_path("ib_send_bw") or "")


def _docker() -> Check:
    from migroce import dockersetup
    from migroce.engines import dockerspec
    from migroce.errors import EngineError

    if _on_path("docker") is None:
        return _good("Docker", "not installed (only Docker's own containers need it)")
    engine = dockersetup.engine()
    try:
        if not engine.here:
            return _warn("Docker", "dockerd does not run", "start it, if you want to move its containers")
        info = engine.about
    except EngineError as exc:
        return _warn("Docker", exc.reason, exc.mend)
    version = info["ServerVersion"]
    try:
        dockerspec.check_release("this machine", {**info, "ExperimentalBuild": True}, {"any": "network"})
    except EngineError as exc:
        return _warn("Docker", exc.reason, f"use another release: {dockerspec.WORKING}")
    lacks = []
    if dockersetup.RUNTIME not in (info.get("Runtimes") or {}):
        lacks.append("the runtime migroce is not registered")
    if not info.get("ExperimentalBuild"):
        lacks.append("experimental, which docker checkpoint needs, is off")
    if lacks:
        return _warn("Docker", f"{version}: {' and '.join(lacks)}", "migroce setup docker")
    return _good("Docker", f"{version}: can checkpoint and restore RDMA containers (--runtime migroce)")
