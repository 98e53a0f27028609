# SPDX-License-Identifier: BSD-3-Clause
"""The list of symbols: what we export, what we leave to the real libibverbs, and why."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from verbs_programs import imports, sanitized, symbols

LIST = Path(__file__).with_name("symbols.txt")
PROGRAMS = (
    "ib_send_bw", "ib_send_lat", "ib_write_bw", "ib_write_lat", "ib_read_bw", "ib_read_lat", "ib_atomic_bw",
    "raw_ethernet_bw", "ibv_devices", "ibv_devinfo", "ibv_rc_pingpong", "ibv_uc_pingpong", "ibv_ud_pingpong",
    "ibv_srq_pingpong", "ibv_xsrq_pingpong", "rping", "ucmatose", "udaddy", "mckey",
)  # fmt: skip


def _list() -> dict[str, str]:
    lines = (line.split() for line in LIST.read_text().splitlines())
    return {fields[0]: fields[1] for fields in lines if fields and fields[0] != "#"}


def _real_library(name: str) -> Path:
    found = sorted(Path("/usr").glob(f"lib*/**/{name}"))
    if not found:
        pytest.skip(f"{name} is not installed")
    return found[0]


def test_the_library_exports_exactly_what_the_list_says(library: Path) -> None:
    ours = {name for name, fate in _list().items() if fate == "ours"}
    if sanitized():
        ours -= {"dlsym", "dlvsym"}  # see native/verbs/dlsym.c
    assert symbols(library) == ours


def test_no_exported_symbol_has_a_version(library: Path) -> None:
    """A version would keep it from taking the place of a differently versioned one."""
    assert not [name for name in symbols(library) if "@" in name]


@pytest.mark.parametrize("name", ["libibverbs.so.1", "librdmacm.so.1"])
def test_every_symbol_of_the_installed_libraries_is_decided_about(name: str) -> None:
    real = {symbol.split("@")[0] for symbol in symbols(_real_library(name))}
    private = ("ibv_cmd_", "IBVERBS_", "RDMACM_", "verbs_register_driver_")
    public = {name for name in real if not name.startswith(private)}
    assert public - set(_list()) == set()


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_programs_import_is_ours_or_needs_no_object(program: str) -> None:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")
    fates = _list()
    strange = {name: fates.get(name, "unknown") for name in imports(Path(path))}
    assert {name: fate for name, fate in strange.items() if fate not in ("ours", "pure", "never")} == {}
