"""A sealed segment as a folder: it comes back as it was, or says that it cannot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.gpu import segment_files
from headrace.gpu.backend import Backend, resolve
from headrace.gpu.errors import BackendError
from headrace.gpu.index_spec import KINDS, IndexSpec
from headrace.gpu.rows import DELETED
from headrace.gpu.segments import Sealed, SegmentView
from headrace.gpu.store import Store, StoreSettings
from tests.gpu.batches import DIM, batch_of, vector_of

BACKENDS = [pytest.param("host"), pytest.param("rapids", marks=pytest.mark.gpu)]
ROWS = 80
ODD = ["", "é", "\ud800", "\0", "x" * 1000]


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request: pytest.FixtureRequest) -> Backend:
    return resolve(request.param)


def attributes_of(number: int) -> dict[str, Any]:
    every = {"n": number - 40, "f": number / 7, "b": number % 2 == 0, "s": ODD[number % len(ODD)], "big": -(2**63)}
    return {name: value for at, (name, value) in enumerate(every.items()) if (number + at) % 3}


def sealed_of(backend: Backend, kind: str = "graph", dtype: str = "float32", ids: str = "string") -> SegmentView:
    names: list[Any] = [f"{ODD[n % 5]}-{n}" if ids == "string" else n - 7 for n in range(ROWS)]
    index = IndexSpec(kind, dtype, graph_degree=8, graph_effort=32)
    store = Store(backend, DIM, "cosine", StoreSettings(seal_rows=ROWS), index=index, ids=ids)
    rows = [{"id": name, "offset": n, "cell": n % 5, "attributes": attributes_of(n)} for n, name in enumerate(names)]
    store.apply(batch_of(rows))
    assert store.maintain()
    store.apply(batch_of([{"id": names[n], "offset": 100 + n, "cell": DELETED} for n in range(0, ROWS, 9)]))
    [view] = [part for part in store.view.segments if isinstance(part.segment, Sealed)]
    return view


@pytest.mark.parametrize("ids", ["string", "integer"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_as_it_was(backend: Backend, tmp_path: Path, kind: str, dtype: str, ids: str) -> None:
    view = sealed_of(backend, kind, dtype, ids)
    before = view.segment
    assert isinstance(before, Sealed)
    segment_files.save(view, ids, backend, tmp_path / "one")
    assert os.listdir(tmp_path) == ["one"]
    after, marks = segment_files.load(backend, tmp_path / "one")
    np.testing.assert_array_equal(marks.alive, view.alive)
    np.testing.assert_array_equal(marks.cells, view.cells)
    assert marks.live == view.live
    assert after.ids.to_list() == before.ids.to_list()
    np.testing.assert_array_equal(after.ids.hashes(), before.ids.hashes())
    assert after.versions.to_tuples() == before.versions.to_tuples()
    every = np.arange(ROWS)
    assert after.columns.rows(every) == before.columns.rows(every)
    assert [attributes_of(n) for n in range(ROWS)] == after.columns.rows(every)
    assert dict(after.columns.schema) == dict(before.columns.schema)
    np.testing.assert_array_equal(after.vectors_of(every), before.vectors_of(every))
    assert (after.params, after.calibration) == (before.params, before.calibration)
    queries = backend.xp.asarray(np.array([vector_of("query", n) for n in range(5)]))
    for one, other in zip(
        after.search(None, queries, 5, 0.9, ROWS), before.search(None, queries, 5, 0.9, ROWS), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_growing_segment_is_not_saved(tmp_path: Path) -> None:
    host = resolve("host")
    store = Store(host, DIM, "cosine")
    store.apply(batch_of([{"id": "a", "offset": 1}]))
    with pytest.raises(BackendError, match="a growing segment still changes"):
        segment_files.save(store.view.segments[0], "string", host, tmp_path / "one")
    assert os.listdir(tmp_path) == []


def test_what_is_there_already_stays(tmp_path: Path) -> None:
    host = resolve("host")
    view = sealed_of(host)
    segment_files.save(view, "string", host, tmp_path / "one")
    before = (tmp_path / "one" / "manifest.json").read_bytes()
    with pytest.raises(BackendError, match="cannot write a segment"):
        segment_files.save(view, "string", host, tmp_path / "one")
    assert (tmp_path / "one" / "manifest.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["one"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = resolve("host")
    view = sealed_of(host)

    def full(*args: Any, **arrays: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(BackendError, match="No space left"):
        segment_files.save(view, "string", host, tmp_path / "one")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
@pytest.mark.parametrize("file", ["index", "rows.npz"])
def test_damage_is_noticed(tmp_path: Path, file: str, damage: str) -> None:
    host = resolve("host")
    segment_files.save(sealed_of(host), "string", host, tmp_path / "one")
    path = tmp_path / "one" / file
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content[:-1] if damage == "cut" else content)
    with pytest.raises(BackendError, match=f"{file} is missing or damaged: restore"):
        segment_files.load(host, tmp_path / "one")


def test_half_a_folder_and_a_newer_format_are_no_segments(tmp_path: Path) -> None:
    host = resolve("host")
    with pytest.raises(BackendError, match="holds no complete segment"):
        segment_files.load(host, tmp_path / "nothing")
    segment_files.save(sealed_of(host), "string", host, tmp_path / "one")
    manifest = tmp_path / "one" / "manifest.json"
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**told, "format": 2}))
    with pytest.raises(BackendError, match="format 2, this Headrace reads 1"):
        segment_files.load(host, tmp_path / "one")
    manifest.write_text("{")
    with pytest.raises(BackendError, match="holds no complete segment"):
        segment_files.load(host, tmp_path / "one")
