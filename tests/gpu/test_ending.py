"""A program that ends while an index is being built ends in order."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import threading
import numpy as np
from headrace.gpu.backend import resolve
from headrace.gpu.ending import at_work
from headrace.gpu.index_spec import IndexSpec, build_params

kind, began = resolve("host").kinds["graph"], threading.Event()

def build():
    vectors = np.random.default_rng(0).normal(size=(200_000, 64)).astype(np.float32)
    with at_work():
        began.set()
        kind.build(vectors, "l2", build_params(IndexSpec("graph"), *vectors.shape))
        print("built")

threading.excepthook = lambda what: print(what.exc_type.__name__)
threading.Thread(target=build, daemon=True).start()
began.wait()
threading.Event().wait(0.3)
"""


def test_a_build_is_given_up_at_the_end_of_the_program() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["Ending"]), done.stderr
