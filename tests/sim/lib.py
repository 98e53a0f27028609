# SPDX-License-Identifier: BSD-3-Clause
"""libmgsim.so through cffi's ABI mode; its declarations are read from native/sim/simapi.h."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from cffi import FFI

from migroce import paths

_HEADER = Path(__file__).resolve().parents[2] / "native" / "sim" / "simapi.h"


@functools.cache
def load() -> tuple[Any, Any]:
    """``(ffi, lib)``. Raises LibraryNotFoundError (naming the mend) when it is not built."""
    text = _HEADER.read_text()
    declarations = text.split("/* cffi: begin */", 1)[1].split("/* cffi: end */", 1)[0]
    ffi: Any = FFI()
    ffi.cdef(declarations)
    return ffi, ffi.dlopen(str(paths.sim_library()))
