"""Ids: hashes that are the same everywhere, columns, and the map from ids to places, against plain dictionaries."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.gpu.bucket_table import BucketTable
from headrace.gpu.errors import RecordError
from headrace.gpu.id_map import IdMap
from headrace.gpu.ids import IdColumn, hash_ids, row_digests
from headrace.gpu.packed_text import PackedText
from headrace.gpu.rows import Id

Hashes = npt.NDArray[np.uint64]

ODD_TEXTS = ["", "a", "a\0", "\0", "ä", "\ud800", "\udfff\ud800", "日本", "x" * 1_000_000, "1", "-1", "𝄞"]
ODD_INTEGERS = [0, 1, -1, 2**63 - 1, -(2**63), 2**62, 255]

texts = st.text(st.characters(), max_size=12)  # lone surrogates too
integers = st.integers(-(2**63), 2**63 - 1)


def ids_of(kind: str) -> st.SearchStrategy[Any]:
    return texts if kind == "string" else integers


# -- hashes ------------------------------------------------------------------------------------------------------------


def test_hashes_are_pinned() -> None:
    # Copies are compared by these across processes and releases: a change here is a change of the protocol.
    assert hash_ids(["", "a", "doc-1", "ä"], "string").tolist() == [
        1760245841805064774, 13950350942979735504, 15875389535068581627, 169404545344139998,
    ]  # fmt: skip
    assert hash_ids(["\ud800"], "string").tolist() == [12913474159858131671]
    assert hash_ids([0, 1, -1, 2**63 - 1], "integer").tolist() == [
        0, 6238072747940578789, 13029008266876403067, 6514504133438201533,
    ]  # fmt: skip
    digests = row_digests(hash_ids([0, 1], "integer"), np.array([0, 3], dtype=np.int32), np.array([0, 5]))
    assert digests.tolist() == [3531997233750407150, 10656565917902763661]


def test_hashes_do_not_depend_on_the_process() -> None:
    program = "from headrace.gpu.ids import hash_ids; print(hash_ids(['a', 'ü'], 'string').tolist())"
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        )
        assert run.stdout.strip() == str(hash_ids(["a", "ü"], "string").tolist())


@pytest.mark.parametrize(("kind", "odd"), [("string", ODD_TEXTS), ("integer", ODD_INTEGERS)])
def test_a_hash_depends_on_its_id_alone(kind: str, odd: Sequence[Id]) -> None:
    together = hash_ids(odd, kind)
    assert together.dtype == np.uint64
    assert len(set(together.tolist())) == len(odd)
    assert [int(hash_ids([one], kind)[0]) for one in odd] == together.tolist()
    assert len(hash_ids([], kind)) == 0


@pytest.mark.parametrize(
    ("kind", "ids"), [("string", ["a", 1]), ("integer", ["1"]), ("integer", [1, 2**63]), ("integer", [-(2**63) - 1, 0])]
)
def test_ids_of_another_kind_are_refused(kind: str, ids: Sequence[Id]) -> None:
    with pytest.raises(RecordError, match="the id"):
        hash_ids(ids, kind)


@given(st.lists(st.tuples(integers, st.integers(0, 2**31 - 1), st.integers(0, 2**62)), unique=True, max_size=50))
def test_digests_tell_rows_apart_and_their_sum_knows_no_order(rows: list[tuple[int, int, int]]) -> None:
    ids, partitions, offsets = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])

    def digests(order: list[int]) -> Hashes:
        return row_digests(
            hash_ids([ids[at] for at in order], "integer"),
            np.array([partitions[at] for at in order], dtype=np.int32),
            np.array([offsets[at] for at in order], dtype=np.int64),
        )

    forward = digests(list(range(len(rows))))
    assert len(set(forward.tolist())) == len(rows)
    assert forward.sum() == digests(list(range(len(rows)))[::-1]).sum()


def test_equal_numbers_do_not_cancel_out() -> None:
    # Were id and offset mixed alike and combined by xor, id n at offset n of topic partition 0 would always give 0.
    numbers = np.arange(1000)
    digests = row_digests(hash_ids(numbers.tolist(), "integer"), np.zeros(1000, dtype=np.int32), numbers)
    assert len(set(digests.tolist())) == 1000
    swapped = row_digests(hash_ids([1, 0], "integer"), np.zeros(2, dtype=np.int32), np.array([0, 1]))
    assert digests[:2].sum() != swapped.sum()


# -- columns -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(texts, max_size=8), max_size=5), st.data())
def test_packed_texts_are_a_list_of_texts(parts: list[list[str]], data: st.DataObject) -> None:
    packed = PackedText(parts)
    expected = [text for part in parts for text in part]
    assert list(packed) == packed.to_list() == expected
    assert len(packed) == len(expected)
    if expected:
        rows = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=20))
        assert packed.to_list(np.array(rows, dtype=np.int64)) == [expected[row] for row in rows]
        assert packed[len(expected) - 1] == expected[-1]
    with pytest.raises(IndexError):
        packed[len(expected)]


def test_packed_texts_take_four_bytes_beside_their_own() -> None:
    assert PackedText([["abc"] * 1000]).nbytes == 3 * 1000 + 4 * 1001


@pytest.mark.parametrize("kind", ["string", "integer"])
@given(data=st.data())
def test_a_column_is_a_list(kind: str, data: st.DataObject) -> None:
    batches = data.draw(st.lists(st.lists(ids_of(kind), max_size=10), max_size=5))
    column = IdColumn(kind)
    expected: list[Id] = []
    for batch in batches:
        column.append(batch, hash_ids(batch, kind))
        expected += batch
    rows = np.array(
        data.draw(st.lists(st.integers(0, max(0, len(expected) - 1)), max_size=30)) if expected else [], int
    )
    chosen = [expected[row] for row in rows.tolist()]
    sealed = column.take(rows)
    both = IdColumn.gather([(sealed, np.arange(len(sealed))), (column, rows)])
    assert (column.sealed, sealed.sealed) == (False, True)
    for form, holds in ((column, expected), (sealed, chosen), (both, chosen + chosen)):
        assert (len(form), form.to_list()) == (len(holds), holds)
        assert form.hashes().tolist() == hash_ids(holds, kind).tolist()
    assert column.to_list(rows) == chosen
    assert column.hashes(rows).tolist() == hash_ids(chosen, kind).tolist()
    asked = [data.draw(ids_of(kind)) if data.draw(st.booleans()) else one for one in chosen]
    for form, at in ((column, rows), (sealed, np.arange(len(rows)))):
        assert form.same(at, asked).tolist() == [one == other for one, other in zip(chosen, asked, strict=True)]


@pytest.mark.parametrize(("kind", "odd"), [("string", ODD_TEXTS), ("integer", ODD_INTEGERS)])
def test_odd_ids_come_back(kind: str, odd: Sequence[Id]) -> None:
    column = IdColumn(kind)
    column.append(odd, hash_ids(odd, kind))
    rows = np.arange(len(odd))[::-1]
    assert column.take(rows).to_list() == list(odd)[::-1]
    assert list(map(type, column.take(rows).to_list())) == [type(one) for one in odd]


def test_a_sealed_column_says_so() -> None:
    with pytest.raises(ValueError, match="sealed"):
        IdColumn("string").take(np.arange(0)).append(["a"], hash_ids(["a"], "string"))
    with pytest.raises(ValueError, match="2 kinds"):
        IdColumn.gather([(IdColumn("string"), np.arange(0)), (IdColumn("integer"), np.arange(0))])


def test_bytes_of_an_id() -> None:
    ids: list[Id] = [f"{n:020}" for n in range(10_000)]
    column = IdColumn("string")
    column.append(ids, hash_ids(ids, "string"))
    assert column.take(np.arange(10_000)).nbytes / 10_000 == pytest.approx(20 + 4 + 8, abs=0.01)
    assert column.nbytes / 10_000 > 20 + 49 + 8
    numbers = IdColumn("integer")
    numbers.append(range(10_000), hash_ids(range(10_000), "integer"))
    assert numbers.take(np.arange(10_000)).nbytes == 8 * 10_000


# -- the map -----------------------------------------------------------------------------------------------------------


class Rows:
    """Ids by place, as a store has them, and a hash that may be made to collide."""

    def __init__(self, bits: int = 64) -> None:
        self.ids: dict[int, Id] = {}
        self.bits = bits
        self.map = IdMap(self.same)
        self.next = 0

    def same(self, places: npt.NDArray[np.int64], ids: Sequence[Id]) -> npt.NDArray[np.bool_]:
        assert len(places) == len(ids)
        return np.array([self.ids[place] == one for place, one in zip(places.tolist(), ids, strict=True)])

    def hashes(self, ids: Sequence[Id]) -> Hashes:
        return hash_ids(ids, "string" if ids and isinstance(ids[0], str) else "integer") >> np.uint64(64 - self.bits)

    def find(self, ids: Sequence[Id]) -> list[int]:
        return self.map.find(self.hashes(ids), ids).tolist()  # type: ignore[no-any-return]

    def places(self, count: int) -> npt.NDArray[np.int64]:
        self.next += count
        return np.arange(self.next - count, self.next)

    def add(self, ids: Sequence[Id]) -> list[int]:
        places = self.places(len(ids))
        self.ids.update(zip(places.tolist(), ids, strict=True))
        self.map.add(self.hashes(ids), places)
        return places.tolist()  # type: ignore[no-any-return]

    def move(self, ids: Sequence[Id], places: list[int]) -> list[int]:
        targets = self.places(len(ids))
        self.map.move(self.hashes(ids), np.array(places, dtype=np.int64), targets)
        self.ids.update(zip(targets.tolist(), ids, strict=True))
        for place in places:
            del self.ids[place]
        return targets.tolist()  # type: ignore[no-any-return]

    def remove(self, ids: Sequence[Id], places: list[int]) -> None:
        self.map.remove(self.hashes(ids), np.array(places, dtype=np.int64))
        for place in places:
            del self.ids[place]


class MapMachine(RuleBasedStateMachine):
    """Against a dictionary; each run of it chooses how many bits a hash has: with none, all ids collide."""

    @rule(bits=st.sampled_from([1, 3, 8, 64]))
    @precondition(lambda self: not hasattr(self, "rows"))
    def start(self, bits: int) -> None:
        self.rows, self.model = Rows(bits), dict[str, int]()

    @rule(first=st.integers(0, 3000), count=st.integers(0, 900))
    @precondition(lambda self: hasattr(self, "rows"))
    def add(self, first: int, count: int) -> None:
        count = min(count, 40) if self.rows.bits < 8 else count
        ids = [one for n in range(first, first + count) if (one := f"id{n}") not in self.model]
        self.model.update(zip(ids, self.rows.add(ids), strict=True))

    @rule(data=st.data(), share=st.floats(0, 1))
    @precondition(lambda self: hasattr(self, "rows"))
    def move(self, data: st.DataObject, share: float) -> None:
        ids = self.some(data, share)
        self.model.update(zip(ids, self.rows.move(ids, [self.model[one] for one in ids]), strict=True))

    @rule(data=st.data(), share=st.floats(0, 1))
    @precondition(lambda self: hasattr(self, "rows"))
    def remove(self, data: st.DataObject, share: float) -> None:
        ids = self.some(data, share)
        self.rows.remove(ids, [self.model.pop(one) for one in ids])

    def some(self, data: st.DataObject, share: float) -> list[str]:
        ids = list(self.model)
        return data.draw(st.randoms(use_true_random=False)).sample(ids, int(share * len(ids)))

    @invariant()
    def finds_what_is_there(self) -> None:
        if not hasattr(self, "rows"):
            return
        assert len(self.rows.map) == len(self.model)
        ids = [*self.model, *(f"id{n}" for n in range(0, 4000, 61)), "never"]
        assert self.rows.find(ids) == [self.model.get(one, -1) for one in ids]


TestMapMachine = MapMachine.TestCase
TestMapMachine.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)


@pytest.mark.parametrize("odd", [ODD_TEXTS, ODD_INTEGERS])
def test_odd_ids_are_found(odd: Sequence[Id]) -> None:
    rows = Rows()
    assert rows.find(odd) == [-1] * len(odd)
    places = rows.add(odd)
    assert rows.find(odd[::-1]) == places[::-1]


def test_ids_of_one_hash_are_told_apart() -> None:
    rows = Rows(bits=1)
    ids = [f"id{n}" for n in range(300)]  # two hashes, four buckets of eight slots: most go into the dictionary beside
    places = rows.add(ids)
    assert rows.find(ids) == places
    assert rows.map._spilled
    assert rows.find(["other"]) == [-1]
    rows.remove(ids[:299], places[:299])
    assert rows.find(ids) == [-1] * 299 + places[299:]
    assert rows.map.nbytes > 0


@pytest.mark.parametrize("batch", [1, 256, 40_000])
def test_a_map_grows_and_shrinks_by_and_by(batch: int) -> None:
    count = 100_000 if batch > 1 else 3_600
    rows = Rows()
    held: list[int] = []
    most = 0.0
    for start in range(0, count, batch):
        held += rows.add(range(start, min(count, start + batch)))
        if len(held) > 2_000:
            most = max(most, rows.map.nbytes / len(held))
        assert rows.find([start, count]) == [held[start], -1]
    assert rows.find(range(count)) == held
    assert most < 70  # when the next table is made ready, both are there: 48 bytes for 0.7 entries
    for start in range(0, count - 100, batch):
        end = min(count - 100, start + batch)
        rows.remove(range(start, end), held[start:end])
        assert rows.find([start, count - 1]) == [-1, held[-1]]
    for _ in range(200):
        rows.remove([count - 1], [held[-1]])
        held[-1:] = rows.add([count - 1])
    assert rows.find(range(count)) == [-1] * (count - 100) + held[-100:]
    assert rows.map.nbytes <= 2 * 16 * 8 * 512


def test_no_call_moves_all_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []
    emptied: list[int] = []
    insert, make_ready = BucketTable.insert, BucketTable.make_ready

    def counted(table: Any, hashes: Hashes, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        entered[-1] += len(hashes)
        return insert(table, hashes, places)

    def watched(table: BucketTable, buckets: int) -> None:
        before = table._ready
        make_ready(table, buckets)
        emptied.append(table._ready - before)

    monkeypatch.setattr(BucketTable, "insert", counted)
    monkeypatch.setattr(BucketTable, "make_ready", watched)
    keys = np.random.default_rng(1).integers(0, 2**64, 200_000, dtype=np.uint64)
    growing = IdMap(lambda places, ids: np.ones(len(ids), dtype=np.bool_))
    for start in range(0, len(keys), 200):
        entered.append(0)
        growing.add(keys[start : start + 200], np.arange(start, start + 200))
    assert max(entered) < 200 + 8 * 128 + 100  # its own, a step's buckets, and those that had found no room
    assert max(emptied) <= 4 * 200
    assert sum(emptied) > 200_000 / 8


@pytest.mark.parametrize("bits", [1, 64])
def test_an_entry_that_is_not_there_cannot_be_moved_or_removed(bits: int) -> None:
    rows = Rows(bits)
    rows.add(list(range(100)))
    hashes = rows.hashes([5, 6])
    for places in ([5, 100], [99, 6])[: 1 if bits == 1 else 2]:  # with one bit, 99 may well have the hash of 5
        with pytest.raises(KeyError, match="no entry with hash"):
            rows.map.remove(hashes, np.array(places))
        with pytest.raises(KeyError, match="no entry with hash"):
            rows.map.move(hashes, np.array(places), np.array([500, 600]))
    assert rows.find([5, 6, 99]) == [5, 6, 99]


def test_empty_batches_change_nothing() -> None:
    rows = Rows()
    none = np.empty(0, dtype=np.int64)
    rows.map.add(none.view(np.uint64), none)
    rows.map.move(none.view(np.uint64), none, none)
    rows.map.remove(none.view(np.uint64), none)
    assert (len(rows.map), rows.find([])) == (0, [])
