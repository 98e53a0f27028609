# SPDX-License-Identifier: BSD-3-Clause
"""Help texts: written in lines of 110, shown in the width of the terminal."""

from __future__ import annotations


def flow(text: str) -> str:
    """Join the lines of each paragraph; indented lines (examples) stay as they are, one paragraph each."""
    paragraphs: list[str] = []
    open_ = False
    for line in text.strip("\n").splitlines():
        if not line.strip():
            open_ = False
        elif line.startswith("  "):
            paragraphs.append(line)
            open_ = False
        elif open_:
            paragraphs[-1] += " " + line.strip()
        else:
            paragraphs.append(line.strip())
            open_ = True
    return "\n\n".join(paragraphs)
