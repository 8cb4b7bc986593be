"""Reading NumPy's archives, one at a time in a process.

NumPy reads the head of each array by Python's parser, and in CPython 3.11 two threads there at once may fail with
"SystemError: AST constructor recursion depth mismatch": workers that share a process load at the same time.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

__all__ = ["arrays_of"]

_reading = threading.Lock()


def arrays_of(file: Path | BinaryIO) -> dict[str, npt.NDArray[Any]]:
    """All arrays of an archive by name; nothing is unpickled. Raises whatever `numpy.load` does. Thread-safe."""
    with _reading, np.load(file, allow_pickle=False) as parts:
        return {name: parts[name] for name in parts.files}
