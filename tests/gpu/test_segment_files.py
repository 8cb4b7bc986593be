"""A sealed segment as a folder: it comes back as it was, or says that it cannot."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from headrace.gpu import archive, segment_files
from headrace.gpu.backend import Backend, resolve
from headrace.gpu.errors import BackendError, SnapshotDamaged, SnapshotError
from headrace.gpu.index_spec import KINDS, IndexSpec
from headrace.gpu.rows import DELETED
from headrace.gpu.segments import Sealed
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


def sealed_of(backend: Backend, kind: str = "graph", dtype: str = "float32", ids: str = "string") -> Sealed:
    names: list[Any] = [f"{ODD[n % 5]}-{n}" if ids == "string" else n - 7 for n in range(ROWS)]
    index = IndexSpec(kind, dtype, graph_degree=8, graph_effort=32)
    store = Store(backend, DIM, "cosine", StoreSettings(seal_rows=ROWS), index=index, ids=ids)
    rows = [{"id": name, "offset": n, "cell": n % 5, "attributes": attributes_of(n)} for n, name in enumerate(names)]
    store.apply(batch_of(rows))
    assert store.maintain()
    store.apply(batch_of([{"id": names[n], "offset": 100 + n, "cell": DELETED} for n in range(0, ROWS, 9)]))
    [sealed] = [part.segment for part in store.view.segments if isinstance(part.segment, Sealed)]
    return sealed


def loaded(backend: Backend, folder: Path) -> Sealed:
    manifest = segment_files.manifest_from((folder / "manifest.json").read_bytes(), f"{folder}/manifest.json")
    segment_files.verify(manifest, folder, str(folder))
    return segment_files.load(manifest, backend, folder, str(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("ids", ["string", "integer"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_as_it_was(backend: Backend, tmp_path: Path, kind: str, dtype: str, ids: str) -> None:
    before = sealed_of(backend, kind, dtype, ids)
    segment_files.save(before, "cosine", backend, tmp_path / "one")
    after = loaded(backend, tmp_path / "one")
    assert after.uid == before.uid
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


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_segment_gives_the_same_folder_whoever_writes_it(tmp_path: Path, kind: str, dtype: str) -> None:
    host = resolve("host")
    segment_files.save(sealed_of(host, kind, dtype), "cosine", host, tmp_path / "one")
    segment_files.save(loaded(host, tmp_path / "one"), "cosine", host, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_write_that_fails_says_where(tmp_path: Path) -> None:
    host = resolve("host")
    (tmp_path / "one").mkdir()
    with pytest.raises(OSError, match="one"):
        segment_files.save(sealed_of(host), "cosine", host, tmp_path / "one")

    def full(index: Any, path: Path) -> None:
        raise BackendError(f"cannot write the index to {path}: check its free space")

    broken = dataclasses.replace(host, kinds={"graph": SimpleNamespace(save=full)})  # type: ignore[dict-item]
    with pytest.raises(SnapshotError, match="check its free space"):
        segment_files.save(sealed_of(host), "cosine", broken, tmp_path / "two")


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
@pytest.mark.parametrize("file", ["index", "rows.npz"])
def test_damage_is_noticed(tmp_path: Path, file: str, damage: str) -> None:
    host = resolve("host")
    segment_files.save(sealed_of(host), "cosine", host, tmp_path / "one")
    path = tmp_path / "one" / file
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content[:-1] if damage == "cut" else content)
    with pytest.raises(SnapshotDamaged, match=f"one/{file} is (missing|damaged): take another"):
        loaded(host, tmp_path / "one")


def test_a_manifest_that_was_changed_is_none(tmp_path: Path) -> None:
    host = resolve("host")
    segment_files.save(sealed_of(host), "cosine", host, tmp_path / "one")
    path = tmp_path / "one" / "manifest.json"
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        changed = bytearray(content)
        changed[at] ^= 1
        if not changed[at : at + 1].isspace() or not content[at : at + 1].isspace():
            with pytest.raises(SnapshotDamaged, match="is not a segment's manifest"):
                segment_files.manifest_from(bytes(changed), str(path))
    for wrong in (b"", b"{", b"[]", b"{}", content[: len(content) // 2]):
        with pytest.raises(SnapshotDamaged, match="not a segment's manifest"):
            segment_files.manifest_from(wrong, str(path))


def test_another_format_is_refused_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = resolve("host")
    with monkeypatch.context() as patch:
        patch.setattr(segment_files, "_FORMAT", 7)
        segment_files.save(sealed_of(host), "cosine", host, tmp_path / "one")
    with pytest.raises(SnapshotError, match="format 7, this Headrace reads 1") as told:
        loaded(host, tmp_path / "one")
    assert not isinstance(told.value, SnapshotDamaged)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_a_device_wrote_is_searched_on_the_host(tmp_path: Path, dtype: str, few: bool) -> None:
    """`headrace.gpu.rapids.graph.save` writes an archive; the recall by effort of CAGRA says nothing about HNSW's."""
    host = resolve("host")
    before = sealed_of(host, "graph", dtype)
    kept = before.index.rows
    near = np.argsort(-(kept.astype(np.float32) @ kept.astype(np.float32).T), axis=1)[:, 1:17].astype(np.uint32)

    def save(index: Any, path: Path) -> None:
        archive.write(path, "graph", "cosine", index.rows, links=near[:0, :0] if few else near)

    device = dataclasses.replace(host, name="rapids", kinds={"graph": SimpleNamespace(save=save)})  # type: ignore[dict-item]
    told = dataclasses.replace(before.calibration, pairs=((512, 0.5),))
    before.calibration = told
    segment_files.save(before, "cosine", device, tmp_path / "one")
    after = loaded(host, tmp_path / "one")
    assert after.uid != before.uid
    assert after.calibration != told
    np.testing.assert_array_equal(after.vectors_of(np.arange(ROWS)), before.vectors_of(np.arange(ROWS)))
    queries = after.vectors_of(np.arange(0, ROWS, 9))
    _, rows = after.search(None, queries, 1, 0.95, ROWS)
    assert rows[:, 0].tolist() == list(range(0, ROWS, 9))
    segment_files.save(after, "cosine", host, tmp_path / "two")
    assert loaded(host, tmp_path / "two").uid == after.uid
