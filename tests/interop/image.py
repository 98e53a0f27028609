# SPDX-License-Identifier: BSD-3-Clause
"""The emulated machine's kernel and root file system, made of Debian's own packages.

An apt with lists, cache and an empty dpkg status of its own fetches the stock kernel and the programs from
the mirror that this machine uses, for one fixed release: whatever runs here, the peer is the same. They are
unpacked, not installed (no maintainer script runs), the kernel's modules reduced to those needed, and all of
it packed into one initramfs. Made once; the second time it is there already.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SUITE = os.environ.get("MIGROCE_INTEROP_SUITE", "trixie")
"""Debian 13: Linux 6.12."""
PACKAGES = (
    "linux-image-amd64", "bash", "coreutils", "procps", "mount", "kmod", "iproute2", "iputils-ping",
    "python3", "perftest", "ibverbs-utils", "ibverbs-providers", "rdmacm-utils", "libdeflate0", "libc-bin",
)  # fmt: skip
MODULES = (
    "virtio_pci", "virtio_net", "virtio_rng", "crc32_generic", "crc32_pclmul", "crc32c_generic",
    "crc32c_intel", "ib_core", "ib_uverbs", "ib_umad", "ib_cm", "rdma_cm", "rdma_ucm", "rdma_rxe", "ipv6",
)  # fmt: skip
UNUSED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/bug",
          "usr/share/zoneinfo", "usr/share/lintian", "boot")  # fmt: skip


class ImageError(Exception):
    """Why there is no image; one sentence."""


@dataclass(frozen=True, slots=True)
class Image:
    """What qemu boots."""

    kernel: Path
    initrd: Path
    release: str
    """The kernel's, `6.12.1-amd64`."""


def provide(work: Path) -> Image:
    """The image in `work`, made there if it is not. Raises ImageError."""
    stamp = hashlib.sha256(Path(__file__).read_bytes() + SUITE.encode()).hexdigest()
    done = work / "stamp"
    if not (done.is_file() and done.read_text() == stamp):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        with tempfile.TemporaryDirectory(prefix="tmp.", dir=work) as scratch:
            _make(work, Path(scratch))
        done.write_text(stamp)
    return Image(work / "vmlinuz", work / "root.cpio", (work / "release").read_text())


def _run(argv: Sequence[str | Path], what: str, **options: object) -> str:
    done = subprocess.run(
        list(map(str, argv)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False, **options,  # type: ignore[call-overload]
    )  # fmt: skip
    if done.returncode:
        errors = [line for line in done.stdout.splitlines() if line.startswith("E:")]
        raise ImageError(f"{what}: {(errors or done.stdout.strip().splitlines() or ['no output'])[-1]}")
    return str(done.stdout)


def _mirror() -> str:
    """The Debian mirror of this machine's apt."""
    fields = "$(REPO_URI) $(LABEL) $(COMPONENT)"
    lines = _run(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"], "apt").splitlines()
    for line in lines:
        uri, _, rest = line.partition(" ")
        if rest == "Debian main" and uri.split(":")[0] in ("http", "https", "file", "copy", "mirror"):
            return uri
    raise ImageError("apt names no Debian mirror: run `apt-get update`, on Debian")


def _make(work: Path, scratch: Path) -> None:
    tree = scratch / "root"
    debs = _fetch(scratch)
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    for deb in debs:
        _run(["dpkg-deb", "-x", deb, tree], deb.name)
    kernel = next((tree / "boot").glob("vmlinuz-*"))
    release = kernel.name.removeprefix("vmlinuz-")
    shutil.copy(kernel, work / "vmlinuz")
    (work / "release").write_text(release)
    for name in UNUSED:
        shutil.rmtree(tree / name, ignore_errors=True)
    _keep_modules(tree, release)
    for name in ("proc", "sys", "dev", "run", "tmp", "etc", "root"):
        (tree / name).mkdir(exist_ok=True)
    _run(["chroot", tree, "/sbin/ldconfig"], "ldconfig in the image")
    _pack(tree, work / "root.cpio")


def _fetch(scratch: Path) -> list[Path]:
    """The packages with all that they need."""
    for name in ("lists/partial", "cache/archives/partial"):
        (scratch / name).mkdir(parents=True)
    (scratch / "status").touch()
    ring = next(Path("/usr/share/keyrings").glob("debian-archive-keyring.[gp]*"), None)
    if ring is None:
        raise ImageError("Debian's keyring is missing: install debian-archive-keyring")
    (scratch / "sources.list").write_text(f"deb [signed-by={ring}] {_mirror()} {SUITE} main\n")
    options = {
        "Dir::State": scratch, "Dir::State::lists": scratch / "lists",
        "Dir::State::status": scratch / "status", "Dir::Cache": scratch / "cache",
        "Dir::Etc::sourcelist": scratch / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null", "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null", "APT::Sandbox::User": "root", "Acquire::Languages": "none",
        "APT::Default-Release": "", "APT::Install-Recommends": "false", "Debug::NoLocking": "1",
        "APT::Update::Post-Invoke-Success": "", "APT::Update::Post-Invoke": "", "DPkg::Post-Invoke": "",
    }  # fmt: skip
    apt: list[str | Path] = ["apt-get", "-q", "-y"]
    for name, value in options.items():
        apt += ["-o", f"{name}={value}"]
    _run([*apt, "update"], f"package lists of {SUITE}")
    _run([*apt, "--download-only", "install", *PACKAGES], f"packages of {SUITE}")
    return sorted((scratch / "cache/archives").glob("*.deb"))


def _keep_modules(tree: Path, release: str) -> None:
    """Of the kernel's modules, those of MODULES with what they need; unpacked, which boots faster."""
    base = tree / "usr/lib/modules" / release
    _run(["chroot", tree, "/sbin/depmod", release], "depmod in the image")
    needs: dict[str, list[str]] = {}
    for line in (base / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    by_name = {Path(path).name.split(".ko")[0].replace("-", "_"): path for path in needs}
    keep: set[str] = set()
    for name in MODULES:
        if name in by_name:  # the others are built in
            keep |= {by_name[name], *needs[by_name[name]]}
    for path in needs:
        if path not in keep:
            (base / path).unlink()
    packed = [base / path for path in keep if path.endswith(".xz")]
    if packed:
        _run(["xz", "-d", *packed], "unpacking modules")
    _run(["chroot", tree, "/sbin/depmod", release], "depmod in the image")


def _pack(tree: Path, target: Path) -> None:
    with target.open("wb") as out:
        names = subprocess.run(["find", ".", "-xdev", "-print0"], cwd=tree, capture_output=True, check=True)
        argv = ["cpio", "--null", "--create", "--format=newc", "--quiet", "--owner=0:0"]
        done = subprocess.run(argv, cwd=tree, input=names.stdout, stdout=out, check=False)
        if done.returncode:
            raise ImageError("cpio could not pack the image")


def overlay(files: dict[str, Path], target: Path) -> None:
    """A further initramfs with these files (path in the machine -> file here), executable."""
    with tempfile.TemporaryDirectory() as scratch:
        for inside, path in files.items():
            copy = Path(scratch) / inside.lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
            copy.chmod(0o755)
        _pack(Path(scratch), target)
