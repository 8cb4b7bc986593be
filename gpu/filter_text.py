"""A filter's text before Python's parser sees it: limits, words of other languages, and errors that show the place.

Only tokens that a filter can have get through, and only so many, nested only so deep: Python's parser is handed nothing
that could exhaust its stack, and what SQL or C would have allowed is answered with how it is written here.
"""

from __future__ import annotations

import itertools
import keyword
import re
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from headrace.gpu.errors import FilterError

__all__ = ["MAX_CHARS", "MAX_DEPTH", "MAX_VALUES", "checked", "refusal"]

MAX_CHARS = 1 << 18
"""Of a filter's text: room for `MAX_VALUES` ids of some 20 characters."""
MAX_VALUES = 10_000
"""Numbers and texts in one filter."""
MAX_DEPTH = 64
"""Brackets and `not` around each other; Python's own parser gives up at 200 brackets."""

_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<text>'(?:[^'\\\r\n]|\\[^\r\n])*'|"(?:[^"\\\r\n]|\\[^\r\n])*")
    |(?P<number>0[xX][0-9a-fA-F_]+|(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9]+)?)
    |(?P<name>[^\W\d]\w*)
    |(?P<sign>[=!<>]=|<>|&&|\|\||[<>()\[\],.=\-])
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:[\\'\"abfnrtv]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U00(?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4})")
_WORDS = frozenset({"and", "or", "not", "in", "is", "True", "False", "None"})
_OPERATORS = frozenset({"and", "or", "not", "in", "is"})
_INSTEAD = {
    "=": "==", "<>": "!=", "&&": "and", "&": "and", "||": "or", "|": "or", "!": "not", "~": "not", "null": "None",
    "nil": "None", "true": "True", "false": "False", "and": "and", "or": "or", "not": "not", "in": "in", "is": "is",
}  # fmt: skip
_MAX_TOKENS = 3 * MAX_VALUES + 8192
_MAX_CALLS = 512
_DIGITS = 400
_CLOSING = {"(": ")", "[": "]"}
_SHOWN = 72


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int

    @property
    def ends_value(self) -> bool:
        """Something that has a value ends here, so that an operator, a comma or a bracket must follow."""
        return self.kind in ("text", "number") or self.text in (")", "]") or self._named

    @property
    def begins_value(self) -> bool:
        return self.kind in ("text", "number") or self.text in ("(", "[", "not") or self._named

    @property
    def _named(self) -> bool:
        return self.kind == "name" and self.text not in _OPERATORS


def refusal(text: str, start: int, end: int, why: str) -> FilterError:
    """An error that says `why`, where, and shows the line with characters `start` to `end` of `text` marked."""
    first = max(0, start - _SHOWN // 2)
    last = min(len(text), first + _SHOWN)
    shown = "".join(letter if letter.isprintable() else " " for letter in text[first:last])
    before, after = "… " * (first > 0), " …" * (last < len(text))
    gap = sum(map(_width, before + shown[: start - first]))
    marks = max(1, sum(map(_width, shown[start - first : max(start + 1, end) - first])))
    return FilterError(f"filter, character {start + 1}: {why}\n  {before}{shown}{after}\n  {' ' * gap}{'^' * marks}")


def _width(letter: str) -> int:
    """Columns that a character takes in a terminal."""
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def checked(text: str, columns: Collection[str] = ()) -> str:
    """`text` for Python's parser: as long as it was, with plain spaces between its tokens.

    Parameters
    ----------
    text : str
    columns : collection of str
        Names that are columns even if they look like a word of another language, such as ``null``.

    Raises
    ------
    FilterError
        The text is empty, too long, nested too deep, or has something in it that no filter has.
    """
    if not text.strip():
        raise FilterError("the filter is empty: leave it out (None) to search among all rows")
    if len(text) > MAX_CHARS:
        raise FilterError(f"the filter has {len(text):,} characters: write one of at most {MAX_CHARS:,}")
    tokens = list(itertools.islice(_tokens(text, columns), _MAX_TOKENS + 1))
    dots = [token for token in tokens if token.text == "."]
    for crowd, most, what in ((tokens, _MAX_TOKENS, "words and signs"), (dots, _MAX_CALLS, "dots")):
        if len(crowd) > most:
            raise refusal(text, crowd[most].start, crowd[most].end, f"the filter has more than {most:,} {what}")
    _check_nesting(text, tokens)
    for before, token in zip([None, *tokens], tokens, strict=False):
        _check_pair(text, before, token, columns)
    last = tokens[-1]
    if not last.ends_value:
        raise refusal(text, last.start, last.end, f"something must follow {last.text!r}")
    values = [token for token in tokens if token.kind in ("text", "number")]
    if len(values) > MAX_VALUES:
        token = values[MAX_VALUES]
        raise refusal(text, token.start, token.end, f"the filter has more than {MAX_VALUES:,} values: write fewer")
    plain = [" "] * len(text)
    for token in tokens:
        plain[token.start : token.end] = token.text
    return "".join(plain)


def _tokens(text: str, columns: Collection[str]) -> Iterator[_Token]:
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or "other"
        if kind == "space":
            continue
        token = _Token(kind, match.group(), *match.span())
        if why := _wrong(token, columns):
            raise refusal(text, token.start, token.end, why)
        if kind == "text":
            _check_escapes(text, token)
        yield token


def _wrong(token: _Token, columns: Collection[str]) -> str:
    """Why no filter can have this token, "" if it can."""
    word = token.text
    if token.kind == "name":
        if word in _WORDS or (word in columns and not keyword.iskeyword(word)):
            return ""
        if keyword.iskeyword(word):
            return f"{word!r} has no meaning in a filter: write col({word!r}) if it is a column"
        if instead := _INSTEAD.get(word.lower()):
            return f"write {instead!r}, not {word!r}"
        return ""
    if token.kind == "number" and len(word) > _DIGITS:
        return f"this number has more than {_DIGITS} digits: no column holds one like it"
    if token.kind in ("sign", "other") and (instead := _INSTEAD.get(word)):
        return f"write {instead!r}, not {word!r}"
    if token.kind == "other":
        if word in "'\"":
            return f"this text has no closing {word}"
        if word in "+*/%^":
            return f"{word!r} cannot be: a filter compares, it does not calculate"
        if word in "{}":
            return f"{word!r} cannot be: write a list of values in square brackets"
        return f"{word!r} has no meaning in a filter"
    return ""


def _check_escapes(text: str, token: _Token) -> None:
    for at, letter in enumerate(token.text):
        if letter == "\0" or "\ud800" <= letter <= "\udfff":
            what = "a NUL" if letter == "\0" else "half of a character (a lone surrogate)"
            why = f"this text holds {what}: write it as {ascii(letter)[1:-1]!s}"
            raise refusal(text, token.start + at, token.start + at + 1, why)
    at = 0
    while (at := token.text.find("\\", at)) >= 0:
        match = _ESCAPE.match(token.text, at)
        if match is None:
            start = token.start + at
            raise refusal(text, start, start + 2, "this escape is not known: write a backslash itself as two")
        at = match.end()


def _check_nesting(text: str, tokens: list[_Token]) -> None:
    opened: list[_Token] = []
    nots = 0
    for token in tokens:
        nots = nots + 1 if token.text == "not" else 0
        if token.kind == "sign" and token.text in "([":
            opened.append(token)
        elif token.kind == "sign" and token.text in ")]":
            if not opened or _CLOSING[opened[-1].text] != token.text:
                raise refusal(text, token.start, token.end, f"this {token.text} closes nothing")
            opened.pop()
        if len(opened) + nots > MAX_DEPTH:
            raise refusal(text, token.start, token.end, f"the filter is nested more than {MAX_DEPTH} deep: flatten it")
    if opened:
        raise refusal(text, opened[-1].start, opened[-1].end, f"this {opened[-1].text} is never closed")


def _check_pair(text: str, before: _Token | None, token: _Token, columns: Collection[str]) -> None:
    """Two tokens that cannot stand side by side, told better than a parser would."""
    if token.text == "-" and token.kind == "sign" and before is not None and before.ends_value:
        name = _dashed(text, token.start)
        why = f"write col({name!r})" if name in columns else "'-' cannot be: a filter compares, it does not calculate"
        raise refusal(text, token.start, token.end, why)
    if before is None:
        return
    if before.text == "-" and before.kind == "sign" and token.kind != "number":
        raise refusal(text, before.start, before.end, "a minus can only stand before a number")
    touching = before.end == token.start
    if token.kind == "text" and before.kind == "name" and before.text not in _OPERATORS and touching:
        raise refusal(text, before.start, token.end, f"texts have no prefix here: leave out {before.text!r}")
    if token.kind in ("name", "number") and before.kind in ("name", "number") and touching:
        raise refusal(text, before.start, token.end, "this is neither a number nor a name")
    if before.ends_value and token.begins_value and not (before.kind == "name" and token.text == "("):
        if token.text == "not":  # `x not in [...]`: the parser sees what follows
            return
        what = "a comma" if before.kind == token.kind == "text" else "an operator or a comma"
        raise refusal(text, before.start, token.end, f"{what} is missing here")


def _dashed(text: str, at: int) -> str:
    """The letters, digits, dots and dashes around a dash."""
    start = end = at
    while start and (text[start - 1].isalnum() or text[start - 1] in "_.-"):
        start -= 1
    while end < len(text) and (text[end].isalnum() or text[end] in "_.-"):
        end += 1
    return text[start:end]
