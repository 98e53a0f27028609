# SPDX-License-Identifier: BSD-3-Clause
"""One emulated machine for all tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.interop import net, table
from tests.interop.ends import V6, End, Kernels, Ours
from tests.interop.guest import Guest
from tests.interop.image import HERE, provide
from tests.interop.matrix import ROWS, SCENARIOS
from tests.interop.moves import Both

from migroce.lab.api import Lab

ROOT = HERE.parent.parent
BUILD = ROOT / "build"
WORK = ROOT / "build-interop"
RESULTS = pytest.StashKey[table.Results]()
MOVES = pytest.StashKey[list[str]]()
"""A line for each test with moves."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = table.Results()
    config.stash[MOVES] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.root)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call" or report.failed:  # type: ignore[attr-defined]
        item.config.stash[RESULTS].note(item, passed=report.passed)  # type: ignore[attr-defined]
        item.passed = report.passed  # type: ignore[attr-defined]
    return report  # type: ignore[return-value]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table if the whole matrix was run."""
    results = session.config.stash[RESULTS]
    wanted = 2 * (len(ROWS) + len(SCENARIOS))
    if sum(len(row) for row in results.cells.values()) >= wanted:
        results.write(ROOT / "docs" / "interop.md")


@pytest.fixture(scope="session", autouse=True)
def _ends_well() -> Iterator[None]:
    """Being told to end is like ^C: everything is taken down."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def work() -> Iterator[Path]:
    """A directory of this run."""
    WORK.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="run.", dir=WORK) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def programs(work: Path) -> dict[str, Path]:
    """Test programs of ours, for both ends."""
    mgerr = work / "mgerr"
    flags = ["-std=gnu17", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror",
             "-Wno-missing-field-initializers"]  # fmt: skip
    subprocess.run(["cc", *flags, HERE / "c" / "mgerr.c", "-o", mgerr, "-libverbs"], check=True)
    shared = [*flags, "-shared", "-fPIC"]
    subprocess.run(["cc", *shared, HERE / "c" / "gate.c", "-o", work / "gate.so"], check=True)
    workload = BUILD / "tests" / "workload"
    return {"mgerr": mgerr, **{name: workload / name for name in ("mgcheck", "udcheck", "cmcheck", "target")}}


@pytest.fixture(scope="session")
def ends(
    work: Path, programs: dict[str, Path], request: pytest.FixtureRequest
) -> Iterator[tuple[Ours, Kernels]]:
    """Our end and the kernel's."""
    image = provide(WORK / "image")
    files = {f"/usr/local/bin/{name}": path for name, path in programs.items()}
    library = Path(os.environ.get("MIGROCE_LIBRARY", str(BUILD / "native" / "libmigroce.so")))
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{work}:{BUILD / 'tests' / 'workload'}:{path}"
    try:
        with net.namespace():
            addresses = [f"{ip}/{net.PREFIXES[which]}" for which, ip in net.KERNELS.items()]
            guest = Guest(image, work, files, addresses)
            request.config.stash[RESULTS].kernel = image.release
            try:
                yield Ours(library, net.OURS, work / "gate.so"), Kernels(guest, net.KERNELS)
            finally:
                guest.close()
    finally:
        os.environ["PATH"] = path


@pytest.fixture(autouse=True)
def _capture(ends: tuple[Ours, Kernels], request: pytest.FixtureRequest) -> Iterator[None]:  # noqa: ARG001
    """With MIGROCE_INTEROP_PCAP=DIR: a capture of each test that failed is kept there."""
    directory = os.environ.get("MIGROCE_INTEROP_PCAP")
    if not directory:
        yield
        return
    name = "".join(each if each.isalnum() else "-" for each in request.node.name.removeprefix("test_"))[-160:]
    path = Path(directory) / f"{name}.pcap"
    path.parent.mkdir(parents=True, exist_ok=True)
    argv = ["tcpdump", "-U", "-s", "160", "-B", "16384", "-i", "tap0", "-w", str(path), "udp port 4791"]
    tcpdump = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    yield
    tcpdump.terminate()
    tcpdump.wait()
    if getattr(request.node, "passed", False):
        path.unlink(missing_ok=True)


@pytest.fixture(params=["from rdma_rxe to migroce", "from migroce to rdma_rxe"])
def direction(request: pytest.FixtureRequest, ends: tuple[Ours, Kernels]) -> tuple[End, End]:
    """(server, client)."""
    ours, kernels = ends
    return (ours, kernels) if request.param.endswith("to migroce") else (kernels, ours)


@pytest.fixture(scope="session")
def lab(ends: tuple[Ours, Kernels]) -> Iterator[Lab]:
    """A lab of two nodes; the emulated machine is plugged into node-a."""
    for family, address in net.LAB.items():
        argv = ["ip", "addr", "replace", f"{address}/{net.PREFIXES[family]}", "dev", "data0"]
        ended = ends[1].guest.run(argv + (["nodad"] if family == V6 else []))
        assert ended.status == 0, ended.output
    up = Lab.up(f"iop-{os.getpid()}")
    try:
        with net.plugged_into(f"migroce-{up.name}.node-a"):
            yield up
    finally:
        up.down()


@pytest.fixture
def stage(lab: Lab, ends: tuple[Ours, Kernels], request: pytest.FixtureRequest) -> Iterator[Both]:
    """Containers and the machine's programs; what the moves cost is told at the end of the run."""
    with contextlib.closing(Both(lab, ends[1])) as it:
        yield it
        if it.blackouts:
            request.config.stash[MOVES].append(f"{request.node.name}: {it.summary()}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What each move cost."""
    for line in config.stash[MOVES]:
        terminalreporter.write_line(line)
