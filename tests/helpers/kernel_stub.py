"""A library with the names of the kernels and nothing in them: for tests of what is done with a library."""

from __future__ import annotations

import re
from pathlib import Path

from lamina.codec import native


def stub_source() -> str:
    """Text in C."""
    folder = Path(native.__file__).parent
    text = "".join(path.read_text() for path in sorted(folder.glob("*.c")))
    names = sorted({name for name in re.findall(r"\b(lamina_\w+)\(", text) if name != "lamina_kernels_version"})
    assert names
    functions = [f"int {name}(void) {{ return 1; }}" for name in names]
    return "\n".join([*functions, f"int lamina_kernels_version(void) {{ return {native.VERSION}; }}", ""])
