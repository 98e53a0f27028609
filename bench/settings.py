# SPDX-License-Identifier: BSD-3-Clause
"""How thoroughly to measure, and where to put what is found."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Amount = TypeVar("Amount", int, float)
QUICK_SHARE = 0.2


def _silent(_text: str) -> None:
    """No progress is shown."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`rounds` samples of everything, after `warm_up` uncounted ones; `tell` is called with what goes on."""

    rounds: int = 7
    warm_up: int = 1
    quick: bool = False
    out: Path = Path("out/bench")
    tell: Callable[[str], None] = _silent

    def scaled(self, amount: Amount) -> Amount:
        """An amount of work: a fifth of it when there is no time."""
        return type(amount)(amount * QUICK_SHARE) if self.quick else amount

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A directory for one section, gone afterwards. Short, for the sockets in it."""
        with tempfile.TemporaryDirectory(prefix="mgb-", dir="/tmp") as made:
            yield Path(made)
