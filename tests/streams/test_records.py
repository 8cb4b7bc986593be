"""Bytes to rows: what is usable comes through exactly, what is not is refused alone and with a reason."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from headrace.gpu.errors import RecordError
from headrace.gpu.host import frames
from headrace.streams.records import (
    RawBatch,
    RecordSpec,
    Refusal,
    decode,
    encode_binary,
    encode_json,
    keep_last,
)

SPEC = RecordSpec(dim=8, metric="cosine", ids="string", format="json", schema={}, encoder="minilm@1")
F32 = [("headrace-format", b"f32")]
GOOD = np.linspace(-1, 1, 8, dtype=np.float32)


def batch(*records):
    """A RawBatch of (key, value[, headers]) records in topic partition 0, offsets from 100."""
    count = len(records)
    return RawBatch(
        topic="docs",
        keys=[record[0] for record in records],
        values=[record[1] for record in records],
        headers=[record[2] if len(record) > 2 else None for record in records],
        topic_partitions=np.zeros(count, dtype=np.int32),
        offsets=np.arange(100, 100 + count, dtype=np.int64),
        timestamps=np.arange(count, dtype=np.int64),
        ranges={0: (100, 100 + count)},
        pulled=time.time(),
    )


def one(*record, spec=SPEC):
    """What becomes of a record between two good ones: its reason, or "" where it is usable."""
    before, after = encode_json("before", vector=GOOD), encode_binary("after", GOOD, {"size": 3})
    decoded = decode(batch(before, record, after), spec, frames)
    assert [decoded.ids[0], decoded.ids[-1]] == ["before", "after"], "the neighbours must not suffer"
    assert [refusal.row for refusal in decoded.refused] in ([], [1])
    return decoded.refused[0].reason if decoded.refused else ""


def test_the_four_kinds_of_record():
    decoded = decode(
        batch(
            encode_json("a", text="red shoes", attributes={"price": 9.5, "stock": 3, "sale": True, "note": None}),
            encode_binary("b", GOOD, {"price": 1.0}),
            (b"c", None),
            (b"d", b""),
            encode_json("é", text="kept", vector=2 * GOOD),
            (b"f", b'{"text": "plain"}', [("headrace-format", b"json"), ("other", None)]),
        ),
        SPEC,
        frames,
    )
    assert decoded.refused == []
    assert decoded.rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert decoded.ids == ["a", "b", "c", "d", "é", "f"]
    assert decoded.deleted.tolist() == [False, False, True, True, False, False]
    assert decoded.texts == ["red shoes", None, None, None, "kept", "plain"]
    assert decoded.vector_rows.tolist() == [1, 4]
    np.testing.assert_array_equal(decoded.vectors, [GOOD, 2 * GOOD])
    assert decoded.vectors.dtype == np.float32
    assert decoded.attributes == {
        "text": ["red shoes", None, None, None, "kept", "plain"],
        "price": [9.5, 1.0, None, None, None, None],
        "stock": [3, None, None, None, None, None],
        "sale": [True, None, None, None, None, None],
    }
    assert decoded.schema == {"text": "str", "price": "float", "stock": "int", "sale": "bool"}


def test_an_empty_batch():
    decoded = decode(batch(), SPEC, frames)
    assert decoded.ids == []
    assert decoded.vectors.shape == (0, 8)
    assert keep_last(decoded, *[np.zeros(0, dtype=np.int64)] * 3) is decoded


def test_ten_thousand_records():
    """Row 13: a large batch decodes in a moment, refused ones among them."""
    records = [encode_binary(str(i), GOOD) for i in range(10_000)]
    records[5_000] = (b"5000", b"short", F32)
    decoded = decode(batch(*records), SPEC, frames)
    assert len(decoded.ids) == 9_999
    assert decoded.refused == [
        Refusal(5_000, "the value has 5 bytes, but 8 float32 numbers take 32: check the vector's dimension")
    ]
    assert decoded.vector_rows.tolist() == list(range(9_999))


def test_a_record_of_12_megabytes():
    """Row 13: refused by its length, before anything is parsed."""
    assert one(b"k", b'{"text": "' + b"x" * 12_000_000 + b'"}') == (
        "the record has 12000013 bytes, more than the limit of 1048576"
    )
    assert "more than the limit" in one(b"k", b"x" * 32, [*F32, ("headrace-attributes", b" " * (1 << 20))])
    exactly = b'{"text": "' + b"x" * ((1 << 20) - 13) + b'"}'
    assert one(b"k", exactly) == ""


def big_endian(value):
    """The reason for a value whose bytes are the other way round."""
    odd = next(number for number in np.frombuffer(value, "<f4") if number and not 1e-12 < abs(number) < 1e12)
    return (
        f"the vector's bytes look big-endian, for {odd:.3g} makes sense only if they are reversed: send little-endian "
        "float32"
    )


def test_bad_vectors_one_by_one():
    """Row 12, as binary values: refused with a reason each, and the counters equal what was injected."""

    def vector(*changes):
        changed = GOOD.copy()
        for position, number in changes:
            changed[position] = number
        return changed.tobytes()

    bad = {
        vector((3, np.nan)): "the vector has NaN at position 3: send finite numbers only",
        vector((0, np.inf)): "the vector has an infinite number at position 0: send finite numbers only",
        vector((7, -np.inf)): "the vector has an infinite number at position 7: send finite numbers only",
        bytes(32): "the vector has zero norm, so it has no direction for the metric cosine",
        GOOD[:7].tobytes(): "the value has 28 bytes, but 8 float32 numbers take 32: check the vector's dimension",
        GOOD.astype("<f8").tobytes(): "the value has 64 bytes, but 8 float32 numbers take 32: is it float64?",
        GOOD.astype(">f4").tobytes(): big_endian(GOOD.astype(">f4").tobytes()),
        (1e20 * GOOD).tobytes(): "the vector's norm is 1.85e+20 and its square overflows float32: scale the vector",
        (1e-22 * GOOD).tobytes(): "the vector's norm is 1.85e-22 and its square underflows float32: scale the vector",
    }
    decoded = decode(batch(*((b"k%d" % i, value, F32) for i, value in enumerate(bad))), SPEC, frames)
    assert {value: refusal.reason for value, refusal in zip(bad, decoded.refused, strict=True)} == bad
    assert decoded.ids == []
    assert decoded.vectors.shape == (0, 8)
    for value, reason in bad.items():
        assert one(b"k", value, F32) == reason


def test_numbers_that_the_collection_cannot_keep():
    vector = np.full(8, 0.5, dtype=np.float32)
    vector[3] = -70_000
    kept = replace(SPEC, metric="l2", largest=65504.0)
    assert "-70000" not in one(b"k", (vector / 2).tobytes(), F32, spec=kept)
    refused = one(b"k", vector.tobytes(), F32, spec=kept)
    assert refused == "the vector has the number 70000, too large for float16: make the collection with float32"
    assert one(b"k", vector.tobytes(), F32, spec=replace(kept, metric="cosine")) == ""


def test_what_only_cosine_refuses():
    for metric in ("ip", "l2"):
        spec = replace(SPEC, metric=metric)
        assert one(b"k", bytes(32), F32, spec=spec) == ""
        assert one(b"k", (1e-22 * GOOD).tobytes(), F32, spec=spec) == ""
        assert "overflows float32" in one(b"k", (1e20 * GOOD).tobytes(), F32, spec=spec)
        assert "NaN" in one(b"k", np.full(8, np.nan, dtype=np.float32).tobytes(), F32, spec=spec)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["normal", "unit", "counts", "one-hot", "sparse"]))
def test_byte_order_is_told_by_plausibility(seed, shape):
    """Vectors of every usual making are taken as they are, and refused when their bytes are swapped."""
    random = np.random.default_rng(seed)
    vector = {
        "normal": lambda: random.normal(size=384),
        "unit": lambda: random.normal(size=384) / 384,
        "counts": lambda: random.integers(1, 256, size=384),
        "one-hot": lambda: np.eye(384)[seed % 384],
        "sparse": lambda: random.normal(size=384) * (random.random(384) < 0.3) + np.eye(384)[0],
    }[shape]().astype("<f4")
    spec = replace(SPEC, dim=384, metric="l2")
    swapped = vector.astype(">f4").tobytes()
    raw = batch((b"little", vector.tobytes(), F32), (b"big", swapped, F32))
    decoded = decode(raw, spec, frames)
    assert decoded.ids == ["little"]
    assert decoded.refused == [Refusal(1, big_endian(swapped))]


def test_bad_vectors_in_json():
    def reason(vector, **others):
        return one(b"k", json.dumps({"vector": vector, **others}).encode())

    assert reason([1, 2, 3]) == "the vector has 3 numbers, but this collection's have 8"
    assert reason([]) == "the vector has 0 numbers, but this collection's have 8"
    assert reason([1, 2, "3", 4, 5, 6, 7, 8]) == ("the vector has '3' at position 2: it must be a list of 8 numbers")
    assert "None at position 0" in reason([None] * 8)
    assert "True at position 1" in reason([1, True, 0, 0, 0, 0, 0, 0])
    assert "[1] at position 0" in reason([[1]] * 8)
    assert reason("abc") == "the vector is 'abc': it must be a list of 8 numbers"
    assert reason({"x": 1}).startswith("the vector is {'x': 1}")
    assert "zero norm" in reason([0] * 8)
    assert reason([1e300] + [0] * 7) == "the vector has an infinite number at position 0: send finite numbers only"
    assert "overflows float32" in reason([1e30] + [0] * 7)
    assert "cannot be read: not JSON" in one(b"k", b'{"vector": [NaN, 1, 1, 1, 1, 1, 1, 1]}')
    # A null vector is no vector: the text is encoded.
    assert reason(None, text="t") == ""
    assert reason(None) == "the record has neither text nor vector: send one, or a null value to delete the id"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"\xff\xfe", "the value cannot be read: not UTF-8"),
        (b'{"text": "\xff"}', "the value cannot be read: not UTF-8"),
        (b'{"text": "a"', "the value cannot be read: not JSON"),
        (b"{} {}", "the value cannot be read: not JSON"),
        (b" ", "the value cannot be read: empty"),
        (b'{"text": "a", "text": "b"}', "the value cannot be read: duplicate key 'text'"),
        (b'{"text": "a", "x": 1, "x": 1}', "the value cannot be read: duplicate key 'x'"),
        (b"[1, 2]", "the value cannot be read: not a JSON object"),
        (b"null", "the value cannot be read: not a JSON object"),
        (b'"text"', "the value cannot be read: not a JSON object"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "the value cannot be read: nested too deeply"),
        (b"[" * 1_000_000, "the value cannot be read: nested too deeply"),
        (b"{}", "the record has neither text nor vector"),
        (b'{"text": null}', "the record has neither text nor vector"),
        (b'{"text": 7}', "the text is 7: it must be a string"),
        (b'{"text": ["a"]}', "the text is ['a']: it must be a string"),
        (b'{"text": "a", "tags": ["x", "y"]}', "attribute 'tags' is a list ['x', 'y']: only str"),
        (b'{"text": "a", "place": {"x": 1}}', "attribute 'place' is an object {'x': 1}: only str"),
        (b'{"text": "a", "n": 9223372036854775808}', "attribute 'n' is 9223372036854775808, beyond the range of int64"),
        (b'{"text": "a", "n": -1' + b"0" * 30 + b"}", "attribute 'n' is -1000"),
        (b'{"text": "a", "id": "other"}', "the field id is 'other', but the key is 'k'"),
        (b'{"text": "a", "id": 3}', "the field id is 3, but the key is 'k'"),
    ],
)
def test_bad_json(value, reason):
    """Row 14."""
    started = time.perf_counter()
    found = one(b"k", value)
    assert found.startswith(reason)
    assert len(found) < 300, "a reason is for reading"
    assert time.perf_counter() - started < 5


def test_json_that_is_fine():
    assert one(b"k", b'{"text": "a", "id": "k"}') == ""
    assert one(b"k", b'{"text": "a", "id": null, "n": 9223372036854775807, "m": -9223372036854775808}') == ""
    assert one(b"k", b'{"text": ""}') == ""
    assert one(b"k", '{"text": "\U0001f30a \\u0000"}'.encode()) == ""


def test_bad_keys():
    text = b'{"text": "a"}'
    assert one(None, text) == "the key is missing: it must be the id"
    assert one(b"", text) == "the key is empty: it must be the id"
    assert one(b"\xff\x00", text) == "the key b'\\xff\\x00' is not UTF-8: it must be the id"
    assert one(None, None) == "the key is missing: it must be the id"


def test_integer_ids():
    spec = replace(SPEC, ids="integer")
    text = b'{"text": "a"}'
    keys = [b"7", b"-3", b"0", b"9223372036854775807", b"-9223372036854775808"]
    decoded = decode(batch(*((key, text) for key in keys)), spec, frames)
    assert decoded.ids == [7, -3, 0, 2**63 - 1, -(2**63)]
    for key in (b"007", b"+7", b" 7", b"1_0", b"-0", "٧".encode(), b"9223372036854775808"):
        refused = decode(batch((b"7", text), (key, text)), spec, frames).refused
        assert [refusal.row for refusal in refused] == [1], key
        assert "is not an int64 in its shortest form" in refused[0].reason
    for key in (b"a", b"", None, b"\xff", b"7.0", b"1" * 5000):
        assert len(decode(batch((b"7", text), (key, text)), spec, frames).refused) == 1, key
    assert decode(batch((b"7", b'{"text": "a", "id": 7}')), spec, frames).ids == [7]
    assert "the field id is '7'" in decode(batch((b"7", b'{"text": "a", "id": "7"}')), spec, frames).refused[0].reason
    assert "the field id is True" in decode(batch((b"1", b'{"text": "a", "id": true}')), spec, frames).refused[0].reason


def test_headers():
    vector = GOOD.tobytes()
    assert (
        one(b"k", vector, [("headrace-format", b"avro")]) == "header headrace-format is b'avro': use b'json' or b'f32'"
    )
    # Without a header the collection's format counts, and a header counts more.
    binary = replace(SPEC, format="binary")
    raw = batch((b"a", vector), (b"b", b'{"text": "t"}', [("headrace-format", b"json")]), (b"c", b'{"text": "t"}'))
    assert [refusal.row for refusal in decode(raw, binary, frames).refused] == [2]
    assert [refusal.row for refusal in decode(raw, SPEC, frames).refused] == [0]
    assert one(b"k", vector, [*F32, ("headrace-encoder", b"other@2")]) == (
        "the vector was made by 'other@2', but this collection's encoder is 'minilm@1'"
    )
    assert one(b"k", vector, [*F32, ("headrace-encoder", b"minilm@1")]) == ""
    assert one(b"k", vector, [*F32, ("headrace-encoder", b"other@2")], spec=replace(SPEC, encoder=None)) == ""
    # Only a vector has an encoder; a text will get ours.
    assert one(b"k", b'{"text": "a"}', [("headrace-encoder", b"other@2")]) == ""
    assert "other@2" in one(*encode_json("k", vector=GOOD), [("headrace-encoder", b"other@2")])
    assert one(b"k", b'{"text": "a"}', [("headrace-attributes", b"{}")]).startswith("a JSON record has header")

    def attributes(content):
        return one(b"k", vector, [*F32, ("headrace-attributes", content)])

    assert attributes(b"{").startswith("header headrace-attributes cannot be read: not JSON")
    assert attributes(b"[1]").startswith("header headrace-attributes cannot be read: not a JSON object")
    assert attributes(b'{"a": 1, "a": 2}') == "header headrace-attributes cannot be read: duplicate key 'a'"
    assert attributes(b'{"a": [1]}').startswith("attribute 'a' is a list [1]")
    assert attributes(b'{"vector": [1]}').startswith("header headrace-attributes has a vector")
    assert attributes(b'{"id": "z"}') == "the field id is 'z', but the key is 'k'"
    assert attributes(b'{"tag": "large"}') == ""


def test_text_without_an_encoder():
    spec = replace(SPEC, encoder=None)
    assert one(b"k", b'{"text": "a"}', spec=spec) == (
        "the record has a text but no vector, and this collection has no encoder for it"
    )
    assert one(*encode_json("k", text="a", vector=GOOD), spec=spec) == ""


def test_schema_drift():
    """Row 15: what is compatible goes in, the rest is refused, and a refused record decides nothing."""
    spec = replace(SPEC, schema={"price": "float", "stock": "int", "brand": "str", "sale": "bool"})
    rows = [
        {"price": 3, "stock": 1, "brand": "a", "sale": True},
        {"price": 3.5, "stock": 1.0},
        {"brand": 7},
        {"sale": 1},
        {"stock": True},
        {"price": "3", "colour": 5},
        {"colour": "red"},
        {"colour": 3},
        {},
        {"price": 10**100},
        {"price": 2**53},
    ]
    records = [(b"%d" % i, json.dumps({"text": "t", **row}).encode()) for i, row in enumerate(rows)]
    decoded = decode(batch(*records), spec, frames)
    assert {refusal.row: refusal.reason.split(",")[0] for refusal in decoded.refused} == {
        1: "attribute 'stock' is float 1.0",
        2: "attribute 'brand' is int 7",
        3: "attribute 'sale' is int 1",
        4: "attribute 'stock' is bool True",
        5: "attribute 'price' is str '3'",
        7: "attribute 'colour' is int 3",
        9: "attribute 'price' is 100000000000000000000000000000000000000000000000000000000000…",
    }
    assert decoded.refused[0].reason == "attribute 'stock' is float 1.0, but this column holds int"
    assert decoded.ids == ["0", "6", "8", "10"]
    assert decoded.schema == {**spec.schema, "text": "str", "colour": "str"}
    assert decoded.attributes["price"] == [3.0, None, None, 2.0**53]
    assert [type(price) for price in decoded.attributes["price"]] == [float, type(None), type(None), float]
    assert decoded.attributes["colour"] == [None, "red", None, None]
    assert spec.schema.keys() == {"price", "stock", "brand", "sale"}, "the spec is not ours to change"


def test_columns_of_refused_records_leave_no_trace():
    decoded = decode(batch((b"a", b'{"text": "t", "none": null}'), (b"b", b'{"ghost": 1}')), SPEC, frames)
    assert set(decoded.attributes) == set(decoded.schema) == {"text"}


ATTRIBUTES = st.dictionaries(
    st.text(max_size=5).filter(lambda name: name not in {"id", "text", "vector"}),
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10),
    max_size=4,
)
NUMBERS = st.floats(-1e6, 1e6, width=32)
VECTORS = st.lists(NUMBERS, min_size=8, max_size=8).map(lambda numbers: np.array(numbers, dtype=np.float32))
IDS = st.text(min_size=1, max_size=20)


@given(IDS, VECTORS, st.none() | st.text(max_size=20), ATTRIBUTES)
def test_json_round_trip(id_, vector, text, attributes):
    assume(np.linalg.norm(vector) > 1e-15)
    decoded = decode(batch(encode_json(id_, text=text, vector=vector, attributes=attributes)), SPEC, frames)
    assert decoded.refused == []
    assert decoded.ids == [id_]
    assert decoded.texts == [text]
    np.testing.assert_array_equal(decoded.vectors, vector[None])
    expected = {"text": text, **attributes}
    assert decoded.attributes == {name: [value] for name, value in expected.items() if value is not None}
    for name, (value,) in decoded.attributes.items():
        assert type(value) is type(expected[name])


@given(IDS, VECTORS, ATTRIBUTES)
def test_binary_round_trip(id_, vector, attributes):
    assume(np.linalg.norm(vector) > 1e-15)
    decoded = decode(batch(encode_binary(id_, vector, attributes, encoder="minilm@1")), SPEC, frames)
    assert decoded.refused == []
    assert decoded.ids == [id_]
    np.testing.assert_array_equal(decoded.vectors, vector[None])
    assert decoded.attributes == {name: [value] for name, value in attributes.items() if value is not None}


KEYS = st.sampled_from([b"a", b"b", "ü".encode()])
HEALTHY = st.one_of(
    st.builds(lambda key, text: encode_json(key.decode(), text=text, attributes={"n": 1}), KEYS, st.text(max_size=5)),
    st.builds(lambda key, flag: encode_json(key.decode(), vector=GOOD, attributes={"flag": flag}), KEYS, st.booleans()),
    st.builds(lambda key: encode_binary(key.decode(), -GOOD, {"s": "x", "n": 2}), KEYS),
    st.builds(lambda key: (key, None), KEYS),
)
GARBAGE = st.one_of(
    st.tuples(st.none() | KEYS, st.binary(min_size=1, max_size=40), st.sampled_from([None, F32])),
    st.tuples(
        KEYS, st.dictionaries(st.text(max_size=3), st.integers(), min_size=1).map(lambda d: json.dumps(d).encode())
    ),
    st.tuples(
        KEYS, st.sampled_from([b'{"text": "a", "n": "no"', b'{"text": "a", "n": "no", "zz": [1]}', b'{"vector": [1]}'])
    ),
    st.tuples(KEYS, st.just(bytes(32)), st.just([*F32, ("headrace-attributes", b'{"zz": 1}')])),
    st.tuples(KEYS, st.just(GOOD.tobytes()), st.just([*F32, ("headrace-attributes", b'{"n": "no", "yy": 1}')])),
)


@given(st.lists(HEALTHY, max_size=6), GARBAGE, st.data())
def test_one_bad_record_never_changes_its_neighbours(healthy, garbage, data):
    """Row 10: decoding with and without the garbage gives the same rows, ids, vectors, attributes and schema."""
    spec = replace(SPEC, schema={"n": "int"})
    at = data.draw(st.integers(0, len(healthy)))
    dirty = decode(batch(*healthy[:at], garbage, *healthy[at:]), spec, frames)
    assume(dirty.refused)  # now and then garbage is a record
    clean = decode(batch(*healthy), spec, frames)
    assert [refusal.row for refusal in dirty.refused] == [at]
    assert clean.refused == []
    assert [row - (row > at) for row in dirty.rows.tolist()] == clean.rows.tolist()
    for name in ("ids", "texts", "attributes", "schema"):
        assert getattr(dirty, name) == getattr(clean, name), name
    for name in ("deleted", "vectors", "vector_rows"):
        np.testing.assert_array_equal(getattr(dirty, name), getattr(clean, name), err_msg=name)


@given(st.lists(st.tuples(st.none() | st.binary(max_size=9), st.none() | st.binary(max_size=40)), max_size=8))
def test_no_bytes_make_it_raise(records):
    for ids in ("string", "integer"):
        for format_ in ("json", "binary"):
            decoded = decode(batch(*records), replace(SPEC, ids=ids, format=format_), frames)
            assert len(decoded.rows) + len(decoded.refused) == len(records)


def test_keep_last_within_a_topic_partition():
    raw = batch(
        encode_json("a", text="1"), encode_json("b", vector=GOOD), encode_json("a", vector=2 * GOOD), (b"b", None)
    )
    kept = keep_last(decode(raw, SPEC, frames), raw.topic_partitions, raw.offsets, raw.timestamps)
    assert kept.rows.tolist() == [2, 3]
    assert kept.ids == ["a", "b"]
    assert kept.deleted.tolist() == [False, True]
    assert kept.texts == [None, None]
    np.testing.assert_array_equal(kept.vectors, [2 * GOOD])
    assert kept.vector_rows.tolist() == [0]


def test_a_bad_last_record_does_not_swallow_a_good_earlier_one():
    raw = batch((b"z", b"junk"), encode_json("a", text="good"), (b"a", b"junk"))
    kept = keep_last(decode(raw, SPEC, frames), raw.topic_partitions, raw.offsets, raw.timestamps)
    assert kept.texts == ["good"]
    assert [refusal.row for refusal in kept.refused] == [0, 2]


def test_keep_last_between_topic_partitions_goes_by_the_timestamp():
    raw = batch(*(encode_json("a", text=str(i)) for i in range(4)))
    raw.topic_partitions[:] = [1, 0, 1, 0]
    raw.offsets[:] = [8, 100, 9, 101]
    # In topic partition 1 offset 9 is newer whatever its clock said; between the two, 50 is later than 7.
    raw.timestamps[:] = [90, 6, 50, 7]
    kept = keep_last(decode(raw, SPEC, frames), raw.topic_partitions, raw.offsets, raw.timestamps)
    assert kept.texts == ["2"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1), st.booleans()), max_size=12))
def test_keep_last_against_a_dict(records):
    raw = batch(*((key.encode(), None if gone else encode_json(key, vector=GOOD)[1]) for key, _, gone in records))
    raw.topic_partitions[:] = [place for _, place, _ in records]
    kept = keep_last(decode(raw, SPEC, frames), raw.topic_partitions, raw.offsets, raw.timestamps)
    last = {key: row for row, (key, _, _) in enumerate(records)}  # offsets and timestamps rise here
    assert dict(zip(kept.ids, kept.rows.tolist(), strict=True)) == last
    assert kept.rows.tolist() == sorted(last.values())
    assert kept.vector_rows.tolist() == [at for at, gone in enumerate(kept.deleted) if not gone]


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: encode_json("", text="t"), "id ''"),
        (lambda: encode_json(True, text="t"), "id True"),
        (lambda: encode_json(2**63, text="t"), "id 9223372036854775808"),
        (lambda: encode_json("\ud800", text="t"), "UTF-8"),
        (lambda: encode_json("a"), "neither text nor vector"),
        (lambda: encode_json("a", text=3), "int 3"),
        (lambda: encode_json("a", text="\ud800"), "JSON"),
        (lambda: encode_json("a", vector=[1.0, float("nan")]), "not finite"),
        (lambda: encode_json("a", vector=[1e300]), "not finite"),
        (lambda: encode_json("a", vector=[[1.0]]), "(1, 1)"),
        (lambda: encode_json("a", vector=["x"]), "not made of numbers"),
        (lambda: encode_json("a", vector=[10**400, 1]), "not made of numbers"),
        (lambda: encode_json("a", text="t", attributes={"vector": 1}), "'vector'"),
        (lambda: encode_json("a", text="t", attributes={"x": [1]}), "list [1]"),
        (lambda: encode_json("a", text="t", attributes={"x": float("nan")}), "None"),
        (lambda: encode_json("a", text="t", attributes={"x": 2**63}), "beyond the range of int64"),
        (lambda: encode_json("a", text="t", attributes={3: 2}), "named 3"),
        (lambda: encode_binary("a", GOOD, {"id": "b"}), "'id'"),
    ],
)
def test_writing_refuses_what_reading_would(call, names):
    with pytest.raises(RecordError) as caught:
        call()
    assert names in str(caught.value)


def test_numpy_values_are_written_as_plain_ones():
    record = encode_json(
        np.int64(3), text="t", attributes={"i": np.int32(4), "f": np.float32(0.5), "b": np.True_, "s": np.str_("x")}
    )
    decoded = decode(batch(record), replace(SPEC, ids="integer"), frames)
    assert decoded.ids == [3]
    assert decoded.schema == {"text": "str", "i": "int", "f": "float", "b": "bool", "s": "str"}
