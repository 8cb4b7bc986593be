"""The distinct texts of a column by code, on the host; rows hold the codes, on the device."""

from __future__ import annotations

import heapq
import operator
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu.packed_text import PackedText, chunks

__all__ = ["GrowingVocabulary", "OrderedVocabulary", "Vocabulary", "merge"]

Codes = npt.NDArray[np.int32]

_PER_TEXT = 120  # of a dictionary's entry and a list's, with what they reserve ahead

_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


class Vocabulary:
    """What a filter may ask. A code keeps its text for ever, so an older view's codes stay readable.

    Attributes
    ----------
    ordered : bool
        Codes rise with the texts, in Python's order of str.
    """

    ordered: bool

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, code: int) -> str:
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        """Texts by rising code."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        raise NotImplementedError

    def code(self, text: str) -> int:
        """Code of `text`, -1 if no row ever had it. Fast: a dictionary or a bisection."""
        raise NotImplementedError

    def compare(self, sign: str, text: str) -> npt.NDArray[np.bool_]:
        """Which texts are ``<``, ``<=``, ``>``, ``>=``, ``==`` or ``!=`` `text`: bool (n,) by code.

        n is at least as large as any code that a row had when the call began.
        """
        raise NotImplementedError

    def to_list(self, codes: Codes) -> list[str | None]:
        """The texts of `codes` (int32 (r,)), None where a code is -1."""
        raise NotImplementedError


class GrowingVocabulary(Vocabulary):
    """Of a growing segment: texts in the order in which they came. One writer; readers need no lock."""

    ordered = False

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._codes: dict[str | None, int] = {None: -1}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, code: int) -> str:
        if code < 0:
            raise IndexError(f"no text has the code {code}")
        return self._texts[code]

    def __iter__(self) -> Iterator[str]:
        return islice(self._texts, len(self._texts))

    @property
    def nbytes(self) -> int:
        return sys.getsizeof(self._texts) + sys.getsizeof(self._codes) + self._bytes

    def encode(self, values: Sequence[str | None]) -> Codes:
        """Codes of `values`, int32 (n,), new ones for new texts; -1 for None."""
        codes = list(map(self._codes.get, values))
        if None in codes:
            for text in dict.fromkeys(values):
                if text is not None and text not in self._codes:
                    # The text before its code: who finds the code may look the text up.
                    self._texts.append(text)
                    self._codes[text] = len(self._texts) - 1
                    self._bytes += sys.getsizeof(text)
            codes = list(map(self._codes.get, values))
        return np.array(codes, dtype=np.int32)

    def growth(self, values: Iterable[str | None]) -> int:
        """Bytes that `values` would add to `nbytes`: each text that is new, once."""
        new = set(values).difference(self._codes)
        return sum(map(sys.getsizeof, new)) + _PER_TEXT * len(new)

    def code(self, text: str) -> int:
        return self._codes.get(text, -1)

    def compare(self, sign: str, text: str) -> npt.NDArray[np.bool_]:
        holds = _OPERATORS[sign]
        return np.array([holds(known, text) for known in self], dtype=np.bool_)

    def to_list(self, codes: Codes) -> list[str | None]:
        texts = self._texts
        return [texts[code] if code >= 0 else None for code in codes.tolist()]


class OrderedVocabulary(Vocabulary):
    """Of a merged segment: texts that never change, in their own order, packed. Immutable.

    Parameters
    ----------
    texts : PackedText
        Rising, each once.
    """

    ordered = True

    def __init__(self, texts: PackedText) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, code: int) -> str:
        return self._texts[code]

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    @property
    def nbytes(self) -> int:
        return self._texts.nbytes

    def code(self, text: str) -> int:
        at = bisect_left(self._texts, text)
        return at if at < len(self) and self._texts[at] == text else -1

    def compare(self, sign: str, text: str) -> npt.NDArray[np.bool_]:
        holds = _OPERATORS[sign]
        below, equal = bisect_left(self._texts, text), bisect_right(self._texts, text)
        found = np.empty(len(self), dtype=np.bool_)
        found[:below], found[below:equal], found[equal:] = holds(0, 1), holds(1, 1), holds(1, 0)
        return found

    def to_list(self, codes: Codes) -> list[str | None]:
        if not len(self):
            return [None] * len(codes)
        texts: list[str | None] = list(self._texts.to_list(np.maximum(codes, 0).astype(np.int64)))
        for absent in np.flatnonzero(codes < 0).tolist():
            texts[absent] = None
        return texts


_PART = 16_384  # texts packed in one go


def merge(sources: Sequence[tuple[Vocabulary, npt.NDArray[np.bool_]]]) -> tuple[OrderedVocabulary, list[Codes]]:
    """Several vocabularies as one, without the texts that are not used any more.

    The sources are walked through side by side in their own order, as in a merge sort: nothing is held but the result,
    and other threads are kept waiting no longer than it takes to sort a growing segment's texts.

    Parameters
    ----------
    sources : sequence of (Vocabulary, bool (n,))
        Each with the codes that are still used; n may be smaller than the vocabulary.

    Returns
    -------
    vocabulary : OrderedVocabulary
    recoded : list of int32 (n + 1,)
        For each source, new codes by old ones; -1 for what is not used, and in the last element, where -1 looks.
    """
    recoded = [np.full(len(used) + 1, -1, dtype=np.int32) for _, used in sources]
    streams = [_in_order(number, texts, used) for number, (texts, used) in enumerate(sources)]

    def parts() -> Iterator[list[str]]:
        texts: list[str] = []
        last, code = None, -1
        for text, number, old in heapq.merge(*streams):
            if text != last:
                code += 1
                last = text
                texts.append(text)
            recoded[number][old] = code
            if len(texts) >= _PART:
                yield texts
                texts = []
        yield texts

    return OrderedVocabulary(PackedText(parts())), recoded


def _in_order(number: int, vocabulary: Vocabulary, used: npt.NDArray[np.bool_]) -> Iterator[tuple[str, int, int]]:
    """The used texts, rising, with their source's number and their old codes."""
    codes = np.flatnonzero(used)
    if vocabulary.ordered:
        for some in chunks(codes):
            texts = vocabulary.to_list(some.astype(np.int32))
            yield from (
                (text, number, code) for text, code in zip(texts, some.tolist(), strict=True) if text is not None
            )
    else:
        yield from sorted((vocabulary[code], number, code) for code in codes.tolist())
