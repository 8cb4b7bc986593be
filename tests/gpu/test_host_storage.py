"""What the host's index kinds have in common."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from headrace.gpu.errors import BackendError
from headrace.gpu.host import storage
from headrace.gpu.host.storage import faiss
from headrace.gpu.index_spec import DTYPES
from tests.gpu.searches import random_rows

# In a process of its own: once a team of threads has been woken, it stays.
ONE_QUERY = """
import os
import numpy as np
from headrace.gpu.backend import resolve
from headrace.gpu.index_spec import DTYPES, KINDS, IndexSpec, build_params

vectors = np.random.default_rng(0).normal(size=(2500, 8)).astype(np.float32)
for kind in KINDS:
    for dtype in DTYPES:
        module = resolve("host").kinds[kind]
        index = module.build(vectors, "ip", build_params(IndexSpec(kind=kind, dtype=dtype), *vectors.shape))
        before = len(os.listdir("/proc/self/task"))
        for allowed in (None, np.arange(2500) % 2 == 0, np.arange(2500) < 5):
            module.search(index, allowed, vectors[:1], 5, effort=16)
        assert len(os.listdir("/proc/self/task")) == before, (kind, dtype)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_one_query_and_a_build_with_one_thread_stay_on_their_thread() -> None:
    environment = {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", ONE_QUERY], check=True, env=environment, timeout=60)


def test_threads_are_set_for_a_block_and_for_the_calling_thread_only() -> None:
    before = faiss.omp_get_max_threads()
    seen = []
    with storage.openmp(before + 3):
        assert faiss.omp_get_max_threads() == before + 3
        other = threading.Thread(target=lambda: seen.append(faiss.omp_get_max_threads()))
        other.start()
        other.join()
    assert faiss.omp_get_max_threads() == before
    assert before + 3 not in seen


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_index_over_an_array_sees_what_the_array_holds_and_keeps_it_alive(dtype: str) -> None:
    vectors = random_rows(300, 8, "cosine").astype(dtype)
    index = storage.over(vectors, "ip")
    vectors[7] = 3
    assert storage.search(index, np.ones((1, 8), dtype=np.float32), 1, None)[1].tolist() == [[7]]
    np.testing.assert_array_equal(storage.array(index), vectors)
    kept = vectors.copy()
    del vectors
    gc.collect()
    np.testing.assert_array_equal(storage.array(index), kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_kept_is_a_copy(dtype: str) -> None:
    vectors = random_rows(30, 8).astype(dtype)
    index = storage.keep(vectors, "l2")
    before = vectors.copy()
    vectors[:] = 0
    np.testing.assert_array_equal(storage.array(index), before)


@pytest.mark.parametrize("n", [1, 4096, 4097, 10_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_pieces_are_all_rows_in_order(n: int, dtype: type) -> None:
    vectors = np.arange(n, dtype=np.float32).reshape(n, 1) % 2048
    pieces = list(storage.pieces(vectors.astype(dtype)))
    assert max(map(len, pieces)) <= 4096
    assert {piece.dtype for piece in pieces} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(np.concatenate(pieces), vectors)


def test_a_write_that_fails_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.index"
    storage.write(storage.keep(random_rows(30, 8), "l2"), "flat", path)
    before = path.read_bytes()

    def breaks(index: object, name: str) -> None:
        Path(name).write_bytes(b"half")
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(faiss, "write_index", breaks)
    with pytest.raises(BackendError, match=r"some\.index.*free space.*no space left"):
        storage.write(storage.keep(random_rows(40, 8), "l2"), "flat", path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before
