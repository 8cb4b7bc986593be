"""The columns of rows as named NumPy arrays, for files, and back: ids, versions, attributes."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu.columns import Columns
from headrace.gpu.ids import IdColumn, hash_ids
from headrace.gpu.reading import to_host
from headrace.gpu.versions import Versions

__all__ = ["Arrays", "columns_from", "ids_from", "of_columns", "of_ids", "of_versions", "versions_from"]

Arrays = Mapping[str, npt.NDArray[Any]]
"""What an ``.npz`` holds; none of the arrays needs pickle."""


def of_versions(versions: Versions) -> Arrays:
    return {
        "topic_partitions": versions.topic_partitions,
        "offsets": versions.offsets,
        "timestamps": versions.timestamps,
    }


def versions_from(arrays: Arrays) -> Versions:
    """The reverse of `of_versions`."""
    return Versions(arrays["topic_partitions"], arrays["offsets"], arrays["timestamps"])


def of_ids(column: IdColumn) -> Arrays:
    values = column.to_list()
    if column.kind == "integer":
        return {"ids": np.array(values, dtype=np.int64)}
    return _of_texts("ids", [str(value) for value in values])


def ids_from(arrays: Arrays, kind: str) -> IdColumn:
    """The reverse of `of_ids`: a sealed column of ids of that kind."""
    values = arrays["ids"].tolist() if kind == "integer" else _texts_from("ids", arrays)
    column = IdColumn(kind)
    column.append(values, hash_ids(values, kind))
    return column.take(np.arange(len(values)))


def of_columns(columns: Columns) -> Arrays:
    """Columns by the order of their names; the names and kinds themselves are to be kept beside the arrays."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for number, name in enumerate(sorted(columns.schema)):
        column = columns[name]
        arrays[f"values-{number}"] = to_host(column.values[: len(columns)])
        arrays[f"valid-{number}"] = np.packbits(to_host(column.valid[: len(columns)]))
        if column.vocabulary is not None:
            arrays |= _of_texts(f"texts-{number}", list(column.vocabulary))
    return arrays


def columns_from(arrays: Arrays, schema: Mapping[str, str], rows: int, xp: ModuleType) -> Columns:
    """The reverse of `of_columns`: sealed columns of `rows` rows.

    Parameters
    ----------
    arrays : mapping of str to array
    schema : mapping of str to str
        Kinds by name.
    rows : int
    xp : module
        numpy or cupy.
    """
    attributes: dict[str, list[Any]] = {}
    for number, (name, kind) in enumerate(sorted(schema.items())):
        values: list[Any] = arrays[f"values-{number}"].tolist()
        if kind == "str":
            texts = _texts_from(f"texts-{number}", arrays)
            values = [texts[code] if code >= 0 else None for code in values]
        valid = np.unpackbits(arrays[f"valid-{number}"], count=rows).tolist()
        attributes[name] = [value if there else None for value, there in zip(values, valid, strict=True)]
    columns = Columns(xp)
    columns.append(attributes, rows)
    return columns.take(np.arange(rows))


def _of_texts(name: str, texts: list[str]) -> dict[str, npt.NDArray[Any]]:
    # Not every str is UTF-8: lone surrogates can come in through JSON.
    octets = [text.encode("utf-8", "surrogatepass") for text in texts]
    lengths = np.fromiter(map(len, octets), dtype=np.int64, count=len(octets))
    return {name: np.frombuffer(b"".join(octets), dtype=np.uint8), f"{name}-lengths": lengths}


def _texts_from(name: str, arrays: Arrays) -> list[str]:
    octets = arrays[name].tobytes()
    ends = np.cumsum(arrays[f"{name}-lengths"]).tolist()
    return [octets[start:end].decode("utf-8", "surrogatepass") for start, end in zip([0, *ends], ends, strict=False)]
