"""What is decided about snapshots: manifests, which to write, to load and to give up."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cluster.manifests import Entry, Manifest, lowest, manifest_of, read_manifest
from headrace.cluster.planning import adopt_codebook, membership, settle
from headrace.cluster.snapshot_calls import _beginning, _lineage
from headrace.cluster.snapshot_owner import Mark
from headrace.cluster.snapshot_state import Restoring, Snapshots
from headrace.cluster.snapshots import choose, expired, lineage_of, next_id, owner, refusal, shares, writers
from headrace.cluster.state import CollectionSpec, CollectionState, Source, first_codebook
from headrace.gpu.errors import SnapshotError
from headrace.gpu.snapshot_parts import MomentFile, Part, SegmentFile

A, B, C = (f"tcp://10.0.0.{number}:4000" for number in range(1, 4))
SOURCE = Source("localhost:9092", "docs", 2, "json", {0: 5, 1: 0})


def state(*workers: str, replicas: int = 2, uid: str = "u1", **changes: Any) -> CollectionState:
    spec = CollectionSpec("docs", dim=2, cells=4, replicas=replicas, uid=uid)
    begun = membership(CollectionState(spec, first_codebook(2)), workers)
    trained = settle(adopt_codebook(begun, np.arange(8, dtype=np.float32).reshape(4, 2)))
    return trained.with_(**{"source": SOURCE, "schema": {"price": "float"}, **changes})


def part(name: str = "part-0", rows: Mapping[int, int] | None = None, stamp: Mapping[int, int] | None = None) -> Part:
    segment = SegmentFile(uuid.uuid4().hex, 10, 8, 1000, "0" * 32)
    moment = MomentFile(f"moments/000001-x/{name}.npz", 100, "1" * 32)
    return Part(name, stamp or {0: 7, 1: 3}, rows or {1: 4, 2: 4}, (segment,), moment, 1100)


def entry(number: int, *, uid: str = "u1", topic_id: str = "", **changes: Any) -> Entry:
    kept = state(A, B, uid=uid, source=dataclasses.replace(SOURCE, topic_id=topic_id))
    name = f"{number:06d}-20260101T000000Z-abcd"
    manifest = manifest_of(kept, name, {A: part()}, lineage=uid, created=1e9 + number, seconds=1.0)
    return dataclasses.replace(Entry(name, manifest), **changes)


def damaged(number: int) -> Entry:
    return Entry(f"{number:06d}-x", problem="its manifest is damaged")


class TestPlace:
    """One place is for one collection of one cluster; who wrote last there has it."""

    def written(self, number: int, uid: str, lineage: str = "u1") -> Entry:
        one = entry(number, uid=uid)
        assert one.manifest is not None
        return dataclasses.replace(one, manifest=dataclasses.replace(one.manifest, lineage=lineage))

    def of(self, uid: str, **known: Any) -> CollectionState:
        return state(A, uid=uid, snapshots=Snapshots(**{"lineage": "u1", **known}))

    def test_nobodys_and_ones_own(self) -> None:
        assert refusal([], "/s", self.of("u1")) == ""
        assert refusal([damaged(1)], "/s", self.of("u1")) == ""
        assert refusal([self.written(1, "u1"), damaged(2)], "/s", self.of("u1")) == ""

    def test_a_copy_is_refused_unless_it_is_the_heir(self) -> None:
        there = [self.written(1, "u1")]
        told = refusal(there, "/s", self.of("u2"))
        assert "/s belongs to collection 'docs'" in told
        assert there[0].snapshot in told
        assert "take_over=True (--take-over)" in told
        assert refusal(there, "/s", self.of("u2", heir_of="u1")) == ""

    def test_once_the_heir_has_written_the_one_before_is_refused(self) -> None:
        there = [self.written(1, "u1"), self.written(2, "u2")]
        assert "belongs to" in refusal(there, "/s", self.of("u1"))
        assert refusal(there, "/s", self.of("u2", heir_of="u1")) == ""
        assert "belongs to" in refusal([*there, self.written(3, "u3")], "/s", self.of("u2", heir_of="u1"))

    def test_the_mark_says_whose_snapshots_are_to_be_restored(self) -> None:
        there = [self.written(1, "u1"), self.written(2, "u1"), self.written(3, "u2", lineage="u2")]
        assert _lineage(there, None) == ""
        assert _lineage(there, Mark("u2", "u2", "docs", 1e9)) == "u2"
        assert _lineage(there, Mark("u9", "u9", "docs", 1e9)) == "", "it has written nothing yet"

    def test_no_heir_of_another_lineage(self) -> None:
        told = refusal([self.written(1, "u1", lineage="u0")], "/s", self.of("u2", heir_of="u1"))
        assert "another collection" in told

    @given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from("abc")), max_size=6), st.data())
    def test_just_one_of_all_may_go_on(self, wrote: list[tuple[int, str]], data: st.DataObject) -> None:
        """Whatever order they wrote in, and though two may have taken the same number."""
        there = [
            dataclasses.replace(one, snapshot=name, manifest=dataclasses.replace(one.manifest, snapshot=name))
            for at, (number, uid) in enumerate(wrote)
            if (one := self.written(number, uid)).manifest is not None
            if (name := f"{number:06d}-20260101T000000Z-{at:04d}")
        ]
        may = {uid for uid in "abc" if not refusal(there, "/s", self.of(uid))}
        assert len(may) == (1 if there else 3)
        assert may == {uid for uid in "abc" if not refusal(data.draw(st.permutations(there)), "/s", self.of(uid))}
        newest = owner(there)
        assert newest is None or {newest.state.spec.uid} == may


class TestManifest:
    def test_what_is_written_is_read(self) -> None:
        written = entry(3).manifest
        assert written is not None
        read = read_manifest(written.snapshot, written.to_bytes())
        assert read.problem == ""
        assert read.manifest is not None
        book, read_book = written.state.codebook, read.manifest.state.codebook
        np.testing.assert_array_equal(book.centroids, read_book.centroids)
        plain = {"codebook": first_codebook(2)}
        assert dataclasses.replace(read.manifest, state=read.manifest.state.with_(**plain)) == dataclasses.replace(
            written, state=written.state.with_(**plain)
        )

    def test_one_without_its_topic_stays_so(self) -> None:
        """Restored without its topic, written and restored again: still no other topic may be read into its rows."""
        detached = state(A, source=None, snapshots=Snapshots(detached=True))
        written = manifest_of(detached, "000001-x", {A: part()}, lineage="u1", created=1.0, seconds=1.0)
        read = read_manifest("000001-x", written.to_bytes()).manifest
        assert read is not None
        fresh = CollectionState(dataclasses.replace(detached.spec, uid="u2"), first_codebook(2))
        assert _beginning(fresh, read, "/s", only=False, follow=True).snapshots.detached
        # Manifests from before that was written down: rows whose topic is not known.
        unmarked = dataclasses.replace(read, state=read.state.with_(snapshots=Snapshots()))
        assert _beginning(fresh, unmarked, "/s", only=False, follow=True).snapshots.detached
        bare = dataclasses.replace(read, parts=(dataclasses.replace(part(), rows={}),))
        assert _beginning(fresh, bare, "/s", only=False, follow=True).snapshots.detached, "all its rows were deleted"
        # One that has no rows yet may read any topic, and one that has its topic goes on.
        empty = dataclasses.replace(unmarked, parts=(dataclasses.replace(part(), rows={}),))
        assert not _beginning(fresh, empty, "/s", only=False, follow=True).snapshots.detached
        follows = entry(1).manifest
        assert follows is not None
        assert not _beginning(fresh, follows, "/s", only=False, follow=True).snapshots.detached
        assert _beginning(fresh, follows, "/s", only=False, follow=False).snapshots.detached

    def test_it_names_no_worker_as_holder_of_anything(self) -> None:
        kept = entry(1).manifest
        assert kept is not None
        assert (kept.state.members, kept.state.copies, kept.state.readers) == ({}, {}, {})
        assert kept.state.source == SOURCE

    @given(at=st.integers(0, 1 << 20), bit=st.integers(0, 7))
    def test_one_flipped_bit_is_always_seen(self, at: int, bit: int) -> None:
        written = entry(3).manifest
        assert written is not None
        content = bytearray(written.to_bytes())
        content[at % len(content)] ^= 1 << bit
        told = read_manifest(written.snapshot, bytes(content))
        # Only what JSON does not mean anything by may change unseen, such as a line's end that is a space now.
        same = told.manifest is not None and told.manifest.to_bytes() == written.to_bytes()
        assert same or told.problem

    @given(length=st.integers(0, 1 << 20))
    def test_a_truncated_one_is_always_seen(self, length: int) -> None:
        written = entry(3).manifest
        assert written is not None
        content = written.to_bytes()
        assert read_manifest(written.snapshot, content[: length % len(content)]).problem

    @settings(max_examples=40)
    @given(
        st.binary(max_size=200)
        | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)
    )
    def test_anything_else_is_refused(self, content: bytes) -> None:
        assert read_manifest("000001-x", content).problem

    def test_of_another_format(self) -> None:
        written = entry(3).manifest
        assert written is not None
        wire = json.loads(written.to_bytes())
        told = read_manifest(written.snapshot, json.dumps({**wire, "format": 99}).encode())
        assert "format 99" in told.problem
        assert told.foreign

    def test_under_another_name(self) -> None:
        written = entry(3).manifest
        assert written is not None
        assert written.snapshot in read_manifest("000009-x", written.to_bytes()).problem

    def test_rows_and_bytes_count_once(self) -> None:
        first, second = part("part-0", {1: 4, 2: 6}), part("part-1", {2: 6, 3: 1})
        second = dataclasses.replace(second, segments=first.segments)
        kept = manifest_of(state(A, B), "000001-x", {A: first, B: second}, lineage="u", created=0.0, seconds=0.0)
        assert kept.rows == {1: 4, 2: 6, 3: 1}
        assert kept.nbytes == 1000 + 2 * 100


class TestWriting:
    def test_a_name_is_newer_than_all(self) -> None:
        names = [next_id([], 1e9, "a")]
        for _ in range(3):
            names.append(next_id([Entry(name) for name in names], 5.0, "b"))  # the clock was set back
        assert names == sorted(names)
        assert len(set(names)) == 4

    def test_the_writers_before_are_taken_again(self) -> None:
        now = state(A, B, C, replicas=3)
        assert {tuple(writers(now, [who])) for who in (A, B, C)} == {(A,), (B,), (C,)}

    def test_who_writes_holds_everything(self) -> None:
        now = state(A, B, C, replicas=2)
        who = writers(now, ["tcp://gone:1"])
        assert len(who) == 2
        assert all(set(who) & set(now.serving[cell]) for cell in now.cells)

    def test_nobody_writes_what_nobody_holds(self) -> None:
        now = state(A, B)
        assert writers(now.with_(serving=dict.fromkeys(now.cells, ()))) == []

    def test_the_log_is_read_from_the_lowest(self) -> None:
        assert lowest([{0: 9, 1: 4}, {0: 7, 1: 8}], {0: 0, 1: 0}) == {0: 7, 1: 4}
        assert lowest([{0: 9}, {0: 7, 1: 8}], {0: 5, 1: 2}) == {0: 7, 1: 2}, "nothing is claimed for whoever is silent"
        assert lowest([], {0: 5}) == {0: 5}


class TestChoosing:
    def test_the_newest(self) -> None:
        chosen, passed_over = choose([entry(2), entry(10), entry(9)])
        assert chosen.snapshot.startswith("000010")
        assert passed_over == []

    def test_a_damaged_one_is_passed_over_and_said(self) -> None:
        found = [entry(1), entry(2), damaged(3)]
        chosen, passed_over = choose(found, without={found[1].snapshot: "a bit is flipped"})
        assert chosen.snapshot == found[0].snapshot
        assert ["damaged" in passed_over[0], "a bit is flipped" in passed_over[1]] == [True, True]

    def test_one_of_another_collection_is_passed_over(self) -> None:
        chosen, passed_over = choose([entry(1), entry(2, uid="u2")], lineage="u1")
        assert chosen.lineage == "u1"
        assert "another collection" in passed_over[0]

    def test_most_snapshots_say_whose_they_are(self) -> None:
        assert lineage_of([entry(1), entry(2), entry(3, uid="u2")]) == "u1"
        assert lineage_of([entry(1, uid="u2"), entry(2)]) == "u2", "the oldest, where as many say so"
        assert lineage_of([damaged(1)]) == ""

    def test_one_of_a_topic_that_is_gone_is_passed_over(self) -> None:
        found = [entry(1, topic_id="new"), entry(2, topic_id="old")]
        chosen, passed_over = choose(found, topic_id="new")
        assert chosen.snapshot == found[0].snapshot
        assert "another topic" in passed_over[0]

    def test_the_one_that_is_wanted_and_no_other(self) -> None:
        found = [entry(1), entry(2)]
        assert choose(found, wanted=found[0].snapshot)[0].snapshot == found[0].snapshot
        with pytest.raises(SnapshotError, match="a bit is flipped"):
            choose(found, wanted=found[1].snapshot, without={found[1].snapshot: "a bit is flipped"})
        with pytest.raises(SnapshotError, match="there is no snapshot 'x'"):
            choose(found, wanted="x")

    def test_none(self) -> None:
        with pytest.raises(SnapshotError, match="there is no snapshot: check the URL"):
            choose([])

    @given(
        parts=st.lists(st.dictionaries(st.integers(0, 9), st.integers(0, 50), max_size=10), max_size=4),
        cells=st.sets(st.integers(0, 12)),
    )
    def test_every_cell_is_read_once(self, parts: list[dict[int, int]], cells: set[int]) -> None:
        made = [part(f"part-{number}", rows) for number, rows in enumerate(parts)]
        made = [dataclasses.replace(one, rows=rows) for one, rows in zip(made, parts, strict=True)]
        read = [cell for _, some in shares(made, cells) for cell in some]
        assert len(read) == len(set(read))
        assert set(read) == {cell for cell in cells if any(rows.get(cell) for rows in parts)}
        assert all(one.rows.get(cell) for one, some in shares(made, cells) for cell in some)


class TestGivingUp:
    @given(
        kinds=st.lists(st.sampled_from(["good", "damaged", "of another", "of a newer format"]), max_size=10),
        keep=st.integers(0, 5),
    )
    def test_the_newest_good_ones_stay(self, kinds: list[str], keep: int) -> None:
        make = {
            "good": entry,
            "damaged": damaged,
            "of another": lambda number: entry(number, uid="u2"),
            "of a newer format": lambda number: dataclasses.replace(damaged(number), foreign=True),
        }
        found = {number: make[kind](number) for number, kind in enumerate(kinds, 1)}
        gone = set(expired(list(found.values()), keep, "u1"))
        good = [number for number, kind in enumerate(kinds, 1) if kind == "good"]
        stay = good[-keep:] if keep else good
        assert not gone & {found[number].snapshot for number in stay}
        if keep:
            assert {found[number].snapshot for number in good if number not in stay} <= gone
        for number, kind in enumerate(kinds, 1):
            if kind in ("of another", "of a newer format"):
                assert found[number].snapshot not in gone
            if kind == "damaged" and (not stay or number > stay[0]):
                assert found[number].snapshot not in gone, "it may be all there is"


class TestState:
    def test_it_goes_over_the_wire(self) -> None:
        now = state(A, B).with_(
            snapshots=Snapshots(url="/x", every=60.0, keep=3, last="000001-x", revision=4),
            restoring=Restoring("/x", "000001-x", "u1", {0: 3}, asked=True),
        )
        again = CollectionState.from_wire(now.to_wire())
        assert (again.snapshots, again.restoring) == (now.snapshots, now.restoring)
        assert again.hearing(state(A, B).told()).snapshots == Snapshots()

    def test_a_manifest_is_no_restoring_collection(self) -> None:
        kept: Manifest | None = entry(1).manifest
        assert kept is not None
        assert (kept.state.restoring, kept.state.snapshots) == (None, Snapshots())
