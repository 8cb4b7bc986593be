"""Many texts that never change, end to end in one piece of memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["PackedText", "chunks"]

_CHUNK = 16_384  # texts turned into Python objects at a time, or packed in one call that holds the interpreter's lock


class PackedText:
    """A sequence of str. Takes the texts' UTF-8 and 4 bytes each (8 from 4 GiB of text on), where a str takes 49 more.

    Immutable, so thread-safe.

    Parameters
    ----------
    parts : iterable of sequence of str
        All texts, in convenient pieces; any str, lone surrogates too.
    """

    __slots__ = ("_ends", "_text")

    def __init__(self, parts: Iterable[Sequence[str]]) -> None:
        pieces: list[bytes] = []
        sizes: list[npt.NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
        for part in parts:
            joined = "".join(part)
            if joined.isascii():
                pieces.append(joined.encode())
                sizes.append(np.fromiter(map(len, part), dtype=np.int64, count=len(part)))
            else:
                encoded = [text.encode("utf-8", "surrogatepass") for text in part]
                pieces.append(b"".join(encoded))
                sizes.append(np.fromiter(map(len, encoded), dtype=np.int64, count=len(part)))
        whole = b"".join(pieces)
        ends = np.concatenate(sizes).cumsum()
        self._ends = ends if len(whole) >> 32 else ends.astype(np.uint32)
        # A slice of ASCII is a text already and takes half as long as decoding one.
        self._text: str | bytes = whole.decode("ascii") if whole.isascii() else whole

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return len(self._text) + self._ends.nbytes

    def __getitem__(self, at: int) -> str:
        if not 0 <= at < len(self):
            raise IndexError(f"no text {at} among {len(self)}")
        return self.to_list(np.array([at]))[0]

    def __iter__(self) -> Iterator[str]:
        for rows in chunks(np.arange(len(self))):
            yield from self.to_list(rows)

    def to_list(self, rows: npt.NDArray[np.int64] | None = None) -> list[str]:
        """Texts of `rows` (integers (r,), none negative), in that order; None: all."""
        if rows is None:
            starts, ends = self._ends[:-1].tolist(), self._ends[1:].tolist()
        else:
            starts, ends = self._ends.take(rows).tolist(), self._ends.take(rows + 1).tolist()
        text = self._text
        if isinstance(text, str):
            return [text[start:end] for start, end in zip(starts, ends, strict=True)]
        return [text[start:end].decode("utf-8", "surrogatepass") for start, end in zip(starts, ends, strict=True)]


def chunks(rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """`rows` in pieces, so that what is done to a piece neither stops other threads nor takes much memory."""
    for start in range(0, len(rows), _CHUNK):
        yield rows[start : start + _CHUNK]
