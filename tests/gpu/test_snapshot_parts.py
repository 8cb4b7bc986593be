"""A store as files and back: the same rows whoever reads them, or a refusal that names the file."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
import threading
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.gpu import maintenance, snapshot_parts
from headrace.gpu import store as store_module
from headrace.gpu.backend import Backend, resolve
from headrace.gpu.errors import BackendError, ConfigError, RecordError, SnapshotDamaged, SnapshotError, StoreFull
from headrace.gpu.index_spec import IndexSpec
from headrace.gpu.marks import Marks
from headrace.gpu.merge import MergePolicy
from headrace.gpu.rows import DELETED, Action
from headrace.gpu.segments import Sealed
from headrace.gpu.snapshot_checks import check
from headrace.gpu.snapshot_parts import Part, read_into, write
from headrace.gpu.snapshot_place import Place
from headrace.gpu.snapshot_sweep import sweep
from headrace.gpu.store import Store, StoreSettings
from headrace.pipeline.cuts import left_behind
from tests.gpu.batches import DIM, batch_of, vector_of
from tests.gpu.test_segment_files import attributes_of

HOST = resolve("host")
NEVER_MERGED = MergePolicy(fan_in=100, dead_share=1.0, floor_rows=1, absorb=0)
EVERY = frozenset(range(10))


def store_of(
    backend: Backend = HOST,
    *,
    kind: str = "graph",
    dtype: str = "float32",
    ids: str = "string",
    seal_rows: int = 8,
    metric: str = "cosine",
    **options: Any,
) -> Store:
    index = IndexSpec(kind, dtype, graph_degree=8, graph_effort=32)
    return Store(backend, DIM, metric, StoreSettings(seal_rows=seal_rows, **options), index=index, ids=ids)


def put(store: Store, numbers: Any, *, offset: int = 0, **fields: Any) -> None:
    """Rows ``id-<n>`` at offset + n in cell n % 4, with attributes of every kind."""
    rows = [
        {"id": n if store.ids == "integer" else f"id-{n}", "offset": offset + n, "cell": n % 4, **fields}
        for n in numbers
    ]
    rows = [{"attributes": attributes_of(row["offset"]), **row} for row in rows]
    store.apply(batch_of(rows), {0: max(row["offset"] for row in rows) + 1})


def filled(**options: Any) -> Store:
    """Three sealed segments and some growing rows; in each some that are dead, relabelled or in another cell."""
    store = store_of(merge=NEVER_MERGED, **options)
    for first in (0, 8, 16):
        put(store, range(first, first + 8))
        assert store.maintain()
    put(store, range(24, 29))
    put(store, range(0, 29, 7), offset=100)
    put(store, [3, 11, 25], cell=DELETED, offset=200)
    put(store, [9, 17], cell=7, action=Action.KEEP)
    return store


def state(*stores: Store) -> dict[Any, Any]:
    """All rows by id, in every detail; no id may be in two stores."""
    found: dict[Any, Any] = {}
    for store in stores:
        for row in (row for chunk in store.scan(vectors=True) for row in chunk):
            assert row.id not in found
            found[row.id] = (*row[1:6], row.vector.tobytes())
    return found


def sealed_in(store: Store) -> dict[str, Sealed]:
    return {part.segment.uid: part.segment for part in store.view.segments if isinstance(part.segment, Sealed)}


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def restored(place: Place, part: Part, cells: frozenset[int] = EVERY, **options: Any) -> Store:
    store = store_of(merge=NEVER_MERGED, **options)
    read_into(store, place, part, cells)
    return store


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", ["string", "integer"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["flat", "graph", "ivf_pq"])
def test_a_store_comes_back_as_it_was(backend: Backend, tmp_path: Path, kind: str, dtype: str, ids: str) -> None:
    before = filled(backend=backend, kind=kind, dtype=dtype, ids=ids)
    place = Place(str(tmp_path / "docs"))
    part = write(before, place, "s1", "p0")
    assert check(place, part) == part.size == part.written_bytes == sum(map(len, files_of(tmp_path).values()))
    after = store_of(backend, kind=kind, dtype=dtype, ids=ids)
    loaded = read_into(after, place, part, EVERY)
    assert (loaded.rows, loaded.bytes) == (before.view.rows, part.size)
    assert (loaded.adopted, loaded.rebuilt) == (3, 0)
    assert state(after) == state(before)
    assert after.digests()[0] == before.digests()[0]
    assert {cell: count for cell, (count, _) in before.digests()[0].items()} == dict(part.rows)
    assert (dict(part.stamp), dict(after.view.stamp)) == (dict(before.view.stamp), {})
    assert sealed_in(after).keys() == sealed_in(before).keys() == {file.uid for file in part.segments}
    query = vector_of("query")[None]
    assert [row.id for row in after.search(query, 5).rows[0]] == [row.id for row in before.search(query, 5).rows[0]]
    assert after.statistics()["remembered"] == 0


def test_an_empty_store_comes_back_empty(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    part = write(store_of(), place, "s1", "p0")
    assert (part.segments, dict(part.rows), dict(part.stamp)) == ((), {}, {})
    assert restored(place, part).view.rows == 0


@st.composite
def histories(draw: st.DrawFn) -> list[Any]:
    row = st.tuples(st.integers(0, 24), st.sampled_from([DELETED, 0, 1, 2, 3, 4, 5]), st.booleans())
    return draw(st.lists(st.one_of(st.lists(row, min_size=1, max_size=10), st.just("maintain")), max_size=12))


def test_a_row_that_is_between_two_parts_is_known_to_be_missing(tmp_path: Path) -> None:
    """Found by reading a history: one part was written after a row had left, the other before it had come."""
    place, old, new, both = Place(str(tmp_path)), store_of(), store_of(), store_of()
    put(old, [0, 4])  # of cell 0
    old.apply(batch_of([{"id": "id-0", "offset": 15, "cell": 1, "action": Action.DROP}]), {0: 16})
    put(new, [1, 5])  # of cell 1, where id-0 will be
    parts = [write(store, place, "000001-x", f"part-{n}") for n, store in enumerate((old, new))]
    for part in parts:
        read_into(both, place, part, EVERY)
    both.stamp({0: 6})  # the lowest of both
    assert "id-0" not in state(both)
    assert left_behind([(both.view.stamp, both.view.moved)]) == {0: 16}
    both.stamp({0: 16})
    assert left_behind([(both.view.stamp, both.view.moved)]) == {}


@settings(max_examples=40, deadline=None)
@given(
    histories(),
    st.lists(st.integers(0, 2), min_size=6, max_size=6),
    st.sampled_from([("graph", "float32", "string"), ("flat", "float16", "integer"), ("ivf_pq", "float32", "string")]),
)
def test_split_over_other_workers_it_is_the_same(
    history: list[Any], owners: list[int], of: tuple[str, str, str]
) -> None:
    options = dict(zip(("kind", "dtype", "ids"), of, strict=True))
    before, offset = store_of(**options, merge=MergePolicy(fan_in=2, floor_rows=1)), 0
    for step in history:
        if step == "maintain":
            before.maintain()
            continue
        rows = list({number: (number, cell, kept) for number, cell, kept in step}.values())
        for number, cell, kept in rows:  # kept: told to take over a cell's number only, where it is here
            fields = {"action": Action.KEEP} if kept and cell != DELETED else {}
            offset += not fields
            put(before, [number], offset=offset - number, cell=cell, **fields)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(folder)
        part = Part.from_wire(json.loads(json.dumps(write(before, place, "s1", "p0").to_wire())))
        stores = [store_of(**options) for _ in range(3)]
        loaded = []
        for number, store in enumerate(stores):
            cells = frozenset(cell for cell, owner in enumerate(owners) if owner == number)
            loaded.append(read_into(store, place, part, cells))
            assert {row.cell for chunk in store.scan() for row in chunk} <= cells
        assert state(*stores) == state(before)
        assert sum(some.rows for some in loaded) == before.view.rows
        digests: dict[int, Any] = {}
        for store in stores:
            digests |= store.digests()[0]
        assert digests == before.digests()[0]
        again = write(before, place, "s2", "p0")
        assert again.written_bytes == again.moment.bytes
        assert again.segments == part.segments


def test_most_of_a_segment_is_adopted_and_little_of_it_is_rebuilt(tmp_path: Path) -> None:
    before = store_of(seal_rows=40)
    put(before, range(40))
    assert before.maintain()
    place = Place(str(tmp_path))
    part = write(before, place, "s1", "p0")
    most, least = store_of(), store_of()
    loaded = read_into(most, place, part, frozenset({0, 1}))
    assert (loaded.rows, loaded.adopted, loaded.rebuilt) == (20, 1, 0)
    assert sealed_in(most).keys() == sealed_in(before).keys()
    loaded = read_into(least, place, part, frozenset({3}))
    assert (loaded.rows, loaded.adopted, loaded.rebuilt) == (10, 0, 1)
    assert sealed_in(least) == {}
    assert state(most, least) == {key: row for key, row in state(before).items() if row[3] in (0, 1, 3)}
    loaded = read_into(most, place, part, frozenset({9}))
    assert (loaded.rows, loaded.adopted, loaded.rebuilt, loaded.bytes) == (0, 0, 0, part.moment.bytes)


def test_it_can_be_read_again(tmp_path: Path) -> None:
    place, before = Place(str(tmp_path)), filled()
    part = write(before, place, "s1", "p0")
    after = restored(place, part)
    segments = len(after.view.segments)
    assert read_into(after, place, part, EVERY).rows == 0
    assert len(after.view.segments) == segments
    assert state(after) == state(before)


# -- what is written, and what is not ----------------------------------------------------------------------------------


def test_sealed_segments_are_written_once(tmp_path: Path) -> None:
    place, store = Place(str(tmp_path)), filled()
    first = write(store, place, "s1", "p0")
    written = files_of(tmp_path / "segments")
    put(store, [4, 12], cell=DELETED, offset=300)
    put(store, [5], cell=6, action=Action.KEEP)
    put(store, range(29, 31))
    second = write(store, place, "s2", "p0")
    assert second.written_bytes == second.moment.bytes
    assert files_of(tmp_path / "segments") == written
    assert state(restored(place, second)) == state(store)
    assert restored(place, first).view.rows == sum(first.rows.values())
    put(store, range(40, 48))
    assert store.maintain()
    third = write(store, place, "s3", "p0")
    [new] = {file.uid for file in third.segments} - {file.uid for file in first.segments}
    assert third.written_bytes == third.moment.bytes + next(file.bytes for file in third.segments if file.uid == new)


def test_a_restored_worker_neither_writes_nor_reads_its_segments_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(str(tmp_path))
    part = write(filled(), place, "s1", "p0")
    after = restored(place, part)

    def verify(*args: Any) -> None:
        raise AssertionError(f"read through: {args}")

    monkeypatch.setattr(snapshot_parts.segment_files, "verify", verify)
    again = write(after, place, "s2", "p1")
    assert set(again.segments) == set(part.segments)
    assert again.written_bytes == again.moment.bytes


def test_a_segment_that_two_workers_shared_is_written_as_one(tmp_path: Path) -> None:
    place, before = Place(str(tmp_path / "one")), filled()
    part = write(before, place, "s1", "p0")
    halves = [restored(place, part, cells) for cells in (frozenset({0, 1}), frozenset({2, 3, 7}))]
    for number, half in zip((8, 10), halves, strict=True):
        for store in (half, before):
            put(store, [number], cell=8, action=Action.KEEP)
    parts = [write(half, place, "s2", f"p{number}") for number, half in enumerate(halves)]
    shared = {file.uid for file in parts[0].segments} & {file.uid for file in parts[1].segments}
    assert shared
    after = restored(place, parts[0])
    assert read_into(after, place, parts[1], EVERY).rows
    assert state(after) == state(before)
    for where in (place, Place(str(tmp_path / "two"))):
        whole = write(after, where, "s3", "p0")
        uids = [file.uid for file in whole.segments]
        assert len(set(uids)) == len(uids)
        assert shared <= set(uids)
        assert state(restored(where, whole)) == state(before)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "empty", "manifest"])
def test_what_lies_there_is_not_taken_for_good(tmp_path: Path, damage: str) -> None:
    """A place that was copied: this process has neither written nor read these files."""
    store = filled()
    write(store, Place(str(tmp_path / "one")), "s1", "p0")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    good = files_of(tmp_path / "two" / "segments")
    [*_, uid] = sealed_in(store)
    index, manifest = (tmp_path / "two" / "segments" / uid / name for name in ("index", "manifest.json"))
    content = bytearray(index.read_bytes())
    if damage == "gone":
        index.unlink()
    elif damage == "empty":
        manifest.write_bytes(b"")
    elif damage == "manifest":
        manifest.write_bytes(manifest.read_bytes().replace(b'"n": "int"', b'"m": "int"'))
    else:
        content[len(content) // 2] ^= 4
        index.write_bytes(content[:-1] if damage == "cut" else content)
    assert files_of(tmp_path / "two" / "segments") != good
    place = Place(str(tmp_path / "two"))
    part = write(store, place, "s2", "p0")
    [mended] = [file.bytes for file in part.segments if file.uid == uid]
    assert part.written_bytes == part.moment.bytes + mended
    assert files_of(tmp_path / "two" / "segments") == good
    assert state(restored(place, part)) == state(store)


def test_what_this_process_wrote_is_written_again_where_it_is_gone_or_short(tmp_path: Path) -> None:
    place, store = Place(str(tmp_path)), filled()
    part = write(store, place, "s1", "p0")
    shutil.rmtree(tmp_path / "segments" / part.segments[0].uid)
    (tmp_path / "segments" / part.segments[1].uid / "rows.npz").write_bytes(b"PK")
    again = write(store, place, "s2", "p0")
    assert again.written_bytes == again.moment.bytes + part.segments[0].bytes + part.segments[1].bytes
    assert state(restored(place, again)) == state(store)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_what_this_process_wrote_is_read_before_a_snapshot_relies_on_it(tmp_path: Path) -> None:
    place, store = Place(str(tmp_path)), filled()
    first = write(store, place, "s1", "p0")
    good = files_of(tmp_path / "segments")
    flip(tmp_path / "segments" / first.segments[0].uid / "index")
    second = write(store, place, "s2", "p0")
    assert second.written_bytes == second.moment.bytes + first.segments[0].bytes
    assert files_of(tmp_path / "segments") == good, "the snapshot before is not whole again"
    assert check(place, second) == second.size
    assert check(place, first) == first.size


def test_it_is_read_again_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, store = Place(str(tmp_path)), filled()
    clock = [1000.0]
    monkeypatch.setattr(snapshot_parts.time, "monotonic", lambda: clock[0])
    read, verify = [], snapshot_parts.segment_files.verify
    monkeypatch.setattr(snapshot_parts.segment_files, "verify", lambda *args: (read.append(args), verify(*args)))
    for passed, times in ((0.0, 0), (60.0, 3), (3600.0, 3), (24 * 3600.0, 6), (3600.0, 6)):
        clock[0] += passed
        part = write(store, place, f"s{clock[0]:g}", "p0")
        assert len(read) == times, f"after {clock[0]:g} s"
    flip(tmp_path / "segments" / part.segments[1].uid / "rows.npz")
    clock[0] += 25 * 3600.0
    assert write(store, place, "last", "p0").written_bytes > part.written_bytes
    assert check(place, part) == part.size


# -- writes that fail --------------------------------------------------------------------------------------------------


def full(*args: Any, **arrays: Any) -> None:
    file = args[-1] if arrays == {} else args[0]
    file.write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, "No space left on device")


def full_index(index: Any, path: Path) -> None:
    path.write_bytes(b"half of it")
    raise BackendError(f"cannot write the index to {path}: check the folder and its free space")


@pytest.mark.parametrize("url", ["folder", "memory"])
@pytest.mark.parametrize("what", ["rows", "index", "moment"])
def test_a_full_disk_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, url: str
) -> None:
    place = Place(str(tmp_path) if url == "folder" else f"memory://{uuid.uuid4().hex}")
    store = filled()
    before = write(store, place, "s1", "p0")
    put(store, range(40, 48))
    assert store.maintain()
    there = place.names("segments")
    with monkeypatch.context() as patch:
        if what == "index":
            patch.setattr(store.backend.kinds["graph"], "save", full_index)
        else:
            patch.setattr(*((np, "savez") if what == "rows" else (snapshot_parts.moment_files, "save")), full)
        with pytest.raises(SnapshotError, match=r"free space|make room there"):
            write(store, place, "s2", "p0")
    assert (place.names("segments") == there) == (what != "moment")
    assert all("manifest.json" in place.sizes(f"segments/{uid}") for uid in place.names("segments"))
    assert place.names("moments/s2") == []
    assert check(place, before)
    after = write(store, place, "s2", "p0")
    assert state(restored(place, after)) == state(store)
    assert not [name for name in place.sizes("") if name.endswith(".part")]


def test_an_upload_that_breaks_off_is_not_complete_and_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    place, store = Place(f"memory://{uuid.uuid4().hex}"), filled()
    real, left = MemoryFileSystem.put_file, [0]

    def put_file(self: Any, local: str, remote: str, **options: Any) -> None:
        real(self, local, remote, **options)
        left[0] -= 1
        if not left[0]:
            self.store[remote].truncate(self.store[remote].size // 2)
            raise ConnectionResetError("connection reset")

    for number in range(1, 11):
        left[0] = number
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, "put_file", put_file)
            for uid in place.names("segments"):
                place.remove(f"segments/{uid}")
            with pytest.raises(SnapshotError, match=r"memory://.*check that it can be reached"):
                write(store, place, "s1", "p0")
        for uid in place.names("segments"):
            assert "manifest.json" in place.sizes(f"segments/{uid}")
        assert place.names("moments/s1") == []
    part = write(store, place, "s1", "p0")
    assert check(place, part) == part.size
    assert state(restored(place, part)) == state(store)


def test_a_writer_that_was_killed_leaves_what_nobody_counts(tmp_path: Path) -> None:
    place, store = Place(str(tmp_path)), filled()
    part = write(store, place, "s1", "p0")
    for folder in ("segments", "moments/s1", "snapshots"):
        (tmp_path / folder / "left.0123.part").mkdir(parents=True)
        (tmp_path / folder / "left.0123.part" / "index").write_bytes(b"half")
    (tmp_path / "moments" / "s0").mkdir()
    (tmp_path / "moments" / "s0" / "p0.npz.9.part").write_bytes(b"half of it")
    [gone, *rest] = part.segments
    kept = Part(part.name, part.stamp, part.rows, tuple(rest), part.moment, 0)
    assert len(place.names("segments")) == 3
    assert sweep(place, [part]) == 4 + 4 + 10
    assert check(place, part) == part.size
    assert sweep(place, [kept]) == gone.bytes
    assert sorted(place.names("segments")) == sorted(file.uid for file in rest)
    assert (place.names("moments"), place.names("moments/s1"), place.unfinished("snapshots")) == (
        ["s1"],
        ["p0.npz"],
        [],
    )
    sweep(place, [])
    assert files_of(tmp_path) == {}


def test_sweeping_ends_where_another_begins_to_write(tmp_path: Path) -> None:
    place, store = Place(str(tmp_path)), filled()
    part = write(store, place, "s1", "p0")
    asked: list[int] = []

    def still() -> None:
        asked.append(len(files_of(tmp_path)))
        if len(asked) == 2:
            raise SnapshotError("it is another's now")

    with pytest.raises(SnapshotError, match="another's now"):
        sweep(place, [], still)
    assert len(place.names("segments")) == len(part.segments) - 1


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "tcp://127.0.0.1:1", ".hidden", "é"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    for names in ((name, "p0"), ("s1", name)):
        with pytest.raises(ConfigError, match="use letters, digits"):
            write(store_of(), Place(str(tmp_path)), *names)
    assert files_of(tmp_path) == {}


# -- reads that are refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "gone", "swap"])
def test_damage_to_any_file_is_refused_by_its_name(tmp_path: Path, damage: str) -> None:
    place = Place(str(tmp_path / "docs"))
    part = write(filled(), place, "s1", "p0")
    other = write(filled(ids="string"), Place(str(tmp_path / "other")), "s1", "p0")
    names = files_of(tmp_path / "docs")
    assert len(names) == 3 * 3 + 1
    for number, (name, content) in enumerate(names.items()):
        path, changed = tmp_path / "docs" / name, bytearray(content)
        if damage == "gone":
            path.unlink()
        elif damage == "swap":
            twin = next(file for file in (tmp_path / "other").rglob(Path(name).name) if file.is_file())
            path.write_bytes(twin.read_bytes())
            if twin.read_bytes() == content:
                continue
        elif damage == "flip":
            changed[number * 7919 % len(changed)] ^= 1 << number % 8
            path.write_bytes(changed)
        else:
            path.write_bytes(content[:-1] if damage == "cut" else content + b"\0")
        for attempt in (lambda: check(place, part), lambda: restored(place, part)):
            with pytest.raises(SnapshotDamaged, match=f"{name} is (missing|damaged).*take another snapshot"):
                attempt()
        path.write_bytes(content)
    assert check(place, part) == part.size
    assert other.moment.checksum != part.moment.checksum or damage


def test_a_part_of_another_collection_is_refused(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    part = write(filled(), place, "s1", "p0")
    for store in (
        Store(HOST, DIM + 1, "cosine"),
        store_of(metric="l2"),
        store_of(ids="integer"),
    ):
        with pytest.raises(SnapshotDamaged, match=r"moments/s1/p0.npz is of another collection \(8 numbers"):
            read_into(store, place, part, EVERY)
        assert store.view.rows == 0


def test_a_moment_of_other_segments_is_refused(tmp_path: Path) -> None:
    place, store = Place(str(tmp_path)), filled()
    part = write(store, place, "s1", "p0")
    fewer = Part(part.name, part.stamp, part.rows, part.segments[1:], part.moment, 0)
    with pytest.raises(SnapshotDamaged, match="not of the segments that the snapshot names"):
        restored(place, fewer)


def test_wire() -> None:
    part = write(filled(), Place(f"memory://{uuid.uuid4().hex}"), "s1", "p0")
    wire = part.to_wire()
    assert Part.from_wire(json.loads(json.dumps(wire))) == part
    [segment, *_] = wire["segments"]
    for wrong in (
        {},
        {**wire, "stamp": 3},
        {**wire, "more": 1},
        {**wire, "name": "../p0"},
        {**wire, "segments": [{**segment, "uid": "../../etc"}]},
        {**wire, "segments": [{**segment, "bits": 1}]},
        {**wire, "moment": {**wire["moment"], "path": "moments/../p0.npz"}},
        {**wire, "moment": {**wire["moment"], "path": "/etc/passwd"}},
        {**wire, "moment": {**wire["moment"], "path": "elsewhere/s1/p0.npz"}},
    ):
        with pytest.raises(SnapshotDamaged, match="cannot be read"):
            Part.from_wire(wrong)


# -- adopting ----------------------------------------------------------------------------------------------------------


def test_the_highest_version_wins_when_a_segment_is_adopted(tmp_path: Path) -> None:
    place, before = Place(str(tmp_path)), store_of()
    put(before, range(8), offset=50)
    assert before.maintain()
    part = write(before, place, "s1", "p0")
    store = store_of()
    put(store, [0], offset=40)  # older: goes
    put(store, [1], offset=60, cell=5)  # newer: stays
    put(store, [2], offset=50, cell=6)  # the same, and its cell is as new as the log: stays
    put(store, [3], offset=60, cell=DELETED)  # deleted since: stays deleted
    put(store, [4], offset=40, cell=DELETED)  # deleted before: comes back
    put(store, [5], offset=50, action=Action.DROP)  # was somebody else's: comes
    loaded = read_into(store, place, part, EVERY)
    assert (loaded.rows, loaded.adopted) == (5, 1)
    found = {row.id: (row.offset, row.cell) for chunk in store.scan() for row in chunk}
    assert found == {
        "id-0": (50, 0),
        "id-1": (61, 5),
        "id-2": (52, 6),
        "id-4": (54, 0),
        "id-5": (55, 1),
        "id-6": (56, 2),
        "id-7": (57, 3),
    }
    assert store.statistics()["remembered"] == 1
    rows, _ = store.get([f"id-{n}" for n in range(8)])
    assert {row.id: (row.offset, row.cell) for row in rows if row} == found
    put(store, range(8), offset=70)
    assert {row.offset for chunk in store.scan() for row in chunk} == set(range(70, 78))


def test_rows_that_are_rebuilt_follow_the_same_rules(tmp_path: Path) -> None:
    place, before = Place(str(tmp_path)), store_of()
    put(before, range(6), offset=50)  # growing rows
    part = write(before, place, "s1", "p0")
    store = store_of()
    put(store, [1], offset=60, cell=5)
    put(store, [2], offset=50, cell=6)
    put(store, [3], offset=60, cell=DELETED)
    assert read_into(store, place, part, EVERY).rows == 3
    found = {row.id: (row.offset, row.cell) for chunk in store.scan() for row in chunk}
    assert found == {"id-0": (50, 0), "id-1": (61, 5), "id-2": (52, 6), "id-4": (54, 0), "id-5": (55, 1)}


def test_ids_that_are_in_two_parts_are_there_once(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    old, new = store_of(), store_of()
    put(old, range(16))
    put(new, range(8, 24), offset=100, cell=5)
    for store in (old, new):
        while store.maintain():
            pass
    parts = [write(store, place, "s1", f"p{number}") for number, store in enumerate((old, new))]
    for order in (parts, parts[::-1]):
        after = store_of()
        for part in order:
            read_into(after, place, part, EVERY)
        assert {key: row[1] for key, row in state(after).items()} == {
            f"id-{n}": n if n < 8 else 100 + n for n in range(24)
        }


def test_a_column_of_another_kind_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    place, before = Place(str(tmp_path)), store_of()
    put(before, range(8), attributes={"n": 1})
    assert before.maintain()
    part = write(before, place, "s1", "p0")
    store = store_of()
    put(store, [100], attributes={"n": "text"})
    with pytest.raises(RecordError, match=r"attribute 'n' is int in segment .* here it is str"):
        read_into(store, place, part, EVERY)
    assert store.view.rows == 1
    assert store.get(["id-1"])[0] == [None]


def test_the_memory_limit_holds_when_a_snapshot_is_read(tmp_path: Path) -> None:
    place, before = Place(str(tmp_path)), store_of(seal_rows=512)
    put(before, range(512))
    assert before.maintain()
    part = write(before, place, "s1", "p0")
    empty = store_of().statistics()["memory"]["held"]
    tight = empty + part.size // 2
    # In the second case a quarter stays, but all of it must be read.
    for cells, told in ((EVERY, "kept for merging"), (frozenset({1}), "no room to read")):
        store = store_of(memory_limit=tight)
        with pytest.raises(StoreFull, match=told):
            read_into(store, place, part, cells)
        assert (store.view.rows, store.get(["id-1"])[0]) == (0, [None])
        assert store.statistics()["memory"]["working"] == 0
        with pytest.raises(StoreFull, match="kept for merging"):
            store.adopt(*adoptable(place, part))
        assert (store.view.rows, store.statistics()["memory"]["full"]) == (0, True)
    for cells, rows in ((EVERY, 512), (frozenset({1}), 128)):
        store = store_of(memory_limit=2 * empty + 2 * part.size)
        assert read_into(store, place, part, cells).rows == rows
        memory = store.statistics()["memory"]
        assert memory["held"] <= memory["limit"]
        assert (memory["working"], memory["full"]) == (0, False)


def adoptable(place: Place, part: Part) -> tuple[Sealed, Marks]:
    store = restored(place, part)
    [found] = [(some.segment, Marks(some.alive, some.cells)) for some in store.view.segments if some.live]
    return found  # type: ignore[return-value]


# -- meanwhile ---------------------------------------------------------------------------------------------------------


def test_a_view_is_written_as_it_was_whatever_happens_to_the_store(tmp_path: Path) -> None:
    store = filled()
    view, rows = store.view, state(store)
    put(store, range(0, 20), offset=500)
    put(store, range(20, 29), offset=500, cell=DELETED)
    assert store.maintain(settle=True) or store.maintain()
    place = Place(str(tmp_path))
    part = write(store, place, "s1", "p0", view=view)
    assert state(restored(place, part)) == rows
    assert part.stamp == view.stamp


def test_writing_while_others_write_seal_and_merge(tmp_path: Path) -> None:
    """Each part must be some moment: version v of all ids, or v of the first ones and v - 1 of the others."""
    store = store_of(seal_rows=16, kind="flat", merge=MergePolicy(fan_in=2, floor_rows=1))
    rounds, done = 12, threading.Event()
    put(store, range(40))

    def apply() -> None:
        for number in range(1, rounds):
            for first in range(0, 40, 8):
                put(store, range(first, first + 8), offset=1000 * number)
        done.set()

    def maintain() -> None:
        while not done.is_set():
            store.maintain()

    threads = [threading.Thread(target=target) for target in (apply, maintain)]
    place = Place(str(tmp_path))
    for thread in threads:
        thread.start()
    parts = []
    while not done.is_set() or not parts:
        parts.append(write(store, place, f"s{len(parts)}", "p0"))
    for thread in threads:
        thread.join()
    for part in parts[-6:]:
        found = state(restored(place, part, kind="flat"))
        assert len(found) == 40
        versions = [found[f"id-{n}"][1] // 1000 for n in range(40)]
        assert versions == sorted(versions, reverse=True)
        assert versions[0] - versions[-1] <= 1


@pytest.mark.parametrize("moment", ["while it builds", "while places are entered"])
def test_adopting_while_a_merge_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    place, other = Place(str(tmp_path)), store_of()
    put(other, range(4, 12), offset=100, cell=5)
    assert other.maintain()
    part = write(other, place, "s1", "p0")
    store = store_of(kind="flat")
    put(store, range(0, 8))
    begun, loads = [], []

    def load() -> None:
        if not begun:
            begun.append(True)
            loads.append(read_into(store, place, part, EVERY))

    if moment == "while it builds":
        real = maintenance.calibrate

        def calibrate(*args: Any, **more: Any) -> Any:
            load()
            return real(*args, **more)

        monkeypatch.setattr(maintenance, "calibrate", calibrate)
    else:
        monkeypatch.setattr(maintenance, "_STEP", 3)
        monkeypatch.setattr(maintenance.time, "sleep", lambda seconds: load())
    assert store.maintain()
    assert loads[0].adopted == 1
    expected = {f"id-{n}": (n, n % 4) if n < 4 else (100 + n, 5) for n in range(12)}
    assert {row.id: (row.offset, row.cell) for chunk in store.scan() for row in chunk} == expected
    rows, _ = store.get(list(expected))
    assert {row.id: (row.offset, row.cell) for row in rows if row} == expected
    store.maintain(settle=True)
    put(store, range(12), offset=200)
    assert {row.offset for chunk in store.scan() for row in chunk} == set(range(200, 212))
    assert store.view.rows == 12


def test_a_segment_is_not_merged_while_its_rows_come_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, before = Place(str(tmp_path)), store_of(seal_rows=64)
    put(before, range(64))
    assert before.maintain()
    part = write(before, place, "s1", "p0")
    store = store_of(kind="flat", merge=MergePolicy(fan_in=2, floor_rows=64))
    put(store, range(8))
    put(store, range(100, 108))
    begun, merged, seen = [], [], []

    def pause(seconds: float) -> None:
        if not begun:
            begun.append(True)
            merged.append(store.maintain(settle=True))
            put(store, [109])  # publishes
            seen.append(store.view.rows)

    monkeypatch.setattr(store_module, "chunks", lambda rows: np.array_split(rows, 4))
    monkeypatch.setattr(store_module.time, "sleep", pause)
    assert read_into(store, place, part, EVERY).rows == 56
    assert merged == [True]
    assert seen == [8 + 8 + 1 + 8]  # a quarter, of which half was known in this version
    store.maintain(settle=True)
    expected = {f"id-{n}" for n in [*range(64), *range(100, 108), 109]}
    assert state(store).keys() == expected
    assert all(store.get(sorted(expected))[0])
