"""Filters against a slow reference that looks at one row after the other, and every way to write one wrong."""

from __future__ import annotations

import contextlib
import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.gpu.columns import Columns
from headrace.gpu.errors import FilterError, error_named
from headrace.gpu.filter_reader import MAX_TESTS
from headrace.gpu.filter_text import MAX_CHARS, MAX_DEPTH, MAX_VALUES
from headrace.gpu.filters import Filter, parse

SCHEMA = {
    "i": "int",
    "j": "int",
    "f": "float",
    "g": "float",
    "b": "bool",
    "c": "bool",
    "s": "str",
    "t": "str",
    "gone": "int",  # known to the collection, held by no row here
    "user-id": "int",
    "in": "str",
    "null": "bool",
}
MOST = (1 << 63) - 1


def columns_of(rows: Sequence[Mapping[str, Any]]) -> Columns:
    columns = Columns(np)
    names = {name for row in rows for name in row}
    half = len(rows) // 2
    for part in (rows[:half], rows[half:]):
        columns.append({name: [row.get(name) for row in part] for name in names}, len(part))
    return columns


def passing(text: str, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    mask = parse(text, SCHEMA).mask(columns_of(rows), len(rows), np)
    assert mask.shape == (len(rows),)
    assert mask.dtype == np.bool_
    return np.flatnonzero(mask).tolist()


# -- the reference: SQL's three values, None for unknown, one row at a time --------------------------------------------


@dataclass(frozen=True)
class Node:
    text: str
    value: Callable[[Mapping[str, Any]], bool | None]


def both(left: bool | None, right: bool | None) -> bool | None:
    if left is False or right is False:
        return False
    return None if left is None or right is None else True


def opposite(value: bool | None) -> bool | None:
    return None if value is None else not value


SIGNS = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
EDGES = [0, 1, -1, 2**53, 2**53 + 1, 2**53 - 1, -(2**53) - 1, MOST, MOST - 1, -MOST - 1, MOST - 511, MOST - 512]
INTS = st.sampled_from(EDGES) | st.integers(-3, 3) | st.integers(-MOST - 1, MOST)
FLOATS = st.sampled_from([*map(float, EDGES), 0.5, -0.5, 1e300, -1e300, math.inf, -math.inf, -0.0]) | st.floats(
    allow_nan=False
)
BIG = st.sampled_from([MOST + 1, -MOST - 2, 10**30, -(10**30), 10**309, -(10**309)])
TEXTS = st.sampled_from(["", "a", "b", "ab", "ba", "A", "ä", "it's", '"', "\\", "\n", "漢", "\U0001f600", "\0"])
POOLS = {
    "i": INTS, "j": INTS, "f": FLOATS | st.just(math.nan), "g": FLOATS | st.just(math.nan), "b": st.booleans(),
    "c": st.booleans(), "s": TEXTS, "t": TEXTS,
}  # fmt: skip
LIKE = ["ijfg", "ijfg", "ijfg", "ijfg", "bc", "bc", "st", "st"]


def written(value: Any) -> str:
    """As a filter has it: Python has no literal for infinity."""
    return repr(value).replace("inf", "1e999") if isinstance(value, float) else repr(value)


def compared(left: Any, sign: str, right: Any) -> bool | None:
    return None if left is None or right is None else bool(SIGNS[sign](left, right))


@st.composite
def checks(draw: st.DrawFn) -> Node:
    name = draw(st.sampled_from("ijfgbcst"))
    numbers, texts = name in "ijfg", name in "st"
    signs = st.sampled_from(list(SIGNS) if numbers or texts else ["==", "!="])
    constants = INTS | FLOATS | BIG if numbers else TEXTS if texts else st.booleans()
    kind = draw(st.sampled_from(["constant", "turned", "column", "between", "list", "null", "special"]))
    sign = draw(signs)
    if kind == "constant":
        value = draw(constants)
        return Node(f"{name} {sign} {written(value)}", lambda row: compared(row.get(name), sign, value))
    if kind == "turned":
        value = draw(constants)
        return Node(f"{written(value)} {sign} {name}", lambda row: compared(value, sign, row.get(name)))
    if kind == "column":
        other = draw(st.sampled_from(LIKE["ijfgbcst".index(name)]))
        return Node(f"{name} {sign} {other}", lambda row: compared(row.get(name), sign, row.get(other)))
    if kind == "between":
        low, high, second = draw(constants), draw(constants), draw(signs)
        return Node(
            f"{written(low)} {sign} {name} {second} {written(high)}",
            lambda row: both(compared(low, sign, row.get(name)), compared(row.get(name), second, high)),
        )
    if kind == "list":
        values = draw(st.lists(constants, max_size=4))
        negated = draw(st.booleans())
        # Not Python's `in`, for which a NaN is itself.
        found: Callable[[Any], bool | None] = lambda x: None if x is None else any(x == value for value in values)  # noqa: E731
        shown = f"[{', '.join(map(written, values))}]"
        if negated:
            return Node(f"{name} not in {shown}", lambda row: opposite(found(row.get(name))))
        return Node(f"{name} in {shown}", lambda row: found(row.get(name)))
    if kind == "null":
        name = draw(st.sampled_from([name, "gone"]))
        if draw(st.booleans()):
            return Node(f"{name} is not None", lambda row: row.get(name) is not None)
        return Node(f"{name} is None", lambda row: row.get(name) is None)
    if texts:
        part = draw(TEXTS)
        how, held = draw(
            st.sampled_from(
                [
                    (f"{name}.startswith({part!r})", str.startswith),
                    (f"{name}.endswith({part!r})", str.endswith),
                    (f"{part!r} in {name}", str.__contains__),
                ]
            )
        )
        return Node(how, lambda row: None if row.get(name) is None else held(row[name], part))
    if numbers:
        return Node(f"gone {sign} {name}", lambda row: None)
    return Node(name, lambda row: row.get(name))


def joined(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    def one(parts: list[Node], word: str) -> Node:
        def value(row: Mapping[str, Any]) -> bool | None:
            answer: bool | None = word == "and"
            for part in parts:
                now = part.value(row)
                answer = both(answer, now) if word == "and" else opposite(both(opposite(answer), opposite(now)))
            return answer

        return Node(f" {word} ".join(f"({part.text})" for part in parts), value)

    return st.builds(one, st.lists(inner, min_size=2, max_size=3), st.sampled_from(["and", "or"])) | st.builds(
        lambda part: Node(f"not ({part.text})", lambda row: opposite(part.value(row))), inner
    )


ROWS = st.lists(
    st.fixed_dictionaries({}, optional={name: pool | st.none() for name, pool in POOLS.items()})
    | st.fixed_dictionaries(POOLS),
    max_size=12,
)


@given(st.recursive(checks(), joined, max_leaves=8), ROWS)
def test_a_filter_passes_what_a_slow_reading_of_each_row_passes(node: Node, rows: list[dict[str, Any]]) -> None:
    assert passing(node.text, rows) == [at for at, row in enumerate(rows) if node.value(row) is True]


@given(checks(), ROWS)
def test_a_row_without_the_value_passes_neither_a_test_nor_its_negation(node: Node, rows: list[dict[str, Any]]) -> None:
    yes, no = set(passing(node.text, rows)), set(passing(f"not ({node.text})", rows))
    assert not yes & no
    assert {at for at, row in enumerate(rows) if node.value(row) is None} == set(range(len(rows))) - yes - no


@given(st.text(alphabet="ab i<=>!()[]',.\"\\-+*{}:0e_nот漢\n\t\0", max_size=40) | st.text(max_size=40))
@example("i <")
@example("\ud800")
@example("'\ud800' in s")
@example("i == '\\U00110000'")
def test_any_text_is_read_or_refused_with_its_place(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(FilterError):
            assert isinstance(parse(text, SCHEMA), Filter)


# -- single things -----------------------------------------------------------------------------------------------------


def test_the_example_of_the_readme() -> None:
    schema = {"price": "float", "brand": "str", "sold": "bool"}
    rows = [
        {"price": 20.0, "brand": "a", "sold": False},
        {"price": 60.0, "brand": "a", "sold": False},
        {"price": 20.0, "brand": "c", "sold": False},
        {"price": 20.0, "brand": "b", "sold": True},
        {"price": 20.0, "brand": "b"},
        {"brand": "b", "sold": False},
    ]
    found = parse("price < 50 and brand in ['a','b'] and not sold", schema)
    assert found.mask(columns_of(rows), len(rows), np).tolist() == [True, False, False, False, False, False]


FLOAT_EDGES = [*map(float, EDGES), 0.5, -0.5, 1.5, 1e300, -1e300, math.inf, -math.inf, -0.0, math.nan]
NUMBERS = [*EDGES, *FLOAT_EDGES[:-1], MOST + 1, MOST + 2, -MOST - 2, 10**30, -(10**30), 10**309, -(10**309)]


@pytest.mark.parametrize("sign", SIGNS)
def test_every_number_compares_with_every_other_as_in_python(sign: str) -> None:
    rows = [{"i": i, "j": j, "f": f, "g": g} for i, j in zip(EDGES, EDGES[::-1], strict=True) for f in FLOAT_EDGES
            for g in FLOAT_EDGES]  # fmt: skip
    columns, compare = columns_of(rows), SIGNS[sign]

    def check(text: str, wanted: Callable[[dict[str, Any]], bool]) -> None:
        found = parse(text, SCHEMA).mask(columns, len(rows), np).tolist()
        assert found == [wanted(row) for row in rows], text
        found = parse(f"not {text}", SCHEMA).mask(columns, len(rows), np).tolist()
        assert found == [not wanted(row) for row in rows], text

    for one, two in ("ij", "if", "fi", "fg"):
        check(f"{one} {sign} {two}", lambda row, one=one, two=two: compare(row[one], row[two]))
    rows = rows[: len(FLOAT_EDGES)] + rows[:: len(FLOAT_EDGES) ** 2]
    columns = columns_of(rows)
    for number in NUMBERS:
        for name in "ig":
            check(f"{name} {sign} {written(number)}", lambda row, name=name: compare(row[name], number))  # noqa: B023
            check(f"{written(number)} {sign} {name}", lambda row, name=name: compare(number, row[name]))  # noqa: B023


@pytest.mark.parametrize("sign", SIGNS)
def test_every_text_compares_with_every_other_as_in_python(sign: str) -> None:
    texts = ["", "a", "b", "ab", "ba", "A", "ä", "漢", "\U0001f600", "\uffff"]
    rows = [{"s": one, "t": two} for one in texts for two in reversed(texts)]
    assert passing(f"s {sign} t", rows) == [at for at, row in enumerate(rows) if SIGNS[sign](row["s"], row["t"])]
    for text in texts:
        assert passing(f"s {sign} {text!r}", rows) == [at for at, row in enumerate(rows) if SIGNS[sign](row["s"], text)]
        assert passing(f"{text!r} {sign} s", rows) == [at for at, row in enumerate(rows) if SIGNS[sign](text, row["s"])]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("i == 9007199254740993", [1]),
        ("i > 9007199254740992", [1]),
        ("i <= 9007199254740992.0", [0]),
        ("i < 1e300", [0, 1]),
        ("i > -1e999", [0, 1]),
        ("i == 4503599627370496.5", []),
        ("f == 9007199254740993", []),
        ("f < 9007199254740993", [0, 1]),
        ("f >= 9007199254740993", []),
        ("i == f", [0]),
        ("i > f", [1]),
        ("f < i", [1]),
        ("i in [9007199254740993.0, 9007199254740993]", [0, 1]),
        ("f in [9007199254740993]", []),
    ],
)
def test_numbers_are_never_rounded_to_be_compared(text: str, wanted: list[int]) -> None:
    rows = [{"i": 2**53, "f": 2.0**53}, {"i": 2**53 + 1, "f": 2.0**53}]
    assert passing(text, rows) == wanted


def test_names_that_python_would_not_take() -> None:
    rows = [{"user-id": 7, "in": "a", "null": True}, {"user-id": 8, "in": "b", "null": False}]
    assert passing('col("user-id") == 7', rows) == [0]
    assert passing("col('in') == 'b' and not null", rows) == [1]
    assert passing("col('in').startswith('a')", rows) == [0]


def test_letters_that_look_alike_stay_apart() -> None:
    # Python's own parser takes the ligature for the two letters.
    assert parse("ﬁ == 1", {"ﬁ": "int"}).kinds == (("ﬁ", "int"),)
    with pytest.raises(FilterError, match="is not known"):
        parse("ﬁ == 1", {"fi": "int"})


def test_lines_and_spaces_do_not_matter() -> None:
    rows = [{"i": 1}, {"i": 5}]
    assert passing("\n  i > 0\n  and\n\ti < 3 ", rows) == [0]
    assert passing("(i==1)or(i==5)", rows) == [0, 1]


def test_a_filter_is_a_key_and_reads_the_same_elsewhere() -> None:
    one, two = parse("i < 3 and s == 'a'", SCHEMA), parse("i < 3 and s == 'a'", {"i": "int", "s": "str"})
    assert one == two
    assert hash(one) == hash(two)
    assert one.kinds == (("i", "int"), ("s", "str"))
    assert Filter.from_wire(one.to_wire()) == one
    assert parse("i < 3", SCHEMA) != parse("i < 3", {"i": "float"})
    assert parse("i < 3", SCHEMA) is parse("i < 3", SCHEMA)
    with pytest.raises(AttributeError):
        one.text = "i < 4"  # type: ignore[misc]


def test_only_the_rows_of_the_view_are_tested() -> None:
    columns = columns_of([{"i": number} for number in range(10)])
    assert parse("i >= 2", SCHEMA).mask(columns, 5, np).tolist() == [False, False, True, True, True]
    assert parse("gone is None", SCHEMA).mask(columns, 3, np).tolist() == [True] * 3
    assert parse("gone == 3", SCHEMA).mask(columns, 3, np).tolist() == [False] * 3
    assert parse("not gone == 3", SCHEMA).mask(columns, 3, np).tolist() == [False] * 3
    assert parse("True", SCHEMA).mask(columns, 2, np).tolist() == [True] * 2
    assert parse("i is None", SCHEMA).mask(Columns(np), 0, np).tolist() == []


def test_a_mask_belongs_to_the_caller() -> None:
    columns = columns_of([{"i": 1, "b": True}, {"i": 2, "b": False}])
    for text in ("b", "i is not None", "b and i == 1", "b or i is None"):
        found = parse(text, SCHEMA)
        before = found.mask(columns, 2, np).tolist()
        found.mask(columns, 2, np)[:] ^= True
        assert found.mask(columns, 2, np).tolist() == before


def test_a_column_of_another_kind_than_was_said() -> None:
    columns = columns_of([{"i": "a"}])
    with pytest.raises(FilterError, match="'i' holds str"):
        parse("i < 3", SCHEMA).mask(columns, 1, np)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        ("", 0, "empty"),
        (" \n ", 0, "empty"),
        ("ii < 3", 1, "'ii' is not known: did you mean 'i'"),
        ("i < 3 and xyzzy", 11, "there are b, c, f, g, gone, i"),
        ("i < 's'", 5, "'i' holds whole numbers: it cannot be compared with 's'"),
        ("'s' < i", 1, "it cannot be compared with 's'"),
        ("s < 3", 5, "'s' holds texts"),
        ("i == True", 6, "cannot be compared with True"),
        ("b == 1", 6, "'b' holds True and False"),
        ("b < True", 5, "no order"),
        ("b < c", 5, "no order"),
        ("i < s", 5, "column 's', which holds texts"),
        ("s in ['a', 3]", 12, "cannot be compared with 3"),
        ("i == None", 6, "write 'is None'"),
        ("i in [None]", 7, "join it with 'or'"),
        ("i is 3", 6, "'is' only goes with None"),
        ("b is True", 6, "write == or !="),
        ("i = 3", 3, "write '==', not '='"),
        ("i < 3 && b", 7, "write 'and', not '&&'"),
        ("i < 3 || b", 7, "write 'or', not '||'"),
        ("!b", 1, "write 'not', not '!'"),
        ("i <> 3", 3, "write '!=', not '<>'"),
        ("b AND c", 3, "write 'and', not 'AND'"),
        ("b == true", 6, "write 'True', not 'true'"),
        ("i is NULL", 6, "write 'None', not 'NULL'"),
        ("i + 1 < 3", 3, "does not calculate"),
        ("i - 1 < 3", 3, "does not calculate"),
        ("user-id == 3", 5, "write col('user-id')"),
        ("in == 'a'", 0, "cannot be read"),
        ("class == 1", 1, "write col('class')"),
        ("i < -s", 5, "a minus can only stand before a number"),
        ("s == 'a\\d'", 8, "write a backslash itself as two"),
        ("s == 'abc", 6, "no closing '"),
        ("s == f'a'", 6, "leave out 'f'"),
        ("s in ['a' 'b']", 7, "a comma is missing"),
        ("i < 3 i", 5, "an operator or a comma is missing"),
        ("(i < 3", 1, "never closed"),
        ("i < 3)", 6, "closes nothing"),
        ("(i < 3]", 7, "closes nothing"),
        ("i <", 3, "something must follow '<'"),
        ("i in {1, 2}", 6, "square brackets"),
        ("i in 3", 6, "'in' needs a list of values"),
        ("s in 'abc'", 6, "'in' needs a list of values"),
        ("3 in i", 6, "must hold texts"),
        ("3 in s", 6, "only a text can be looked for"),
        ("s in t", 6, "only a text can be looked for"),
        ("1 in [1]", 1, "only a column can be looked for"),
        ("1 < 2", 1, "one side must be a column"),
        ("3 is None", 1, "only a column can be None"),
        ("i < [1]", 5, "'in' or 'not in'"),
        ("1 < i in [3] < 3", 10, "join two conditions with 'and'"),
        ("i in [i]", 7, "put a text into quotes"),
        ("i in [[1]]", 7, "a value is needed"),
        ("i", 1, "'i' holds whole numbers: compare it with a value"),
        ("3", 1, "this is no condition"),
        ("'a'", 1, "this is no condition"),
        ("s.upper() == 'A'", 1, ".upper() cannot be: texts have .startswith"),
        ("s.upper().startswith('A')", 1, ".upper() cannot be"),
        ("s.startswith('a') == True", 1, "a condition by itself"),
        ("s.lower()", 1, ".lower() cannot be"),
        ("s.startswith()", 1, "takes one text"),
        ("s.startswith('a', 1)", 1, "takes one text"),
        ("s.startswith(1)", 14, "takes a text, not 1"),
        ("i.startswith('a')", 1, "needs a column that holds texts"),
        ("len(s) == 3", 1, "len() is not known"),
        ("col(s) == 3", 5, "as a text"),
        ("col('s', 't') == 3", 1, "takes one name"),
        ("s.t == 3", 1, "no dots"),
        ("__import__('os').system('x')", 1, ".system() cannot be"),
        ("i == 007", 0, "leading zeros"),
        ("i == 1" + "0" * 5000, 6, "more than 400 digits"),
        ("i; b", 2, "has no meaning"),
        ("i # b", 3, "has no meaning"),
        ("lambda: i", 1, "'lambda' has no meaning"),
        ("i if b else c", 3, "'if' has no meaning"),
        ("[b for b in c]", 4, "'for' has no meaning"),
        ("i := 3", 3, "has no meaning"),
        ("i == ...", 8, "something must follow"),
        ("i == 1j", 6, "neither a number nor a name"),
        ("id == 'a'", 1, "ids are not attributes"),
        ("i == 3 and col('id') == 'a'", 12, "read rows by id with get(ids)"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(text: str, place: int, why: str) -> None:
    with pytest.raises(FilterError) as told:
        parse(text, SCHEMA)
    message = str(told.value)
    assert why in message
    if place:
        sentence, shown, marks = message.split("\n")
        assert sentence.startswith(f"filter, character {place}: ")
        assert set(marks) <= {" ", "^"}
        if len(text) < 70:
            assert shown == f"  {text}"
            assert marks.index("^") == place + 1
    assert type(error_named("FilterError", message)) is FilterError


def test_the_marks_stand_below_the_place_in_a_terminal() -> None:
    with pytest.raises(FilterError) as told:
        parse("s == '漢字' and x == 1", SCHEMA)
    _, shown, marks = str(told.value).split("\n")
    wide = sum(2 if letter in "漢字" else 1 for letter in shown[: shown.index("x")])
    assert marks == " " * wide + "^"


def test_a_long_filter_is_shown_around_the_place() -> None:
    with pytest.raises(FilterError) as told:
        parse(" or ".join(f"i == {number}" for number in range(100)) + " or nix", SCHEMA)
    _, shown, marks = str(told.value).split("\n")
    assert len(shown) < 90
    assert shown[marks.index("^") :][:3] == "nix"


@pytest.mark.parametrize(("letter", "name"), [("\0", "a NUL"), ("\ud800", "lone surrogate")])
def test_letters_that_python_would_not_read_are_told_with_their_place(letter: str, name: str) -> None:
    with pytest.raises(FilterError, match=rf"character 11: .*{name}"):
        parse(f"s == 'abcd{letter}e'", SCHEMA)


def test_a_collection_without_columns_says_where_they_come_from() -> None:
    with pytest.raises(FilterError, match="no other is yet: records bring columns"):
        parse("price < 3", {})


def test_a_schema_is_held_to_its_words() -> None:
    with pytest.raises(FilterError, match="'x' has the kind 'object'"):
        parse("x < 3", {"x": "object"})
    with pytest.raises(FilterError, match="write it as text"):
        parse(3, SCHEMA)  # type: ignore[arg-type]


class TestLimits:
    def test_depth(self) -> None:
        deep = MAX_DEPTH - 1
        assert passing("(" * deep + "i == 1" + ")" * deep, [{"i": 1}]) == [0]
        assert passing("not " * deep + "i == 1", [{"i": 1}]) == ([0] if deep % 2 == 0 else [])
        for text in ("(" * 9000 + "b" + ")" * 9000, "not " * 9000 + "b", "[" * 9000):
            with pytest.raises(FilterError, match=f"more than {MAX_DEPTH} deep"):
                parse(text, SCHEMA)

    @pytest.mark.parametrize(
        ("start", "link"),
        [("s", ".f()"), ("s", ".f"), ("s", ".f('a')"), ("b", "()"), ("i", "[0]"), ("1", "-1"), ("0x1e", "-0x1e"),
         ("i == ", "-"), ("col('a')", "('a')"), ("b", ","), ("i", " < i"), ("b", " or b")],
    )  # fmt: skip
    def test_no_chain_exhausts_the_stack(self, start: str, link: str) -> None:
        for links in (MAX_CHARS - len(start)) // len(link), 8000, 500:
            with pytest.raises(FilterError):
                parse(start + link * links, SCHEMA)

    def test_length_values_and_comparisons(self) -> None:
        values = ", ".join(map(str, range(MAX_VALUES)))
        assert passing(f"i in [{values}]", [{"i": 5}, {"i": MAX_VALUES}]) == [0]
        with pytest.raises(FilterError, match="10,000 values"):
            parse(f"i in [{values}, 1]", SCHEMA)
        with pytest.raises(FilterError, match="characters"):
            parse("b" + " " * MAX_CHARS, SCHEMA)
        assert passing(" or ".join(["i == 1"] * MAX_TESTS), [{"i": 1}]) == [0]
        with pytest.raises(FilterError, match="comparisons"):
            parse(" or ".join(["i == 1"] * (MAX_TESTS + 1)), SCHEMA)
        with pytest.raises(FilterError, match="comparisons"):
            parse(" < ".join(["i"] * 1000), SCHEMA)
