# SPDX-License-Identifier: BSD-3-Clause
"""Where the programs are that the benchmarks run: ours from the build directory, perftest from PATH."""

from __future__ import annotations

import shutil
from pathlib import Path

from bench.ends import BenchError
from migroce import paths


def build_dir() -> Path:
    """The build directory whose library is measured: `build/`, or that of ``MIGROCE_LIBRARY``."""
    library = paths.library()
    root = paths.source_tree()
    if library.parent.name == "native" and (library.parent.parent / "build.ninja").is_file():
        return library.parent.parent
    if root is None:
        raise BenchError("benchmarks are run from the work tree (make bench)")
    return root / "build"


def _built(relative: str) -> str:
    path = build_dir() / relative
    if not path.is_file():
        raise BenchError(f"{path} is not built: run `make build`")
    return str(path)


def raw_udp() -> str:
    """The raw UDP sender and receiver (bench/raw_udp.c)."""
    return _built("bench/raw_udp")


def one_qp() -> str:
    """The memory probe (bench/one_qp.c)."""
    return _built("bench/one_qp")


def stream() -> str:
    """The pair of programs without RDMA (bench/stream.c)."""
    return _built("bench/stream")


def mgcheck() -> str:
    """The checking workload (tests/workload)."""
    return _built("tests/workload/mgcheck")


def perftest(name: str) -> str:
    """A perftest program. Raises BenchError when it is not installed."""
    found = shutil.which(name)
    if found is None:
        raise BenchError(f"{name} is not installed (Debian package: perftest)")
    return found
