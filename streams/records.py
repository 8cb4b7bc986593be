"""From Kafka's bytes to rows, and which bytes cannot be rows.

The key is the id; no value, or an empty one, deletes it. A value is a JSON object (`text` or `vector`, other fields are
flat attributes) or, with the header ``headrace-format: f32``, little-endian float32 with the attributes in a header.
Whatever is wrong with one record is its own affair: it is refused with a reason, and its neighbours decode as if it
were not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu.backend import Array, Frames
from headrace.streams.attributes import check_columns, short
from headrace.streams.batches import Decoded, RawBatch, RecordSpec, Refusal, keep_last
from headrace.streams.encode import (
    ATTRIBUTES_HEADER,
    ENCODER_HEADER,
    FORMAT_HEADER,
    encode_binary,
    encode_json,
    encode_key,
)
from headrace.streams.vector_checks import length_fault, list_fault, vector_faults

__all__ = [
    "Decoded",
    "RawBatch",
    "RecordSpec",
    "Refusal",
    "decode",
    "encode_binary",
    "encode_json",
    "encode_key",
    "keep_last",
]

_FORMATS = {b"json": "json", b"f32": "binary"}
_INT64 = 1 << 63


def decode(raw: RawBatch, spec: RecordSpec, frames: Frames) -> Decoded:
    """Read a batch; nothing that is in a record makes it raise.

    A pure function: thread-safe, and the same bytes give the same rows in any batch (but for new attributes, whose kind
    the first usable record decides).
    """
    return _Decoder(raw, spec, frames).run()


class _Decoder:
    """One batch on its way. Rows are positions in the `RawBatch`; a refused row is skipped by every later check."""

    def __init__(self, raw: RawBatch, spec: RecordSpec, frames: Frames) -> None:
        self.raw = raw
        self.spec = spec
        self.frames = frames
        self.count = len(raw.keys)
        self.refused: dict[int, str] = {}
        self.ids: list[Any] = []
        self.deleted = np.zeros(self.count, dtype=np.bool_)
        self.texts: list[str | None] = [None] * self.count
        self.columns: dict[str, list[Any]] = {}
        self.matrices: list[npt.NDArray[np.float32]] = []
        self.matrix_rows: list[int] = []

    def run(self) -> Decoded:
        self._read_keys()
        json_rows, binary_rows, stamps, attributes = self._sort()
        if binary_rows:
            self._read_binary(binary_rows)
        if json_rows:
            self._read_json(json_rows)
        if stamps:
            self._check_stamps(stamps)
        if attributes:
            self._read_attributes(attributes)
        schema = check_columns(self.columns, self._usable(), self.spec.schema, self.refuse)
        return self._result(schema)

    def refuse(self, row: int, reason: str) -> None:
        self.refused.setdefault(row, reason)

    def _read_keys(self) -> None:
        keys = self.raw.keys
        try:
            if self.spec.ids == "string":
                self.ids = [key.decode() for key in keys]  # type: ignore[union-attr]
                good = "" not in self.ids
            else:
                self.ids = [int(key) for key in keys]  # type: ignore[arg-type]
                # The same bytes again: else " 7", "+7" and "007" would be one id, each in another topic partition.
                good = [b"%d" % id_ for id_ in self.ids] == keys and all(-_INT64 <= id_ < _INT64 for id_ in self.ids)
        except (AttributeError, TypeError, ValueError):
            good = False
        if not good:
            self.ids = [self._read_key(row, key) for row, key in enumerate(keys)]

    def _read_key(self, row: int, key: bytes | None) -> str | int | None:
        if not key:
            self.refuse(row, f"the key is {'missing' if key is None else 'empty'}: it must be the id")
            return None
        try:
            text = key.decode()
            if self.spec.ids == "string":
                return text
            number = int(text)
        except UnicodeDecodeError:
            self.refuse(row, f"the key {short(key)} is not UTF-8: it must be the id")
        except ValueError:
            self.refuse(row, f"the key {short(text)} is not a whole number, as this collection's ids are")
        else:
            if str(number) == text and -_INT64 <= number < _INT64:
                return number
            self.refuse(
                row, f"the key {short(text)} is not an int64 in its shortest form, as this collection's ids are"
            )
        return None

    def _sort(self) -> tuple[list[int], list[int], dict[int, bytes], dict[int, bytes]]:
        """JSON rows, binary rows; and from the headers, by row, the stamp of the encoder and the attributes."""
        json_rows: list[int] = []
        binary_rows: list[int] = []
        stamps: dict[int, bytes] = {}
        attributes: dict[int, bytes] = {}
        limit = self.spec.max_record_bytes
        for row, (key, value, headers) in enumerate(zip(self.raw.keys, self.raw.values, self.raw.headers, strict=True)):
            if row in self.refused:
                continue
            if not value:  # a tombstone or an empty value
                self.deleted[row] = True
                continue
            format_, size = self.spec.format, len(key or b"") + len(value)
            if headers:
                named = {name: content for name, content in headers if content is not None}
                size += sum(map(len, named.values()))
                if (told := named.get(FORMAT_HEADER)) is not None:
                    format_ = _FORMATS.get(told, "")
                    if not format_:
                        self.refuse(row, f"header {FORMAT_HEADER} is {short(told)}: use b'json' or b'f32'")
                        continue
                if ENCODER_HEADER in named:
                    stamps[row] = named[ENCODER_HEADER]
                if ATTRIBUTES_HEADER in named:
                    attributes[row] = named[ATTRIBUTES_HEADER]
                    if format_ == "json":
                        self.refuse(row, f"a JSON record has header {ATTRIBUTES_HEADER}: put attributes into the value")
                        continue
            if size > limit:
                self.refuse(row, f"the record has {size} bytes, more than the limit of {limit}")
                continue
            (json_rows if format_ == "json" else binary_rows).append(row)
        return json_rows, binary_rows, stamps, attributes

    def _read_binary(self, rows: list[int]) -> None:
        values: list[Any] = self.raw.values
        right = 4 * self.spec.dim
        if any(len(values[row]) != right for row in rows):
            for row in rows:
                if len(values[row]) != right:
                    self.refuse(row, length_fault(len(values[row]), self.spec.dim))
            rows = [row for row in rows if row not in self.refused]
        joined = bytearray().join([values[row] for row in rows])  # a bytearray, so that the matrix can be written to
        matrix = np.frombuffer(joined, dtype="<f4").reshape(len(rows), self.spec.dim)
        self._add_vectors(matrix.astype(np.float32, copy=False), rows, raw=True)

    def _read_json(self, rows: list[int]) -> None:
        frame, bad = self.frames.decode_json([self.raw.values[row] or b"" for row in rows])
        for place, why in bad.items():
            self.refuse(rows[place], f"the value cannot be read: {why}")
        rows = [row for place, row in enumerate(rows) if place not in bad] if bad else rows
        columns = self.frames.to_lists(frame)
        if "id" in columns:
            self._check_ids(columns.pop("id"), rows)
        lists = columns.pop("vector", None)
        if lists is not None:
            matrix, places = self.frames.vectors(frame, "vector", self.spec.dim)
            found = [rows[place] for place in places.tolist()]
            if len(found) + lists.count(None) < len(lists):
                right = set(found)
                for row, given in zip(rows, lists, strict=True):
                    if given is not None and row not in right:
                        self.refuse(row, list_fault(given, self.spec.dim))
            self._add_vectors(_on_host(matrix), found, raw=False)
        self._check_texts(columns.get("text"), lists, rows)
        self._add_columns(columns, rows)

    def _check_texts(self, texts: list[Any] | None, lists: list[Any] | None, rows: list[int]) -> None:
        """A text is a str, and each record has a text that can be encoded, or a vector."""
        nothing = [None] * len(rows)
        for row, text, given in zip(rows, texts or nothing, lists or nothing, strict=True):
            if type(text) is str:
                self.texts[row] = text
                if given is None and self.spec.encoder is None:
                    self.refuse(row, "the record has a text but no vector, and this collection has no encoder for it")
            elif text is not None:
                self.refuse(row, f"the text is {short(text)}: it must be a string")
            elif given is None:
                self.refuse(row, "the record has neither text nor vector: send one, or a null value to delete the id")

    def _check_ids(self, given: list[Any], rows: list[int]) -> None:
        for row, id_ in zip(rows, given, strict=True):
            if id_ is not None and (type(id_) is not type(self.ids[row]) or id_ != self.ids[row]):
                self.refuse(row, f"the field id is {short(id_)}, but the key is {short(self.ids[row])}")

    def _check_stamps(self, stamps: dict[int, bytes]) -> None:
        """A vector of another encoder lies in another space; without an encoder, the collection takes any."""
        if (ours := self.spec.encoder) is None:
            return
        for row in self.matrix_rows:
            if row in stamps and stamps[row] != ours.encode():
                theirs = stamps[row].decode(errors="replace")
                self.refuse(row, f"the vector was made by {short(theirs)}, but this collection's encoder is {ours!r}")

    def _read_attributes(self, headers: dict[int, bytes]) -> None:
        rows = [row for row in headers if row not in self.refused]
        frame, bad = self.frames.decode_json([headers[row] for row in rows])
        for place, why in bad.items():
            self.refuse(rows[place], f"header {ATTRIBUTES_HEADER} cannot be read: {why}")
        rows = [row for place, row in enumerate(rows) if place not in bad]
        columns = self.frames.to_lists(frame)
        if "id" in columns:
            self._check_ids(columns.pop("id"), rows)
        for row, given in zip(rows, columns.pop("vector", ()), strict=False):
            if given is not None:
                self.refuse(row, f"header {ATTRIBUTES_HEADER} has a vector: the vector is the value")
        self._add_columns(columns, rows)

    def _add_vectors(self, matrix: npt.NDArray[np.float32], rows: list[int], *, raw: bool) -> None:
        for place, why in vector_faults(matrix, self.spec.metric, raw=raw, largest=self.spec.largest).items():
            self.refuse(rows[place], why)
        self.matrices.append(matrix)
        self.matrix_rows += rows

    def _add_columns(self, columns: dict[str, list[Any]], rows: Sequence[int]) -> None:
        for name, values in columns.items():
            if len(rows) == self.count:
                self.columns[name] = values
                continue
            column = self.columns.setdefault(name, [None] * self.count)
            for row, value in zip(rows, values, strict=True):
                column[row] = value

    def _usable(self) -> list[int]:
        return [row for row in range(self.count) if row not in self.refused] if self.refused else [*range(self.count)]

    def _result(self, schema: dict[str, str]) -> Decoded:
        rows = self._usable()
        at = np.array(rows, dtype=np.int64)
        place = np.full(self.count, -1, dtype=np.int64)
        place[at] = np.arange(len(rows))
        vector_rows = place[np.array(self.matrix_rows, dtype=np.int64)]
        vectors = np.zeros((0, self.spec.dim), dtype=np.float32)
        if self.matrices:
            vectors = self.matrices[0] if len(self.matrices) == 1 else np.concatenate(self.matrices)
        if self.refused or len(self.matrices) > 1:
            order = np.argsort(vector_rows, kind="stable")
            order = order[vector_rows[order] >= 0]
            vectors, vector_rows = vectors[order], vector_rows[order]
        columns = self.columns
        if self.refused:
            columns = {name: [column[row] for row in rows] for name, column in columns.items()}
        return Decoded(
            rows=at,
            ids=[self.ids[row] for row in rows],
            deleted=self.deleted[at],
            texts=[self.texts[row] for row in rows],
            vectors=vectors,
            vector_rows=vector_rows,
            # What only refused records had is no column, nor is one of nothing but nulls.
            attributes={name: column for name, column in columns.items() if any(value is not None for value in column)},
            schema=schema,
            refused=[Refusal(row, self.refused[row]) for row in sorted(self.refused)],
        )


def _on_host(matrix: Array) -> npt.NDArray[np.float32]:
    """A NumPy matrix: routing and sending start from host memory, and a device's arrays have `get`."""
    host: npt.NDArray[np.float32] = matrix if isinstance(matrix, np.ndarray) else matrix.get()
    return host
